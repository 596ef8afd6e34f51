"""Halo: what a part of a result needs of an image, seen by changing the image; and where a stage ends, and why."""

import pytest
import torch
from tilewright.ir.analysis.halo import Reach, Span, Stage, needs, stage_of
from tilewright.ir.graph import Graph, Node
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse

CONV = "stride=[1, 1], padding=[1, 1], dilation=[1, 1]"


def graph_of(signature: str, *lines: str) -> Graph:
    return parse("\n".join([f"graph g({signature}) {{", *lines[:-1], f"return {lines[-1]}", "}"]))


def stage_in(graph: Graph, dims: tuple[int, ...] = (2, 3)) -> Stage:
    return stage_of(graph, graph.inputs[0], dims)


def named(graph: Graph, stage: Stage, hint: str) -> Node:
    return next(n for n in (*graph.inputs, *stage.readings, *stage.refused) if n.hint == hint)


def values(graph: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n.shape, generator=generator).abs() + 0.5 for n in graph.inputs]


def read(graph: Graph, dim: int, span: Span) -> set[int]:
    """Indices of the first input along `dim` that `span` of the result depends on: making them huge changes it."""
    given = values(graph)
    before = interpret(graph, given)[0].narrow(dim, span.start, span.size)
    found = set()
    for k in range(given[0].shape[dim]):
        changed = given[0].clone()
        changed.narrow(dim, k, 1).fill_(1e6)
        after = interpret(graph, [changed, *given[1:]])[0].narrow(dim, span.start, span.size)
        found |= {k} if not torch.equal(before, after) else set()
    return found


CASES = {
    "conv": ("y = conv(x, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1])",),
    "strided": ("y = conv(x, w, stride=[2, 3], padding=[1, 0], dilation=[1, 1])",),
    "dilated": ("y = conv(x, w, stride=[1, 1], padding=[2, 2], dilation=[2, 2])",),
    "even": ("y = conv(x, v, stride=[2, 2], padding=[1, 1], dilation=[1, 1])",),
    "one side": ("y = conv(x, v, stride=[1, 1], padding=[0, 0], padding_after=[1, 1], dilation=[1, 1])",),
    "max": ("y = max_pool(x, kernel=[3, 3], stride=[2, 2], padding=[1, 1])",),
    "ceil": ("y = max_pool(x, kernel=[2, 2], stride=[2, 2], padding=[0, 0], ceil=true)",),
    "mean": ("y = avg_pool(x, kernel=[3, 2], stride=[1, 2], padding=[1, 1])",),
    "padded": ("p = pad(x, low=[0, 0, 1, 0], high=[0, 0, 0, 1])", f"y = conv(p, w, {CONV})"),
    "cropped": ("p = slice(x, dim=2, start=3, stop=14, step=2)", "q = slice(p, dim=3, start=1, stop=12)", f"y = conv(q, w, {CONV})"),
    "chain": (f"c = conv(x, w, {CONV})", "r = relu(c)", "y = conv(r, w, stride=[2, 2], padding=[1, 1], dilation=[1, 1])"),
    "residual": (f"c = conv(x, w, {CONV})", f"d = conv(c, w, {CONV})", "y = add(d, x)"),
    "join": (f"c = conv(x, w, {CONV})", "y = cat(c, x, dim=1)"),
    "depthwise": ("y = conv(x, u, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=2)",),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_needed_is_what_is_read(name):
    graph = graph_of("x: f32[1, 2, 15, 13], w: f32[2, 2, 3, 3], v: f32[2, 2, 2, 2], u: f32[2, 1, 3, 3]", *CASES[name], "y")
    stage, end = stage_in(graph), graph.outputs[0]
    for axis, dim in ((0, 2), (1, 3)):
        size = end.shape[dim]
        for span in (Span(0, 1), Span(size // 3, size // 2 + 1), Span(size - 2, size), Span(0, size)):
            found = needs(stage, end, axis, span)
            assert found is not None
            seen = read(graph, dim, span)
            needed = found[stage.source]
            assert seen <= set(range(needed.start, needed.stop)), (axis, span)
            assert {needed.start, needed.stop - 1} <= seen, (axis, span)  # and no more than that


def test_a_value_read_twice_is_needed_as_far_as_both_read():
    graph = graph_of("x: f32[1, 2, 16, 16], w: f32[2, 2, 3, 3]", f"c = conv(x, w, {CONV})", f"d = conv(c, w, {CONV})", "y = add(d, c)", "y")
    stage = stage_in(graph)
    found = needs(stage, graph.outputs[0], 0, Span(4, 8))
    assert found is not None
    assert {n.hint: (s.start, s.stop) for n, s in found.items()} == {"y": (4, 8), "d": (4, 8), "c": (3, 9), "x": (2, 10)}


def test_a_part_of_padding_alone_reads_nothing():
    graph = graph_of("x: f32[1, 1, 8, 8]", "y = pad(x, low=[0, 0, 4, 0], high=[0, 0, 4, 0])", "y")
    assert needs(stage_in(graph), graph.outputs[0], 0, Span(0, 4)) is None
    assert needs(stage_in(graph), graph.outputs[0], 0, Span(0, 5)) is not None


def test_a_reach():
    assert Reach(2, stride=2, low=1, extent=3).of(Span(4, 8)) == Span(7, 16)
    assert Span(-1, 9).within(8) == Span(0, 8)


# -- where a stage ends


ENDS = {
    "global pooling": (("y = mean(c, dims=[2, 3])", "y"), "y", "takes the mean of the whole image"),
    "a sum": (("y = sum(c)", "y"), "y", "takes the sum of the whole image"),
    "group norm": (("y = group_norm(c, groups=2)", "y"), "y", "normalizes over the whole image"),
    "flattening": (("y = reshape(c, shape=[1, 512])", "y"), "y", "flattens"),
    "layer norm over space": (("y = layer_norm(c, axes=1)", "y"), "y", "normalizes over the whole image"),
    "softmax over space": (("y = softmax(c, dim=2)", "y"), "y", "runs along an axis of the image"),
    "linear over space": (("y = linear(c, l)", "y"), "y", "multiplies along an axis of the image"),
    "joining below": (("y = cat(c, c, dim=2)", "y"), "y", "joins images along an axis of theirs"),
    "transposed": (
        ("y = conv(c, w, stride=[2, 2], padding=[1, 1], dilation=[1, 1], transposed=true)", "y"), "y", "transposed",
    ),
    "weights of the image": (("s = slice(c, dim=2, start=0, stop=3)", "t = slice(s, dim=3, start=0, stop=3)",
                              "q = slice(t, dim=0, start=0, stop=1)", f"y = conv(c, q, {CONV})", "y"), "y", "depend on the image"),
    "means at the border": (("y = avg_pool(c, kernel=[3, 3], stride=[1, 1], padding=[1, 1], count_padding=false)", "y"), "y",
                            "over fewer elements"),
    "means that reach out": (("y = avg_pool(c, kernel=[3, 3], stride=[2, 2], padding=[0, 0], ceil=true)", "y"), "y", "over fewer elements"),
    "a flip": (("y = flip(c, dims=[3])", "y"), "y", "not known what of the image it reads"),
    "running sums": (("y = cumsum(c, dim=3)", "y"), "y", "runs along an axis of the image"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_it_ends_before(name):
    lines, last, why = ENDS[name]
    graph = graph_of("x: f32[1, 2, 16, 16], w: f32[2, 2, 3, 3], l: f32[4, 16]", f"c = conv(x, w, {CONV})", *lines)
    stage = stage_in(graph)
    assert "c" in {n.hint for n in stage.readings}
    refused = {n.hint: text for n, text in stage.refused.items()}
    assert why in refused[last]


def test_squeeze_and_excitation_is_outside_of_a_stage():
    graph = graph_of(
        "x: f32[1, 2, 16, 16], w: f32[2, 2, 3, 3]", f"c = conv(x, w, {CONV})", "m = mean(c, dims=[2, 3], keepdim=true)",
        "s = sigmoid(m)", "g = mul(c, s)", f"y = conv(g, w, {CONV})", "y",
    )  # fmt: skip
    stage = stage_in(graph)
    assert [n.hint for n in stage.readings] == ["c"]
    assert {n.hint: w for n, w in stage.refused.items()} == {
        "m": "it takes the mean of the whole image", "g": "it reads sigmoid s, which needs the whole image",
    }  # fmt: skip


def test_what_leaves_space_alone_is_inside():
    graph = graph_of(
        "x: f32[1, 4, 16, 16], w: f32[4, 4, 3, 3], l: f32[8, 4], p: f32[4, 16, 16]", f"c = conv(x, w, {CONV})", "d = add(c, p)",
        "t = permute(d, dims=[0, 2, 3, 1])", "n = layer_norm(t)", "e = linear(n, l)", "s = softmax(e, dim=-1)",
        "m = amax(s, dims=[3])", "m",
    )  # fmt: skip
    stage = stage_in(graph)
    assert not stage.refused
    assert stage.dims_of(named(graph, stage, "t")) == (1, 2)
    assert stage.dims_of(named(graph, stage, "m")) == (1, 2)
    found = needs(stage, graph.outputs[0], 0, Span(5, 6))
    assert found is not None and found[stage.source] == Span(4, 7)


def test_reductions_move_the_image():
    graph = graph_of("x: f32[1, 4, 16, 16]", "a = amax(x, dims=[1])", "b = mean(x, dims=[1], keepdim=true)", "y = sub(b, a)", "y")
    stage = stage_in(graph)
    assert stage.dims_of(named(graph, stage, "a")) == (1, 2) and stage.dims_of(named(graph, stage, "b")) == (2, 3)
    assert not stage.refused


def test_images_in_different_places_do_not_meet():
    graph = graph_of("x: f32[1, 16, 16, 16]", "t = permute(x, dims=[0, 3, 1, 2])", "y = add(x, t)", "y")
    stage = stage_in(graph)
    assert [*stage.refused.values()] == ["its operands have the image in different dimensions"]


def test_a_size_that_varies_is_refused():
    graph = parse("graph g(x: f32[1, 2, s, 16], w: f32[2, 2, 3, 3]) where s in 4..64 {\n  y = conv(x, w, " + CONV + ")\n  return y\n}")
    stage = stage_in(graph)
    assert [*stage.refused.values()] == ["the size of the image varies"]
    assert not stage_in(graph, (3,)).refused
