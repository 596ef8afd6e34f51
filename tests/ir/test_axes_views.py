"""Views and element-by-element ops at random: places and labels judged by numbers, and graphs for other sizes."""

import math

import torch
from axis_oracle import judged, values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir.analysis.axes import How, axis_of, resized
from tilewright.ir.graph import Data, graph_input, make_graph
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType


def merged(draw, x, d):
    return OPS["reshape"](x, shape=(*x.shape[:d], x.shape[d] * x.shape[d + 1], *x.shape[d + 2 :])) if d + 1 < len(x.shape) else x


def split(draw, x, d):
    size = x.shape[d]
    inner = draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
    return OPS["reshape"](x, shape=(*x.shape[:d], size // inner, inner, *x.shape[d + 1 :]))


def permuted(draw, x, d):
    return OPS["permute"](x, dims=tuple(draw(st.permutations(range(len(x.shape))))))


def selected(draw, x, d):
    return OPS["select"](x, dim=d, index=draw(st.integers(0, x.shape[d] - 1))) if len(x.shape) > 1 else x


def part(draw, x, d):
    start = draw(st.integers(0, x.shape[d] - 1))
    return OPS["slice"](x, dim=d, start=start, stop=draw(st.integers(start + 1, x.shape[d])), step=draw(st.integers(1, 2)))


def padded(draw, x, d):
    pads = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    low, high = (tuple(n if i == d else 0 for i in range(len(x.shape))) for n in pads)
    return OPS["pad"](x, low=low, high=high)


def added(draw, x, d):
    """To itself, or to a constant."""
    like = torch.arange(math.prod(x.shape), dtype=torch.float32).reshape(x.shape)
    return OPS["add"](x, x if draw(st.booleans()) else OPS["constant"](data=Data("like", like)))


def summed(draw, x, d):
    return OPS["sum"](x, dims=(d,), keepdim=draw(st.booleans())) if len(x.shape) > 1 else x


def unsqueezed(draw, x, d):
    return OPS["reshape"](x, shape=(*x.shape[:d], 1, *x.shape[d:]))


def flipped(draw, x, d):
    return OPS["flip"](x, dims=(d,))


STEPS = (merged, split, permuted, selected, part, padded, added, summed, unsqueezed, flipped)


@st.composite
def chains(draw):
    """x [2, 6, 8] through up to six steps."""
    x = made = graph_input("x", TensorType(torch.float32, (2, 6, 8)))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6)):
        made = step(draw, made, draw(st.integers(0, len(made.shape) - 1)))
    return make_graph("g", [x], [made])


def cut(x, found, places, size):
    """The elements of a value that belong to the first `size` indices of the axis."""
    for d, along in enumerate(places):
        if along:
            apart = x.reshape(*x.shape[:d], along.outer, found.size, along.inner, *x.shape[d + 1 :])
            x = apart.narrow(d + 1, 0, size).reshape(*x.shape[:d], along.outer * size * along.inner, *x.shape[d + 1 :])
    return x


@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(0, 1), st.integers(0, 2**16))
def test_places_and_labels_are_what_numbers_show(graph, dim, seed):
    found = axis_of(graph, graph.inputs[0], dim)
    first, second = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(seed))
    assert not list(judged(found, values_of(graph, [first]), values_of(graph, [second])))
    if found.first(How.MIXING, How.WINDOW) is None:
        small = interpret(resized(graph, found, 1), [first.narrow(dim, 0, 1)])[0]
        whole = interpret(graph, [first])[0]
        torch.testing.assert_close(small, cut(whole, found, found.everywhere(graph.outputs[0]) or (), 1))
