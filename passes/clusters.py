"""SplitQuant: the weights of a row fall into three clusters, and each has a range of its own.

    weight [n, k]  -->  cluster id [n, k] in 0 1 2,  low [n, 3],  high [n, 3]

Few outliers then cost the rest no resolution. A split into three layers, as published, would keep zeros in each and so ranges that reach
to 0; one layer that looks the range up by id keeps them tight. Source: "SplitQuant" (Song and Lin, 2025), by 1-D k-means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CLUSTERS = 3
ROUNDS = 12
"""Of Lloyd's algorithm; the centres of a row of numbers settle in a few."""


@dataclass(frozen=True)
class Clusters:
    """ids u8 [n, k]; low and high f32 [n, 3]: the ranges, (0, 0) of a cluster without weights."""

    ids: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def clusters(weight: torch.Tensor) -> Clusters:
    """Of the rows of a finite float32 matrix [n, k], k >= 1."""
    centres = torch.quantile(weight, torch.tensor([0.02, 0.5, 0.98]), dim=1).T.contiguous()
    for _ in range(ROUNDS):
        ids = _ids(weight, centres)
        centres = torch.stack([_mean(weight, ids == i, centres[:, i]) for i in range(CLUSTERS)], 1)
    ids = _ids(weight, centres)
    ranges = [_range(weight, ids == i) for i in range(CLUSTERS)]
    low, high = (torch.stack(ends, 1) for ends in zip(*ranges))
    return Clusters(ids, low, high)


def _ids(weight: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The nearest of three ascending centres: borders are midpoints."""
    borders = (centres[:, 1:] + centres[:, :-1]) / 2
    return (weight > borders[:, :1]).to(torch.uint8) + (weight > borders[:, 1:]).to(torch.uint8)


def _mean(weight: torch.Tensor, inside: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Of the weights inside; where there are none the centre stays."""
    count = inside.sum(1)
    return torch.where(count > 0, torch.where(inside, weight, 0).sum(1) / count.clamp(min=1), centre)


def _range(weight: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    some = inside.any(1)
    low = torch.where(inside, weight, torch.inf).amin(1)
    high = torch.where(inside, weight, -torch.inf).amax(1)
    return torch.where(some, low, 0), torch.where(some, high, 0)
