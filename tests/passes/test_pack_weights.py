"""pack-weights: constant weights become panels and views of them; everything else stays with the library."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import constants, order
from tilewright.passes.base import Reason
from tilewright.passes.contractions import WINDOW_PANELS, is_native
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.pack_weights import PackWeights, panel_of

W = {
    "w": torch.randn(50, 24),
    "c": torch.randn(50),
    "k": torch.randn(40, 8, 3, 3),
    "few": torch.randn(5, 24),
    "thin": torch.randn(16, 3, 3, 3),
}
NAMED = [f'{n} = constant "{n}"' for n in W]
CONV = "stride=[1, 1], padding=[1, 1], dilation=[1, 1]"


def test_picture() -> None:
    old, new, notes = run(PackWeights(), body("x: f32[2, b, 24]", *NAMED, "y = linear(x, w, c)", "y"), W)
    assert_becomes(new, """graph g(x: f32[2, b, 24]) {
      p = constant "w.panels" : f32[2, 24, 32]
      c = constant "c" : f32[50]
      t = permute(p, dims=[0, 2, 1])
      r = reshape(t, shape=[64, 24])
      w = slice(r, dim=0, start=0, stop=50)
      y = linear(x, w, c)
      return y
    }""")  # fmt: skip
    assert_same_values(old, new, [torch.randn(2, 3, 24)], 1e-5)
    assert len(notes.applied) == 1 and "w" not in constants(new)


def test_matmul_by_a_constant() -> None:
    text = body("x: f32[b, 24]", *NAMED, "t = permute(w, dims=[1, 0])", "y = matmul(x, t)", "y")
    old, new, _ = run(PackWeights(), text, W)
    assert is_native(new.outputs[0])
    assert_same_values(old, new, [torch.randn(3, 24)], 1e-5)


@pytest.mark.parametrize("x", ["1, b, 24", "3, b, 24", "b, 24"])
def test_matmul_by_a_stack_of_constants(x: str) -> None:
    text = body(f"x: f32[{x}]", 'e = constant "e"', "y = matmul(x, e)", "y")
    old, new, _ = run(PackWeights(), text, {"e": torch.randn(3, 24, 50)})
    assert is_native(new.outputs[0])
    assert_same_values(old, new, [torch.randn([int(d) if d != "b" else 5 for d in x.split(", ")])], 1e-5)


def test_convolution_with_channels_last() -> None:
    old, new, _ = run(PackWeights(), body("x: f32[b, 6, 5, 8]", *NAMED, f"y = conv(x, k, {CONV}, channels_last=True)", "y"), W)
    (panels,) = constants(new).values()
    assert panels.value is not None and panels.value.shape == (1, 3, 3, 8, 48) and is_native(new.outputs[0])
    assert_same_values(old, new, [torch.randn(2, 6, 5, 8)], 1e-5)


def test_depthwise_weights_have_their_channels_together() -> None:
    values = {"d": torch.randn(20, 1, 3, 2)}
    text = body("x: f32[b, 6, 5, 20]", 'd = constant "d"', f"y = conv(x, d, {CONV}, groups=20, channels_last=True)", "y")
    old, new, _ = run(PackWeights(), text, values)
    (taps,) = constants(new).values()
    assert taps.value is not None and taps.value.shape == (3, 2, 1, 20)
    assert_same_values(old, new, [torch.randn(2, 6, 5, 20)], 1e-5)


def test_one_weight_of_two_products_is_packed_once() -> None:
    text = body("x: f32[b, 24], z: f32[b, 24]", *NAMED, "y = linear(x, w)", "v = linear(z, w, c)", "y, v")
    old, new, _ = run(PackWeights(), text, W)
    assert set(constants(new)) == {"w.panels", "c"}
    assert_same_values(old, new, [torch.randn(3, 24), torch.randn(3, 24)], 1e-5)


TABLE = {"w": torch.randn(9001, 24)}  # no whole number of panels
IDS = torch.tensor([[0, 1, 47], [48, 95, 96], [8975, 8976, 9000]])


def test_an_embedding_picks_its_rows_out_of_the_panels() -> None:
    text = body("at: i64[b, 3]", 'w = constant "w"', "x = embedding(w, at)", "h = relu(x)", "y = linear(h, w)", "y, x")
    old, new, notes = run(PackWeights(), text, TABLE)
    assert set(constants(new)) == {"w.panels"} and is_native(new.outputs[0]) and not notes.declined
    fused = FuseRegions().run(new)
    assert [n.op.name for n in order(fused) if n.op.name in ("embedding", "linear")] == []
    assert_same_values(old, new, [IDS], 1e-5)
    assert_same_values(old, fused, [IDS], 1e-5)


@pytest.mark.parametrize(
    "lines", [["z = embedding(w, more)", "y, z"], ["t = slice(w, dim=0, start=0, stop=99)", "z = embedding(t, at)", "y, z"]]
)
def test_refused_because_of_an_embedding(lines: list[str]) -> None:
    signature = "at: i64[9], more: i64[20]"
    text = body(signature, 'w = constant "w"', "x = embedding(w, at)", "y = linear(x, w)", *lines)
    old, new, notes = run(PackWeights(), text, TABLE)
    assert refusals(notes) == {("pack-weights", Reason.NO_GAIN if "more" in lines[0] else Reason.SHARED)}
    assert_becomes(new, old)


def test_the_epilogue_joins_the_contraction() -> None:
    text = body("x: f32[b, 24], r: f32[b, 50]", *NAMED, "y = linear(x, w, c)", "h = relu(y)", "z = add(h, r)", "z")
    _, new, _ = run(PackWeights(), text, W)
    fused = FuseRegions().run(new)
    (region,) = fused.outputs
    assert region.op.name == "region" and region.attrs["label"] == "linear+relu+add"


@pytest.mark.parametrize(("columns", "width"), [(384, 48), (768, 48), (512, 48), (64, 32), (32, 32), (16, 16), (10, 16), (96, 48)])
def test_panels_that_waste_least(columns: int, width: int) -> None:
    assert panel_of(columns) == width


@pytest.mark.parametrize(("columns", "width"), [(384, 48), (512, 64), (64, 64), (32, 32), (24, 32), (96, 48)])
def test_panels_of_convolutions(columns: int, width: int) -> None:
    assert panel_of(columns, WINDOW_PANELS) == width


@pytest.mark.parametrize(
    ("signature", "lines", "reason"),
    [
        ("x: f32[b, 24], v: f32[50, 24]", ["y = linear(x, v)", "y"], Reason.NOT_CONSTANT),
        ("x: f32[b, 24]", ["y = linear(x, w)", "z = neg(w)", "y, z"], Reason.SHARED),
        ("x: f32[b, 24]", ["y = linear(x, w)", "y, w"], Reason.SHARED),
        ("x: f32[b, 24], at: i64[3]", ["y = linear(x, w)", "e = embedding(w, at)", "y, e"], Reason.NO_GAIN),
        ("x: f32[b, 24]", ["y = linear(x, few)", "y"], Reason.NO_GAIN),
        ("x: f32[24]", ["y = linear(x, w)", "y"], Reason.SHAPE_MISMATCH),
        ("x: f32[b, 8, 6, 5]", [f"y = conv(x, k, {CONV})", "y"], Reason.LAYOUT),
        ("x: f32[b, 6, 5, 40]", [f"y = conv(x, k, {CONV}, transposed=True, channels_last=True)", "y"], Reason.SHAPE_MISMATCH),
        ("x: f32[b, 6, 5, 3]", [f"y = conv(x, thin, {CONV}, channels_last=True)", "y"], Reason.NO_GAIN),
        ("x: f32[b, 6, 5, 16]", [f"y = conv(x, k, {CONV}, groups=2, channels_last=True)", "y"], Reason.SHAPE_MISMATCH),
    ],
)
def test_refused(signature: str, lines: list[str], reason: Reason) -> None:
    old, new, notes = run(PackWeights(), body(signature, *NAMED, *lines), W)
    assert refusals(notes) == {("pack-weights", reason)}
    assert_becomes(new, old)


def test_refused_because_few_rows_stream_the_weight() -> None:
    text = body("x: f32[1, 2, 128]", 'w = constant "w"', "y = linear(x, w)", "z = relu(y)", "z")
    _, new, notes = run(PackWeights(), text, {"w": torch.randn(256, 128)})
    assert refusals(notes) == {("pack-weights", Reason.NO_GAIN)} and is_native(new.outputs[0].inputs[0])
    (region,) = FuseRegions().run(new).outputs
    assert region.attrs["label"] == "linear+relu"


def test_refused_by_measurement_and_by_dtype() -> None:
    text = body("x: f32[b, 24]", *NAMED, "y = linear(x, w)", "y")
    _, _, notes = run(PackWeights(vendor=("w",)), text, W)
    assert refusals(notes) == {("pack-weights", Reason.LIBRARY_CALL)}
    narrow = {n: v.bfloat16() for n, v in W.items()}
    _, _, notes = run(PackWeights(), text.replace("f32", "bf16"), narrow)
    assert refusals(notes) == {("pack-weights", Reason.UNSUPPORTED_DTYPE)}


def test_refused_on_other_devices() -> None:
    before, after, notes = run(PackWeights(), body("x: f32[64, 24]@cuda:0, w: f32[96, 24]@cuda:0", "y = linear(x, w)", "y"))
    assert_becomes(after, before)
    assert refusals(notes) == {("pack-weights", Reason.OTHER_DEVICE)}
