"""Windows that become kernels of ours: pooling and depthwise convolutions whose channels lie last, so that they fill vectors."""

from __future__ import annotations

import torch

from ..ir.graph import Node
from ..ir.ops.contractions import is_depthwise

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

LONGEST = 11
"""Points of a row share what their windows read where a side of the window is at most this long."""


def may_be_native(node: Node) -> bool:
    """Whether the node is a window of ours once its channels lie last."""
    if node.op.name not in ("conv", "max_pool", "avg_pool") or node.tensor.device != "cpu" or node.dtype not in _DTYPES:
        return False
    if node.op.name != "conv":
        return True
    one_each = is_depthwise(node) and node.inputs[1].shape[0] == node.attrs["groups"]
    return one_each and _shares(node)


def _shares(conv: Node) -> bool:
    """Whether there are several points along a short side of the window."""
    kernel = conv.inputs[1].shape[2:]
    space = conv.shape[1:-1] if conv.attrs["channels_last"] else conv.shape[2:]
    return any(isinstance(k, int) and 1 < k <= LONGEST and d != 1 for k, d in zip(kernel, space))


def is_native_window(node: Node) -> bool:
    """Whether the node is a pooling or depthwise convolution (one result per channel) that the library does not run."""
    return may_be_native(node) and node.attrs["channels_last"]
