"""Attentions that become kernels of ours, and the copies around them that those kernels make needless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..ir.analysis.points import Refusal
from ..ir.dims import same
from ..ir.graph import Node
from ..ir.reasons import Reason

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
MOST_COLUMNS = 256
"""Wider heads do not fit the tiles."""


def is_native_attention(node: Node) -> bool:
    return node.op.name == "attention" and node.tensor.device == "cpu" and attention_refusal(node) is None


def attention_refusal(node: Node) -> Refusal | None:
    """Why an attention on a CPU is left to the library."""
    _, k, v = node.inputs[:3]
    if node.dtype not in _DTYPES:
        return Refusal(Reason.UNSUPPORTED_DTYPE, node, str(node.type))
    widths = (k.shape[-1], v.shape[-1])
    if any(not isinstance(d, int) or d > MOST_COLUMNS or d % 4 for d in widths):
        return Refusal(Reason.LIBRARY_CALL, node, f"heads of {widths[0]} and {widths[1]} columns")
    if any(same(k.shape[-2], n) for n in (0, 1)):
        return Refusal(Reason.LIBRARY_CALL, node, f"{k.shape[-2]} keys")
    return None


def merging_reshapes(nodes: Sequence[Node], readers: Mapping[Node, Sequence[Node]], roots: set[Node]) -> set[Node]:
    """The reshapes that join the heads of native attentions again: the kernel of the attention can store its result in that order.

    permute(attention(q, k, v): [b, h, s, d]): [b, s, h, d]   -->   reshape: [b, s, h*d], which as a view would have to copy
    """
    found: set[Node] = set()
    for node in nodes:
        if not is_native_attention(node):
            continue
        moved = False
        while node not in roots and len(readers[node]) == 1:
            node = readers[node][0]
            if moved and node.op.name == "reshape":
                found.add(node)
            if node.op.name != "permute":
                break
            moved = True
    return found
