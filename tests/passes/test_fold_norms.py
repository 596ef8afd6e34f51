"""fold-norms: into the product before, into the linears behind, and every reason not to."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import order
from tilewright.passes.base import Reason
from tilewright.passes.fold_norms import FoldNorms

CONV = "c = conv(x, w, b, stride=[1, 1], padding=[1, 1], dilation=[1, 1])"


def _values(channels: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = {"w": (channels, 4, 3, 3), "b": (channels,), "mean": (channels,), "g": (channels,), "h": (channels,)}
    return {name: torch.randn(shape) for name, shape in names.items()} | {"var": torch.rand(channels) + 0.1}


def _constants(*names: str) -> list[str]:
    return [f'{n} = constant "{n}"' for n in names]


def _ops(graph) -> list[str]:
    return [n.op.name for n in order(graph) if n.op.name not in ("input", "constant")]


def test_picture_conv() -> None:
    text = body("x: f32[n, 4, 5, 5]", *_constants("w", "b", "mean", "var", "g", "h"), CONV, "y = batch_norm(c, mean, var, g, h)", "y")
    old, new, _ = run(FoldNorms(), text, _values())
    assert_becomes(new, """graph g(x: f32[n, 4, 5, 5]) {
      w = constant "w.scaled" : f32[6, 4, 3, 3]
      b = constant "b.shifted" : f32[6]
      y = conv(x, w, b, stride=[1, 1], padding=[1, 1], dilation=[1, 1])
      return y
    }""")  # fmt: skip
    assert_same_values(old, new, [torch.randn(2, 4, 5, 5)], 1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_conv_without_bias(groups: int) -> None:
    conv = f"c = conv(x, w, stride=[2], padding=[0], dilation=[1], groups={groups}, transposed=true)"
    text = body("x: f32[2, 4, 5]", *_constants("w", "mean", "var"), conv, "y = batch_norm(c, mean, var)", "y")
    values = _values(3 * groups) | {"w": torch.randn(4, 3, 3)}
    old, new, _ = run(FoldNorms(), text, values)
    assert _ops(new) == ["conv"]
    assert_same_values(old, new, [torch.randn(2, 4, 5)], 1e-5)


def test_primitive_affine_and_linear() -> None:
    lines = [*_constants("w", "g", "h"), "m = linear(x, w)", "s = mul(m, g)", "y = sub(s, h)", "y"]
    values = {"w": torch.randn(6, 4), "g": torch.randn(6), "h": torch.randn(1, 6)}
    old, new, _ = run(FoldNorms(), body("x: f32[3, 4]", *lines), values)
    assert _ops(new) == ["linear"]
    assert_same_values(old, new, [torch.randn(3, 4)], 1e-5)


def test_picture_layer_norm() -> None:
    lines = [*_constants("g", "h", "wq", "bq", "wk"), "n = layer_norm(x, g, h)", "q = linear(n, wq, bq)", "k = linear(n, wk)", "q, k"]
    values = {"g": torch.randn(8), "h": torch.randn(8), "wq": torch.randn(4, 8), "bq": torch.randn(4), "wk": torch.randn(5, 8)}
    old, new, _ = run(FoldNorms(), body("x: f32[b, 8]", *lines), values)
    assert_becomes(new, """graph g(x: f32[b, 8]) {
      n = layer_norm(x)
      wq = constant "wq.scaled" : f32[4, 8]
      bq = constant "bq.shifted" : f32[4]
      wk = constant "wk.scaled" : f32[5, 8]
      bk = constant "wk.shifted" : f32[5]
      q = linear(n, wq, bq)
      k = linear(n, wk, bk)
      return q, k
    }""")  # fmt: skip
    assert_same_values(old, new, [torch.randn(3, 8)], 1e-5)


def test_rms_norm_into_a_transposed_weight() -> None:
    lines = [*_constants("g", "w"), "t = permute(w, dims=[1, 0])", "n = rms_norm(x, g)", "y = linear(n, t)", "y"]
    old, new, _ = run(FoldNorms(), body("x: f32[b, 8]", *lines), {"g": torch.randn(8), "w": torch.randn(8, 4)})
    assert _ops(new) == ["rms_norm", "linear"] and len(order(new)) == 4
    assert_same_values(old, new, [torch.randn(3, 8)], 1e-5)


BN = ["y = batch_norm(c, mean, var, g, h)"]


@pytest.mark.parametrize(
    ("lines", "signature", "reason"),
    [
        ([CONV, *BN, "y, c"], "", Reason.SHARED),
        ([CONV.replace("w, b", "v, b"), *BN, "y"], ", v: f32[6, 4, 3, 3]", Reason.NOT_CONSTANT),
        ([CONV, "y = batch_norm(c, mean, v, g, h)", "y"], ", v: f32[6]", Reason.NOT_CONSTANT),
        ([CONV, *BN, CONV.replace("c =", "e ="), "y, w"], "", Reason.SHARED),
    ],
)
def test_refused_conv(lines: list[str], signature: str, reason: Reason) -> None:
    text = body("x: f32[n, 4, 5, 5]" + signature, *_constants("w", "b", "mean", "var", "g", "h"), *lines)
    _, new, notes = run(FoldNorms(), text, _values())
    assert refusals(notes) == {("fold-norms.batch-norm", reason)}
    assert "batch_norm" in _ops(new)


def test_refused_because_weights_would_overflow() -> None:
    lines = [*_constants("w", "g"), "m = linear(x, w)", "y = mul(m, g)", "y"]
    values = {"w": torch.full((2, 2), 60000.0, dtype=torch.float16), "g": torch.tensor([2.0, 3.0], dtype=torch.float16)}
    _, new, notes = run(FoldNorms(), body("x: f16[1, 2]", *lines), values)
    assert refusals(notes) == {("fold-norms.scale", Reason.NOT_FINITE)} and _ops(new) == ["linear", "mul"]


def test_refused_in_training() -> None:
    text = body(
        "x: f32[2, 4, 5, 5]", *_constants("w", "b", "mean", "var"), CONV,
        "t = extern[aten._native_batch_norm_legit.default](c, mean, var, args=[$0, none, none, $1, $2, true, 0.1, 1e-05]) "
        ": (f32[2, 6, 5, 5], f32[6], f32[6])", "y = item(t, index=0)", "y",
    )  # fmt: skip
    _, _, notes = run(FoldNorms(), text, _values())
    assert refusals(notes) == {("fold-norms.in-training", Reason.STATE)}


@pytest.mark.parametrize(
    ("signature", "tail", "reason"),
    [
        ("x: f32[b, 8]", ["q = linear(n, wq)", "z = neg(n)", "q, z"], Reason.SHARED),
        ("x: f32[b, 8]", ["q = linear(n, wq)", "q, n"], Reason.SHARED),
        ("x: f32[b, 8]", ["q = linear(n, wq)", "q, wq"], Reason.SHARED),
        ("x: f32[b, 8], v: f32[4, 8]", ["q = linear(n, v)", "q"], Reason.NOT_CONSTANT),
        ("x: f32[4, 8]", ["q = linear(wq, n)", "q"], Reason.SHARED),
    ],
)
def test_refused_layer_norm(signature: str, tail: list[str], reason: Reason) -> None:
    text = body(signature, *_constants("g", "wq"), "n = layer_norm(x, g)", *tail)
    old, new, notes = run(FoldNorms(), text, {"g": torch.randn(8), "wq": torch.randn(4, 8)})
    assert refusals(notes) == {("fold-norms.affine", reason)}
    assert_becomes(new, old)


def test_refused_because_the_scale_is_no_constant() -> None:
    text = body("x: f32[b, 8], g: f32[8]", *_constants("w"), "n = layer_norm(x, g)", "y = linear(n, w)", "y")
    _, _, notes = run(FoldNorms(), text, {"w": torch.randn(4, 8)})
    assert refusals(notes) == {("fold-norms.affine", Reason.NOT_CONSTANT)}


def test_refused_in_16_bits_and_over_two_dimensions() -> None:
    text = body("x: bf16[b, 8]", *_constants("g", "w"), "n = layer_norm(x, g)", "y = linear(n, w)", "y")
    _, _, notes = run(FoldNorms(), text, {"g": torch.randn(8).bfloat16(), "w": torch.randn(4, 8).bfloat16()})
    assert refusals(notes) == {("fold-norms.affine", Reason.ROUNDING)}
    text = body("x: f32[3, 2, 8]", *_constants("g", "w"), "n = layer_norm(x, g, axes=2)", "y = linear(n, w)", "y")
    _, _, notes = run(FoldNorms(), text, {"g": torch.randn(2, 8), "w": torch.randn(4, 8)})
    assert refusals(notes) == {("fold-norms.affine", Reason.SHAPE_MISMATCH)}
