"""Rounding a weight matrix to integers: the grid that a group of weights shares, to the nearest point of it (RTN), or by GPTQ.

    weight [n, k]  -->  codes [n, k],  scale [n, k / group],  zero [n, k / group]      weight ~ (codes - zero) * scale

GPTQ rounds column by column, and corrects the columns that are left for the error made, as the inputs' correlations tell: "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of the range of an asymmetric group that are tried: clipping its largest weights may cost less than a coarser grid."""

DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean, so that it can be inverted."""

COLUMNS = 128
"""Columns that GPTQ rounds before it corrects all those behind them, about: a whole number of groups."""


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, with a scale (and a zero point, unless symmetric) for each `group` of a row (None: for the whole row).

    Symmetric codes are signed and leave out the lowest, so that -x has the code of x, negated.
    """

    bits: int
    group: int | None = None
    symmetric: bool = False

    @property
    def scale_dtype(self) -> torch.dtype:
        """One for a row may be exact; those of groups are many, and bfloat16 has the range of float32."""
        return torch.float32 if self.group is None else torch.bfloat16

    @property
    def lowest(self) -> int:
        return 1 - (1 << self.bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1

    def fitted(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """scale [n] and zero [n] for rows [n, g] that share them: as the rounded numbers in which they are stored."""
        if self.symmetric:
            scale = self.stored(weights.abs().amax(1) / self.highest)
            return scale, torch.zeros_like(scale)
        low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
        span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        best = torch.full_like(low, torch.inf)
        kept = (torch.ones_like(low), torch.zeros_like(low))
        for share in SHRINK:
            scale = self.stored((high - low) * share / self.highest)
            zero = (-low * share / scale).round().clamp(0, self.highest)
            column = scale[:, None], zero[:, None]
            error = ((self.values(self.codes(weights, *column), *column) - weights) / span).square().sum(1)
            better = error < best
            best = torch.where(better, error, best)
            kept = (torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1]))
        return kept

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale as it is kept; 1 where all weights are 0."""
        scale = torch.where(scale > 0, scale, 1)
        return scale.to(self.scale_dtype).float().clamp(min=torch.finfo(torch.float32).tiny)

    def codes(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest integers, as floats."""
        return (weights / scale + zero).round().clamp(self.lowest, self.highest)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (codes - zero) * scale

    def width(self, columns: int) -> int:
        """Weights of a row that share a scale: of rows that are not whole groups the most, up to a group, that are; else a group."""
        if self.group is None or columns <= self.group:
            return columns
        widths = range(self.group, self.group // 2, -self.per_byte)
        return next((w for w in widths if columns % w == 0), self.group)

    def padded(self, columns: int) -> int:
        """The columns, with those that fill the last group and byte."""
        multiple = self.per_byte if columns <= (self.group or columns) else self.width(columns)
        return -(-columns // multiple) * multiple

    @property
    def per_byte(self) -> int:
        return 8 // self.bits


@dataclass(frozen=True)
class Rounded:
    """codes [n, k] within the grid, scale and zero [n, k / group]; all float32; whole numbers but the scale."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """The weights that they stand for, [n, k]."""
        width = self.codes.shape[1] // max(self.scale.shape[1], 1)
        return (self.codes - self.zero.repeat_interleave(width, 1)) * self.scale.repeat_interleave(width, 1)


def rounded(weight: torch.Tensor, grid: Grid, gram: torch.Tensor | None = None) -> Rounded:
    """A float32 weight [n, k] on the grid, whose group divides k.

    gram: [k, k] x.T @ x of the inputs that the weight meets, in float32 or wider: by GPTQ. None: to the nearest.
    """
    return _nearest(weight, grid) if gram is None else _gptq(weight, grid, gram)


def _nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    n, k = weight.shape
    width = grid.width(k)
    groups = weight.reshape(-1, width)
    scale, zero = grid.fitted(groups)
    codes = grid.codes(groups, scale[:, None], zero[:, None])
    return Rounded(codes.reshape(n, k), scale.reshape(n, -1), zero.reshape(n, -1))


def _gptq(weight: torch.Tensor, grid: Grid, gram: torch.Tensor) -> Rounded:
    """Scales are fitted when a group is reached, to the weights as corrected by then."""
    left, factor = weight.clone(), _factor(gram)
    n, k = weight.shape
    width = grid.width(k)
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    block = max(1, COLUMNS // width) * width if width < k else COLUMNS
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty(n, stop - start)
        for i in range(start, stop):
            if i % width == 0:
                scale, zero = grid.fitted(left[:, i : i + width])
                scales.append(scale)
                zeros.append(zero)
            codes[:, i] = grid.codes(left[:, i], scales[-1], zeros[-1])
            error = (left[:, i] - grid.values(codes[:, i], scales[-1], zeros[-1])) / factor[i, i]
            errors[:, i - start] = error
            left[:, i + 1 : stop] -= error[:, None] * factor[i, i + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return Rounded(codes, torch.stack(scales, 1), torch.stack(zeros, 1))


def _factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, by float64: its rows say how errors spread."""
    wide = gram.double()
    mean = wide.diagonal().mean()
    damped = wide + torch.eye(len(wide), dtype=torch.float64) * torch.where(mean > 0, DAMPING * mean, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
