"""All states between a graph and its program compute the same, and each has one step more than the one before."""

from __future__ import annotations

import pytest
import torch
from support import NATIVE
from tilewright.driver.accuracy import check
from tilewright.driver.ladder import CODEGEN, HOST, Ladder
from tilewright.driver.pipeline import DEFAULT_PASSES
from tilewright.driver.reproduce import constant_types, interpreted
from tilewright.ir.graph import Graph
from tilewright.ir.text import parse
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.manager import StageError
from tilewright.passes.plan_memory import PlanMemory

CONVOLUTIONS = """graph images(x: f32[2, 16, 28, 28]) {
  w = constant "w" : f32[32, 16, 3, 3]
  mean = constant "mean" : f32[32]
  var = constant "var" : f32[32]
  v = constant "v" : f32[32, 32, 3, 3]
  c = conv(x, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1])
  n = batch_norm(c, mean, var)
  r = relu(n)
  d = conv(r, v, stride=[1, 1], padding=[1, 1], dilation=[1, 1])
  s = add(d, r)
  p = mean(s, dims=[2, 3], keepdim=false)
  return p
}"""
LINEARS = """graph rows(x: f32[4, 32], state: f32[4, 16]) {
  g = constant "g" : f32[32]
  h = constant "h" : f32[32]
  q = constant "q" : f32[16, 32]
  k = constant "k" : f32[16, 32]
  o = constant "o" : f32[32, 16]
  b = constant "b" : f32[32]
  n = layer_norm(x, g, h)
  a = linear(n, q)
  c = linear(n, k)
  t = sigmoid(a)
  u = mul(a, t)
  m = mul(u, c)
  e = add(m, state)
  y = linear(e, o, b)
  z = add(y, x)
  write state = e
  return z
}"""


def made(text: str) -> tuple[Graph, list[torch.Tensor]]:
    """The graph with seeded constants, positive where they are variances, and inputs."""
    types = constant_types(parse(text))
    values = {name: torch.rand(kind.shape) + 0.5 if name == "var" else torch.randn(kind.shape) * 0.2 for name, kind in types.items()}
    graph = parse(text, values)
    return graph, [torch.randn(node.shape) for node in graph.inputs]


@NATIVE
@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (CONVOLUTIONS, {"fold-norms", "choose-layouts", "fuse-regions", CODEGEN, "plan-memory"}),
        (LINEARS, {"recognize", "fold-norms", "merge-linears", "fuse-regions", CODEGEN, "plan-memory"}),
    ],
)
def test_every_state_is_right(text, passes) -> None:
    torch.manual_seed(0)
    graph, inputs = made(text)
    ladder = Ladder(graph, DEFAULT_PASSES)
    assert passes <= {s.item for s in ladder.steps if s.rule}
    assert HOST in ladder.steps and ladder.failure is None
    reference, eager = interpreted(graph, inputs, torch.float64), interpreted(graph, inputs)
    for state in range(len(ladder.steps) + 1):
        found = check(ladder.observed(state, inputs), eager, reference)
        assert found.ok, (ladder.steps[:state][-1:], found)


def test_graphs_of_states() -> None:
    ladder = Ladder(parse("graph g(x: f32[4]) {\na = mul(x, 1.0)\nb = neg(a)\nc = neg(b)\nd = tanh(c)\nreturn d\n}"), [Canonicalize()])
    assert [(s.rule, s.what) for s in ladder.steps[:3]] == [
        ("", ""),
        ("canonicalize.times-one", "mul a"),
        ("canonicalize.neg-of-neg", "neg c"),
    ]
    graph, node = ladder.rewritten(2)
    assert "neg(" in str(graph) and "mul(" not in str(graph)
    assert node is not None and node.hint == "c", "where the next step is taken"
    assert ladder.entry(2) == ladder.entry(1) == 0


def test_passes_in_an_order_that_cannot_work() -> None:
    with pytest.raises(StageError):
        Ladder(parse("graph g(x: f32[4]) {\nreturn x\n}"), [PlanMemory()])
