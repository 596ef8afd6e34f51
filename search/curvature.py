"""Curvature scores: by how much a loss grows if a layer is kept in another format, foretold by the trace of the loss's second derivatives.

    loss(W + D) - loss(W)  ~  |D|^2 / 2 * trace(H) / size of W        H: second derivatives by the weights of one layer, at its minimum

Traces are Hutchinson's estimate: E v . H v over signs v, by two backward passes a probe for all layers together. The perturbation D is told
by what it does to the results of the layer on its own inputs, so that the rounding of inputs counts too, and directions that inputs seldom
take do not: |D|^2 = |Y_q - Y|^2 / (mean square of an input). After HAWQ-V2 (Dong et al., 2020).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ir.errors import is_lost
from ..ir.graph import Graph, Node
from ..passes.layers import Layer
from ..passes.quantize import Encoded, requantized
from ..passes.weights import value_of
from .replay import Replay

DRAWS = 16
"""Probes."""

Loss = Callable[[Mapping[Node, torch.Tensor]], object]
"""The loss of a graph whose nodes have these values: a scalar with a derivative, else there are no traces."""


def traces(layers: Sequence[Layer], loss: Loss, draws: int = DRAWS) -> dict[str, float] | None:
    """Name of a layer -> the trace of the second derivatives of the loss by its weights; None where the loss has none, or only zeros.

    A trace below its own uncertainty counts as that: few probes do not make a layer free.
    """
    weights = [value_of(layer.weight) for layer in layers]
    known = {layer.weight: w.detach().clone().requires_grad_() for layer, w in zip(layers, weights) if w is not None}
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            value = loss(known)
            if not isinstance(value, torch.Tensor) or not value.requires_grad or value.numel() != 1:
                return None
            found = _estimates(value.reshape(()), list(known.values()), draws)
            if not found.any():
                return None
    except RuntimeError as error:  # what torch raises for an op without a second derivative
        if is_lost(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"nothing is foretold of the loss ({said}): formats are judged by what they do to outputs", RuntimeWarning, 2)
        return None
    means, deviations = found.mean(0).abs(), found.std(0) / math.sqrt(draws)
    return {layer.name: float(trace) for layer, trace in zip(layers, torch.maximum(means, deviations))}


def _estimates(value: torch.Tensor, weights: Sequence[torch.Tensor], draws: int) -> torch.Tensor:
    """v . H v: f64 [draws, weights]."""
    source = torch.Generator().manual_seed(0)
    slopes = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
    bent = [g if g is not None and g.requires_grad else None for g in slopes]  # else the loss is linear in it
    rows = []
    for _ in range(draws):
        probes = [torch.randint(0, 2, w.shape, generator=source).to(w) * 2 - 1 for w in weights]
        along = sum(((g * v).sum() for g, v in zip(bent, probes) if g is not None), start=torch.zeros(()))
        if not along.requires_grad:
            rows.append([0.0] * len(weights))
            continue
        found = torch.autograd.grad(along, weights, retain_graph=True, allow_unused=True)
        rows.append([0.0 if h is None else float((h.double() * v).sum()) for h, v in zip(found, probes)])
    return torch.tensor(rows, dtype=torch.float64)


class Curvature:
    """How much a loss grows, by the traces of layers. grams: x.T @ x of the inputs that layers meet, of those that have one."""

    def __init__(
        self,
        graph: Graph,
        replays: Sequence[Replay],
        grams: Mapping[str, torch.Tensor],
        found: Mapping[str, float],
    ) -> None:
        self.graph, self.replays, self.grams, self.traces = graph, replays, grams, found

    def error(self, made: Encoded) -> float:
        """Foretold for nothing but this layer changed."""
        layer = made.layer
        size = layer.matrix().numel()
        return 0.5 * self.traces[layer.name] / size * self._perturbation(made)

    def _perturbation(self, made: Encoded) -> float:
        """|D|^2, of weights that would do the same to results."""
        layer, matrix = made.layer, made.layer.matrix()
        exact = replace(self.graph, outputs=layer.readers, writes=())
        changed = requantized(exact, [made])
        off = whole = 0.0
        for replay in self.replays:
            for y, y_q in zip(replay.run(exact), replay.run(changed), strict=True):
                off += float((y_q.double() - y.double()).square().sum())
                whole += float(y.double().square().sum())
        gram = self.grams.get(layer.name)
        scale = whole / max(float(matrix.double().square().sum()), 1e-300) if gram is None else float(gram.trace()) / matrix.shape[1]
        return off / scale if scale > 0 else off
