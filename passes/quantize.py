"""`quantize`: weights in the formats that a plan says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, constants
from ..ir.ops import OPS
from ..ir.reasons import Reason
from ..ir.rewrite import rewrite
from .base import Exactness, Notes, Pass
from .formats import FORMATS, Encode, Format, Tensors, columns
from .layers import Layer, layers
from .weights import ConstantMaker

NO_WEIGHT = "there is no such weight"


class PlanError(TilewrightError):
    """A plan that cannot be read."""

    template = "plan {text!r}: {reason}"


@dataclass(frozen=True)
class Plan:
    """Which layer is kept in which format: (name of the weight, name of the format), ... A name of "*" is every other layer.

    grams: name of the weight -> x.T @ x of the inputs that it meets, by which rounding keeps the outputs rather than the weights.
    """

    entries: tuple[tuple[str, str], ...] = ()
    grams: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def parse(text: str) -> Plan:
        """Of "encoder.fc1.weight:int8 *:int4-g32", as on the command line. Raises PlanError."""
        entries = []
        for item in text.split():
            name, colon, kind = item.rpartition(":")
            if not colon or kind not in FORMATS:
                reason = f"{item!r} is not name:format, where formats are {', '.join(FORMATS)}"
                raise PlanError(text=text, reason=reason)
            entries.append((name, kind))
        return Plan(tuple(entries))

    def unknown(self, graph: Graph) -> list[str]:
        """The names that none of the graph's weights has."""
        there = {"*", *constants(graph)}
        return [name for name, _ in self.entries if name not in there]

    def with_plain_inputs(self) -> Plan:
        """The same weights, but inputs that products would round to bfloat16 stay as they are: for a row or two that gains nothing."""
        return Plan(tuple((name, FORMATS[kind].plain or kind) for name, kind in self.entries), self.grams)

    def format_of(self, layer: Layer) -> Format | None:
        formats = dict(self.entries)
        name = formats.get(layer.name, formats.get("*"))
        return None if name is None else FORMATS[name]


@dataclass(frozen=True)
class Quantize(Pass):
    """A weight becomes parts, and the ops that make it of them.

        w = constant "fc.weight" : f32[n, k]       q = constant "fc.weight.int8"       : i8[n, k]
        y = linear(x, w)                    -->    s = constant "fc.weight.int8.scale" : f32[n, 1]
                                                   y = linear(x, dequantize(q, s))

    All readers of a weight get it in the new form: embeddings pick rows of the parts. `formats.py` lists the formats, `rounding.py` says
    how weights are rounded. Refused: weights that something else reads too, that are not finite, and formats that do not serve a reader or
    would take no less memory.

    plan: e.g. "encoder.fc1.weight:int8 *:int4-g32".
    """

    plan: Plan = Plan()

    name: ClassVar[str] = "quantize"
    exactness: ClassVar[Exactness] = Exactness.BOUNDED

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        chosen: list[Encoded] = []
        found = layers(graph, lambda node, reason, value: notes.decline(self.name, f"{node.op.name} {node.hint}", reason, node, value))
        for name in self.plan.unknown(graph):
            notes.decline(self.name, name, Reason.SHAPE_MISMATCH, value=NO_WEIGHT)
        for layer in found:
            kind = self.plan.format_of(layer)
            if kind is None:
                continue
            made = encoded(layer, kind, self.plan.grams.get(layer.name))
            what = f"{layer.name} {_short(layer.weight.dtype)} -> {kind.name}"
            if isinstance(made, Encoded):
                if not notes.may(self.name, layer.readers[0], what):
                    continue
                notes.apply(self.name, what, layer.readers[0], layer.nbytes - made.nbytes)
                chosen.append(made)
            else:
                notes.decline(self.name, what, made[0], layer.readers[0], made[1])
        return requantized(graph, chosen)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A layer in a format: its parts."""

    layer: Layer
    format: Format
    parts: Tensors

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(p.nbytes for p in self.parts.values())


Known = dict[Encode, Tensors]
"""What ways to encode have made of one layer."""


def encoded(layer: Layer, kind: Format, gram: torch.Tensor | None = None, known: Known | None = None) -> Encoded | tuple[Reason, str]:
    """The parts of a layer's weight in a format, or why it is kept as it is. known: of this layer, for formats with the same parts."""
    known = {} if known is None else known
    unserved = sorted(layer.kinds - kind.readers)
    if unserved:
        return Reason.NOT_EXPRESSIBLE, f"{kind.name} for {unserved[0]}"
    if kind.encode not in known:
        matrix = layer.matrix()
        if not bool(matrix.isfinite().all()):
            return Reason.NOT_FINITE, layer.name
        with torch.no_grad():
            known[kind.encode] = kind.encode(matrix, gram)
    made = Encoded(layer, kind, known[kind.encode])
    return made if made.nbytes < layer.nbytes else (Reason.NO_GAIN, f"{made.nbytes} bytes instead of {layer.nbytes}")


def requantized(graph: Graph, chosen: Sequence[Encoded]) -> Graph:
    """The graph with layers of it as they are encoded."""
    maker = ConstantMaker(graph)
    replaced: dict[Node, _Replaced] = {}
    for made in chosen:
        parts = {part: _constant(maker, made, part, value) for part, value in made.parts.items()}
        replaced |= dict.fromkeys(made.layer.readers, _Replaced(made.layer, made.format, parts))

    def requantize(node: Node, inputs: tuple[Node, ...]) -> Node | None:
        found = replaced.get(node)
        return None if found is None else found.reader(node, inputs)

    return rewrite(graph, requantize) if replaced else graph


def _constant(maker: ConstantMaker, made: Encoded, part: str, value: torch.Tensor) -> Node:
    layer, name = made.layer, made.format.name
    suffix = name if part == "weight" else f"{name}.{part}"
    value = value.to(layer.weight.tensor.device)
    return maker.make(f"{layer.name}.{suffix}", value, layer.weight.prov.with_rule(Quantize.name), layer.weight.hint)


def _short(dtype: torch.dtype) -> str:
    return re.sub("float", "f", str(dtype).removeprefix("torch."))


def along_outputs(values: Node, node: Node) -> Node:
    """Numbers for each output of a product or convolution, as they stand in its result."""
    behind = node.tensor.rank - 2 if node.op.name == "conv" and not node.attrs["channels_last"] else 0
    return OPS["reshape"](values, shape=(values.shape[0], *(1,) * behind)) if behind else values


@dataclass(frozen=True)
class _Replaced:
    """A layer in its new form."""

    layer: Layer
    format: Format
    parts: Mapping[str, Node]

    def reader(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        """What was `node`, on the new operands."""
        prov = node.prov.with_rule(Quantize.name)
        if node.op.name == "embedding":
            picked = {name: OPS["embedding"](part, inputs[1], prov=prov) for name, part in self.parts.items()}
            return self._matrix(picked, node.shape[-1], node.dtype)
        if self.format.linear is None and self.format.inputs is None:
            weight = self.layer.from_matrix(self._matrix(self.parts, self._columns, node.dtype))
            return node.op(inputs[0], weight, *inputs[2:], hint=node.hint, prov=prov, **node.attrs)
        product = self.format.linear(inputs[0], self.parts) if self.format.linear is not None else self._narrow(node, inputs[0])
        if len(inputs) == 2:
            return product
        return OPS["add"](product, along_outputs(inputs[2], node), hint=node.hint, prov=prov)

    def _narrow(self, node: Node, x: Node) -> Node:
        """The product in the dtype that the format says, without bias, as a value of the model's dtype."""
        dtype = self.format.inputs
        assert dtype is not None
        weight = self.layer.from_matrix(self._matrix(self.parts, self._columns, dtype))
        x = x if x.dtype == dtype else OPS["cast"](x, dtype=dtype)
        product = OPS["cast"](node.op(x, weight, prov=node.prov.with_rule(Quantize.name), **node.attrs), dtype=torch.float32)
        if self.format.scale is not None:
            scale = self.format.scale(self.parts)
            product = OPS["mul"](product, along_outputs(OPS["reshape"](scale, shape=(scale.shape[0],)), node))
        return product if node.dtype == torch.float32 else OPS["cast"](product, dtype=node.dtype)

    @property
    def _columns(self) -> object:
        shape = self.layer.weight.shape
        count = 1
        for d in shape[:-1] if self.layer.transposed else shape[1:]:
            count *= d  # type: ignore[assignment]
        return count

    def _matrix(self, parts: Mapping[str, Node], count: object, dtype: torch.dtype) -> Node:
        assert self.format.weight is not None, "embeddings and convolutions have formats that are a matrix"
        return columns(self.format.weight(parts, dtype), count)
