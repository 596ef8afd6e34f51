"""What each layer may be, as choices with costs; from measurements, for `allocate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ir.dims import Dim, hint, product
from ..ir.graph import Graph
from ..passes.formats import FORMATS
from ..passes.layers import Layer
from ..passes.quantize import Plan
from .allocate import Allocation, Choice
from .layer_times import EXACT
from .sensitivity import Effect

WORD = 32
"""Bits of an exact weight or input."""


@dataclass(frozen=True)
class LayerChoices:
    """A layer and its choices, the first of which is to leave it as it is."""

    layer: Layer
    choices: tuple[Choice, ...]

    def named(self, name: str) -> Choice:
        return next(c for c in self.choices if c.name == name)


def layer_choices(
    graph: Graph,
    layers: Sequence[Layer],
    formats: Sequence[str],
    effects: Mapping[tuple[str, str], Effect],
    seconds: Mapping[tuple[str, str], float],
    power: int,
) -> list[LayerChoices]:
    """Costs: "error", to the power in which errors add up; "bytes"; "time" in seconds; "bops", see `Budget`."""
    found = []
    for layer in layers:
        products = [r for r in layer.readers if r.op.name != "embedding"]
        count = sum(hint(product((*r.shape, _depth(layer))), graph.symbols) for r in products)
        exact = {"error": 0.0, "bytes": float(layer.nbytes), "time": seconds[layer.name, EXACT], "bops": float(count * WORD * WORD)}
        choices = [Choice(EXACT, exact)]
        for name in formats:
            effect = effects[layer.name, name]
            if effect.declined or (layer.name, name) not in seconds:
                continue
            weight_bits = 8 * effect.bytes / (layer.nbytes / layer.weight.dtype.itemsize)
            costs = {
                "error": effect.error**power,
                "bytes": float(effect.bytes),
                "time": seconds[layer.name, name],
                "bops": float(count * weight_bits * FORMATS[name].bits),
            }
            choices.append(Choice(name, costs))
        found.append(LayerChoices(layer, tuple(choices)))
    return found


def _depth(layer: Layer) -> Dim:
    """Multiplications for an element of the result."""
    shape = layer.weight.shape
    return product(shape[:-1] if layer.transposed else shape[1:])


def plan_of(choices: Sequence[LayerChoices], allocation: Allocation, grams: Mapping[str, torch.Tensor]) -> Plan:
    """The formats of the layers that change, rounded with their inputs in mind."""
    return Plan(tuple((c.layer.name, name) for c, name in zip(choices, allocation.names) if name != EXACT), grams)
