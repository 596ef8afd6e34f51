"""`choose-layouts`: convolutions read and write memory in the order the library computes in, channels last."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

from ..ir import ops
from ..ir.analysis.primitives import expanded
from ..ir.dims import Dim, SymbolRange, contiguous_strides, hint, product, same_shape
from ..ir.graph import Graph, Node, order, users
from ..ir.rewrite import cleaned, remap
from ..ir.types import TensorType
from .base import Notes, Pass, Reason, describe
from .layout_rules import CONV_DTYPES, Layouts, first_dims, last_dims, read_last, reads_either, turn_rule, turned_operands
from .weights import is_constant
from .windows import may_be_native

CONVERSION = 3
"""A permute in memory takes as long as so many of the reorders that the library makes around a convolution, byte by byte."""

CALL_BYTES = 32 * 1024
"""Memory traffic that takes as long as the two views that a call with channels last needs."""


EPILOGUE = 3
"""The result of a window that the library computes is reordered, written and read again by what follows."""


@dataclass(frozen=True)
class ChooseLayouts(Pass):
    """Keeps images between convolutions with their channels last, as the library wants them.

        c = conv(x, w, ...)               p = permute(x, [0, 2, 3, 1])
        r = relu(c)                       c = conv(p, w, ..., channels_last=true)
        y = conv(r, v, ...)       -->     r = relu(c)
                                          q = conv(r, v, ..., channels_last=true)
                                          y = permute(q, [0, 3, 1, 2])

    With channels first the library reorders what each convolution reads and writes. Which values are turned is a minimum cut: each
    convolution left as it is costs these reorders, each value needed in both orders costs a permute. Pooling and depthwise
    convolutions become kernels of ours where their channels lie last. Batch norms become primitives on the way, group norms primitives
    that keep channels last. Refused: other devices, convolutions in one and three dimensions, which gain nothing, dtypes that the
    library does not convolve, and whatever does not pay. After the layout propagation of Liu et al., "Optimizing CNN Model Inference
    on CPUs" (2019).
    """

    name: ClassVar[str] = "choose-layouts"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        convs = _convs(graph)
        if not any(_refusal(n) is None for n in convs):
            _note(convs, set(), notes, graph.symbols)
            return graph
        flat = expanded(graph, keep=ops.OPS.keys() - {"batch_norm"})
        convs = _convs(flat)
        chosen = _Choice(flat).chosen()
        chosen = {n for n in order(flat) if n in chosen and notes.may(self.name, n)}  # any part of them computes the same
        _note(convs, chosen, notes, flat.symbols)
        return with_channels_last(flat, chosen) if any(n in chosen for n in convs) else graph


def _convs(graph: Graph) -> list[Node]:
    return [n for n in order(graph) if n.op.name == "conv" and not n.attrs["channels_last"]]


def _refusal(conv: Node) -> tuple[Reason, str] | None:
    """Why a convolution cannot have its channels last at all."""
    if conv.tensor.device != "cpu":
        return Reason.LIBRARY_CALL, conv.tensor.device
    if conv.dtype not in CONV_DTYPES:
        return Reason.NO_GAIN, str(conv.dtype).removeprefix("torch.")
    return None if turn_rule(conv) else (Reason.NO_GAIN, f"{conv.tensor.rank - 2}d")


def _note(convs: list[Node], chosen: set[Node], notes: Notes, symbols: Mapping[str, SymbolRange]) -> None:
    for conv in convs:
        if conv in chosen:
            notes.apply(ChooseLayouts.name, describe(conv), conv, _reorders(conv, symbols))
            continue
        refusal = _refusal(conv) or (Reason.NO_GAIN, "permutes around it would move more bytes than they save")
        notes.decline(ChooseLayouts.name, describe(conv), refusal[0], conv, refusal[1])


def _reorders(conv: Node, symbols: Mapping[str, SymbolRange]) -> int:
    """Bytes that the library reorders around a convolution with channels first, less what it reorders of weights with channels last.

    A window of ours has neither, and takes the operation behind it along.
    """
    x, w, *_ = conv.inputs
    if may_be_native(conv):
        return hint(x.tensor.nbytes, symbols) + EPILOGUE * hint(conv.tensor.nbytes, symbols)
    weights = 0 if is_constant(w) else hint(w.tensor.nbytes, symbols)
    return hint(x.tensor.nbytes, symbols) + hint(conv.tensor.nbytes, symbols) - weights - CALL_BYTES


_LAST, _FIRST = "channels last", "channels first"

_FASTER_LAST = ("max_pool", "avg_pool")
"""Pooling is not vectorised where channels come first, which takes longer by a permute and more."""


class _Choice:
    """The minimum cut between the values with channels last and those with channels first.

    A value that is needed in both orders is turned once, whoever reads it: so each value has two gates, through which its readers
    reach it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.net = nx.DiGraph()
        self.net.add_nodes_from((_LAST, _FIRST))
        self.free: set[Node] = set()
        for node in order(graph):
            if turn_rule(node) and node.tensor.device == "cpu":
                self.free.add(node)
            else:
                self.net.add_edge(node, _FIRST)
        for node, readers in users(graph).items():
            self._price(node, readers)

    def _price(self, node: Node, readers: list[Node]) -> None:
        if not isinstance(node.type, TensorType) or node.type.rank < 3:
            return
        cost = CONVERSION * hint(node.type.nbytes, self.graph.symbols)
        if node.op.name == "conv" and node in self.free:
            gain = _reorders(node, self.graph.symbols)
            self._rather_last(node, max(0, gain))
            self._rather_first(node, max(0, -gain))
        if node in self.free and node.op.name in _FASTER_LAST:
            self._rather_last(node, cost)
        turning = [r for r in readers if r in self.free and node in turned_operands(r)]
        wanting_first = [r if r in turning else _FIRST for r in readers if r in turning or not reads_either(r)]
        wanting_first += [_FIRST] * (node in self.graph.roots)
        if any(r.op.name in ("permute", "layout") and _to_last(r) for r in readers):
            self._rather_last(node, cost)
        for reader in wanting_first:
            self.net.add_edge((node, "first"), reader)
        self._add(_LAST if _lies_last(node) else node, (node, "first"), cost)
        if _lies_last(node) or _per_channel(node):
            return
        for reader in turning:
            self.net.add_edge(reader, (node, "last"))
        self._add((node, "last"), node, cost)

    def _rather_last(self, node: Node, cost: int) -> None:
        self._add(_LAST, node, cost)

    def _rather_first(self, node: Node, cost: int) -> None:
        self._add(node, _FIRST, cost)

    def _add(self, a: object, b: object, cost: int) -> None:
        known = self.net.get_edge_data(a, b, {"capacity": 0}).get("capacity")
        if known is not None:  # else the edge cannot be cut at all
            self.net.add_edge(a, b, capacity=known + cost)

    def chosen(self) -> set[Node]:
        """The values that are to have their channels last."""
        _, (last, _) = nx.minimum_cut(self.net, _LAST, _FIRST, flow_func=boykov_kolmogorov)
        return self.free & last


def _to_last(reader: Node) -> bool:
    """Whether the reader asks for channels last, as a permute or in memory."""
    rank = reader.tensor.rank
    if reader.op.name == "permute":
        return reader.attrs["dims"] == last_dims(rank)
    return same_shape(reader.attrs["strides"], _last_strides(reader.tensor))


def _lies_last(node: Node) -> bool:
    """A value that has its channels last in memory, whatever is chosen."""
    if node.op.name == "permute":
        return node.attrs["dims"] == first_dims(node.tensor.rank)
    strides = node.attrs.get("strides") if node.op.name == "input" else None
    return strides is not None and same_shape(strides, _last_strides(node.tensor))


def _last_strides(kind: TensorType) -> tuple[Dim, ...]:
    strides = contiguous_strides(tuple(kind.shape[d] for d in last_dims(kind.rank)))
    return tuple(strides[d] for d in first_dims(kind.rank))


def _per_channel(node: Node) -> bool:
    """One number per channel: a reshape away from either order."""
    return node.tensor.rank > 1 and product(node.shape) == node.shape[1]


def with_channels_last(graph: Graph, chosen: Container[Node]) -> Graph:
    """The graph with the `chosen` values, each with a turn rule, kept with their channels last; any choice computes the same."""
    layouts = Layouts()
    for node in order(graph):
        rule = turn_rule(node) if node in chosen else None
        if rule is not None:
            layouts.last[node] = rule(node, layouts)
        elif reads_either(node) and node.inputs[0] in chosen:
            layouts.first[node] = read_last(node, layouts)
        else:
            inputs = tuple(layouts.channels_first(i) for i in node.inputs)
            layouts.first[node] = node if inputs == node.inputs else node.with_inputs(inputs)
    new = {root: layouts.channels_first(root) for root in graph.roots}
    for node in graph.outputs:
        if node in chosen:  # a caller sees strides: row-major, as before
            new[node] = ops.op("layout")(new[node], strides=contiguous_strides(node.shape), hint=node.hint, prov=node.prov)
    return cleaned(remap(graph, new))
