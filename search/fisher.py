"""Scores: what a format of a layer does to the results, foretold by gradients. A few backward passes tell it for all layers and formats.

    error^2 = E (v . (outputs_q - outputs))^2 ~ sum over rows of E (g . (Y_q - Y))^2        g = J^T v, the gradient of v . outputs at Y

Y is what a layer computes; probes v are random, and of such a kind that the left side is the metric: signs over the norm of the outputs
for the relative error; for a divergence, p - onehot(a class drawn by p), whose covariance is the Fisher information of the softmax. Errors
of different rows are taken to be independent, unless the probes tell that they go together (a mean over rows follows the layer): the sum is
squared then, which is right for all, but by few probes uncertain. After Fisher scores as in HAWQ-V3's and ModelOpt's searches, without
labels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ir.errors import is_lost
from ..ir.graph import Graph, Node
from ..ir.interpret import interpret
from ..passes.layers import Layer
from ..passes.quantize import Encoded, requantized
from .metrics import Metric
from .replay import Replay

DRAWS = 8
"""Probes for each batch."""

DEVIATIONS = 3.0
"""By so many the squares of sums must be more than those of their terms, for the terms not to be independent."""

Draw = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _signs(like: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, like.shape, generator=source).to(like.dtype) * 2 - 1


def _relative(y: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    return _signs(y, source) / y.norm().clamp(min=torch.finfo(y.dtype).tiny)


def _largest(y: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """As if errors were normal: of n of them the largest is about sqrt(2 ln n) deviations."""
    return _signs(y, source) * math.sqrt(2 * math.log(max(y.numel(), 2)) / max(y.numel(), 1))


def _angle(y: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """1 - cos = |error across the row|^2 / (2 |row|^2), nearly; on average over rows."""
    rows, length = _rows(y), y.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    unit, v = y / length, _signs(y, source)
    return (v - (v * unit).sum(-1, keepdim=True) * unit) / (length * math.sqrt(2 * rows))


def _divergence(y: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """KL = error^T F error / 2, nearly, with the covariance F = diag(p) - p p^T of onehot(a class drawn by p); on average over rows."""
    p = torch.softmax(y, -1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=source).reshape(*p.shape[:-1], 1)
    return (p - torch.zeros_like(p).scatter_(-1, drawn, 1)) / math.sqrt(2 * _rows(y))


def _rows(y: torch.Tensor) -> int:
    return max(y.numel() // max(y.shape[-1], 1), 1)


PROBES: Mapping[str, Draw] = {"relative": _relative, "max-abs": _largest, "cosine": _angle, "kl": _divergence}
"""Metric -> probes. The share of rows whose largest element moves has no derivative."""


class Fisher:
    """Gradients at what layers compute, of a graph on some inputs.

    Layers whose results have no derivative (what follows draws, rounds or compares), and all of them for a metric that has none or where
    torch cannot differentiate an op, have no score.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer], replays: Sequence[Replay], metric: Metric) -> None:
        self.graph, self.replays, self.power = graph, replays, metric.power
        draw = PROBES.get(metric.name)
        readers = [reader for layer in layers for reader in layer.readers]
        self.found = [{} if draw is None else _gradients(graph, replay, readers, draw) for replay in replays]

    def error(self, made: Encoded) -> float | None:
        """Foretold for the graph with nothing but this layer changed, on the worst batch; None without a score."""
        readers = made.layer.readers
        if not all(reader in found for found in self.found for reader in readers):
            return None
        exact = replace(self.graph, outputs=readers, writes=())
        changed = requantized(exact, [made])
        scores = [_squares(r.run(exact), r.run(changed), [found[n] for n in readers]) for r, found in zip(self.replays, self.found)]
        terms, sums = (math.fsum(column) for column in zip(*scores))
        chance = 1 + DEVIATIONS * math.sqrt(2 / (DRAWS * len(scores)))
        worst = max(alone for alone, _ in scores) * (sums / terms if sums > chance * terms else 1.0)
        return worst ** (1 / self.power) if math.isfinite(terms + worst) else None


def _squares(exact: Sequence[Any], changed: Sequence[Any], gradients: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Of g . (Y_q - Y) of the rows of all readers, on average over probes: added up, and of their sum."""
    alone, together = 0.0, torch.zeros(DRAWS, dtype=torch.float64)
    for y, y_q, g in zip(exact, changed, gradients, strict=True):
        rows = (g * (y_q - y)).sum(-1, dtype=torch.float64).reshape(DRAWS, -1)
        alone += float(rows.square().sum()) / DRAWS
        together += rows.sum(1)
    return alone, float(together.square().mean())


def _gradients(graph: Graph, replay: Replay, readers: Sequence[Node], draw: Draw) -> dict[Node, torch.Tensor]:
    """Reader -> bf16[draws, *shape of its result]; of those that some output depends on in a way that can be differentiated."""
    source = torch.Generator().manual_seed(0)
    values: dict[Node, torch.Tensor] = {}
    wanted = set(readers)

    def watch(node: Node, value: Any) -> None:
        if node in wanted and isinstance(value, torch.Tensor) and value.is_floating_point():
            values[node] = value if value.requires_grad else value.requires_grad_()

    try:
        with torch.enable_grad():
            outputs = interpret(replace(graph, writes=()), replay.inputs(), watch=watch)
        ends = [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point() and y.requires_grad and y.dim()]
        if not ends:
            return {}
        drawn = [_probed(ends, list(values.values()), draw, source) for _ in range(DRAWS)]
    except RuntimeError as error:  # what torch raises for an op without a derivative
        if is_lost(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the errors of formats cannot be foretold by gradients ({said}): they are measured, one by one", RuntimeWarning, 2)
        return {}
    columns = {node: [g[i] for g in drawn] for i, node in enumerate(values)}
    return {node: torch.stack([g.bfloat16() for g in gs if g is not None]) for node, gs in columns.items() if gs[0] is not None}


def _probed(ends: Sequence[torch.Tensor], values: Sequence[torch.Tensor], draw: Draw, source: torch.Generator) -> tuple[Any, ...]:
    probes = [torch.where(y.isfinite(), draw(y.detach().nan_to_num(), source), 0).to(y.dtype) for y in ends]
    return torch.autograd.grad(ends, values, probes, retain_graph=True, allow_unused=True)
