"""Sparse weights: a constant matrix of blocks (`torch.sparse_bsr_tensor`) is the constants that it is made of.

linear(x, w)   -->   block_sparse_linear(x, w.values, w.columns, w.starts)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..graph import Data, Node


@dataclass(frozen=True)
class Opaque:
    """An fx value that has no form here (a float or bool computed from sizes); an error only if something reads it."""

    what: str


@dataclass(frozen=True)
class BlockMatrix(Opaque):
    """A matrix of blocks, which has no form of its own: only a linear reads it, as its weight."""

    values: Node
    columns: Node
    starts: Node


def block_matrix(data: Data, constant: Callable[[Data], Node]) -> BlockMatrix | None:
    """The matrix that a tensor is, if it is one of blocks; `constant` makes the constant of a tensor."""
    w = data.value
    if w is None or w.layout != torch.sparse_bsr or w.dim() != 2 or not w.dtype.is_floating_point:
        return None
    parts = {"values": w.values(), "columns": w.col_indices(), "starts": w.crow_indices()}
    made = {name: constant(Data(f"{data.name}.{name}", part.contiguous())) for name, part in parts.items()}
    return BlockMatrix(f"the sparse matrix {data.name}", **made)
