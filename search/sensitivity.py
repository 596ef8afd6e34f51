"""What it does to the results of a model to keep one layer in another format: measured, from calibration inputs.

    layer              format      error of the outputs
    encoder.0.fc1      int8        4.1e-4
    encoder.0.fc1      int4-g32    6.3e-3

The model is run once; then, for each layer and format, what follows from that layer is run again. Formats that make the same of a layer
(groups of 64 and 128 in rows of 64) are told by a hash of what they compute, and measured once. Results are kept under a hash of the model
and the inputs, each as soon as it is known: who is interrupted goes on.

Where running all of them would take long, scores by gradients (`fisher.py`) come first. Of each layer then only those formats are run that
have least error for their bytes by score, and the others' errors are the scores, times what measuring makes of those that are run. Where
there are no scores, priors (`priors.py`) keep the layers that matter most from formats of few bits.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir.analysis.hashing import structural_hash
from ..ir.dims import SymbolRange
from ..ir.graph import Graph, Node, Stage, graph_input
from ..passes.formats import FORMATS
from ..passes.layers import Layer
from ..passes.quantize import Encoded, Known, encoded, requantized
from .database import Database
from .examples import with_sizes
from .fisher import Fisher
from .metrics import Metric
from .priors import LEAST_BITS, important
from .replay import Replay

LADDERS = (("fp16", "int8", "int4-g32", "int4-g64", "int4-g128"), ("int8", "int8-dynamic"), ("int4-split3", "int2-split3"))
"""Formats of which each says less than the one before: where it is measured to err less, that is luck."""

SECONDS = 60.0
"""Running every variant may take so long, in seconds; else only some are run, at least one for each layer."""

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Effect:
    """error: of the outputs, by the metric, if nothing but this layer is in that format; bytes: of its parts. Declined: why not.

    estimated: by score, rather than measured. pruned: the prior by which it was declined unmeasured.
    """

    error: float
    bytes: int
    declined: str = ""
    estimated: bool = False
    pruned: str = ""


@dataclass(frozen=True)
class _Short:
    """Time is short. scores: where there are any. most: variants of each layer that may be run. important: layers that matter most."""

    scores: Fisher | None
    most: int
    important: Mapping[str, str]


class Sensitivity:
    """A canonical graph, on calibration inputs (each a value for every input of the graph).

    grams: name of a layer -> x.T @ x of all inputs that it meets, in float64, for linears and products.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer], batches: Sequence[Sequence[Any]], metric: Metric, database: Database) -> None:
        self.graph, self.layers, self.metric, self.database = graph, layers, metric, database
        self.replays = [Replay(graph, batch) for batch in batches]
        self.grams = {layer.name: gram for layer in layers if (gram := self._gram(layer)) is not None}
        text = [structural_hash(graph, weights=True), metric.name, *(_digest(v) for batch in batches for v in batch)]
        self.key = hashlib.sha256("\0".join(text).encode()).hexdigest()
        self.known = database.errors(self.key)

    def effects(
        self, formats: Sequence[str], progress: Progress = lambda done, total: None, seconds: float = SECONDS
    ) -> dict[tuple[str, str], Effect]:
        """(layer, format) -> what the format does there."""
        short = self._short(len(self.layers) * len(formats) - len(self.known), seconds)
        return self._effects(formats, lambda layer, fits: self._of_layer(layer, fits, short), progress)

    def foretold(
        self, formats: Sequence[str], score: Callable[[Encoded], float], progress: Progress = lambda done, total: None
    ) -> dict[tuple[str, str], Effect]:
        """The same by a score: nothing is measured."""

        def of_layer(layer: Layer, fits: Mapping[str, Encoded]) -> dict[str, Effect]:
            return {name: Effect(score(made), made.nbytes, estimated=True) for name, made in fits.items()}

        return self._effects(formats, of_layer, progress)

    def _effects(
        self, formats: Sequence[str], of_layer: Callable[[Layer, Mapping[str, Encoded]], Mapping[str, Effect]], progress: Progress
    ) -> dict[tuple[str, str], Effect]:
        """of_layer: what the formats that serve a layer do there."""
        found: dict[tuple[str, str], Effect] = {}
        total = len(self.layers) * len(formats)
        for layer in self.layers:
            progress(len(found), total)
            parts: Known = {}
            made = {name: encoded(layer, FORMATS[name], self.grams.get(layer.name), parts) for name in formats}
            fits = {name: m for name, m in made.items() if isinstance(m, Encoded)}
            declined = {name: m for name, m in made.items() if not isinstance(m, Encoded)}
            found |= {(layer.name, name): Effect(math.inf, layer.nbytes, f"{m[0].value} ({m[1]})") for name, m in declined.items()}
            found |= {(layer.name, name): effect for name, effect in of_layer(layer, fits).items()}
        progress(total, total)
        return monotone(found, [layer.name for layer in self.layers])

    def _short(self, runs: int, seconds: float) -> _Short | None:
        """What there is to save time by, where so many runs would take longer."""
        each = sum(replay.seconds for replay in self.replays) / 2  # half of a graph follows a layer, on average
        if runs * each <= seconds:
            return None
        whole = all(replay.whole for replay in self.replays)  # else gradients would take too much memory
        scores = Fisher(self.graph, self.layers, self.replays, self.metric) if whole else None
        return _Short(scores, max(1, int(seconds / each / len(self.layers))), important(self.graph, self.layers, self.replays))

    def error_of(self, variant: Graph) -> float:
        """Of the worst batch."""
        return max(self.metric(replay.run(variant), replay.outputs) for replay in self.replays)

    def _of_layer(self, layer: Layer, made: Mapping[str, Encoded], short: _Short | None) -> dict[str, Effect]:
        """By format, of those that serve a layer."""
        scores = None if short is None else short.scores
        guesses = {} if scores is None else {name: error for name, m in made.items() if (error := scores.error(m)) is not None}
        prior = "" if short is None else short.important.get(layer.name, "")
        pruned = {name for name, m in made.items() if prior and name not in guesses and _bits(m) < LEAST_BITS}
        hull = efficient({name: (made[name].nbytes, error**self.metric.power) for name, error in guesses.items()})
        chosen = hull[-short.most :] if short is not None else []
        errors: dict[str, float] = {}  # by what is computed
        known = {name for name in made if (layer.name, name) in self.known}
        run = [name for name in made if name in known or name in chosen or name not in guesses and name not in pruned]
        measured = {name: self._measured(made[name], errors) for name in run}
        others = {name: error for name, error in guesses.items() if name not in measured}
        off = _off([(measured[name], error) for name, error in guesses.items() if name in measured])
        return {
            **{name: Effect(error, made[name].nbytes) for name, error in measured.items()},
            **{name: Effect(error * off, made[name].nbytes, estimated=True) for name, error in others.items()},
            **{name: Effect(math.inf, layer.nbytes, f"it matters most, says {prior}", pruned=prior) for name in pruned - known},
        }

    def _measured(self, made: Encoded, errors: dict[str, float]) -> float:
        place = made.layer.name, made.format.name
        if place not in self.known:
            function = structural_hash(requantized(*alone([made])), weights=True)
            if function not in errors:
                errors[function] = self.error_of(requantized(self.graph, [made]))
            self.known[place] = errors[function]
            self.database.put_error(self.key, *place, errors[function])
        return self.known[place]

    def _gram(self, layer: Layer) -> torch.Tensor | None:
        """Of a layer whose readers are linears and products."""
        if not layer.kinds <= {"linear", "matmul"}:
            return None
        inputs = [replay.value(reader.inputs[0]) for replay in self.replays for reader in layer.readers]
        rows = [x.reshape(-1, x.shape[-1]).double() for x in inputs]
        total = sum(x.T @ x for x in rows)
        return total if isinstance(total, torch.Tensor) and bool(total.isfinite().all()) else None


def _bits(made: Encoded) -> float:
    """Of a weight, on average."""
    return 8 * made.nbytes * made.layer.weight.dtype.itemsize / made.layer.nbytes


def _off(pairs: Sequence[tuple[float, float]]) -> float:
    """By what factor measured errors differ from scores, on the geometric mean."""
    ratios = [math.log(error / score) for error, score in pairs if min(error, score) > 0 and error < math.inf]
    return math.exp(math.fsum(ratios) / len(ratios)) if ratios else 1.0


def counts(effects: Mapping[tuple[str, str], Effect]) -> dict[str, int]:
    """How what is known of pairs of a layer and a format came to be known."""
    found = Counter(
        f"pruned by {e.pruned}" if e.pruned else "declined" if e.declined else "estimated" if e.estimated else "measured"
        for e in effects.values()
    )
    return dict(found)


def alone(chosen: Sequence[Encoded], symbols: Mapping[str, SymbolRange] = {}) -> tuple[Graph, list[Encoded]]:
    """A graph of the readers of some layers, and the layers in it. Whatever else readers read are its inputs, and the sizes that vary, of
    which `symbols` are told."""
    operands: dict[Node, Node] = {}
    moved: list[Encoded] = []
    for made in chosen:
        weight = made.layer.weight
        for x in (x for reader in made.layer.readers for x in reader.inputs if x is not weight and x not in operands):
            operands[x] = x if x.op.name in ("constant", "scalar") else graph_input(x.hint or "x", x.type)
        readers = tuple(r.with_inputs(tuple(operands.get(x, x) for x in r.inputs)) for r in made.layer.readers)
        moved.append(replace(made, layer=replace(made.layer, readers=readers)))
    inputs = tuple(x for x in operands.values() if x.op.name == "input")
    outputs = tuple(r for made in moved for r in made.layer.readers)
    return with_sizes(Graph("alone", inputs, outputs, symbols=symbols, stage=Stage.CANONICAL)), moved


def efficient(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of points (bytes, error) on the lower left of their convex hull, most bytes first: of no others makes a sum the best trade."""
    hull: list[str] = []
    for name in sorted(points, key=lambda n: (-points[n][0], points[n][1])):
        x, y = points[name]
        if hull and x == points[hull[-1]][0]:
            continue
        while hull and points[hull[-1]][1] >= y:
            hull.pop()  # more bytes, and no less error
        while len(hull) > 1 and _above(points[hull[-1]], points[hull[-2]], (x, y)):
            hull.pop()
        hull.append(name)
    return hull


def _above(point: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether a point lies on or above the line between those beside it."""
    return (point[1] - left[1]) * (left[0] - right[0]) >= (right[1] - left[1]) * (left[0] - point[0])


def monotone(effects: Mapping[tuple[str, str], Effect], layers: Sequence[str]) -> dict[tuple[str, str], Effect]:
    """The effects, where a format that says less about a weight errs at least as much as one that says more."""
    found = dict(effects)
    for layer in layers:
        for ladder in LADDERS:
            least = 0.0
            for name in ladder:
                effect = found.get((layer, name))
                if effect is None or effect.declined:
                    continue
                least = max(least, effect.error)
                found[layer, name] = replace(effect, error=least)
    return found


def _digest(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    plain = value.detach().cpu().contiguous()
    return f"{plain.dtype}{tuple(plain.shape)}{hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()}"
