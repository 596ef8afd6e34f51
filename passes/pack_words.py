"""Weights of few bits as kernels on a CPU read them: what `pack-weights` makes of their constants.

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
from ..ir.graph import Graph, Node
from ..ir.op import Category
from ..ir.ops import OPS
from .base import Reason, describe
from .contractions import PRODUCTS, panel_of
from .weights import ConstantMaker, constant_under, is_constant

WORD_BYTES, WORD_BITS = 4, 32
Form = Callable[[Node, ConstantMaker], Node]
Parts = Mapping[Node, Form]
"""Constants of a weight -> what is laid out in their place: a view of equal value."""

BETWEEN = frozenset({"unpack", "dequantize", "cast"})
"""Ops between the constants of a weight and its contraction, beside views."""

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
    if weight.op.name == "cast":
        (stored,) = weight.inputs
        return {stored: panels} if is_constant(stored) and stored.dtype in (torch.bfloat16, torch.float16) else None
    return _of_levels(weight) if weight.op.name == "dequantize" and weight.dtype == torch.float32 else None


def _of_levels(weight: Node) -> Parts | None:
    levels, *affine = weight.inputs
    bits = levels.attrs["bits"] if levels.op.name == "unpack" else 8
    levels = levels.inputs[0] if levels.op.name == "unpack" else levels
    depth, groups = weight.shape[1], affine[0].shape[1]
    if (
        levels.dtype not in (torch.int8, torch.uint8)
        or not is_constant(levels)
        or not isinstance(depth, int)
        or not isinstance(groups, int)
    ):
        return None
    if groups > 1 and depth // groups % (WORD_BITS // bits):
        return None
    return {levels: words} | {a: panels for a in affine if groups > 1 and is_constant(a)}


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
            if reader.op.category is Category.VIEW or reader.op.name in BETWEEN:
                stack.append(reader)
            elif not _reads_it(reader, value, part):
                return describe(reader)
    return ""


def _reads_it(reader: Node, value: Node, part: Node) -> bool:
    """Whether the reader takes the value as its weight, or the part as its table, and as nothing else."""
    if reader.op.name == "embedding":
        return value is part
    return reader.op.name in PRODUCTS and value not in (reader.inputs[0], *reader.inputs[2:])
