"""All pairs of rewrites, on models they apply to: the same function, within bounds, or refused with a reason."""

from __future__ import annotations

import pytest
from compositions import EXACT, MODELS, PAGE, PAIRS, TRANSFORMS, page, pair, single


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_applies_to_a_model(name: str) -> None:
    found = [single(name, model) for model in MODELS]
    assert any(not f.refused for f in found), found
    assert all(f.error <= f.allowed for f in found)
    assert all(f.error > EXACT for f in found if not f.refused and TRANSFORMS[name].bounded is not None), "it does nothing"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs(first: str, second: str) -> None:
    found = pair(first, second)
    assert found.refused or found.error <= found.allowed, found


def test_the_page_says_what_is() -> None:
    """But for digits, which other machines round otherwise."""
    shown = [line.split("|")[1::] for line in PAGE.read_text().splitlines() if line.startswith("| **")]
    now = [line.split("|")[1::] for line in page().splitlines() if line.startswith("| **")]
    kinds = [[["%" if "%" in cell else cell for cell in row] for row in rows] for rows in (shown, now)]
    assert kinds[0] == kinds[1], "run `python tests/compositions.py` to write the page anew"
