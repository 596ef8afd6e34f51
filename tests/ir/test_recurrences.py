"""The recurrences against torch's own LSTM, GRU and RNN; no steps, no rows; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tilewright.ir import ops
from tilewright.ir.errors import TypeInferenceError
from tilewright.ir.graph import graph_input, make_graph
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import tensor_type
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType

CASES = {"lstm_layer": (4, 2, {}), "gru_layer": (3, 1, {}), "rnn_layer": (1, 1, {}), "relu": (1, 1, {"activation": "relu"})}
TORCH = {"lstm_layer": torch.lstm, "gru_layer": torch.gru, "rnn_layer": torch.rnn_tanh, "relu": torch.rnn_relu}


def run(name: str, *xs: torch.Tensor, **attrs: Any) -> tuple[torch.Tensor, ...]:
    """The op by `interpret`, through the text form; the inferred types are those of the results."""
    inputs = [graph_input(f"x{i}", tensor_type(x)) for i, x in enumerate(xs)]
    node = ops.op("rnn_layer" if name == "relu" else name)(*inputs, **attrs)
    assert isinstance(node.type, tuple)
    graph = make_graph("g", inputs, [ops.item(node, index=i) for i in range(len(node.type))])
    assert str(parse(str(graph))) == str(graph)
    results = tuple(interpret(graph, xs))
    assert tuple(tensor_type(r) for r in results) == node.type
    return results


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_against_torch(name: str, biased: bool, batch_first: bool, reverse: bool) -> None:
    gates, count, attrs = CASES[name]
    torch.manual_seed(0)
    x, w_in, w = torch.randn(6, 3, 5), torch.randn(gates * 4, 5), torch.randn(gates * 4, 4)
    states, biases = [torch.randn(3, 4) for _ in range(count)], [torch.randn(gates * 4) for _ in range(2 * biased)]
    products = torch.nn.functional.linear(x, w_in, *biases[:1])
    given = products.transpose(0, 1) if batch_first else products
    got = run(name, given, *states, w, *biases[1:], reverse=reverse, batch_first=batch_first, **attrs)
    first = [s[None] for s in states]
    seen = x.flip(0) if reverse else x
    out, *ends = TORCH[name](seen, first if count > 1 else first[0], [w_in, w, *biases], biased, 1, 0.0, False, False, False)
    for ours, theirs in zip(got, (out.flip(0) if reverse else out, *(e[0] for e in ends)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("steps, batch", [(0, 3), (2, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("name", CASES)
def test_few_steps_and_rows(name: str, steps: int, batch: int) -> None:
    gates, count, attrs = CASES[name]
    states = [torch.randn(batch, 4) for _ in range(count)]
    out, *ends = run(name, torch.randn(steps, batch, gates * 4), *states, torch.randn(gates * 4, 4), **attrs)
    assert out.shape == (steps, batch, 4)
    if not steps:
        assert all(torch.equal(a, b) for a, b in zip(ends, states))


def test_refused() -> None:
    def t(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return graph_input("x", TensorType(dtype, shape))

    faults = {
        "dtype": (t(5, 3, 12), t(3, 4, dtype=torch.float64), t(12, 4)),
        "integers": (t(5, 3, 12, dtype=torch.int32), t(3, 4, dtype=torch.int32), t(12, 4, dtype=torch.int32)),
        "columns": (t(5, 3, 16), t(3, 4), t(12, 4)), "units": (t(5, 3, 12), t(3, 4), t(16, 4)), "state": (t(5, 3, 12), t(5, 4), t(12, 4)),
        "bias": (t(5, 3, 12), t(3, 4), t(12, 4), t(4)), "rank": (t(3, 12), t(3, 4), t(12, 4)),
    }  # fmt: skip
    for operands in faults.values():
        with pytest.raises(TypeInferenceError):
            ops.gru_layer(*operands)
    with pytest.raises(TypeInferenceError, match="activation"):
        ops.rnn_layer(t(5, 3, 4), t(3, 4), t(4, 4), activation="sigmoid")


def test_cost_counts_the_products_of_the_state() -> None:
    types = [TensorType(torch.float32, s) for s in ((128, 8, 1024), (8, 256), (8, 256), (1024, 256))]
    node = ops.lstm_layer(*(graph_input("x", t) for t in types))
    flops = node.op.cost(tuple(types), node.type, node.attrs).flops
    assert 2 * 128 * 8 * 1024 * 256 <= flops <= 2.2 * 128 * 8 * 1024 * 256
