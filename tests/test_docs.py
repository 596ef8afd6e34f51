"""The pages of docs/ whose code runs: each ```python block is executed, and what it prints is the ```text block that follows it.

`python tests/test_docs.py` writes what is printed now into the pages.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("tour.md", "allocation.md", "budget.md", "stages.md", "patches.md", "axes.md", "padding.md", "merging.md", "blocks.md")
_BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)


def refreshed(page: str) -> str:
    """The page with what its code prints now."""
    names: dict[str, Any] = {"__name__": "tour"}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[1], page, "exec"), names)
        shown = "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines())
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{shown}\n```\n" if shown else "")

    return _BLOCK.sub(run, (DOCS / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, monkeypatch) -> None:
    """Other tests run meanwhile: no candidate is slower beyond noise."""
    monkeypatch.setattr(pytest.importorskip("tilewright.driver.within"), "CERTAINTY", 1e9)
    assert refreshed(page) == (DOCS / page).read_text(), "run `python tests/test_docs.py` to refresh the page"


LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = DOCS.parent / page
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    assert all((path.parent / target).exists() for target in LINK.findall(prose))


if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        (DOCS / name).write_text(refreshed(name))
