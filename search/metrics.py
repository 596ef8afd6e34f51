"""How far results are from the exact ones: the error metrics that a budget may be stated in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import TilewrightError


class UnknownMetric(TilewrightError):
    """A name that is none of METRICS."""

    template = "there is no error metric {name!r}; there are {known}"


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference|| in float64 over the elements where the reference is finite.

    inf where a shape differs, or where one is NaN or infinite and the other is not the same. Integer and bool tensors must be equal.
    """
    found = _finite_parts(value, reference)
    if not isinstance(found, tuple):
        return found
    a, b = found
    difference = torch.linalg.vector_norm(a - b).item()
    scale = torch.linalg.vector_norm(b).item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else difference


def _finite_parts(value: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | float:
    """Both, flat and wide, where the reference is finite; or the error, where that says it."""
    if value.shape != reference.shape:
        return float("inf")
    if not reference.is_floating_point() and not reference.is_complex():
        return 0.0 if torch.equal(value.to(reference.dtype), reference) else float("inf")
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = value.to(wide).flatten(), reference.to(wide).flatten()
    finite = torch.isfinite(b)
    if not _same_specials(a[~finite], b[~finite]):
        return float("inf")
    return a[finite], b[finite]


def _same_specials(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def _largest(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max |value - reference|."""
    found = _finite_parts(value, reference)
    if not isinstance(found, tuple):
        return found
    a, b = found
    return _or_inf((a - b).abs().max().item()) if a.numel() else 0.0


def _cosine(value: torch.Tensor, reference: torch.Tensor) -> float:
    """1 - the cosine of the angle between rows (along the last dimension), on average; a row of zeros is near only itself."""
    if value.shape != reference.shape or not reference.is_floating_point() or not reference.dim():
        return relative_error(value, reference)
    a, b = value.double(), reference.double()
    same = (a == b).all(-1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return _or_inf(torch.where(same, 0.0, 1 - cosine).mean().clamp(min=0).item()) if b.numel() else 0.0


def _divergence(value: torch.Tensor, reference: torch.Tensor) -> float:
    """KL(reference || value) of the distributions that softmax makes of rows of logits, on average, in nats."""
    if value.shape != reference.shape or not reference.is_floating_point() or not reference.dim():
        return relative_error(value, reference)
    a, b = (torch.log_softmax(x.double(), -1) for x in (value, reference))
    terms = torch.where(b.exp() > 0, b.exp() * (b - a), 0.0)
    return _or_inf(terms.sum(-1).mean().clamp(min=0).item()) if b.numel() else 0.0


def _disagreement(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The share of rows whose largest element is elsewhere."""
    if value.shape != reference.shape or not reference.is_floating_point() or not reference.dim():
        return relative_error(value, reference)
    if not reference.numel():
        return 0.0
    return (value.argmax(-1) != reference.argmax(-1)).double().mean().item()


def _or_inf(error: float) -> float:
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Metric:
    """of(value, reference): the error of one output, 0 where they are equal.

    power: errors to that power add up over layers, nearly. Perturbations of layers are independent of each other, so their squares add:
    those of norms; a divergence and an angle are squares already.
    """

    name: str
    of: Callable[[torch.Tensor, torch.Tensor], float]
    power: int

    def __call__(self, values: Sequence[Any], references: Sequence[Any]) -> float:
        """Of the worst output."""
        pairs = zip(values, references, strict=True)
        return max((self.of(v, r) for v, r in pairs if isinstance(r, torch.Tensor)), default=0.0)


_TABLE = (
    Metric("relative", relative_error, 2),
    Metric("max-abs", _largest, 2),
    Metric("cosine", _cosine, 1),
    Metric("kl", _divergence, 1),
    Metric("argmax", _disagreement, 1),
)
METRICS = {m.name: m for m in _TABLE}


def metric(name: str) -> Metric:
    """The metric of that name; raises UnknownMetric."""
    if name not in METRICS:
        raise UnknownMetric(name=name, known=", ".join(METRICS))
    return METRICS[name]
