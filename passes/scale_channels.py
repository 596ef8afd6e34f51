"""`scale-channels`: channels of what linears read get smaller, and the weights that meet them larger, so that both round better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..ir.graph import Graph, Node, users
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.patterns import Refusal
from ..ir.reasons import Reason
from ..ir.rewrite import rewrite
from .base import Notes, Pass, describe
from .layers import Layer, layers
from .weights import ConstantMaker, is_constant

_WIDE = (torch.float32, torch.float64)
_NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True, eq=False)
class Shared:
    """x: a value [..., k] that nothing but linears read. layers: their weights, which x alone meets."""

    x: Node
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.layers[0].name


@dataclass(frozen=True)
class ScaleChannels(Pass):
    """What computes x divides its channels, and the weights that meet them are multiplied: the same function in real arithmetic.

        n = layer_norm(x, g, h)                n = layer_norm(x, g / s, h / s)
        q = linear(n, wq)               -->    q = linear(n, wq * s)
        k = linear(n, wk)                      k = linear(n, wk * s)

    A linear in front divides the rows of its weight and bias; a pointwise operation is followed by a product, in the same kernel. Refused:
    values that something else reads, weights that meet another value too, 16-bit values, what would take a kernel of its own, and channels
    without a scale.

    scales: name of the first weight that x meets -> s [k]. After "AWQ: Activation-aware Weight Quantization" (Lin et al., 2023) and
    "SmoothQuant" (Xiao et al., 2022).
    """

    scales: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    name: ClassVar[str] = "scale-channels"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        found = shared(graph, lambda x, refusal: notes.decline(self.name, describe(x), refusal.reason, x, str(refusal.value or "")))
        for one in (one for one in found if one.name not in self.scales):
            notes.decline(self.name, describe(one.x), Reason.NO_GAIN, one.x, "its channels are alike")
        chosen = [(one, self.scales[one.name]) for one in found if one.name in self.scales and notes.may(self.name, one.x)]
        for one, _ in chosen:
            notes.apply(self.name, f"{describe(one.x)} into {len(one.layers)} weight(s)", one.x)
        return rewrite(graph, _Scaling(graph, chosen).node) if chosen else graph


def shared(graph: Graph, declined: Callable[[Node, Refusal], object] = lambda x, refusal: None) -> list[Shared]:
    """Every value whose channels may be scaled, in the order of the graph. declined: called with those that linears read but may not."""
    readers = users(graph)
    by_reader = {reader: layer for layer in layers(graph) for reader in layer.readers if reader.op.name == "linear"}
    found: list[Shared] = []
    for x in dict.fromkeys(reader.inputs[0] for reader in by_reader):
        refusal = _read_elsewhere(x, readers[x], by_reader, graph)
        refusal = _undividable(x, readers) if refusal is None else refusal
        if refusal is None:
            found.append(Shared(x, tuple(dict.fromkeys(by_reader[r] for r in readers[x]))))
        else:
            declined(x, refusal)
    return found


def _read_elsewhere(x: Node, readers: Sequence[Node], by_reader: Mapping[Node, Layer], graph: Graph) -> Refusal | None:
    """Why not everything that reads x takes the scale."""
    if x in graph.roots:
        return Refusal(Reason.SHARED, "an output")
    for reader in readers:
        layer = by_reader.get(reader)
        if layer is None or x in reader.inputs[1:]:
            return Refusal(Reason.SHARED, describe(reader))
        if any(other.inputs[0] is not x for other in layer.readers):
            return Refusal(Reason.SHARED, layer.name)
        if layer.weight.dtype not in _WIDE:
            return Refusal(Reason.ROUNDING, str(layer.weight.dtype).removeprefix("torch."))
    return None


def _undividable(x: Node, readers: Mapping[Node, list[Node]]) -> Refusal | None:
    """Why what computes x cannot divide it."""
    if x.dtype not in _WIDE:
        return Refusal(Reason.ROUNDING, str(x.dtype).removeprefix("torch."))
    if x.op.category is Category.POINTWISE:
        return None
    if x.op.name not in (*_NORMS, "linear"):
        return Refusal(Reason.NO_GAIN, x.op.name)
    parameters = x.inputs[1:]
    if not all(map(is_constant, parameters)):
        return Refusal(Reason.NOT_CONSTANT, describe(x))
    if x.op.name == "linear":
        other = next((p for p in parameters if len(readers[p]) > 1), None)
        return None if other is None else Refusal(Reason.SHARED, describe(other))
    return None if x.attrs["axes"] == 1 else Refusal(Reason.SHAPE_MISMATCH, f"{x.attrs['axes']} normalized dimensions")


class _Scaling:
    """divided: value -> what its channels are multiplied by; columns: weight -> what its inputs are; in float64, on the CPU."""

    def __init__(self, graph: Graph, chosen: Sequence[tuple[Shared, torch.Tensor]]) -> None:
        self.maker = ConstantMaker(graph)
        self.divided = {one.x: 1 / s.double().cpu() for one, s in chosen}
        self.columns = {layer.weight: s.double().cpu() for one, s in chosen for layer in one.layers}
        self.weights: dict[Node, Node] = {}

    def node(self, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        scale = self.divided.get(node)
        if node.op.name == "linear" and (scale is not None or node.inputs[1] in self.columns):
            made = (inputs[0], self._weight(node, scale), *(self._times(b, scale, node) for b in inputs[2:]))
        elif scale is None:
            return None
        elif node.op.name in _NORMS:
            made = (inputs[0], *([self._times(p, scale, node) for p in inputs[1:]] or [self._gain(node, scale)]))
        else:
            plain = node.op(*inputs, hint=node.hint, prov=node.prov, **node.attrs)
            return OPS["mul"](plain, self._gain(node, scale), prov=node.prov.with_rule(ScaleChannels.name))
        return node.op(*made, hint=node.hint, prov=node.prov.with_rule(ScaleChannels.name), **node.attrs)

    def _weight(self, node: Node, rows: torch.Tensor | None) -> Node:
        """Once for all linears that it is the weight of."""
        weight = node.inputs[1]
        if weight not in self.weights:
            columns = self.columns.get(weight)

            def fill(out: torch.Tensor, value: torch.Tensor) -> None:
                wide = value.double() if columns is None else value.double() * columns.to(value.device)
                out.copy_(wide if rows is None else wide * rows[:, None].to(value.device))

            self.weights[weight] = self.maker.later([weight], "scaled", fill, weight.shape, node.prov)
        return self.weights[weight]

    def _times(self, vector: Node, scale: torch.Tensor | None, node: Node) -> Node:
        if scale is None:
            return vector
        return self.maker.derived([vector], "scaled", lambda v: (v.double() * scale.to(v.device)).to(v.dtype), node.prov)

    def _gain(self, node: Node, scale: torch.Tensor) -> Node:
        return self.maker.make(f"{node.hint or node.op.name}.channels", scale.to(node.tensor.device, node.dtype), node.prov)
