"""How many tokens to merge behind each attention: counts as choices, see `rewrites.py`. The pass: `passes/merge_tokens.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.graph import Graph
from ..passes.base import Notes, Pass
from ..passes.merge_tokens import MergeTokens, tokens_of
from ..passes.token_maps import most_merged
from .rewrites import Place

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8)
"""Of all tokens, how many go behind one attention: what is tried unless the user says which."""


class Merging:
    """protected: so many first tokens stay as they are. shares: those to choose from."""

    def __init__(self, graph: Graph, notes: Notes, protected: int = 0, shares: Sequence[float] = SHARES) -> None:
        found = tokens_of(graph, notes)
        self.protected, self.count = protected, 0
        self.places: tuple[Place, ...] = ()
        if found is None:
            return
        self.count = found.count
        most = most_merged(found.count, protected)
        counts = sorted({min(most, round(share * found.count)) for share in shares} - {0})
        names = tuple(f"merge {count}" for count in counts)
        self.places = tuple(Place(site.name, site.x.prov.source, names) for site in found.sites)

    def passes(self, chosen: Mapping[str, str]) -> list[Pass]:
        """As many as can go, where those chosen alone are too many together."""
        counts: list[tuple[str, int]] = []
        left = self.count
        for name in (place.name for place in self.places if place.name in chosen):
            count = min(int(chosen[name].removeprefix("merge ")), most_merged(left, self.protected))
            counts.append((name, count))
            left -= count
        return [MergeTokens(tuple(counts), self.protected)] if counts else []
