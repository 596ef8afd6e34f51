"""A graph cut into parts: composed they are the graph, to the bit; what crosses is the least that can; illegal places are none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tilewright.ir.analysis.segments import Segments, segments
from tilewright.ir.graph import Graph, constants
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.split_layers import Part, rounded, split


def weights(*names: str, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(size, size, generator=generator) for name in names}


def run(parts: Sequence[Part], inputs: Sequence[Any], state: dict[str, torch.Tensor] | None = None) -> list[Any]:
    """The parts, one after the other."""
    values = list(inputs)
    for part in parts:
        verify(part.graph)
        values = interpret(part.graph, values + [(state or {})[n.hint] for n in part.state])
    return values


def assert_equal_wherever_cut(found: Segments, inputs: Sequence[Any]) -> None:
    wanted = interpret(found.graph, inputs)
    numbers = range(len(found.cuts))
    for count in range(len(numbers) + 1):
        for at in itertools.combinations(numbers, count):
            for a, b in zip(wanted, run(split(found, at), inputs), strict=True):
                assert torch.equal(a, b), at


def names(found: Segments) -> list[list[str]]:
    return [[n.hint for n in cut.crosses] for cut in found.cuts]


CHAIN = """
graph g(x: f32[3, 4]) stage canonical {
  w = constant "w"
  v = constant "v"
  a = linear(x, w)
  b = relu(a)
  c = linear(b, v)
  d = add(c, b)
  y = linear(d, w)
  return y
}
"""


def test_a_chain_is_cut_behind_single_tensors_and_composes_to_itself() -> None:
    found = segments(parse(CHAIN, weights("w", "v")))
    assert names(found) == [["a"], ["b"], ["d"]]
    assert [cut.nbytes for cut in found.cuts] == [48, 48, 48]
    assert_equal_wherever_cut(found, [torch.randn(3, 4)])


def test_a_part_holds_its_own_weights_only() -> None:
    first, second, third = split(segments(parse(CHAIN, weights("w", "v"))), [1, 2])
    assert [sorted(constants(p.graph)) for p in (first, second, third)] == [["w"], ["v"], ["w"]]
    assert [p.graph.name for p in (first, second, third)] == ["g_1", "g_2", "g_3"]


MASKED = """
graph g(x: f32[2, 4], lengths: i64[2]) stage canonical {
  w = constant "w"
  v = constant "v"
  i = iota(length=4)
  column = reshape(lengths, shape=[2, 1])
  inside = lt(i, column)
  wide = where(inside, 0.0, 1.0)
  a = linear(x, w)
  b = mul(a, wide)
  c = linear(b, v)
  d = mul(c, wide)
  e = linear(d, w)
  y = mul(e, wide)
  return y
}
"""


def test_a_mask_crosses_in_its_smallest_form_and_is_made_again() -> None:
    found = segments(parse(MASKED, weights("w", "v")))
    assert names(found) == [["a", "inside"], ["b", "inside"], ["c", "inside"], ["d", "inside"], ["e", "inside"]]
    assert found.cuts[0].nbytes == 32 + 8
    assert_equal_wherever_cut(found, [torch.randn(2, 4), torch.tensor([1, 3])])


def test_positions_that_hang_from_no_input_do_not_cross() -> None:
    text = (
        MASKED.replace("lengths: i64[2]", "")
        .replace("reshape(lengths, shape=[2, 1])", "full(shape=[2, 1], value=3, dtype=i64)")
        .replace("4], )", "4])")
    )
    found = segments(parse(text, weights("w", "v")))
    assert names(found) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert_equal_wherever_cut(found, [torch.randn(2, 4)])


SKIPS = """
graph g(x: f32[3, 4]) stage canonical {
  w = constant "w"
  v = constant "v"
  u = constant "u"
  a = linear(x, w)
  b = linear(a, v)
  c = linear(b, u)
  d = add(c, a)
  e = add(d, x)
  return e, b
}
"""


def test_where_no_single_tensor_will_do_sets_cross() -> None:
    graph = parse(SKIPS, weights("w", "v", "u"))
    assert names(segments(graph)) == [["a", "x"]]
    found = segments(graph, least=2)
    assert names(found) == [["a", "x"], ["b", "x", "a"], ["c", "x", "a", "b"]]
    assert_equal_wherever_cut(found, [torch.randn(3, 4)])


def test_results_of_early_parts_travel_to_the_end() -> None:
    text = CHAIN.replace("return y", "return y, a, x")
    found = segments(parse(text, weights("w", "v")))
    assert [sorted(row) for row in names(found)] == [["a", "x"], ["a", "b", "x"], ["a", "d", "x"]]
    assert_equal_wherever_cut(found, [torch.randn(3, 4)])


STATE = """
graph g(x: f32[3, 4], mean: f32[4]) stage canonical {
  w = constant "w"
  a = linear(x, w)
  m = mean(a, dims=[0])
  new = add(m, mean)
  b = relu(a)
  c = linear(b, w)
  d = sub(c, SOME)
  y = linear(d, w)
  write mean = new
  return y
}
"""


def test_state_stays_with_the_part_that_reads_it() -> None:
    graph = parse(STATE.replace("SOME", "1.0"), weights("w"))
    found = segments(graph)
    assert names(found) == [["a"], ["b"], ["c"], ["d"]]
    x, before = torch.randn(3, 4), torch.randn(4)
    whole, apart = before.clone(), before.clone()
    wanted = interpret(graph, [x, whole])
    parts = split(found, [1])
    assert [[n.hint for n in p.state] for p in parts] == [["mean"], []]
    assert torch.equal(run(parts, [x], {"mean": apart})[0], wanted[0]) and torch.equal(apart, whole)
    assert not torch.equal(whole, before)


def test_no_cut_has_state_on_both_sides() -> None:
    assert names(segments(parse(STATE.replace("SOME", "mean"), weights("w")))) == [["a"], ["d"]]


def test_random_draws_stay_together() -> None:
    draw = 'extern["aten.rand_like.default"]({}, sequence={}) : f32[3, 4]'
    text = CHAIN.replace("relu(a)", draw.format("a", 0)).replace("add(c, b)", draw.format("c", 1))
    assert names(segments(parse(text, weights("w", "v")))) == [["a"], ["d"]]


def test_sizes_that_vary_are_told_to_every_part() -> None:
    text = CHAIN.replace("x: f32[3, 4])", "x: f32[n, 4]) where n in 1..64")
    found = segments(parse(text, weights("w", "v")))
    assert names(found) == [["a"], ["b"], ["d"]]
    assert_equal_wherever_cut(found, [torch.randn(5, 4)])


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_what_crosses_in_8_bits_is_off_by_half_a_step_at_most(kind: str) -> None:
    text = CHAIN.replace("f32", kind).replace("4]", "16]")
    dtype = torch.float32 if kind == "f32" else torch.float64
    graph = parse(text, {name: w.to(dtype) for name, w in weights("w", "v", size=16).items()})
    found = segments(graph)
    exact = split(found, [1])
    head, tail = rounded(*exact)
    verify(tail.graph)
    assert [n.dtype for n in head.graph.outputs] == [torch.int8, dtype]
    x = torch.randn(3, 16, dtype=dtype)
    crossing, coded = interpret(exact[0].graph, [x])[0], interpret(head.graph, [x])
    step = crossing.abs().amax(-1, keepdim=True) / 127
    assert ((coded[0] * coded[1] - crossing).abs() <= step * (0.5 + 1e-5)).all()
    assert run([head, tail], [x])[0].shape == (3, 16)


def test_short_rows_and_integers_cross_as_they_are() -> None:
    parts = split(segments(parse(MASKED, weights("w", "v"))), [1])
    head, tail = rounded(parts[0], parts[1])
    inputs = [torch.randn(2, 4), torch.tensor([1, 3])]
    assert [n.dtype for n in head.graph.outputs] == [torch.float32, torch.bool]
    assert torch.equal(run([head, tail], inputs)[0], run(parts, inputs)[0])


def test_a_graph_without_places_has_no_cuts() -> None:
    graph: Graph = parse("graph g(x: f32[3]) stage canonical {\n y = relu(x)\n return y\n}")
    assert segments(graph).cuts == ()
    assert len(split(segments(graph), [])) == 1
