"""A limit on what intermediate values take, kept by computing the first stage of images patch by patch (`passes.split_space`).

    "30%"  -->  a share of what plan-memory makes of the graph as it is  -->  the patches with the least arithmetic that take no more

What patches will take is foretold; what plan-memory makes of them decides, and where that is more, less is asked for. Weights in formats
may be intermediate values themselves, so of a graph in formats patches are found anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..codegen.program import arena_bytes
from ..ir.dims import hint
from ..ir.graph import Graph
from ..passes.base import Notes, Pass
from ..passes.manager import pass_text, run_passes
from ..passes.split_space import SplitSpace
from .budget import quantity
from .compile import Options
from .errors import TooManyActivations
from .pipeline import DEFAULT_PASSES, FINISHING, PREPARING

ATTEMPTS = 4

Finishing = Callable[[Graph], tuple[Pass, ...]]
"""The passes behind formats, for a graph."""


def unlimited(graph: Graph) -> tuple[Pass, ...]:
    """Of a model whose activations are not limited."""
    return FINISHING


def within_activations(graph: Graph, options: Options, limit: str | float) -> tuple[Options, Finishing]:
    """The options under which a captured graph keeps the limit, and what finishes forms of it so. Nothing is taken back for being slower:
    tuning knows time alone. Raises as `finishing_within` and what it returns."""
    finishing = finishing_within(graph, limit)
    passes = (*PREPARING, *finishing(run_passes(graph, PREPARING, Notes())))
    return replace(options, passes=",".join(map(pass_text, passes))), finishing


def finishing_within(graph: Graph, limit: str | float) -> Finishing:
    """What finishes forms of a captured graph so that their intermediate values take no more than `limit`: bytes, "2MB", or "30%" of what
    those of the graph do.

    Sizes that vary are taken at a plausible value. Raises BadOption for what is no amount; what is returned raises TooManyActivations where
    patches within the arithmetic that they may take do not suffice.
    """
    allowed = quantity("activations", limit, _taken(graph, DEFAULT_PASSES)) or 0.0
    return functools.partial(_finishing, allowed)


def _finishing(allowed: float, graph: Graph) -> tuple[Pass, ...]:
    before = _taken(graph, FINISHING)
    if before <= allowed:
        return FINISHING
    aim, least, notes = allowed, before, Notes()
    for _ in range(ATTEMPTS):
        passes, notes = (SplitSpace(limit=max(1, int(aim))), *FINISHING), Notes()
        taken = _taken(graph, passes, notes)
        if taken <= allowed:
            return passes
        if taken >= least:  # asking for less gives no less
            break
        aim, least = aim * allowed / taken, taken
    more = f"{SplitSpace().overhead:.0%}"
    found = f"{before:,} bytes, in patches with up to {more} more arithmetic {least:,}"
    reason = f"intermediate values take {found}, and {int(allowed):,} are allowed"
    raise TooManyActivations(path=graph.name, reason="; ".join([reason, *_declined(notes)]))


def _taken(graph: Graph, passes: Sequence[Pass], notes: Notes | None = None) -> int:
    made = run_passes(graph, passes, notes or Notes())
    return hint(arena_bytes(made), made.symbols)


def _declined(notes: Notes) -> list[str]:
    """Where patches end, and why, with the user's source lines."""
    found = [d for d in notes.declined if d.rule == SplitSpace.name]
    return [f"{d.what}{f' ({d.source})' if d.source else ''}: {d.value}" for d in found]
