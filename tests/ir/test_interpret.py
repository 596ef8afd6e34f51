"""The interpreter: written-back inputs, sizes, float64 runs, and memory freed on the way."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from tilewright.ir import ops
from tilewright.ir.dims import symbol
from tilewright.ir.graph import graph_input, make_graph
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType, scalar_type

S = symbol("s")
F32 = TensorType(torch.float32, (3,))


def test_writes_happen_after_every_value_is_known() -> None:
    a, b = graph_input("a", F32), graph_input("b", F32)
    view = ops.flip(ops.reshape(a, shape=(3,)), dims=())
    graph = make_graph("swap", [a, b], [view, a], writes=((a, b), (b, a)))
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    old_x, old_y = x.clone(), y.clone()
    seen, same = interpret(graph, [x, y])
    assert torch.equal(x, old_y) and torch.equal(y, old_x)
    assert torch.equal(seen, old_x) and torch.equal(same, old_x)


def test_a_float64_run_updates_the_callers_tensor() -> None:
    a = graph_input("a", F32)
    x = torch.ones(3)
    interpret(make_graph("g", [a], [], writes=((a, ops.add(a, 1.0)),)), [x], torch.float64)
    assert torch.equal(x, torch.full((3,), 2.0))


def test_float64_runs_do_not_round_on_the_way() -> None:
    a = graph_input("a", F32)
    narrow = ops.cast(ops.cast(ops.div(a, 3.0), dtype=torch.bfloat16), dtype=torch.float32)
    filled = ops.add(narrow, ops.full(shape=(3,), value=0.1, dtype=torch.float16))
    x = torch.tensor([1.0, 2.0, 3.0])
    (out,) = interpret(make_graph("g", [a], [filled]), [x], torch.float64)
    assert torch.equal(out, x.double() / 3.0 + 0.1)


def test_sizes_come_from_shapes_and_from_size_inputs() -> None:
    a = graph_input("a", TensorType(torch.float32, (S, 2)))
    n = graph_input("n", scalar_type(symbol("n")))
    flat = ops.reshape(a, shape=(2 * S,))
    wide = ops.full(shape=(symbol("n"), S), value=S, dtype=torch.int64)
    out, filled = interpret(make_graph("g", [a, n], [flat, wide]), [torch.ones(4, 2), 3])
    assert out.shape == (8,) and torch.equal(filled, torch.full((3, 4), 4))


def test_a_region_knows_the_sizes_around_it() -> None:
    a = graph_input("a", TensorType(torch.float32, (S, 2)))
    flat = graph_input("flat", TensorType(torch.float32, (2 * S,)))
    body = make_graph("body", [flat], [ops.reshape(flat, shape=(2, S))])
    graph = make_graph("g", [a], [ops.region(ops.reshape(a, shape=(2 * S,)), body=body)])
    x = torch.arange(8.0).reshape(4, 2)
    assert torch.equal(interpret(graph, [x])[0], x.reshape(2, 4))


def test_expansions_run_at_every_size() -> None:
    shape = (S, 4, symbol("n"), 8)
    q, k, v = (graph_input(name, TensorType(torch.float32, shape)) for name in "qkv")
    whole = ops.attention(q, k, v, causal=True, scale=0.5)
    graph = make_graph("g", [q, k, v], [whole.op.expand(*whole.inputs, **whole.attrs)])  # type: ignore[misc]
    for s, n in [(1, 1), (2, 5), (3, 2)]:
        tensors = [torch.randn(s, 4, n, 8) for _ in range(3)]
        expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.5)
        torch.testing.assert_close(interpret(graph, tensors)[0], expected)


def test_values_are_freed_after_their_last_reader() -> None:
    """A chain of 64 steps holds a few values at a time, not all."""
    alive: list[weakref.ref[torch.Tensor]] = []
    a = graph_input("a", TensorType(torch.float32, (8,)))
    most = 0

    def step(x: torch.Tensor) -> torch.Tensor:
        nonlocal most
        out = x + 1
        alive.append(weakref.ref(out))
        most = max(most, sum(r() is not None for r in alive))
        return out

    counted = replace(ops.neg, eager=step)
    value = a
    for _ in range(64):
        value = counted(value)
    interpret(make_graph("chain", [a], [value]), [torch.zeros(8)])
    assert most <= 3
