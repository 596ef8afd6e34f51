"""merge-linears: siblings become one; constants only, up to a width, where it pays."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import order
from tilewright.passes.base import Reason
from tilewright.passes.merge_linears import MergeLinears

W = {"wq": torch.randn(4, 8), "bq": torch.randn(4), "wk": torch.randn(6, 8), "wv": torch.randn(8, 4)}
CONSTANTS = [f'{n} = constant "{n}"' for n in W]
TAIL = ["a = relu(q)", "c = relu(k)", "a, c"]


def test_picture() -> None:
    text = body("x: f32[b, 8]", *CONSTANTS, "q = linear(x, wq, bq)", "k = linear(x, wk)", *TAIL)
    old, new, notes = run(MergeLinears(), text, W)
    assert_becomes(new, """graph g(x: f32[b, 8]) {
      w = constant "wq.merged" : f32[10, 8]
      c0 = constant "bq.merged" : f32[10]
      y = linear(x, w, c0)
      q = slice(y, dim=1, start=0, stop=4)
      k = slice(y, dim=1, start=4, stop=10)
      a = relu(q)
      c = relu(k)
      return a, c
    }""")  # fmt: skip
    assert_same_values(old, new, [torch.randn(3, 8)], 1e-5)
    assert notes.applied[0].bytes_saved > 0


def test_transposed_weights_and_three_siblings() -> None:
    lines = ["t = permute(wv, dims=[1, 0])", "q = linear(x, wq)", "k = linear(x, wk)", "v = linear(x, t)"]
    text = body("x: f32[2, b, 8]", *CONSTANTS, *lines, "a = relu(q)", "c = relu(k)", "d = relu(v)", "a, c, d")
    old, new, _ = run(MergeLinears(), text, W)
    assert [n.op.name for n in order(new)].count("linear") == 1
    assert_same_values(old, new, [torch.randn(2, 3, 8)], 1e-5)


def test_refused_beyond_max_columns() -> None:
    text = body("x: f32[b, 8]", *CONSTANTS, "q = linear(x, wq)", "k = linear(x, wk)", *TAIL)
    old, new, notes = run(MergeLinears(max_columns=8), text, W)
    assert refusals(notes) == {("merge-linears", Reason.TOO_LARGE)}
    assert_becomes(new, old)


@pytest.mark.parametrize(
    ("signature", "lines", "reason"),
    [
        (", v: f32[4, 8]", ["q = linear(x, v)", "k = linear(x, wk)", *TAIL], Reason.NOT_CONSTANT),
        ("", ["q = linear(x, wq)", "k = linear(x, wk)", "a = relu(q)", "c = relu(k)", "z = neg(wk)", "a, c, z"], Reason.SHARED),
    ],
)
def test_refused_weights(signature: str, lines: list[str], reason: Reason) -> None:
    text = body("x: f32[b, 8]" + signature, *CONSTANTS, *lines)
    old, new, notes = run(MergeLinears(), text, W)
    assert refusals(notes) == {("merge-linears", reason)}
    assert_becomes(new, old)


def test_refused_where_copies_cost_more() -> None:
    big = {"wq": torch.zeros(512, 8), "wk": torch.ones(512, 8)}
    text = body("x: f32[4096, 8]", 'wq = constant "wq"', 'wk = constant "wk"', "q = linear(x, wq)", "k = linear(x, wk)", "q, k")
    old, new, notes = run(MergeLinears(), text, big)
    assert refusals(notes) == {("merge-linears", Reason.NO_GAIN)}
    assert_becomes(new, old)


def test_an_only_child_stays_in_silence() -> None:
    text = body("x: f32[b, 8]", *CONSTANTS, "q = linear(x, wq, bq)", "y = relu(q)", "y")
    old, new, notes = run(MergeLinears(), text, W)
    assert not notes.declined and not notes.applied
    assert_becomes(new, old)


def test_refused_where_each_has_an_epilogue_of_its_own() -> None:
    weights = {"gate": torch.randn(256, 64), "up": torch.randn(256, 64)}
    lines = [*(f'{n} = constant "{n}"' for n in weights), "g = linear(x, gate)", "u = linear(x, up)", "s = silu(g)", "y = mul(s, u)", "y"]
    old, new, notes = run(MergeLinears(), body("x: f32[1024, 64]", *lines), weights)
    assert refusals(notes) == {("merge-linears", Reason.NO_GAIN)}
    assert_becomes(new, old)
