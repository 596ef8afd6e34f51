"""The axis analysis: places and labels by op, what it refuses, and graphs for other sizes."""

import pytest
import torch
from tilewright.ir.analysis.axes import Along, CannotResize, How, axis_of, resized
from tilewright.ir.dims import symbol
from tilewright.ir.graph import graph_input, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify


def named(graph, name):
    return next(n for n in order(graph) if n.hint == name)


DECODER = """
graph decoder(tokens: i64[2, 6]) {
  table = constant "table" : f32[11, 8]
  h = embedding(table, tokens)
  positions = constant "positions" : f32[1, 6, 8]
  x = add(h, positions)
  n = layer_norm(x)
  w = constant "w" : f32[24, 8]
  qkv = linear(n, w)
  parts = reshape(qkv, shape=[2, 6, 3, 2, 4])
  q0 = select(parts, dim=2, index=0)
  k0 = select(parts, dim=2, index=1)
  v0 = select(parts, dim=2, index=2)
  q1 = permute(q0, dims=[0, 2, 1, 3])
  k1 = permute(k0, dims=[0, 2, 1, 3])
  v = permute(v0, dims=[0, 2, 1, 3])
  angles = constant "angles" : f32[1, 6, 4]
  cos = reshape(angles, shape=[1, 1, 6, 4])
  q = rope(q1, cos, cos)
  k = rope(k1, cos, cos)
  BODY
  back = permute(a, dims=[0, 2, 1, 3])
  flat = reshape(back, shape=[2, 6, 8])
  y = add(x, flat)
  return y
}
"""
FUSED = "a = attention(q, k, v, causal=true, scale=0.5)"
WRITTEN_OUT = """
  turned = permute(k, dims=[0, 1, 3, 2])
  scores = matmul(q, turned)
  bias = constant "bias" : f32[6, 6]
  masked = add(scores, bias)
  shares = softmax(masked, dim=3)
  a = matmul(shares, v)
"""


def decoder(body):
    """The decoder with seeded weights; its bias is causal."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (11, 8), "positions": (1, 6, 8), "w": (24, 8), "angles": (1, 6, 4)}
    constants = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return parse(DECODER.replace("BODY", body), constants | {"bias": torch.full((6, 6), -torch.inf).triu(1)})


@pytest.mark.parametrize("body", [FUSED, WRITTEN_OUT])
def test_a_decoder_is_prefix_along_tokens_and_parallel_along_the_batch(body):
    graph = decoder(body)
    tokens = axis_of(graph, graph.inputs[0], 1)
    assert tokens.first(How.MIXING) is None
    assert {n.op.name for n, label in tokens.labels.items() if label.how is How.PREFIX} <= {"attention", "softmax", "matmul"}
    assert tokens.labels[named(graph, "a")].how is How.PREFIX
    assert tokens.places[named(graph, "q")] == (None, None, Along(), None)
    assert tokens.places[named(graph, "positions")] == (None, Along(), None)
    assert tokens.places[named(graph, "angles")] == (None, Along(), None)
    batch = axis_of(graph, graph.inputs[0], 0)
    assert {label.how for label in batch.labels.values()} == {How.PARALLEL}


@pytest.mark.parametrize("body", [FUSED, WRITTEN_OUT])
@pytest.mark.parametrize("size", [1, 4, 6, symbol("s")])
def test_a_decoder_for_fewer_tokens_computes_what_it_computes_on_a_prefix(body, size):
    graph = decoder(body)
    small = resized(graph, axis_of(graph, graph.inputs[0], 1), size)
    verify(small)
    tokens = torch.arange(12).reshape(2, 6) % 11
    n = size if isinstance(size, int) else 3
    whole, part = interpret(graph, [tokens])[0], interpret(small, [tokens[:, :n]])[0]
    assert part.shape == (2, n, 8)
    torch.testing.assert_close(part, whole[:, :n])


def test_constants_do_not_grow():
    graph = decoder(FUSED)
    with pytest.raises(CannotResize, match="constant positions cannot be made for size 9"):
        resized(graph, axis_of(graph, graph.inputs[0], 1), 9)


def test_roles_of_masks_and_scores():
    graph = decoder(WRITTEN_OUT)
    found = axis_of(graph, graph.inputs[0], 1)
    assert found.places[named(graph, "scores")] == (None, None, Along(), None)
    assert found.keys[named(graph, "scores")] == (None, None, None, Along())
    assert found.keys[named(graph, "bias")] == (None, Along())
    assert found.places[named(graph, "bias")] == (Along(), None)
    assert named(graph, "k") not in found.keys


def test_what_stands_for_a_node_is_made_from_its_new_operands():
    graph = decoder(FUSED)
    found = axis_of(graph, graph.inputs[0], 1)
    positions, a = named(graph, "positions"), named(graph, "a")
    given = graph_input("here", TensorType(torch.float32, (1, 2, 8)))

    def windowed(node, operands):
        assert [x.shape for x in operands] == [(2, 2, 2, 4)] * 3
        return node.op(*operands, **{**node.attrs, "causal": False})

    small = resized(graph, found, 2, {positions: given, a: windowed})
    verify(small)
    assert [n.hint for n in small.inputs] == ["tokens", "here"]
    assert not any(n.attrs.get("causal") for n in order(small))


def test_a_refusal_names_the_node_and_the_line():
    text = "graph g(x: f32[2, 6, 8]) {\n  pooled = mean(x, dims=[1])  # model.py:41 head\n  return pooled\n}"
    graph = parse(text)
    found = axis_of(graph, graph.inputs[0], 1)
    node = found.first(How.MIXING)
    assert found.why(node) == "mean pooled reads all indices together: mean reduces it (at model.py:41)"


def test_an_axis_of_one_index_cannot_be_followed():
    graph = parse("graph g(x: f32[1, 6, 8]) {\n  y = relu(x)\n  return y\n}")
    found = axis_of(graph, graph.inputs[0], 0)
    assert "single index" in found.why(found.first(How.MIXING))
