"""What it does to the results of a model to keep one layer in another format: measured, from calibration inputs.

    layer              format      error of the outputs
    encoder.0.fc1      int8        4.1e-4
    encoder.0.fc1      int4-g32    6.3e-3

The model is run once; then, for each layer and format, what follows from that layer is run again. Formats that make the same of a layer
(groups of 64 and 128 in rows of 64) are told by a hash of what they compute, and measured once. Results are kept under a hash of the model
and the inputs, each as soon as it is known: who is interrupted goes on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir.analysis.hashing import structural_hash
from ..ir.graph import Graph, Node, Stage, graph_input
from ..passes.formats import FORMATS
from ..passes.layers import Layer
from ..passes.quantize import Encoded, Known, encoded, requantized
from .database import Database
from .metrics import Metric
from .replay import Replay

LADDERS = (("fp16", "int8", "int4-g32", "int4-g64", "int4-g128"), ("int8", "int8-dynamic"), ("int4-split3", "int2-split3"))
"""Formats of which each says less than the one before: where it is measured to err less, that is luck."""

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Effect:
    """error: of the outputs, by the metric, if nothing but this layer is in that format; bytes: of its parts. Declined: why not."""

    error: float
    bytes: int
    declined: str = ""


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

    def effects(self, formats: Sequence[str], progress: Progress = lambda done, total: None) -> dict[tuple[str, str], Effect]:
        """(layer, format) -> what the format does there."""
        found: dict[tuple[str, str], Effect] = {}
        total = len(self.layers) * len(formats)
        for layer in self.layers:
            errors: dict[str, float] = {}  # by what is computed
            parts: Known = {}
            for name in formats:
                found[layer.name, name] = self._effect(layer, name, errors, parts)
                progress(len(found), total)
        return monotone(found, [layer.name for layer in self.layers])

    def error_of(self, variant: Graph) -> float:
        """Of the worst batch."""
        return max(self.metric(replay.run(variant), replay.outputs) for replay in self.replays)

    def _effect(self, layer: Layer, name: str, errors: dict[str, float], parts: Known) -> Effect:
        made = encoded(layer, FORMATS[name], self.grams.get(layer.name), parts)
        if not isinstance(made, Encoded):
            return Effect(math.inf, layer.nbytes, f"{made[0].value} ({made[1]})")
        if (layer.name, name) not in self.known:
            function = structural_hash(requantized(*alone([made])), weights=True)
            if function not in errors:
                errors[function] = self.error_of(requantized(self.graph, [made]))
            self.known[layer.name, name] = errors[function]
            self.database.put_error(self.key, layer.name, name, errors[function])
        return Effect(self.known[layer.name, name], made.nbytes)

    def _gram(self, layer: Layer) -> torch.Tensor | None:
        """Of a layer whose readers are linears and products."""
        if not layer.kinds <= {"linear", "matmul"}:
            return None
        inputs = [replay.value(reader.inputs[0]) for replay in self.replays for reader in layer.readers]
        rows = [x.reshape(-1, x.shape[-1]).double() for x in inputs]
        total = sum(x.T @ x for x in rows)
        return total if isinstance(total, torch.Tensor) and bool(total.isfinite().all()) else None


def alone(chosen: Sequence[Encoded]) -> tuple[Graph, list[Encoded]]:
    """A graph of the readers of some layers, and the layers in it. Whatever else readers read are its inputs."""
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
    return Graph("alone", inputs, outputs, stage=Stage.CANONICAL), moved


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
                found[layer, name] = Effect(least, effect.bytes)
    return found


def _digest(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    plain = value.detach().cpu().contiguous()
    return f"{plain.dtype}{tuple(plain.shape)}{hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()}"
