"""Windows that become kernels of ours: pooling and depthwise convolutions whose channels lie last, so that they fill vectors."""

from __future__ import annotations

import torch

from ..ir.graph import Node
from ..ir.ops.contractions import is_depthwise

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def may_be_native(node: Node) -> bool:
    """Whether the node is a window of ours once its channels lie last."""
    if node.op.name not in ("conv", "max_pool", "avg_pool") or node.tensor.device != "cpu" or node.dtype not in _DTYPES:
        return False
    return node.op.name != "conv" or is_depthwise(node) and node.inputs[1].shape[0] == node.attrs["groups"]


def is_native_window(node: Node) -> bool:
    """Whether the node is a pooling or depthwise convolution (one result per channel) that the library does not run."""
    return may_be_native(node) and node.attrs["channels_last"]
