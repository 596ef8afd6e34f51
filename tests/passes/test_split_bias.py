"""split-bias: a bias moves into the kernel that reads the linear, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import order
from tilewright.passes.base import Reason
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.split_bias import SplitBias

INPUTS = "x: f32[2, n, 8], w: f32[8, 8], c: f32[8]"


def _values(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype), torch.randn(8, dtype=dtype)]


def test_picture() -> None:
    old, new, notes = run(SplitBias(), body(INPUTS, "h = linear(x, w, c)", 'y = gelu(h, approximate="none")', "y"))
    assert_becomes(new, body(INPUTS, "p = linear(x, w)", "h = add(p, c)", 'y = gelu(h, approximate="none")', "y"))
    assert_same_values(old, new, _values(), 1e-6)
    assert notes.applied[0].bytes_saved > 0 and not notes.declined


def test_the_sum_is_in_its_readers_kernel() -> None:
    text = body(f"{INPUTS}, r: f32[2, n, 8]", "h = linear(x, w, c)", "s = reshape(h, shape=[2, n, 8])", "y = add(s, r)", "z = relu(y)", "z")
    _, new, _ = run(SplitBias(), text)
    fused = FuseRegions().run(new)
    assert [n.op.name for n in order(fused) if n.op.name not in ("input", "reshape")] == ["linear", "region"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["h"], Reason.LIBRARY_CALL),
        (["y = matmul(h, w)", "y"], Reason.LIBRARY_CALL),
        (["y = relu(h)", "h, y"], Reason.SHARED),
        (["y = relu(h)", "z = matmul(h, w)", "y, z"], Reason.SHARED),
    ],
)
def test_refused(lines: list[str], reason: Reason) -> None:
    old, new, notes = run(SplitBias(), body(INPUTS, "h = linear(x, w, c)", *lines))
    assert refusals(notes) == {("split-bias", reason)}
    assert_becomes(new, old)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_narrow_types_round_once(kind: str) -> None:
    old, new, _ = run(SplitBias(), body(INPUTS.replace("f32", kind), "h = linear(x, w, c)", "y = relu(h)", "y"))
    assert_becomes(new, old)


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "native"), [(256, 128, 128, True), (255, 128, 128, False), (256, 128, 2052, False), (256, 40, 512, False)]
)
def test_linears_of_many_rows_are_kernels_of_ours_and_keep_their_bias(rows: int, columns: int, depth: int, native: bool) -> None:
    signature = f"x: f32[4, {rows // 4}, {depth}], w: f32[{columns}, {depth}], c: f32[{columns}]"
    if rows % 4:
        signature = signature.replace(f"x: f32[4, {rows // 4}, {depth}]", f"x: f32[{rows}, {depth}]")
    _, new, notes = run(SplitBias(), body(signature, "h = linear(x, w, c)", "y = relu(h)", "y"))
    assert bool(notes.applied) is not native
    (region,) = FuseRegions().run(new).outputs
    assert region.attrs["label"] == ("linear+relu" if native else "add+relu")
