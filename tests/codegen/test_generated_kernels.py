"""Generated graphs through the whole pipeline and both printers, against the interpreter by the float64 rule.

Each example holds several random chains over shared inputs, so that one compilation checks many op mixes. Nothing may fall back.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import NATIVE
from tilewright.codegen.program import compile_program
from tilewright.codegen.target import TARGETS
from tilewright.driver.accuracy import check
from tilewright.driver.pipeline import DEFAULT_PASSES
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, dim, symbol
from tilewright.ir.graph import Graph, Node, graph_input, make_graph
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType, broadcast
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes
from tilewright.passes.manager import run_passes

BUDGET = 2e-6
CANCELLED = 1e-12  # values are about 1, so that this is rounding in float64
CHAINS, STEPS = 5, 7
UNARY = ("relu", "neg", "abs", "tanh", "sigmoid", "square", "erf", "sin", "floor", "silu")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
REDUCTIONS = ("sum", "mean", "amax", "amin")


def _unary(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    return ops.op(draw.choice(UNARY))(x)


def _binary(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    return ops.op(draw.choice(BINARY))(x, _partner(x, draw, pool))


def _partner(x: Node, draw: random.Random, pool: list[Node]) -> Node | float:
    """Another value that broadcasts with x, or a number."""
    for other in draw.sample(pool, len(pool)):
        try:
            broadcast(x.shape, other.shape)
            return other
        except ValueError:
            continue
    return draw.choice((0.5, -2.0, 3))


def _where(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    return ops.op("where")(ops.op("gt")(x, 0.1), x, ops.op("mul")(x, 0.25))


def _reduce(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    if not x.tensor.rank:
        return x
    return ops.op(draw.choice(REDUCTIONS))(x, dims=(draw.randrange(x.tensor.rank),), keepdim=draw.random() < 0.7)


def _normalize(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    if not x.tensor.rank:
        return x
    if draw.random() < 0.5:
        return ops.op("softmax")(x, dim=draw.randrange(x.tensor.rank))
    return ops.op("layer_norm")(x, axes=1, eps=1.0)  # rows may be constant, and 1 / sqrt(1e-5) would magnify their rounding


def _permute(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    return ops.op("permute")(x, dims=tuple(draw.sample(range(x.tensor.rank), x.tensor.rank)))


def _flatten(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    if x.tensor.rank < 2:
        return x
    return ops.op("reshape")(x, shape=(dim(x.shape[0] * x.shape[1]), *x.shape[2:]))


def _slice(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    fixed = [d for d, n in enumerate(x.shape) if isinstance(n, int) and n > 1]
    if not fixed:
        return x
    d = draw.choice(fixed)
    start = draw.randrange(x.shape[d])
    return ops.op("slice")(x, dim=d, start=start, stop=x.shape[d], step=draw.choice((1, 1, 2)))


def _cat(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    return ops.op("cat")(x, ops.op("neg")(x), dim=draw.randrange(x.tensor.rank)) if x.tensor.rank else x


def _pad(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    low, high = (tuple(draw.randrange(2) for _ in x.shape) for _ in range(2))
    return ops.op("pad")(x, low=low, high=high, value=0.5)


def _rows(x: Node, draw: random.Random, pool: list[Node]) -> Node:
    """Rows of a table at integer positions made from a range: a gather."""
    if x.tensor.rank != 2 or not isinstance(x.shape[0], int) or x.shape[0] < 1:
        return x
    ids = ops.op("remainder")(ops.op("iota")(length=draw.choice((1, 3, 6))), x.shape[0])
    return ops.op("embedding")(x, ids)


STEP = (_unary, _unary, _binary, _binary, _where, _reduce, _normalize, _permute, _flatten, _slice, _cat, _pad, _rows)


def generated(seed: int) -> Graph:
    """A random graph over x [a, b], y [b] and z [c, a, b], where one size may be symbolic."""
    draw = random.Random(seed)
    sizes = [draw.choice((1, 2, 5, 17)) for _ in range(3)]
    a, b, c = (symbol("s") if k == 0 and draw.random() < 0.4 else n for k, n in enumerate(sizes))
    inputs = [graph_input(n, TensorType(torch.float32, shape)) for n, shape in (("x", (a, b)), ("y", (b,)), ("z", (c, a, b)))]
    results = []
    for _ in range(CHAINS):
        value = draw.choice(inputs)
        pool = list(inputs)
        for _ in range(STEPS):
            value = draw.choice(STEP)(value, draw, pool)
            pool.append(value)
        results.append(value)
    symbols = {} if isinstance(a, int) else {"s": SymbolRange(1, 64)}
    return make_graph("generated", inputs, results, symbols=symbols)


def values(graph: Graph, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = random.Random(seed).choice((1, 3, 16))
    shapes = [[d if isinstance(d, int) else size for d in n.shape] for n in graph.inputs]
    return [torch.randn(s, generator=generator) for s in shapes]


def compare(seed: int, target: str) -> None:
    graph = generated(seed)
    verify(graph)
    program = compile_program(run_passes(graph, DEFAULT_PASSES, Notes()), {"cpu": TARGETS[target]})
    assert not program.fallbacks, f"seed {seed}: {program.fallbacks}"
    inputs = values(graph, seed)
    wide = [x.double() for x in inputs]
    outputs = zip(program(inputs), interpret(graph, inputs), interpret(graph, wide, torch.float64))
    for number, (ours, eager, exact) in enumerate(outputs):
        if exact.numel() and exact.abs().max() < CANCELLED:  # nothing is left for an error to be relative to
            assert (ours - exact).abs().max() <= BUDGET, f"seed {seed}, output {number}\n{graph}"
            continue
        result = check([ours], [eager], [exact], k=8, budget=BUDGET)
        assert result.ok, f"seed {seed}, output {number}: {result}\n{graph}"


QUIET = [HealthCheck.too_slow]


@NATIVE
@settings(max_examples=25, deadline=None, suppress_health_check=QUIET)
@given(st.integers(0, 1 << 30))
@example(64196)  # short rows of neighbouring points in one buffer
@example(5283)  # a mean that cancels
def test_cpp_kernels_compute_what_the_graph_means(seed: int) -> None:
    compare(seed, "cpu")


@settings(max_examples=8, deadline=None, suppress_health_check=QUIET)
@given(st.integers(0, 1 << 30))
def test_triton_kernels_compute_what_the_graph_means(seed: int) -> None:
    pytest.importorskip("triton")
    compare(seed, "cuda")
