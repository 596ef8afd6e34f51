"""Weights of few bits as kernels on a CPU read them: what `pack-weights` makes of the constants that they are computed from.

    q = constant : u8[n, k / 2]                             p = constant : u8[n / 48, k / 8, 48, 4]
    s = constant : f32[n, g]                                t = constant : f32[n / 48, g, 48]
    w = dequantize(unpack(q, bits=4), s)      -->           w = dequantize(unpack(view of p, bits=4), view of t)

Four bytes of a row are a word: eight terms of 4 bits, four of 8. The words of the 48 columns that one register block reads stand together,
and so do their scales and zeros. The numbers stay as they are, and so do their bytes but for the padding of the last panel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..ir.dims import hint
from ..ir.graph import Graph, Node, is_scalar
from ..ir.op import Category
from ..ir.ops import OPS
from .base import Reason, describe
from .contractions import PRODUCTS, panel_of
from .weights import GENERATED, ConstantMaker, constant_under, is_constant

WORD_BYTES, WORD_BITS = 4, 32
Form = Callable[[Node, ConstantMaker], Node]
Parts = Mapping[Node, Form]
"""Constants of a weight -> what is laid out in their place: a view of equal value."""

HALVES = frozenset({torch.bfloat16, torch.float16})

PICK = 8
"""To pick an element out of words takes so many times longer than to make a number of one where they are not laid out, which every call of
the contraction then does with all of them."""


def parts_of(node: Node) -> Parts | None:
    """The parts of the weight of a contraction, where it is of few bits and constant."""
    weight = node.inputs[1]
    if node.op.name == "int_linear":
        return {weight: words} if is_constant(weight) else None
    while weight.op.name in ("slice", "permute"):
        weight = weight.inputs[0]
    if weight.tensor.rank != 2 or node.dtype != torch.float32:
        return None
    if weight.op.name == "cast" and weight.inputs[0].dtype in HALVES:
        return {weight.inputs[0]: panels} if is_constant(weight.inputs[0]) else None
    return _of_levels(weight) if _is_computed(weight) and weight.dtype == torch.float32 else None


def _is_computed(node: Node) -> bool:
    return node.op.category in (Category.POINTWISE, Category.VIEW) or node.op.name in ("unpack", "dequantize")


def _of_levels(weight: Node) -> Parts | None:
    """Bytes of which each holds terms become words, other constants with several numbers for a column panels."""
    parts: dict[Node, Form] = {}
    stack, seen = [weight], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or is_scalar(node):
            continue
        seen.add(node)
        form = _form(node, weight) if is_constant(node) else None
        if form is not None:
            parts[node] = form
        elif _is_computed(node):
            stack.extend(node.inputs)
        elif node.op.name not in GENERATED and not is_constant(node):
            return None
    return parts if words in parts.values() and _groups_are_words(weight) else None


def _form(part: Node, weight: Node) -> Form | None:
    if part.tensor.rank != 2 or part.shape[0] != weight.shape[0] or part.shape[1] == 1:
        return None
    held = {weight.shape[1] // terms for terms in (1, 2, 4, 8)} if isinstance(weight.shape[1], int) else set[int]()
    return words if part.dtype in (torch.int8, torch.uint8) and part.shape[1] in held else panels


def _groups_are_words(weight: Node) -> bool:
    """Whether scales change between words only, where there is nothing else but levels."""
    if weight.op.name != "dequantize":
        return True
    levels, scale = weight.inputs[:2]
    bits = levels.attrs["bits"] if levels.op.name == "unpack" else 8
    depth, groups = weight.shape[1], scale.shape[1]
    if not isinstance(depth, int) or not isinstance(groups, int):
        return False
    return groups == 1 or depth // groups % (WORD_BITS // bits) == 0


def words(levels: Node, maker: ConstantMaker) -> Node:
    """Bytes [n, b] as words of panels, [n / 48, b / 4, 48, 4], and a view of them."""
    count, size = map(int, levels.shape)  # type: ignore[arg-type]
    width, rows = panel_of(count), -(-size // WORD_BYTES)
    shape = (-(-count // width), rows, width, WORD_BYTES)
    packed = maker.later([levels], "words", _fill_words, shape, levels.prov)
    turned = OPS["permute"](packed, dims=(0, 2, 1, 3), prov=levels.prov)
    flat = OPS["reshape"](turned, shape=(shape[0] * width, rows * WORD_BYTES), prov=levels.prov)
    return _first(_first(flat, 0, count), 1, size)


def _fill_words(out: torch.Tensor, levels: torch.Tensor) -> None:
    count, rows, width, _ = out.shape
    whole = torch.nn.functional.pad(levels, (0, rows * WORD_BYTES - levels.shape[1], 0, count * width - levels.shape[0]))
    out.copy_(whole.view(count, width, rows, WORD_BYTES).transpose(1, 2))


def panels(values: Node, maker: ConstantMaker) -> Node:
    """A number for each column and term, or group of terms, as [n / 48, g, 48], and a view of it."""
    count, size = map(int, values.shape)  # type: ignore[arg-type]
    width = panel_of(count)
    packed = maker.later([values], "panels", _fill_panels, (-(-count // width), size, width), values.prov)
    turned = OPS["permute"](packed, dims=(0, 2, 1), prov=values.prov)
    return _first(OPS["reshape"](turned, shape=(-(-count // width) * width, size), prov=values.prov), 0, count)


def _fill_panels(out: torch.Tensor, values: torch.Tensor) -> None:
    count, size, width = out.shape
    whole = torch.nn.functional.pad(values, (0, 0, 0, count * width - values.shape[0]))
    out.copy_(whole.view(count, width, size).transpose(1, 2))


def _first(values: Node, dim: int, count: int) -> Node:
    if values.shape[dim] == count:
        return values
    return OPS["slice"](values, dim=dim, start=0, stop=count, step=1, prov=values.prov)


def refusal(node: Node, parts: Parts, readers: Mapping[Node, Sequence[Node]], graph: Graph) -> tuple[Reason, str] | None:
    """Why the parts stay as they are, though they could be laid out."""
    for part in parts:
        other = _other_reader(part, readers, graph)
        if other:
            return Reason.SHARED, other
    picked = sum(hint(r.tensor.numel, graph.symbols) for part in parts for r in readers[part] if r.op.name == "embedding")
    if picked * PICK > hint(node.inputs[1].tensor.numel, graph.symbols):
        return Reason.NO_GAIN, "picking rows out of panels takes longer"
    return None


def _other_reader(part: Node, readers: Mapping[Node, Sequence[Node]], graph: Graph) -> str:
    """Who reads the constant and is neither a contraction with it in its weight nor an embedding by it, in words."""
    stack = [constant_under(part)]
    while stack:
        value = stack.pop()
        if value in graph.roots:
            return "the result"
        for reader in readers[value]:
            if _is_computed(reader):
                stack.append(reader)
            elif not _reads_it(reader, value, part):
                return describe(reader)
    return ""


def _reads_it(reader: Node, value: Node, part: Node) -> bool:
    """Whether the reader takes the value as its weight, or the part as its table, and as nothing else."""
    if reader.op.name == "embedding":
        return value is part
    return reader.op.name in PRODUCTS and value not in (reader.inputs[0], *reader.inputs[2:])
