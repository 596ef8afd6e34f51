"""Index arithmetic is exact, and regions are placed on the axes one expects."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir import ops
from tilewright.ir.analysis.indices import ONE, ZERO, Poly, Ranges, const, divide, expression, linear, poly, variable
from tilewright.ir.analysis.iteration import place
from tilewright.ir.analysis.points import Kind, Refusal, dense_order, regroup
from tilewright.ir.dims import SymbolRange, evaluate, symbol
from tilewright.ir.graph import graph_input, make_graph
from tilewright.ir.reasons import Reason
from tilewright.ir.types import TensorType

i, j, k = map(variable, "ijk")
s = poly(symbol("s"))


def ranges(**extents):
    known = Ranges({"s": SymbolRange(1, 4096), "b": SymbolRange(1)})
    for name, extent in extents.items():
        known.add(name, extent if isinstance(extent, Poly) else const(extent))
    return known


def value(p, **env):
    return evaluate(expression(p), env)


# -- arithmetic


def test_splitting_a_joined_index_gives_its_parts():
    r = ranges(i=12, j=384)
    joined = const(384) * i + j
    assert r.floordiv(joined, const(384)) == i and r.mod(joined, const(384)) == j
    assert r.delinearize(joined, [const(12), const(384)]) == (i, j)
    assert r.floordiv(joined, const(768)) == r.floordiv(i, const(2))
    assert r.mod(joined, const(768)) == const(384) * r.mod(i, const(2)) + j


def test_symbolic_extents_split_too():
    r = ranges(i=12, j=s)
    assert r.floordiv(i * s + j, s) == i and r.mod(i * s + j, s) == j
    r = ranges(i=s, j=s + ONE, k=8)
    joined = (i * (s + ONE) + j) * const(8) + k
    assert r.delinearize(joined, [s, s + ONE, const(8)]) == (i, j, k)


def test_what_is_unknown_stays():
    r = ranges(i=100)
    assert str(r.mod(i, const(7))) == str(r.mod(i, const(7))) != str(i)
    assert r.floordiv(i + s, const(7)).names() == {"i", "s"}


def test_split_positions_join_again():
    r = ranges(i=24)
    parts = r.delinearize(i, [const(2), const(3), const(4)])
    assert r.recombine(linear(parts, [const(2), const(3), const(4)])) == i


def test_bounds_use_the_ranges_of_sizes():
    r = ranges(i=s)
    assert r.inside(i, s) and r.inside(i, const(4096)) and not r.inside(i, s - ONE) and not r.inside(i + ONE, s)
    assert r.at_least(s - ONE, ZERO) and not r.at_least(s - const(2), ZERO)


def test_division_by_zero_sizes_is_harmless():
    r = ranges(i=0)
    assert r.floordiv(i, ZERO) == ZERO and r.mod(i, ZERO) == ZERO


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-9, 9), min_size=4, max_size=4), st.integers(1, 12), st.integers(1, 5), st.integers(1, 7))
def test_floor_division_and_modulo_are_exact(coefficients, d, m, n):
    a, b, c, e = coefficients
    r = ranges(i=m, j=n)
    p = const(a) * i + const(b) * j + const(c) + const(e) * s
    quotient, rest = r.floordiv(p, const(d)), r.mod(p, const(d))
    nested = r.mod(r.floordiv(p, const(2)), const(3))
    for x, y, z in itertools.product(range(m), range(n), (1, 2, 5)):
        exact = a * x + b * y + c + e * z
        assert value(quotient, i=x, j=y, s=z) == exact // d
        assert value(rest, i=x, j=y, s=z) == exact % d
        assert value(nested, i=x, j=y, s=z) == exact // 2 % 3
        low, high = r.bounds(p).lo, r.bounds(p).hi
        assert value(low, s=z) <= exact <= value(high, s=z)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_regrouping_keeps_the_position(shape, random):
    total = torch.Size(shape).numel()
    other = []
    left = total
    while left > 1:
        factor = random.choice([f for f in range(2, left + 1) if left % f == 0])
        other.append(factor)
        left //= factor
    names = "ijkl"[: len(shape)]
    r = ranges(**dict(zip(names, shape)))
    outer, inner = [const(n) for n in shape], [const(n) for n in other]
    index = regroup(tuple(map(variable, names)), outer, inner, r)
    position = r.recombine(linear(index, inner))
    for at in itertools.product(*map(range, shape)):
        env = dict(zip(names, at))
        assert value(position, **env) == value(linear([const(a) for a in at], outer))
        assert all(0 <= value(p, **env) < n for p, n in zip(index, other))


@given(st.lists(st.tuples(st.integers(-20, 20), st.sampled_from("ijs")), max_size=4), st.integers(1, 9))
def test_division_with_rest(terms, d):
    p = sum((const(c) * variable(n) for c, n in terms), start=ZERO)
    for divisor in (const(d), const(d) * s, s + const(d)):
        whole, rest = divide(p, divisor)
        assert whole * divisor + rest == p


def test_dense_layouts():
    dims = [const(2), const(3), const(4)]
    assert dense_order(dims, [const(12), const(4), const(1)]) == [0, 1, 2]
    assert dense_order(dims, [const(4), const(8), const(1)]) == [1, 0, 2]
    assert dense_order(dims, [const(24), const(8), const(2)]) is None


# -- placement


def body(build, *shapes):
    inputs = [graph_input(f"x{n}", TensorType(torch.float32, shape)) for n, shape in enumerate(shapes)]
    outs = build(*inputs)
    return make_graph("g", inputs, outs if isinstance(outs, tuple) else (outs,), symbols={"s": SymbolRange(1)})


def axes(placement):
    return [(expression(a.extent), a.inner) for a in placement.normal_form()[0]]


def test_a_reduction_anchors_the_axes():
    placed = place(body(lambda a: ops.sum(ops.exp(a), dims=(1,)), (3, 4, 5)))
    assert [(a.extent.constant, a.inner) for a in placed.axes] == [(3, False), (5, False), (4, True)]


def test_views_leave_no_points_and_equal_values_are_one():
    def turned(a):
        return ops.permute(ops.reshape(a, shape=(2, 6)), dims=(1, 0))

    placed = place(body(lambda a: ops.add(turned(a), turned(a)), (3, 4)))
    assert [p.kind for p in placed.points] == [Kind.LOAD, Kind.APPLY]


def test_recomputation_is_seen_as_points():
    def rotated(a):
        e = ops.exp(a)
        return ops.mul(e, ops.cat(ops.slice(e, dim=1, start=2, stop=4), ops.slice(e, dim=1, start=0, stop=2), dim=1))

    placed = place(body(rotated, (3, 4)))
    assert sum(p.node is not None and p.node.op.name == "exp" for p in placed.points) == 3


def test_axes_split_where_indices_divide():
    build = lambda a: ops.exp(ops.reshape(ops.permute(a, dims=(1, 0, 2)), shape=(4, 15)))  # noqa: E731
    assert axes(place(body(build, (3, 4, 5)))) == [(4, False), (3, False), (5, False)]


def test_refusals_name_the_node():
    with pytest.raises(Refusal) as caught:
        place(body(lambda a: ops.sum(ops.sub(a, ops.amax(a, dims=(1,), keepdim=True)), dims=(0,)), (3, 3)))
    assert caught.value.reason is Reason.TILED_AXIS and caught.value.node.op.name == "amax"
    with pytest.raises(Refusal) as caught:
        place(body(lambda a, b: (ops.exp(a), ops.exp(b)), (3,), (4,)))
    assert caught.value.reason is Reason.DIFFERENT_SPACE and "[3]" in caught.value.value
