"""Low rank: a weight matrix as the product of two thin ones, that which changes the outputs least.

    w [n, k]  ~  out [n, r] @ into [r, k]      r (n + k) numbers instead of n k

The outputs y = x @ w.T are projected onto the r directions in which they vary most: the eigenvectors of y.T @ y = w (x.T x) w.T. No other
pair of that rank changes them less (Eckart and Young). Source: "LoRD: Low-Rank Decomposition of Monolingual Code LLMs" (Kaushal and
others, 2023).
"""

from __future__ import annotations

import torch


def factors(weight: torch.Tensor, rank: int, gram: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out [n, r] and into [r, k], float32. gram: [k, k] x.T @ x of the inputs; None: as if all were alike (then it is the SVD).

    Computed in float64: a Gram matrix has the squares of the singular values.
    """
    wide = weight.double()
    spread = wide @ wide.T if gram is None else wide @ gram.double() @ wide.T
    _, vectors = torch.linalg.eigh(spread)  # eigenvalues ascend
    out = vectors[:, -rank:].flip(1)
    return out.float().contiguous(), (out.T @ wide).float()


def rank_for(n: int, k: int, share: float) -> int:
    """The rank at which the two factors have that share of the numbers of the matrix, at least 1."""
    return max(1, int(share * n * k / (n + k)))
