"""How long the layers of a model take in each format, on this machine: measured, with all that runs instead of them; or foretold.

Layers of equal shapes are measured as one group: a graph of several of them, each with weights of its own, so that memory is read as in the
model rather than caches; their candidates are called in turn (`tuner.py`), and verdicts are kept in the database. For a machine that is not
here, the group is foretold together, within the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..ir.analysis.hashing import structural_hash
from ..ir.dims import SymbolRange, hint, symbol
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
    symbols: Mapping[str, SymbolRange] = {},
) -> dict[tuple[str, str], float]:
    """(layer, format) -> seconds of a call of its readers; of the format "exact" too. What a format cannot serve is missing.

    compiled: makes a canonical graph something to call. symbols: sizes that vary, measured at a plausible value of their range.
    """

    def measured(shape: str, members: Sequence[Layer]) -> Mapping[str, float]:
        return _measured(members[:COPIES], shape, formats, compiled, database, symbols)

    return _of_groups(layers, measured, progress)


def foretold_times(
    graph: Graph,
    layers: Sequence[Layer],
    formats: Sequence[str],
    foretold: Callable[[Graph], float],
    progress: Progress = lambda done, total: None,
) -> dict[tuple[str, str], float]:
    """The same for another machine, by what is foretold of the seconds of a canonical graph: the whole graph with a group in a format, less
    the exact one, so that what is fused with a layer counts."""
    whole = foretold(graph)

    def of_group(shape: str, members: Sequence[Layer]) -> Mapping[str, float]:
        spared = {
            name: (whole - foretold(requantized(graph, _as(members, made)))) / len(members)
            for name, made in _variants(members[0], formats).items()
        }
        exact = max(foretold(_exact(members[:1])), *spared.values(), 0.0)  # alone it may be quicker than with what is fused with it
        return {EXACT: exact} | {name: exact - gain for name, gain in spared.items()}

    return _of_groups(layers, of_group, progress)


def _of_groups(
    layers: Sequence[Layer], times: Callable[[str, Sequence[Layer]], Mapping[str, float]], progress: Progress
) -> dict[tuple[str, str], float]:
    """times: of the hash and the layers of a group, seconds by format for one of them."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(structural_hash(_exact([layer]), weights=False), []).append(layer)
    found: dict[tuple[str, str], float] = {}
    for done, (shape, members) in enumerate(groups.items()):
        progress(done, len(groups))
        for name, seconds in times(shape, members).items():
            found |= {(layer.name, name): seconds for layer in members}
    progress(len(groups), len(groups))
    return found


def _exact(layers: Sequence[Layer], symbols: Mapping[str, SymbolRange] = {}) -> Graph:
    return alone([Encoded(layer, FORMATS["bf16"], {}) for layer in layers], symbols)[0]


def _variants(layer: Layer, formats: Sequence[str]) -> dict[str, Encoded]:
    parts: Known = {}
    return {name: made for name in formats if isinstance(made := encoded(layer, FORMATS[name], known=parts), Encoded)}


def _measured(
    layers: Sequence[Layer], shape: str, formats: Sequence[str], compiled: Compile, database: Database, symbols: Mapping[str, SymbolRange]
) -> Mapping[str, float]:
    """Format -> seconds for one layer of the group."""
    variants, exact = _variants(layers[0], formats), _exact(layers, symbols)

    def candidates() -> dict[str, Run]:
        inputs = example_inputs(exact)
        graphs = {EXACT: exact} | {name: _in_format(layers, made, symbols) for name, made in variants.items()}
        return {name: _call(compiled(graph), inputs) for name, graph in graphs.items()}

    names = (EXACT, *variants)
    sizes = f"\0{sorted((name, hint(symbol(name), symbols)) for name in symbols)}" if symbols else ""
    text = f"layers\0{shape}\0{len(layers)}{sizes}"
    key = Key.here(hashlib.sha256(text.encode()).hexdigest(), ", ".join(str(n.type) for n in exact.inputs))
    verdict = remembered(key, database, candidates, EXACT, names, SECONDS * len(names))
    return {name: timing.seconds / len(layers) for name, timing in verdict.timings.items()}


def _in_format(layers: Sequence[Layer], made: Encoded, symbols: Mapping[str, SymbolRange]) -> Graph:
    return requantized(*alone(_as(layers, made), symbols))


def _as(layers: Sequence[Layer], made: Encoded) -> list[Encoded]:
    """All layers as one of them is encoded: time does not depend on the values."""
    return [replace(made, layer=layer, parts={k: v.clone() for k, v in made.parts.items()}) for layer in layers]


def _call(run: Callable[[list[Any]], Any], inputs: Sequence[Any]) -> Run:
    return lambda: run(list(inputs))
