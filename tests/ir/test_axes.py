"""The axis analysis: places and labels by op, what it refuses, and graphs for other sizes."""

import pytest
import torch
from tilewright.ir.analysis.axes import Along, CannotResize, How, axis_of, resized
from tilewright.ir.dims import symbol
from tilewright.ir.graph import order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify


def axis(text: str, dim: int = 1, input: int = 0):
    """The graph of some lines over `x: f32[2, 6, 8]` or the given header, and the axis of one of its inputs."""
    graph = parse(text if text.lstrip().startswith("graph") else "graph g(x: f32[2, 6, 8]) {\n" + text + "\n}")
    return graph, axis_of(graph, graph.inputs[input], dim)


def named(graph, name):
    return next(n for n in order(graph) if n.hint == name)


def how(graph, found, name="y"):
    return found.labels[named(graph, name)].how


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


def with_weights(graph):
    """Seeded values for the constants; a `bias` is causal."""
    generator = torch.Generator().manual_seed(0)
    for node in order(graph):
        if node.op.name == "constant":
            data = node.attrs["data"]
            causal = torch.full(node.shape, -torch.inf).triu(1) if data.name == "bias" else None
            data._value = torch.randn(node.shape, generator=generator) if causal is None else causal
    return graph


@pytest.mark.parametrize("body", [FUSED, WRITTEN_OUT])
def test_a_decoder_is_prefix_along_tokens_and_parallel_along_the_batch(body):
    graph = with_weights(parse(DECODER.replace("BODY", body)))
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
    graph = with_weights(parse(DECODER.replace("BODY", body)))
    small = resized(graph, axis_of(graph, graph.inputs[0], 1), size)
    verify(small)
    tokens = torch.arange(12).reshape(2, 6) % 11
    n = size if isinstance(size, int) else 3
    whole, part = interpret(graph, [tokens])[0], interpret(small, [tokens[:, :n]])[0]
    assert part.shape == (2, n, 8)
    torch.testing.assert_close(part, whole[:, :n])


def test_constants_do_not_grow():
    graph = with_weights(parse(DECODER.replace("BODY", FUSED)))
    with pytest.raises(CannotResize, match="constant positions cannot be made for size 9"):
        resized(graph, axis_of(graph, graph.inputs[0], 1), 9)


def test_roles_of_masks_and_scores():
    graph = with_weights(parse(DECODER.replace("BODY", WRITTEN_OUT)))
    found = axis_of(graph, graph.inputs[0], 1)
    assert found.places[named(graph, "scores")] == (None, None, Along(), None)
    assert found.keys[named(graph, "scores")] == (None, None, None, Along())
    assert found.keys[named(graph, "bias")] == (None, Along())
    assert found.places[named(graph, "bias")] == (Along(), None)
    assert named(graph, "k") not in found.keys
