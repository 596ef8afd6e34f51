"""Lowering of a recurrence: a region whose body is one layer's steps becomes a kernel that walks them.

lstm_layer(gates, h0, c0, w, b)   -->   for row in batch (grid), unit in units (grid), step in steps (inner), k in units (inner):
                                          state h = load h0[...], then sigmoid(o) * tanh(c)      where o = load gates[...] + load b[...]
                                          state c = load c0[...], then ...                            + dot(previous h at k, load w[...])
                                          store out[...] = h after the step; last h, last c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch

from ..ir.analysis.points import Refusal
from ..ir.dims import Dim, contiguous_strides, dim, symbol
from ..ir.graph import Graph, Node, order
from ..ir.op import Category
from ..ir.ops import op
from ..ir.ops.recurrences import GATES
from ..ir.reasons import Reason
from ..ir.scalar import Scalar
from .kernel import Axis, Buffer, Dot, Kernel, Last, Load, Previous, Recurrence, State, Store
from .names import sizes_of, unique


def recurrence_of(body: Graph) -> Node | None:
    """The recurrence that the body is, if it is one."""
    return next((n for n in order(body) if n.op.category is Category.RECURRENCE), None)


def lower_recurrence(body: Graph, node: Node, names: dict[Node | int, str], name: str, label: str, sources: tuple[str, ...]) -> Kernel:
    """The kernel of a body that is `node` and its items. names: of the buffers, by input node and output number. Raises Refusal."""
    return _Lowering(body, node, names).kernel(name, label, sources)


class _Lowering:
    def __init__(self, body: Graph, node: Node, names: dict[Node | int, str]) -> None:
        self.body, self.node, self.names = body, node, names
        types = node.type
        assert isinstance(types, tuple)
        if types[0].dtype != torch.float32:
            raise Refusal(Reason.UNSUPPORTED_DTYPE, node, str(types[0].dtype))
        if any(i.op.name != "input" for i in node.inputs):
            raise Refusal(Reason.NOT_EXPRESSIBLE, node, "operands computed inside")
        steps, rows, units = types[0].shape
        if not isinstance(units, int):
            raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{units} units")
        taken = {*names.values(), *body.symbols}
        self.row, self.unit, self.step, self.source = (unique(n, taken) for n in ("row", "unit", "step", "source"))
        self.units = units
        self.axes = (Axis(self.row, rows), Axis(self.unit, units), Axis(self.step, steps, True), Axis(self.source, units, True))

    def kernel(self, name: str, label: str, sources: tuple[str, ...]) -> Kernel:
        states = _CELLS[self.node.op.name](self)
        recurrence = Recurrence(self.step, self.unit, states, self.node.attrs["reverse"])
        values = [states[0].following, *(Last(s.initial.dtype, s) for s in states)]
        inputs = tuple(Buffer(self.names[n], n.dtype, _span(n)) for n in self.body.inputs)
        outputs, stores = [], []
        for k, out in enumerate(self.body.outputs):
            index = self.position(contiguous_strides(out.shape), *([self.step] if out.attrs["index"] == 0 else []), self.row, self.unit)
            outputs.append(Buffer(self.names[k], out.dtype, out.tensor.numel))
            stores.append(Store(self.names[k], index, values[out.attrs["index"]]))
        sizes = sizes_of(self.axes, stores, (*inputs, *outputs))
        return Kernel(name, self.axes, inputs, tuple(outputs), tuple(stores), sizes, label, sources, recurrence=recurrence)

    # the values of a step

    def operand(self, number: int, *axes: str | sympy.Expr) -> Load:
        """An element of an operand, by its position along each of its dimensions."""
        node = self.node.inputs[number]
        strides = node.attrs["strides"] or contiguous_strides(node.shape)
        return Load(torch.float32, self.names[node], self.position(strides, *axes))

    def position(self, strides: Sequence[object], *axes: str | sympy.Expr) -> sympy.Expr:
        places = [symbol(a) if isinstance(a, str) else a for a in axes]
        return sympy.expand(sum((p * s for p, s in zip(places, strides, strict=True)), start=sympy.Integer(0)))

    def column(self, gate: int) -> sympy.Expr:
        return gate * self.units + symbol(self.unit)

    def given(self, gate: int) -> Scalar:
        """What the input contributes to a gate."""
        first = (self.row, self.step) if self.node.attrs["batch_first"] else (self.step, self.row)
        return self.operand(0, *first, self.column(gate))

    def recurrent(self, gate: int) -> Scalar:
        """What the state before contributes to a gate, bias included."""
        weight = len(self.state_operands) + 1
        product = Dot(
            torch.float32, Previous(torch.float32, "h", self.source), self.operand(weight, self.column(gate), self.source), (self.source,)
        )
        return product + self.operand(weight + 1, self.column(gate)) if len(self.node.inputs) > weight + 1 else product

    def gate(self, number: int) -> Scalar:
        return self.given(number) + self.recurrent(number)

    @property
    def state_operands(self) -> range:
        return range(1, 3 if self.node.op.name == "lstm_layer" else 2)

    def state(self, name: str, number: int, following: Scalar) -> State:
        return State(name, self.operand(number, self.row, self.unit), following)

    def before(self, name: str) -> Scalar:
        return Previous(torch.float32, name, self.unit)


def _lstm(low: _Lowering) -> tuple[State, ...]:
    i, f, g, o = (low.gate(n) for n in range(GATES["lstm_layer"]))
    c = _sigmoid(f) * low.before("c") + _sigmoid(i) * _tanh(g)
    return low.state("h", 1, _sigmoid(o) * _tanh(c)), low.state("c", 2, c)


def _gru(low: _Lowering) -> tuple[State, ...]:
    r, z = _sigmoid(low.gate(0)), _sigmoid(low.gate(1))
    n = _tanh(low.given(2) + r * low.recurrent(2))
    return (low.state("h", 1, n + z * (low.before("h") - n)),)


def _rnn(low: _Lowering) -> tuple[State, ...]:
    return (low.state("h", 1, _function(low.node.attrs["activation"])(low.gate(0))),)


_CELLS: dict[str, Callable[[_Lowering], tuple[State, ...]]] = {"lstm_layer": _lstm, "gru_layer": _gru, "rnn_layer": _rnn}


def _function(name: str) -> Callable[..., Scalar]:
    scalar = op(name).scalar
    assert scalar is not None
    return scalar


_sigmoid, _tanh = _function("sigmoid"), _function("tanh")


def _span(node: Node) -> Dim:
    """Elements from the first to the last of an operand in memory."""
    strides = node.attrs["strides"]
    if strides is None:
        return node.tensor.numel
    return dim(1 + sum((d - 1) * s for d, s in zip(node.shape, strides)))
