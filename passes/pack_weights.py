"""`pack-weights`: constant weights of contractions are laid out in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir.dims import Dim, hint
from ..ir.graph import Graph, Node, order, users
from ..ir.ops import OPS
from ..ir.rewrite import rewrite
from .base import Notes, Pass, Reason, describe
from .contractions import PANELS, PRODUCTS, WINDOW_PANELS, has_few_rows, panel_of
from .pack_words import Form, parts_of
from .pack_words import refusal as parts_refusal
from .weights import ConstantMaker, constant_under, is_constant, stray_reader
from .windows import is_native_window

MIN_COLUMNS = 8
"""Fewer columns than this leave most of a register empty."""

MIN_CHANNELS, MANY_COLUMNS = 8, 32
"""A window of fewer channels takes as long to find as to multiply, unless it is multiplied by so many columns."""


PICK = 1 << 13
"""To pick an element out of panels costs as much more than out of a row as panels save of so many multiplications. Measured with tables
that no cache holds: 8 ns, and 5% of a product."""


@dataclass(frozen=True)
class PackWeights(Pass):
    """A constant weight becomes panels, and a view of them; the contraction is then a kernel of ours.

        w = constant  [n, k]               p = constant  [n / 48, k, 48]
        y = linear(x, w)         -->       w = slice(reshape(permute(p)), 0, n)
                                           y = linear(x, w)

    The rows of a register block read stand together for each k: a kernel reads memory in order, once per block of rows. Panels are
    padded with zeros to a whole number of 48 (32, 16; of convolutions 64) columns, whichever wastes least. An embedding by the same table
    picks its rows out of the panels. Refused: weights that are no constants or that something else reads too (both layouts would be
    kept), other dtypes than float32, other devices than the CPU, transposed and grouped convolutions (but depthwise ones, whose weights
    become [*window, 1, n]), channels first, sizes that fill no register, and tables of which more is picked than multiplying gains.

    Weights of few bits, which are computed from constants, have those laid out: see `pack_words.py`.

    vendor: names of weights that stay with the vendor's library.
    """

    vendor: tuple[str, ...] = ()

    name: ClassVar[str] = "pack-weights"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        readers, maker = users(graph), ConstantMaker(graph)
        packed: dict[Node, Node] = {}
        laid: dict[Node, Form] = {}
        chosen: set[Node] = set()
        for node in order(graph):
            if node.op.name not in PRODUCTS:
                continue
            weight, refusal = node.inputs[1], self._refusal(node, readers, graph)
            if refusal is not None:
                reason, value = refusal
                notes.decline(self.name, describe(node), reason, node, value)
                continue
            if not notes.may(self.name, node):
                continue
            chosen.add(node)
            parts = parts_of(node)
            laid |= parts or {}
            if parts is None and weight not in packed:
                packed[weight] = _FORMS[node.op.name](weight, maker, node)

        def pack(node: Node, inputs: tuple[Node, ...]) -> Node | None:
            if node in laid:
                return laid[node](node, maker)
            prov = node.prov.with_rule(self.name)
            if node.op.name == "embedding" and node.inputs[0] in packed:
                return node.op(packed[node.inputs[0]], inputs[1], hint=node.hint, prov=prov)
            if node not in chosen:
                return None
            notes.apply(self.name, describe(node), node)
            weight = packed.get(node.inputs[1], inputs[1])
            return node.op(inputs[0], weight, *inputs[2:], hint=node.hint, prov=prov, **node.attrs)

        return rewrite(graph, pack)

    def _refusal(self, node: Node, readers: Mapping[Node, list[Node]], graph: Graph) -> tuple[Reason, str] | None:
        """Why the library keeps the contraction."""
        weight = node.inputs[1]
        if node.tensor.device != "cpu":
            return Reason.OTHER_DEVICE, node.tensor.device
        parts = parts_of(node)
        if parts is not None:
            return parts_refusal(node, parts, readers, graph) or _product_refusal(node)
        if node.dtype != torch.float32:
            return Reason.UNSUPPORTED_DTYPE, str(node.type)
        if not is_constant(weight):
            return Reason.NOT_CONSTANT, weight.hint
        if constant_under(weight).attrs["data"].name in self.vendor:
            return Reason.LIBRARY_CALL, "faster by measurement"
        if has_few_rows(node):
            return Reason.NO_GAIN, "few rows read the weight as it is"
        other = stray_reader(weight, readers, graph.roots, lambda reader, value: _reads_panels(reader, weight, value))
        if other:
            return Reason.SHARED, other
        if _picks_too_many(weight, readers[weight], graph):
            return Reason.NO_GAIN, "picking rows out of panels takes longer"
        return _conv_refusal(node) if node.op.name == "conv" else _product_refusal(node)


def _reads_panels(reader: Node, weight: Node, value: Node) -> bool:
    """Whether the reader of the value reads it as the weight, and nothing else of it."""
    if reader.op.name == "embedding":
        return reader.inputs[0] is weight
    return reader.op.name in PRODUCTS and reader.inputs[1] is weight and value not in (reader.inputs[0], *reader.inputs[2:])


def _picks_too_many(weight: Node, readers: Sequence[Node], graph: Graph) -> bool:
    """Whether embeddings by the weight lose more by panels than products with it gain."""

    def count(value: Dim) -> int:
        return hint(value, graph.symbols)

    picked = sum(count(r.tensor.numel) for r in readers if r.op.name == "embedding")
    if not picked:
        return False
    return picked * PICK > sum(count(r.inputs[0].tensor.numel) * count(r.shape[-1]) for r in readers if r.op.name in PRODUCTS)


def _product_refusal(node: Node) -> tuple[Reason, str] | None:
    weight = node.inputs[1]
    columns = weight.shape[-1 if node.op.name == "matmul" else 0]
    if weight.tensor.rank not in _RANKS[node.op.name] or node.inputs[0].tensor.rank < 2:
        return Reason.SHAPE_MISMATCH, str(weight.type)
    if not isinstance(columns, int) or columns < MIN_COLUMNS or weight.tensor.numel == 0:
        return Reason.NO_GAIN, str(weight.type)
    return None


_RANKS = {"linear": (2,), "int_linear": (2,), "matmul": (2, 3)}  # of weights; with three, the first counts matrices, as of experts


def _conv_refusal(node: Node) -> tuple[Reason, str] | None:
    a, weight = node.attrs, node.inputs[1]
    if is_native_window(node):
        return None
    if a["transposed"] or a["groups"] != 1:
        return Reason.SHAPE_MISMATCH, "transposed" if a["transposed"] else f"{a['groups']} groups"
    if not a["channels_last"]:
        return Reason.LAYOUT, "channels first"
    out, channels = weight.shape[:2]
    if not isinstance(out, int) or not isinstance(channels, int) or out < (MIN_COLUMNS if channels >= MIN_CHANNELS else MANY_COLUMNS):
        return Reason.NO_GAIN, str(weight.type)
    return None


def panels_shape(shape: Sequence[int], times: Mapping[int, float] = PANELS) -> tuple[int, ...]:
    """Of [n, ...] as panels."""
    width = panel_of(shape[0], times)
    return (-(-shape[0] // width), *shape[1:], width)


def fill_panels(out: torch.Tensor, weight: torch.Tensor) -> None:
    """[n, ...] copied into [panels, ..., width], element by element: a weight laid out otherwise on the way would take its size again."""
    width = out.shape[-1]
    whole, rest = divmod(weight.shape[0], width)
    out[:whole] = weight[: whole * width].unflatten(0, (whole, width)).movedim(1, -1)
    if rest:
        out[whole, ..., :rest] = weight[whole * width :].movedim(0, -1)
        out[whole, ..., rest:] = 0


def _linear(weight: Node, maker: ConstantMaker, node: Node) -> Node:
    packed = maker.later([weight], "panels", fill_panels, panels_shape(weight.shape), node.prov)
    return _rows(OPS["permute"](packed, dims=(0, 2, 1), prov=node.prov), weight.shape[0], node)


def _matmul(weight: Node, maker: ConstantMaker, node: Node) -> Node:
    if weight.tensor.rank == 3:
        return _stack(weight, maker, node)
    packed = maker.later([weight], "panels", lambda out, w: fill_panels(out, w.t()), panels_shape(weight.shape[::-1]), node.prov)
    rows = _rows(OPS["permute"](packed, dims=(0, 2, 1), prov=node.prov), weight.shape[1], node)
    return OPS["permute"](rows, dims=(1, 0), prov=node.prov)


def _stack(weight: Node, maker: ConstantMaker, node: Node) -> Node:
    """Matrices [e, k, n] as [e, n / 32, k, 32], without padding where that is possible: the columns of all are then one row of panels."""
    count, depth, columns = weight.shape
    whole = {width: time for width, time in PANELS.items() if int(columns) % width == 0} or PANELS
    shape = (count, *panels_shape((columns, depth), whole))

    def fill(out: torch.Tensor, w: torch.Tensor) -> None:
        for part, matrix in zip(out, w):
            fill_panels(part, matrix.t())

    packed = maker.later([weight], "panels", fill, shape, node.prov)
    turned = OPS["permute"](packed, dims=(0, 1, 3, 2), prov=node.prov)
    rows = OPS["reshape"](turned, shape=(count, int(turned.shape[1]) * int(turned.shape[2]), depth), prov=node.prov)
    if rows.shape[1] != columns:
        rows = OPS["slice"](rows, dim=1, start=0, stop=columns, step=1, prov=node.prov)
    return OPS["permute"](rows, dims=(0, 2, 1), prov=node.prov)


def _conv(weight: Node, maker: ConstantMaker, node: Node) -> Node:
    """Channels innermost, as they lie in memory: [n / 48, *window, channels, 48]; of a depthwise convolution [*window, 1, n]."""
    if is_native_window(node):
        shape = (*weight.shape[2:], weight.shape[1], weight.shape[0])
        taps = maker.later([weight], "taps", lambda out, w: out.copy_(w.movedim((0, 1), (-1, -2))), shape, node.prov)
        rank = taps.tensor.rank
        return OPS["permute"](taps, dims=(rank - 1, rank - 2, *range(rank - 2)), prov=node.prov)
    shape = panels_shape((weight.shape[0], *weight.shape[2:], weight.shape[1]), WINDOW_PANELS)
    packed = maker.later([weight], "panels", lambda out, w: fill_panels(out, w.movedim(1, -1)), shape, node.prov)
    rank = packed.tensor.rank
    ordered = OPS["permute"](packed, dims=(0, rank - 1, rank - 2, *range(1, rank - 2)), prov=node.prov)
    return _rows(ordered, weight.shape[0], node)


def _rows(view: Node, count: Any, node: Node) -> Node:
    """[panels, width, ...] as the first `count` rows of [panels * width, ...]."""
    rows = OPS["reshape"](view, shape=(int(view.shape[0]) * int(view.shape[1]), *view.shape[2:]), prov=node.prov)
    return OPS["slice"](rows, dim=0, start=0, stop=count, step=1, prov=node.prov) if rows.shape[0] != count else rows


_FORMS: dict[str, Callable[[Node, ConstantMaker, Node], Node]] = {"linear": _linear, "matmul": _matmul, "conv": _conv}
