"""benchmarks/schedules.py on a few kernels: legal schedules compile, what ranks first does not spill, and the table says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import schedules
from schedules import Row, main, markdown


@pytest.mark.parametrize("kernels", ["softmax, 4096", "rnn, 1 row", "attention, 1 of 4096"])
def test_a_sample(tmp_path: Path, kernels: str) -> None:
    asked = ["--count", "4", "--ranked", "2", "--targets", "sm_80,sm_90", "--only", kernels, "--out", str(tmp_path)]
    assert main(asked) == 0
    rows = json.loads((tmp_path / "schedules.json").read_text())
    assert [(row["target"], row["sampled"]) for row in rows] == [("sm_80", 2), ("sm_90", 2)]
    assert all(row["best"] and row["legal"] > 20 and row["registers"] and not row["spills"] for row in rows)


def test_failures_are_counted_and_listed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(schedules, "taken", lambda *rest: "it fell over")
    row = schedules.measured("softmax, 4096 x 1024 float32", "sm_90", 2, 1, schedules.Database(tmp_path / "t.sqlite"))
    assert row.sampled == len(row.failed) == 2
    text = markdown([row, Row("another", "sm_80", 5, 0.1, sampled=3, spilled=1, best="xblock=1", spills=8)])
    assert "Of 5 legal schedules, drawn at random and compiled, 2 failed and 1 spill; of 2 that rank first, 1 spill." in text
    assert text.count("it fell over") == 2
