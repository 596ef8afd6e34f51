"""All pairs of rewrites, on models they apply to, and of ways to generate: the same function, within bounds, or refused with a reason."""

from __future__ import annotations

from itertools import combinations

import generations
import pytest
from compositions import MODELS, PAGE, TRANSFORMS, page, pair, single
from generations import FEATURES
from matrices import EXACT


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_applies_to_a_model(name: str) -> None:
    found = [single(name, model) for model in MODELS]
    assert any(not f.refused for f in found), found
    assert all(f.error <= f.allowed for f in found)
    assert all(f.error > EXACT for f in found if not f.refused and TRANSFORMS[name].bounded is not None), "it does nothing"


@pytest.mark.parametrize(("first", "second"), list(combinations(TRANSFORMS, 2)))
def test_pairs(first: str, second: str) -> None:
    found = pair(first, second)
    assert found.refused or found.error <= found.allowed, found


@pytest.mark.parametrize("name", FEATURES)
def test_each_way_to_generate(name: str) -> None:
    found = generations.single(name)
    assert not found.refused and found.error <= found.allowed
    assert found.error > EXACT or FEATURES[name].bounded is None, "it does nothing"


@pytest.mark.parametrize(("first", "second"), list(combinations(FEATURES, 2)))
def test_pairs_of_ways_to_generate(first: str, second: str) -> None:
    found = generations.pair(first, second)
    assert found.refused or found.error <= found.allowed, found


def test_the_page_says_what_is() -> None:
    """But for digits, which other machines round otherwise."""
    shown = [line.split("|")[1::] for line in PAGE.read_text().splitlines() if line.startswith("| **")]
    now = [line.split("|")[1::] for line in page().splitlines() if line.startswith("| **")]
    kinds = [[["%" if "%" in cell else cell for cell in row] for row in rows] for rows in (shown, now)]
    assert kinds[0] == kinds[1], "run `python tests/compositions.py` to write the page anew"
