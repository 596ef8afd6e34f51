"""Recurrences: one direction of one layer of an LSTM, GRU or plain RNN, all time steps in one op.

The products with the input are a `linear` in front: `gates` holds them for every step, so that only what depends on the step before is
left. Every op yields (the state after each step, the last state), an LSTM its last cell besides. What comes out has the steps outermost,
as torch lays it out; with `batch_first` the gates are [batch, steps, columns]. `reverse` starts at the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..dims import dim, product, same, same_shape
from ..op import Category, Cost, Op, streaming_cost
from ..types import TensorType, Type, one_device

GATES = {"lstm_layer": 4, "gru_layer": 3, "rnn_layer": 1}
"""Op -> how many products of the state one unit needs."""


def _check(name: str, batch_first: bool, gates: TensorType, w: TensorType, b: TensorType | None, *states: TensorType) -> Type:
    """(out, last states)."""
    given = [gates, w, *states] + ([b] if b else [])
    if len({t.dtype for t in given}) > 1 or not gates.dtype.is_floating_point:
        raise ValueError("operands must have one floating-point dtype")
    one_device(*given)
    if gates.rank != 3 or w.rank != 2:
        raise ValueError("gates must be [steps, batch, columns] and w [columns, units]")
    columns, units = w.shape
    if not same(columns, dim(GATES[name] * units)) or not same(gates.shape[2], columns):
        raise ValueError(f"gates and w must have {GATES[name]} columns for each of the {units} units")
    batch, steps = gates.shape[:2] if batch_first else gates.shape[1::-1]
    if not all(same_shape(s.shape, (batch, units)) for s in states):
        raise ValueError(f"a state must be [{batch}, {units}]")
    if b is not None and not same_shape(b.shape, (columns,)):
        raise ValueError("b must have one entry per column")
    return (gates.with_shape((steps, batch, units)), *states)


def _infer_lstm(
    gates: TensorType, h: TensorType, c: TensorType, w: TensorType, b: TensorType | None = None, *, reverse: bool = False,
    batch_first: bool = False,
) -> Type:  # fmt: skip
    """gates [steps, batch, 4 units], h, c [batch, units], w [4 units, units], b [4 units] -> out [steps, batch, units], h, c.

    i, f, g, o = gates[t] + h @ w.T + b; c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c).
    """
    return _check("lstm_layer", batch_first, gates, w, b, h, c)


def _infer_gru(
    gates: TensorType, h: TensorType, w: TensorType, b: TensorType | None = None, *, reverse: bool = False, batch_first: bool = False
) -> Type:
    """gates [steps, batch, 3 units], h [batch, units], w [3 units, units], b [3 units] -> out [steps, batch, units], h.

    p, q = gates[t], h @ w.T + b, each in parts r, z, n: r = sigmoid(p.r + q.r); z likewise; n = tanh(p.n + r * q.n); h = n + z * (h - n).
    """
    return _check("gru_layer", batch_first, gates, w, b, h)


def _infer_rnn(
    gates: TensorType, h: TensorType, w: TensorType, b: TensorType | None = None, *, activation: str = "tanh", reverse: bool = False,
    batch_first: bool = False,
) -> Type:  # fmt: skip
    """gates [steps, batch, units], h [batch, units], w [units, units], b [units] -> out [steps, batch, units], h.

    h = activation(gates[t] + h @ w.T + b), "tanh" or "relu".
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"there is no activation {activation!r}")
    return _check("rnn_layer", batch_first, gates, w, b, h)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def _steps(gates: torch.Tensor, reverse: bool, batch_first: bool) -> Iterator[torch.Tensor]:
    steps = gates.unbind(1 if batch_first else 0)
    return iter(reversed(steps) if reverse else steps)


def _stacked(states: list[torch.Tensor], h: torch.Tensor, reverse: bool) -> torch.Tensor:
    return torch.stack(states[::-1] if reverse else states) if states else h.new_empty((0, *h.shape))


def _lstm(gates: Any, h: Any, c: Any, w: Any, b: Any = None, *, reverse: bool, batch_first: bool) -> tuple[torch.Tensor, ...]:
    states = []
    for step in _steps(gates, reverse, batch_first):
        i, f, g, o = (step + F.linear(h, w, b)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return _stacked(states, h, reverse), h, c


def _gru(gates: Any, h: Any, w: Any, b: Any = None, *, reverse: bool, batch_first: bool) -> tuple[torch.Tensor, ...]:
    states = []
    for step in _steps(gates, reverse, batch_first):
        (pr, pz, pn), (qr, qz, qn) = step.chunk(3, 1), F.linear(h, w, b).chunk(3, 1)
        n = torch.tanh(pn + torch.sigmoid(pr + qr) * qn)
        h = n + torch.sigmoid(pz + qz) * (h - n)
        states.append(h)
    return _stacked(states, h, reverse), h


def _rnn(gates: Any, h: Any, w: Any, b: Any = None, *, activation: str, reverse: bool, batch_first: bool) -> tuple[torch.Tensor, ...]:
    states = []
    for step in _steps(gates, reverse, batch_first):
        h = _ACTIVATIONS[activation](step + F.linear(h, w, b))
        states.append(h)
    return _stacked(states, h, reverse), h


def _cost(types: tuple[Any, ...], out: Type, attrs: Any) -> Cost:
    """The products with the state, and some 30 operations per gate."""
    gates, units = types[0], out[0].shape[2]  # type: ignore[index,union-attr]
    return Cost(dim(product(gates.shape) * (2 * units + 30)), streaming_cost(types, out).bytes)


RECURRENCES: tuple[Op, ...] = (
    Op("lstm_layer", Category.RECURRENCE, _infer_lstm, _lstm, _cost),
    Op("gru_layer", Category.RECURRENCE, _infer_gru, _gru, _cost),
    Op("rnn_layer", Category.RECURRENCE, _infer_rnn, _rnn, _cost),
)
