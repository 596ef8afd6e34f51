"""Which residual units to leave out, or to give the weights of a neighbour: see `rewrites.py`. The pass: `passes/prune_blocks.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.analysis.residuals import units
from ..ir.graph import Graph
from ..passes.base import Pass
from ..passes.prune_blocks import PruneBlocks, neighbour
from .rewrites import Place

REMOVED, SHARED = "removed", "shared"


class Pruning:
    """choices: REMOVED, SHARED, or both."""

    def __init__(self, graph: Graph, choices: Sequence[str] = (REMOVED, SHARED)) -> None:
        found = units(graph)
        offered = {unit: tuple(c for c in choices if c == REMOVED or neighbour(unit, found) is not None) for unit in found}
        self.places = tuple(Place(unit.name, unit.result.prov.source, names) for unit, names in offered.items() if names)

    def passes(self, chosen: Mapping[str, str]) -> list[Pass]:
        removed, shared = (tuple(name for name, how in chosen.items() if how == what) for what in (REMOVED, SHARED))
        return [PruneBlocks(removed, shared)] if chosen else []
