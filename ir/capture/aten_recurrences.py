"""ATen's whole LSTM, GRU and plain RNN -> one `linear` and one recurrence per layer and direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..dims import same
from ..graph import Node
from ..ops.recurrences import GATES
from .call import Call, Converter, Result, make, reshape


def _lstm(call: Call, x: Node, hx: Any, params: Any, *settings: Any) -> Result:
    return _network(call, "lstm_layer", {}, x, tuple(hx), params, *settings)


def _gru(call: Call, x: Node, hx: Node, params: Any, *settings: Any) -> Result:
    return _network(call, "gru_layer", {}, x, (hx,), params, *settings)


def _rnn(activation: str) -> Converter:
    def convert(call: Call, x: Node, hx: Node, params: Any, *settings: Any) -> Result:
        return _network(call, "rnn_layer", {"activation": activation}, x, (hx,), params, *settings)

    return convert


def _network(
    call: Call, op: str, attrs: dict[str, Any], x: Node, states: Sequence[Node], params: Sequence[Node], has_biases: bool, layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> Result:  # fmt: skip
    """(out, last states): layer by layer, the directions of one side by side. states: [layers * directions, batch, units] each.

    Declined, to run as ATen runs it: other dtypes than float32 and other devices than the CPU (vendor libraries are better there: their
    programs share the units of a layer, which kernels of ours on a GPU cannot), dropout in training, and a projected state.
    """
    given = [x, *states, *params]
    if any(n.dtype != torch.float32 or n.tensor.device != "cpu" for n in given) or (train and dropout and layers > 1):
        return None
    directions = 2 if bidirectional else 1
    per_layer = 4 if has_biases else 2
    if len(params) != layers * directions * per_layer or not same(params[0].shape[0], GATES[op] * states[0].shape[2]):
        return None
    weights = (params[i : i + per_layer] for i in range(0, len(params), per_layer))
    last: list[list[Node]] = [[] for _ in states]
    for layer in range(layers):
        outs: list[Node] = []
        for direction in range(directions):
            start = [make("select", s, dim=0, index=layer * directions + direction) for s in states]
            order = {"reverse": direction == 1, "batch_first": batch_first and layer == 0}
            out, *ends = _direction(op, attrs | order, x, start, next(weights))
            outs.append(out)
            for ended, end in zip(last, ends):
                ended.append(reshape(end, (1, *end.shape)))
        x = outs[0] if directions == 1 else make("cat", *outs, dim=2)
    out = make("permute", x, dims=(1, 0, 2)) if batch_first else x
    return out, *(ended[0] if len(ended) == 1 else make("cat", *ended, dim=0) for ended in last)


def _direction(op: str, attrs: dict[str, Any], x: Node, states: list[Node], weights: Sequence[Node]) -> Iterator[Node]:
    """The results of one layer in one direction."""
    w_in, w, *biases = weights
    gates = make("linear", x, w_in, *biases[:1])
    node = make(op, gates, *states, w, *biases[1:], **attrs)
    return (make("item", node, index=i) for i in range(len(states) + 1))


RECURRENCES: dict[str, Converter] = {
    target: converter
    for name, converter in (("lstm", _lstm), ("gru", _gru), ("rnn_tanh", _rnn("tanh")), ("rnn_relu", _rnn("relu")))
    for target in (f"aten.{name}.input", f"tilewright.{name}.default")
}
