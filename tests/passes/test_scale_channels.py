"""scale-channels: the same function with channels divided and weights multiplied, wherever that costs nothing, and every reason not to."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, run
from tilewright.ir.reasons import Reason
from tilewright.passes.scale_channels import ScaleChannels

CASES = {
    "norm": ["n = layer_norm(x, g, h, axes=1, eps=1e-05)", "q = linear(n, w)", "k = linear(n, v)", "y = add(q, k)"],
    "norm without scale": ["n = rms_norm(x, axes=1, eps=1e-05)", "y = linear(n, w, h)"],
    "rms norm": ["n = rms_norm(x, g, axes=1, eps=1e-05)", "y = linear(n, w)"],
    "linear": ["n = linear(x, v, g)", "y = linear(n, w)"],
    "pointwise": ["a = linear(x, v)", "n = gelu(a)", "y = linear(n, w)"],
    "chain": ["m = relu(x)", "n = linear(m, v, g)", "y = linear(n, w)"],
    "one weight for two": ["n = relu(x)", "q = linear(n, w)", "k = linear(n, w, h)", "y = add(q, k)"],
}
REFUSED = {
    "residual": (["n = relu(x)", "q = linear(n, w)", "y = add(q, n)"], Reason.SHARED),
    "output": (["y = relu(x)", "q = linear(y, w)", "r = sum(q)"], Reason.SHARED),
    "read as a weight": (["n = relu(x)", "q = linear(n, w)", "r = permute(n, dims=[1, 0])", "y = matmul(r, q)"], Reason.SHARED),
    "weight of two values": (["n = relu(x)", "m = neg(x)", "q = linear(n, w)", "k = linear(m, w)", "y = add(q, k)"], Reason.SHARED),
    "input": (["y = linear(x, w)"], Reason.NO_GAIN),
    "reduction": (["n = softmax(x, dim=1)", "y = linear(n, w)"], Reason.NO_GAIN),
    "weight in front read elsewhere": (["n = linear(x, v)", "q = linear(n, w)", "y = linear(q, v)"], Reason.SHARED),
    "norm of the input's making": (["n = rms_norm(x, z, axes=1, eps=1e-05)", "y = linear(n, w)"], Reason.NOT_CONSTANT),
}


def _text(lines: list[str], kind: str = "f32") -> str:
    parameters = [f'{name} = constant "{name}"' for name in "vwgh"]
    result = "y, r" if lines[-1].startswith("r") else "y"
    return body(f"x: {kind}[16, 16], z: {kind}[16]", *parameters, *lines, result)


def _values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(16, 16, dtype=dtype) for name in "vw"} | {name: torch.randn(16, dtype=dtype) for name in "gh"}


def _scales() -> dict[str, torch.Tensor]:
    return {name: torch.rand(16) * 8 + 0.1 for name in "vw"}


@pytest.mark.parametrize("case", CASES)
def test_same_function(case: str) -> None:
    old, new, notes = run(ScaleChannels(_scales()), _text(CASES[case]), _values())
    assert new is not old and notes.applied
    assert_same_values(old, new, [torch.randn(16, 16), torch.randn(16)], 1e-5)


def test_picture() -> None:
    _, new, _ = run(ScaleChannels(_scales()), _text(CASES["norm"]), _values())
    assert_becomes(new, body(
        "x: f32[16, 16], z: f32[16]", 'g = constant "g.scaled" : f32[16]', 'h = constant "h.scaled" : f32[16]',
        'w = constant "w.scaled" : f32[16, 16]', 'v = constant "v.scaled" : f32[16, 16]',
        "n = layer_norm(x, g, h, axes=1, eps=1e-05)", "q = linear(n, w)", "k = linear(n, v)", "y = add(q, k)", "y",
    ))  # fmt: skip


def test_channels_are_divided() -> None:
    scales = _scales()
    _, new, _ = run(ScaleChannels(scales), _text(CASES["pointwise"]), _values())
    (y,) = new.outputs
    factor = y.inputs[0].inputs[1].attrs["data"].value
    torch.testing.assert_close(factor, 1 / scales["w"])


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    lines, reason = REFUSED[case]
    old, new, notes = run(ScaleChannels({"w": torch.full((16,), 2.0)}), _text(lines), _values())
    assert new is old and reason in {d.reason for d in notes.declined}


def test_refused_dtypes_and_channels_without_a_scale() -> None:
    old, new, notes = run(ScaleChannels(_scales()), _text(CASES["pointwise"], "bf16"), _values(torch.bfloat16))
    assert new is old and Reason.ROUNDING in {d.reason for d in notes.declined}
    old, new, notes = run(ScaleChannels(), _text(CASES["pointwise"]), _values())
    assert new is old and Reason.NO_GAIN in {d.reason for d in notes.declined}
