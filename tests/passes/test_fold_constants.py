"""fold-constants: what folds, what memory forbids, what is shared."""

from __future__ import annotations

import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import constants, order
from tilewright.passes.base import Reason
from tilewright.passes.fold_constants import FoldConstants

A, B = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -0.0])


def test_picture() -> None:
    before = body("x: f32[2]", 'a = constant "a" : f32[2]', 'b = constant "b" : f32[2]', "c = add(a, b)", "y = mul(x, c)", "y")
    old, new, notes = run(FoldConstants(), before, {"a": A, "b": B})
    assert_becomes(new, body("x: f32[2]", 'c = constant "a.add" : f32[2]', "y = mul(x, c)", "y"))
    assert_same_values(old, new, [torch.randn(2)])
    assert [a.rule for a in notes.applied] == ["fold-constants"]


def test_fills_stay_fills_of_any_size() -> None:
    before = body("x: f32[b, 8]", "a = full(shape=[b, 8], value=2.0, dtype=f32)", "c = sqrt(a)", "d = mul(c, 3)", "y = add(x, d)", "y")
    old, new, _ = run(FoldConstants(), before)
    assert [n.op.name for n in order(new)] == ["input", "full", "add"]
    assert_same_values(old, new, [torch.randn(3, 8)])


def test_refused_because_memory_would_grow() -> None:
    item = FoldConstants(allowance=16)
    lines = ['a = constant "a"', "i = full(shape=[64], value=0, dtype=i64)", "e = embedding(a, i)", "y = add(x, e)", "y"]
    text = body("x: f32[64, 64]", *lines)
    old, new, notes = run(item, text, {"a": torch.randn(2, 64)})
    assert refusals(notes) == {("fold-constants", Reason.MEMORY)}
    assert "embedding" in [n.op.name for n in order(new)]
    assert_same_values(old, new, [torch.randn(64, 64)])


def test_generated_values_fold_only_while_small() -> None:
    lines = "r = iota(length={n})", "c = mul(r, 3)", "y = add(x, c)", "y"
    small = body("x: i64[8]", *(line.format(n=8) for line in lines))
    big = body("x: i64[1024]", *(line.format(n=1024) for line in lines))
    old, new, notes = run(FoldConstants(allowance=4096), big)
    assert refusals(notes) == {("fold-constants", Reason.MEMORY)}
    assert_becomes(new, old)
    old, new, _ = run(FoldConstants(), small)
    assert [n.op.name for n in order(new)] == ["input", "constant", "add"]
    assert_same_values(old, new, [torch.arange(8)])


def test_views_of_constants_stay_views() -> None:
    text = body("x: f32[2, 3]", 'w = constant "w"', "t = permute(w, dims=[1, 0])", "y = linear(x, t)", "y")
    _, new, _ = run(FoldConstants(), text, {"w": torch.randn(3, 4)})
    assert [n.op.name for n in order(new)] == ["input", "constant", "permute", "linear"]


def test_folds_through_views() -> None:
    text = body("x: f32[4, 3]", 'w = constant "w"', "t = permute(w, dims=[1, 0])", "d = mul(t, 2.0)", "y = add(x, d)", "y")
    old, new, _ = run(FoldConstants(), text, {"w": torch.randn(3, 4)})
    assert [n.op.name for n in order(new)] == ["input", "constant", "add"]
    assert_same_values(old, new, [torch.randn(4, 3)])


def test_equal_constants_become_one_to_the_bit() -> None:
    lines = ['a = constant "a"', 'b = constant "b"', 'c = constant "c"', "s = add(x, a)", "t = mul(s, b)", "y = sub(t, c)", "y"]
    minus = torch.tensor([-0.0, float("nan")])
    values = {"a": minus.clone(), "b": minus.clone(), "c": torch.tensor([0.0, float("nan")])}
    old, new, notes = run(FoldConstants(), body("x: f32[2]", *lines), values)
    assert sorted(constants(new)) == ["a", "c"]
    assert [a.rule for a in notes.applied] == ["fold-constants.share"]
    assert_same_values(old, new, [torch.randn(2)])


def test_constants_without_data_stay() -> None:
    text = body("x: f32[2]", 'a = constant "a" : f32[2]', "c = add(a, a)", "y = mul(x, c)", "y")
    old, new, _ = run(FoldConstants(), text)
    assert_becomes(new, old)
