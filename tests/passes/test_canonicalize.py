"""canonicalize: the picture of every rule, bit for bit; what must stay; generated graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_checks import assert_becomes, assert_same_values, body, refusals, run, special
from tilewright.ir.graph import Stage, graph_input, make_graph, order
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType
from tilewright.passes.base import Reason
from tilewright.passes.canonicalize import Canonicalize

F = "x: f32[4, 6]"
I = "x: i32[4, 6]"  # noqa: E741
B = "x: bool[4, 6]"

EXACT = [
    # signature, expression on x, what it becomes
    (F, "sub(x, 0.0)", "x"), (I, "add(x, 0)", "x"), (F, "add(x, -0.0)", "x"), (I, "sub(0, x)", "neg(x)"),
    (F, "mul(x, 1)", "x"), (F, "mul(1.0, x)", "x"), (F, "div(x, 1)", "x"), (F, "mul(x, -1)", "neg(x)"), (I, "mul(x, 0)", None),
    (I, "mul(x, 1.0)", "cast(x, dtype=f32)"), (F, "mul(2.0, x)", "mul(x, 2.0)"), (F, "lt(1.0, x)", "gt(x, 1.0)"),
    (F, "div(x, 8)", "mul(x, 0.125)"), (I, "div(x, 4)", "mul(x, 0.25)"), (F, "mul(x, x)", "square(x)"), (F, "div(1, x)", "reciprocal(x)"),
    (F, "pow(x, 0)", "full(shape=[4, 6], value=1, dtype=f32)"), (F, "pow(x, 1)", "x"), (F, "pow(x, 2)", "square(x)"),
    (I, "pow(x, 2)", "square(x)"),
    (F, "pow(x, 0.5)", "sqrt(x)"), (F, "pow(x, -0.5)", "rsqrt(x)"), (F, "pow(x, -1)", "reciprocal(x)"),
    (F, "where(true_, x, 2.0)", "x"), (F, "cast(x, dtype=f32)", "x"), (F, "reshape(x, shape=[4, 6])", "x"),
    (F, "expand(x, shape=[4, 6])", "x"),
    (F, "permute(x, dims=[0, 1])", "x"), (F, "flip(x, dims=[])", "x"), (F, "slice(x, dim=1, start=0, stop=6)", "x"),
    (F, "cat(x, dim=1)", "x"), (F, "pad(x, low=[0, 0], high=[0, 0])", "x"), (F, "sum(x, dims=[-1])", "sum(x, dims=[1])"),
    (F, "amax(x)", "amax(x, dims=[0, 1])"), (F, "softmax(x, dim=-1)", "softmax(x, dim=1)"), (F, "maximum(x, x)", "x"),
    (B, "bitwise_and(x, x)", "x"), (B, "logical_and(x, true)", "x"), (B, "bitwise_not(x)", "logical_not(x)"),
    (F, "select(x, dim=-1, index=2)", "select(x, dim=1, index=2)"),
]  # fmt: skip

CHAINS = [
    (F, ("neg(x)", "neg(a)"), "x"), (F, ("abs(x)", "abs(a)"), "abs(x)"), (F, ("neg(x)", "square(a)"), "square(x)"),
    (F, ("relu(x)", "relu(a)"), "relu(x)"), (F, ("sqrt(x)", "reciprocal(a)"), "rsqrt(x)"), (F, ("neg(x)", "add(a, 1.5)"), "sub(1.5, x)"),
    (F, ("exp(x)", "add(a, 0.0)"), "exp(x)"), (F, ("eq(x, 1.0)", "logical_not(a)"), "ne(x, 1.0)"),
    (F, ("cast(x, dtype=f64)", "cast(a, dtype=bf16)"), "cast(x, dtype=bf16)"),
    (B, ("cast(x, dtype=i64)", "cast(a, dtype=f32)"), "cast(x, dtype=f32)"),
    (F, ("permute(x, dims=[1, 0])", "permute(a, dims=[1, 0])"), "x"),
    (F, ("reshape(x, shape=[24])", "reshape(a, shape=[6, 4])"), "reshape(x, shape=[6, 4])"),
    (F, ("expand(x, shape=[1, 4, 6])", "expand(a, shape=[3, 4, 6])"), "expand(x, shape=[3, 4, 6])"),
    (F, ("slice(x, dim=1, start=1, stop=6)", "slice(a, dim=1, start=1, stop=3)"), "slice(x, dim=1, start=2, stop=4)"),

    (F, ("slice(x, dim=1, start=1, stop=6, step=2)", "slice(a, dim=1, start=0, stop=3, step=2)"),
     "slice(x, dim=1, start=1, stop=6, step=4)"),
    (F, ("slice(x, dim=1, start=1, stop=6, step=2)", "select(a, dim=1, index=2)"), "select(x, dim=1, index=5)"),
    (F, ("expand(x, shape=[3, 4, 6])", "select(a, dim=0, index=1)"), "x"),
    (F, ("expand(x, shape=[3, 4, 6])", "slice(a, dim=0, start=1, stop=3)"), "expand(x, shape=[2, 4, 6])"),
    (F, ("flip(x, dims=[0])", "flip(a, dims=[0, 1])"), "flip(x, dims=[1])"),
    (F, ("cat(x, x, dim=1)", "slice(a, dim=1, start=7, stop=9)"), "slice(x, dim=1, start=1, stop=3)"),
    (F, ("full(shape=[1], value=2.0, dtype=f32)", "expand(a, shape=[5])"), "full(shape=[5], value=2.0, dtype=f32)"),
]  # fmt: skip


def _sample(signature: str) -> torch.Tensor:
    if "i32" in signature:
        return torch.arange(-12, 12, dtype=torch.int32).reshape(4, 6)
    return special(4, 6) if "f32" in signature else torch.arange(24).reshape(4, 6) % 3 == 0


@pytest.mark.parametrize(("signature", "before", "after"), EXACT)
def test_rule(signature: str, before: str, after: str | None) -> None:
    lines = ["true_ = full(shape=[4, 6], value=true, dtype=bool)"] if "true_" in before else []
    old, new, _ = run(Canonicalize(), body(signature, *lines, f"y = {before}", "y"))
    wanted = after or "full(shape=[4, 6], value=0, dtype=i32)"
    assert_becomes(new, body(signature, "x") if wanted == "x" else body(signature, f"y = {wanted}", "y"))
    assert_same_values(old, new, [_sample(signature)])
    assert new.stage == Stage.CANONICAL


@pytest.mark.parametrize(("signature", "before", "after"), CHAINS)
def test_composition(signature: str, before: tuple[str, str], after: str) -> None:
    old, new, _ = run(Canonicalize(), body(signature, f"a = {before[0]}", f"y = {before[1]}", "y"))
    assert_becomes(new, body(signature, "x") if after == "x" else body(signature, f"y = {after}", "y"))
    assert_same_values(old, new, [_sample(signature)])


@pytest.mark.parametrize(
    ("signature", "before", "rule", "reason"),
    [
        (F, "add(x, 0.0)", "add-zero", Reason.SIGNED_ZERO),
        (F, "sub(0.0, x)", "zero-sub", Reason.SIGNED_ZERO),
        (F, "mul(x, 0.0)", "times-zero", Reason.NOT_FINITE),
        (F, "div(x, 3.0)", "div-by-power-of-two", Reason.ROUNDING),
        ("x: bf16[4, 6]", "pow(x, 3)", "power", Reason.ROUNDING),
    ],
)
def test_refused(signature: str, before: str, rule: str, reason: Reason) -> None:
    old, new, notes = run(Canonicalize(), body(signature, f"y = {before}", "y"))
    assert refusals(notes) == {(f"canonicalize.{rule}", reason)}
    assert [n.op.name for n in order(new)] == [n.op.name for n in order(old)]


def test_refused_casts_and_roots() -> None:
    _, _, notes = run(Canonicalize(), body(F, "a = cast(x, dtype=f16)", "y = cast(a, dtype=f32)", "y"))
    assert refusals(notes) == {("canonicalize.cast-of-cast", Reason.ROUNDING)}
    _, _, notes = run(Canonicalize(), body("x: f16[4]", "a = sqrt(x)", "y = reciprocal(a)", "y"))
    assert refusals(notes) == {("canonicalize.reciprocal-of-sqrt", Reason.ROUNDING)}


def test_picture() -> None:
    before = """graph g(x: f32[b, s, 8], w: f32[4, 8], bias: f32[4]) {
      w2 = permute(w, dims=[1, 0])
      h = reshape(x, shape=[b*s, 8])
      m = matmul(h, w2)
      y = add(m, bias)
      r = reshape(y, shape=[b, s, 4])
      z = mul(r, 1)
      return z
    }"""
    old, new, _ = run(Canonicalize(), before)
    assert_becomes(new, body("x: f32[b, s, 8], w: f32[4, 8], bias: f32[4]", "y = linear(x, w, bias)", "y"))
    assert_same_values(old, new, [torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)], 1e-5)


def test_shared_product_keeps_its_bias_apart() -> None:
    text = body("x: f32[3, 8], w: f32[4, 8], b: f32[4]", "m = linear(x, w)", "y = add(m, b)", "y, m")
    _, new, notes = run(Canonicalize(), text)
    assert refusals(notes) == {("canonicalize.bias-into-linear", Reason.SHARED)}
    assert_becomes(new, text)


GRID = ("i = iota(length=4)", "rows = reshape(i, shape=[4, 1, 1])", "j = iota(length=6)")


@pytest.mark.parametrize(
    ("lines", "y", "after"),
    [
        (GRID, "index(x, rows, j, dims=[0, 1])", "reshape(x, shape=[4, 1, 6])"),
        (GRID, "index(x, j, dims=[1])", "x"),
        (GRID, "index(x, i, dims=[1])", None),
        (("i = iota(length=4)", "j = iota(length=6)", "columns = reshape(j, shape=[6, 1])"), "index(x, i, columns, dims=[0, 1])", None),
        (("j = iota(length=6, start=5, step=-1)",), "index(x, j, dims=[1])", None),
    ],
)
def test_index_of_every_position_is_a_view(lines: tuple[str, ...], y: str, after: str | None) -> None:
    old, new, _ = run(Canonicalize(), body(F, *lines, f"y = {y}", "y"))
    wanted = body(F, *lines, f"y = {y}", "y") if after is None else body(F, "x") if after == "x" else body(F, f"y = {after}", "y")
    assert_becomes(new, wanted)
    assert_same_values(old, new, [_sample(F)])


def test_batched_products_unfold() -> None:
    before = """graph g(q: f32[b, 2, s, 8], k: f32[b, 2, 8, s]) {
      a = reshape(q, shape=[b*2, s, 8])
      c = reshape(k, shape=[b*2, 8, s])
      m = matmul(a, c)
      y = reshape(m, shape=[b, 2, s, s])
      return y
    }"""
    old, new, _ = run(Canonicalize(), before)
    assert_becomes(new, body("q: f32[b, 2, s, 8], k: f32[b, 2, 8, s]", "y = matmul(q, k)", "y"))
    assert_same_values(old, new, [torch.randn(3, 2, 4, 8), torch.randn(3, 2, 8, 4)], 1e-5)


def test_linear_takes_leading_dims_from_what_follows() -> None:
    before = body(
        "x: f32[2, 3, 4, 2], w: f32[5, 8]", "h = reshape(x, shape=[6, 8])", "m = linear(h, w)", "y = reshape(m, shape=[2, 3, 5])", "y"
    )
    old, new, _ = run(Canonicalize(), before)
    assert_becomes(new, body("x: f32[2, 3, 4, 2], w: f32[5, 8]", "h = reshape(x, shape=[2, 3, 8])", "y = linear(h, w)", "y"))
    assert_same_values(old, new, [torch.randn(2, 3, 4, 2), torch.randn(5, 8)], 1e-5)


def test_cat_of_all_slices_and_mean_of_sum() -> None:
    lines = ["a = slice(x, dim=1, start=0, stop=2)", "c = slice(x, dim=1, start=2, stop=6)", "y = cat(a, c, dim=-1)", "y"]
    _, new, _ = run(Canonicalize(), body(F, *lines))
    assert_becomes(new, body(F, "x"))
    _, new, _ = run(Canonicalize(), body("x: f32[b, s]", "t = sum(x, dims=[1])", "y = div(t, s)", "y"))
    assert_becomes(new, body("x: f32[b, s]", "y = mean(x, dims=[1])", "y"))


def test_operands_have_no_layout_but_outputs_do() -> None:
    text = body(F, "a = layout(x, strides=[1, 4])", "b = neg(a)", "y = layout(b, strides=[1, 4])", "y")
    _, new, _ = run(Canonicalize(), text)
    assert_becomes(new, body(F, "b = neg(x)", "y = layout(b, strides=[1, 4])", "y"))


# -- generated graphs

_UNARY = ["neg", "abs", "relu", "square", "sqrt", "reciprocal", "exp", "floor", "sign"]
_BINARY = ["add", "sub", "mul", "div", "maximum", "minimum"]
_NUMBERS = [0, 1, -1, 2, 0.0, -0.0, 1.0, 0.5, 3.0, -1.0, 8.0]
_VIEWS = ["transpose", "flatten", "flip", "halve", "twice", "front"]


def _view(kind: str, x, shape: tuple[int, ...]):
    rank = len(shape)
    if kind == "transpose":
        return OPS["permute"](x, dims=tuple(reversed(range(rank))))
    if kind == "flatten":
        return OPS["reshape"](x, shape=(x.tensor.numel,))
    if kind == "flip":
        return OPS["flip"](x, dims=(-1,))
    if kind == "twice":
        return OPS["cat"](x, x, dim=-1)
    if kind == "front":
        return OPS["select"](OPS["expand"](x, shape=(2, *shape)), dim=0, index=1)
    return OPS["slice"](x, dim=-1, start=shape[-1] // 3, stop=shape[-1])


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_generated_graphs_keep_every_bit(data: st.DataObject) -> None:
    x = graph_input("x", TensorType(torch.float32, (4, 6)))
    pool = [x]
    for _ in range(data.draw(st.integers(1, 10))):
        a = data.draw(st.sampled_from(pool))
        kind = data.draw(st.sampled_from(["unary", "number", "binary", "view"]))
        if kind == "unary":
            made = OPS[data.draw(st.sampled_from(_UNARY))](a)
        elif kind == "number":
            pair = (a, data.draw(st.sampled_from(_NUMBERS)))
            made = OPS[data.draw(st.sampled_from(["add", "sub", "mul", "div"]))](*(pair if data.draw(st.booleans()) else pair[::-1]))
        elif kind == "view":
            made = _view(data.draw(st.sampled_from(_VIEWS)), a, a.shape)
        else:
            fitting = [n for n in pool if n.shape == a.shape]
            made = OPS[data.draw(st.sampled_from(_BINARY))](a, data.draw(st.sampled_from(fitting)))
        pool.append(made)
    graph = make_graph("g", [x], pool[-2:])
    assert_same_values(graph, Canonicalize().run(graph), [special(4, 6)])
