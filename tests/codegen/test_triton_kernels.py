"""Printed kernels run in Triton's interpreter (or on the GPU there is) and give what torch gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import on_gpu
from triton_kernels import CASES, Case

pytest.importorskip("triton")

from tilewright.codegen.triton.runtime import LaunchError, load, run
from tilewright.codegen.triton.schedule import Schedule, default_schedule, inner_groups, needs_whole_block
from tilewright.codegen.triton.templates import build

SCHEDULES = {
    "default": None,
    "rows": Schedule(xblock=1, rblock=64),
    "blocks": Schedule(xblock=4, rblock=64, wide=True),
    "looped": Schedule(xblock=2, rblock=16, persistent=False),
    "looped_rows": Schedule(xblock=1, rblock=8, persistent=False, wide=True),
}


def check(case: Case, schedule: Schedule | None, device: str = "cpu") -> None:
    """Every output within rounding of torch's."""
    inputs = {name: x.to(device).reshape(-1).clone() for name, x in case.inputs.items()}
    outputs = run(build(case.kernel, schedule), inputs, case.sizes, torch.device(device))
    for (name, ours), expected in zip(outputs.items(), case.expected(**case.inputs)):
        tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(ours.dtype, 2e-6)
        torch.testing.assert_close(
            ours.cpu(), expected.reshape(-1), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def applies(case: Case, schedule: str) -> bool:
    groups = inner_groups(case.kernel)
    return schedule == "default" or bool(groups) and not (schedule.startswith("looped") and needs_whole_block(case.kernel, groups))


@pytest.mark.parametrize(
    ("case", "schedule"), [(c, s) for c in CASES for s in SCHEDULES if applies(c, s)], ids=lambda v: getattr(v, "name", v)
)
def test_interpreted(case: Case, schedule: str) -> None:
    check(case, SCHEDULES[schedule])


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_gpu(case: Case) -> None:
    for name, schedule in SCHEDULES.items():
        if applies(case, name):
            check(case, schedule, "cuda")


def test_refuses_what_does_not_fit() -> None:
    case = next(c for c in CASES if c.name == "symbolic_softmax")
    program = build(case.kernel, Schedule(xblock=1, rblock=16, persistent=True))
    with pytest.raises(LaunchError, match="extent of 37 does not fit"):
        run(program, {"x": case.inputs["x"].reshape(-1)}, case.sizes)
    with pytest.raises(LaunchError, match="no value for the size 'n'"):
        run(program, {"x": case.inputs["x"].reshape(-1)}, {"m": 37})
    with pytest.raises(LaunchError, match="x is torch.float64"):
        run(program, {"x": case.inputs["x"].reshape(-1).double()}, case.sizes)


def test_source_on_disk_is_repaired(tmp_path: Path) -> None:
    source = build(CASES[0].kernel).source
    load(source, directory=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.read_text() == source
    file.write_text("half writ")
    load(source, interpreted=True, directory=tmp_path)
    assert [f.read_text() for f in tmp_path.iterdir()] == [source]


def test_default_schedule_follows_memory() -> None:
    by_name = {c.name: c.kernel for c in CASES}
    assert default_schedule(by_name["column_sum"]).xblock > 1, "columns are contiguous along the grid"
    assert default_schedule(by_name["symbolic_softmax"]).persistent is False, "an unknown extent is looped over"
    assert not default_schedule(by_name["symbolic_softmax"]).wide, "an unknown extent may be large, and has a kernel of its own then"
    assert not default_schedule(by_name["softmax"]).wide
    big = replace(by_name["add_relu"], outputs=(replace(by_name["add_relu"].outputs[0], size=2**32),))
    assert default_schedule(big).wide
