"""How long the layers of a model take in each format, on this machine: measured, with all that runs instead of them.

Layers of equal shapes are measured as one group: a graph of several of them, each with weights of its own, so that memory is read as in the
model rather than caches; their candidates are called in turn (`tuner.py`), and verdicts are kept in the database.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..ir.analysis.hashing import structural_hash
from ..ir.graph import Graph
from ..passes.formats import FORMATS
from ..passes.layers import Layer
from ..passes.quantize import Encoded, Known, encoded, requantized
from .database import Database, Key
from .examples import example_inputs
from .sensitivity import Progress, alone
from .tuner import Run, remembered

EXACT = "exact"
COPIES = 6
"""Layers of a group that are run one after the other, at most."""

SECONDS = 0.15
"""For each candidate of a group."""

Compile = Callable[[Graph], Callable[[list[Any]], Any]]


def layer_times(
    layers: Sequence[Layer],
    formats: Sequence[str],
    compiled: Compile,
    database: Database,
    progress: Progress = lambda done, total: None,
) -> dict[tuple[str, str], float]:
    """(layer, format) -> seconds of a call of its readers; of the format "exact" too. What a format cannot serve is missing.

    compiled: makes a canonical graph something to call.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(structural_hash(_exact([layer]), weights=False), []).append(layer)
    found: dict[tuple[str, str], float] = {}
    for done, (shape, members) in enumerate(groups.items()):
        progress(done, len(groups))
        for name, seconds in _group_times(shape, members[:COPIES], formats, compiled, database).items():
            found |= {(layer.name, name): seconds for layer in members}
    progress(len(groups), len(groups))
    return found


def _exact(layers: Sequence[Layer]) -> Graph:
    return alone([Encoded(layer, FORMATS["bf16"], {}) for layer in layers])[0]


def _group_times(shape: str, layers: Sequence[Layer], formats: Sequence[str], compiled: Compile, database: Database) -> Mapping[str, float]:
    """Format -> seconds for one layer of the group."""
    parts: Known = {}
    variants = {name: made for name in formats if isinstance(made := encoded(layers[0], FORMATS[name], known=parts), Encoded)}
    exact = _exact(layers)

    def candidates() -> dict[str, Run]:
        inputs = example_inputs(exact)
        graphs = {EXACT: exact} | {name: _in_format(layers, made) for name, made in variants.items()}
        return {name: _call(compiled(graph), inputs) for name, graph in graphs.items()}

    names = (EXACT, *variants)
    text = f"layers\0{shape}\0{len(layers)}"
    key = Key.here(hashlib.sha256(text.encode()).hexdigest(), ", ".join(str(n.type) for n in exact.inputs))
    verdict = remembered(key, database, candidates, EXACT, names, SECONDS * len(names))
    return {name: timing.seconds / len(layers) for name, timing in verdict.timings.items()}


def _in_format(layers: Sequence[Layer], made: Encoded) -> Graph:
    """All layers as one of them is encoded: time does not depend on the values."""
    chosen = [replace(made, layer=layer, parts={k: v.clone() for k, v in made.parts.items()}) for layer in layers]
    return requantized(*alone(chosen))


def _call(run: Callable[[list[Any]], Any], inputs: Sequence[Any]) -> Run:
    return lambda: run(list(inputs))
