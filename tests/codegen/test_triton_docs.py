"""The example of docs/triton.md runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

PAGE = Path(__file__).parents[2] / "docs" / "triton.md"


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(), re.S)
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip() == shown.strip()
