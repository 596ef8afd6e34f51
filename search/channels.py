"""Which channels of what linears read to scale, and by how much: found on calibration inputs, with the rounding that will be used.

s = mean|x|^a (AWQ)     or     s = sqrt(max|x| / max|w|) (SmoothQuant)     the one with the least error of round(w s) round(x / s)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..ir.graph import Data, Graph, Stage, graph_input
from ..ir.interpret import interpret
from ..ir.ops import OPS
from ..ir.types import TensorType
from ..passes.formats import FORMATS
from ..passes.layers import Layer
from ..passes.quantize import Encoded, encoded, requantized
from ..passes.scale_channels import Shared, shared
from .replay import Replay

POWERS = (0.2, 0.35, 0.5, 0.65, 0.8)
TRIED = (("int2-g64", "int2-g32", "int4-g128", "int4-g64", "int4-g32"), ("int8-dynamic",))
"""Of each row the first that is among the formats to choose from: coarse weights, and rounded inputs."""

GAIN = 0.9
"""Scaling is done where errors get as much smaller, with GPTQ, by the geometric mean over formats; and where none gets larger."""

ROWS = 512
"""Of the inputs, by which scales are judged; GPTQ gets others."""


def channel_scales(graph: Graph, batches: Sequence[Sequence[torch.Tensor]], formats: Sequence[str]) -> dict[str, torch.Tensor]:
    """For `ScaleChannels`: name of the first weight that a value meets -> scale, where that lowers the error."""
    names = tried(formats)
    places = shared(graph) if names else []
    replays = [Replay(graph, batch) for batch in batches] if places else []
    found = {place.name: best_scale(_matrix(place), _rows(place, replays), names) for place in places}
    return {name: scale for name, scale in found.items() if scale is not None}


def tried(formats: Sequence[str]) -> list[str]:
    """Those of the formats that scales are judged by; none where nothing is rounded coarsely."""
    firsts = (next((name for name in row if name in formats), None) for row in TRIED)
    return [name for name in firsts if name is not None]


def _matrix(place: Shared) -> torch.Tensor:
    return torch.cat([layer.matrix().cpu() for layer in place.layers])


def _rows(place: Shared, replays: Sequence[Replay]) -> torch.Tensor:
    values = [replay.value(place.x) for replay in replays]
    return torch.cat([v.reshape(-1, v.shape[-1]).float().cpu() for v in values])


def best_scale(weight: torch.Tensor, x: torch.Tensor, formats: Sequence[str]) -> torch.Tensor | None:
    """Of a weight [n, k] that meets the rows x [m, k]; None where no scale gains enough."""
    if not bool(x.isfinite().all()) or not bool(weight.isfinite().all()):
        return None
    judged, known = _halves(x)
    plain = _errors(weight, judged, formats, None)
    candidates = [(_ratio(_errors(weight * s, judged / s, formats, None), plain), i, s) for i, s in enumerate(candidate_scales(weight, x))]
    ratio, _, scale = min(candidates, key=lambda c: c[:2])
    if ratio > GAIN:
        return None
    gram = (known.double().T @ known.double()).float()
    before, after = _errors(weight, judged, formats, gram), _errors(weight * scale, judged / scale, formats, gram / scale / scale[:, None])
    worse = any(after[name] > before[name] for name in before)
    return scale if not worse and _ratio(after, before) <= GAIN else None


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that judge, and rows that GPTQ knows: every other one; the same where there are few."""
    judged, known = (x[::2], x[1::2]) if len(x) > 1 else (x, x)
    return judged[:: max(1, len(judged) // ROWS)][:ROWS], known


def candidate_scales(weight: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    """[k] each, about 1 on the geometric mean; 1 for channels that are always 0."""
    mean, most, largest = x.abs().mean(0), x.abs().amax(0), weight.abs().amax(0)
    found = [mean**a for a in POWERS] + [(most / largest.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()]
    return [_normal(s) for s in found]


def _normal(scale: torch.Tensor) -> torch.Tensor:
    """Within a factor of a thousand of their geometric mean, which becomes 1."""
    used = (scale > 0) & scale.isfinite()
    if not bool(used.any()):
        return torch.ones_like(scale)
    logs = torch.where(used, scale.clamp(min=torch.finfo(torch.float32).tiny).log(), 0)
    return torch.where(used, (logs - logs[used].mean()).clamp(-math.log(1e3), math.log(1e3)).exp(), 1)


def _ratio(errors: Mapping[str, float], others: Mapping[str, float]) -> float:
    logs = [math.log(errors[name] / others[name]) for name in errors if min(errors[name], others.get(name, 0.0)) > 0]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0


def _errors(weight: torch.Tensor, x: torch.Tensor, formats: Sequence[str], gram: torch.Tensor | None) -> dict[str, float]:
    """Format -> relative error of x @ weight.T; of those that serve it."""
    rows = graph_input("x", TensorType(torch.float32, tuple(x.shape)))
    constant = OPS["constant"](data=Data("w", weight.contiguous()))
    product = OPS["linear"](rows, constant)
    layer, graph = Layer("w", constant, (product,)), Graph("product", (rows,), (product,), stage=Stage.CANONICAL)
    exact = x @ weight.T
    made = {name: encoded(layer, FORMATS[name], gram) for name in formats}
    graphs = {name: requantized(graph, [m]) for name, m in made.items() if isinstance(m, Encoded)}
    with torch.no_grad():
        return {name: float((interpret(g, [x])[0] - exact).norm() / exact.norm().clamp(min=1e-30)) for name, g in graphs.items()}
