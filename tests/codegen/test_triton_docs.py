"""The examples of docs/triton.md run, one after the other, and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

PAGE = Path(__file__).parents[2] / "docs" / "triton.md"


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for kind, text in re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), re.S):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        else:
            assert capsys.readouterr().out.strip() == text.strip()
