"""Rows that are sorted, worked on in groups and put back: parallel in the end, or refused where something reads the order."""

import pytest
import torch
from tilewright.ir.analysis.axes import How, axis_of, resized
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse

ROUTING = """
h = reshape(x, shape=[12, 8])
scores = slice(h, dim=1, start=0, stop=4)
best = extern[aten.topk.default](scores, args=[$0, 2]) : (f32[12, 2], i64[12, 2])
weight = item(best, index=0)
chosen = item(best, index=1)
flat = reshape(chosen, shape=[24])
sorted = extern[aten.sort.default](flat, args=[$0]) : (i64[24], i64[24])
order = item(sorted, index=1)
of = floor_divide(order, 2)
rows = index(h, of, dims=[0])
ids = item(sorted, index=0)
row = reshape(ids, shape=[1, 24])
group = iota(length=4)
groups = reshape(group, shape=[4, 1])
same = eq(row, groups)
ones = cast(same, dtype=i32)
count = sum(ones, dims=[1])
total = cumsum(count, dim=0)
ends = cast(total, dtype=i32)
made = grouped_matmul(rows, experts, ends)
weights = reshape(weight, shape=[24])
mine = index(weights, order, dims=[0])
column = reshape(mine, shape=[24, 1])
scaled = mul(made, column)
BACK
pairs = reshape(back, shape=[2, 6, 2, 8])
y = sum(pairs, dims=[2])
"""
BY_INDEX = """
zero = full(shape=[24], value=0, dtype=i64)
number = iota(length=24)
inverse = index_put(zero, number, order, dims=[0])
back = index(scaled, inverse, dims=[0])
"""
BY_SORT = "inverse = extern[aten.argsort.default](order, args=[$0]) : i64[24]\nback = index(scaled, inverse, dims=[0])"
BY_WRITING = "zero = full(shape=[24, 8], value=0.0, dtype=f32)\nback = index_put(zero, scaled, order, dims=[0])"


def routed(lines):
    text = 'graph g(x: f32[2, 6, 8]) {\nexperts = constant "experts" : f32[4, 8, 8]\n' + lines + "\nreturn y\n}"
    return parse(text, {"experts": torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))})


@pytest.mark.parametrize("back", [BY_INDEX, BY_SORT, BY_WRITING])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_that_are_routed_and_put_back_are_parallel(back, dim):
    graph = routed(ROUTING.replace("BACK", back))
    found = axis_of(graph, graph.inputs[0], dim)
    assert {label.how for label in found.labels.values()} == {How.PARALLEL}
    first, second = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(3))
    whole = interpret(graph, [first], torch.float64)[0]
    for i in range(found.size):
        mixed = first.clone()
        mixed.select(dim, i).copy_(second.select(dim, i))
        changed = (interpret(graph, [mixed], torch.float64)[0] - whole).abs().movedim(dim, 0).flatten(1).amax(1) > 1e-9
        assert changed.nonzero().flatten().tolist() == [i]
    part = interpret(resized(graph, found, 1), [first.narrow(dim, 0, 1)], torch.float64)[0]
    torch.testing.assert_close(part, whole.narrow(dim, 0, 1))


# (what is wrong, a piece of a routing that is right, what stands there instead)
REFUSED = [
    ("rows are not put back", BY_INDEX, "back = relu(scaled)"),
    ("they are put back by another order", BY_INDEX, "back = index(scaled, order, dims=[0])"),
    (
        "the order is a number",
        "scaled = mul(made, column)",
        "n = cast(order, dtype=f32)\nc = reshape(n, shape=[24, 1])\nscaled = mul(made, c)",
    ),
    (
        "the counts are a result",
        "y = sum(pairs, dims=[2])",
        "z = sum(pairs, dims=[2])\nt = sum(count, dims=[0])\ny = add(z, t)",
    ),
    ("groups are counted in another order", "iota(length=4)", "iota(length=4, start=3, step=-1)"),
    ("ends are no sums of counts", "total = cumsum(count, dim=0)", "total = cast(count, dtype=i64)"),
    ("rows are sorted downwards", "(flat, args=[$0])", "(flat, args=[$0, -1, true])"),
]


@pytest.mark.parametrize(("right", "wrong"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_routing_that_mixes_is_refused(right, wrong):
    lines = ROUTING.replace("BACK", BY_INDEX)
    assert right in lines
    graph = routed(lines.replace(right, wrong))
    assert axis_of(graph, graph.inputs[0], 1).first(How.MIXING) is not None
