"""What the constant mask of a causal attention says, if it says no more than how far back a query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOWEST = -1e4
"""A mask that is added hides keys by numbers below this one."""


@dataclass(frozen=True)
class Mask:
    """Each query sees its own key and those before it: `window` keys in all, or all of them."""

    window: int | None


def mask_of(mask: torch.Tensor, length: int) -> Mask | None:
    """The mask [..., length, length] by its window; None for any other mask."""
    if mask.dim() < 2 or tuple(mask.shape[-2:]) != (length, length):
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask < LOWEST)).all()):
        return None
    one = seen.reshape(-1, length, length)[0]
    if not bool((seen == one).all()):
        return None
    window = int(one[-1].sum())
    position = torch.arange(length, device=mask.device)
    away = position[:, None] - position
    if not bool((one == ((away >= 0) & (away < window))).all()):
        return None
    return Mask(None if window == length else window)
