"""Attentions that become kernels of ours, and the copies around them that those kernels make needless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ir.analysis.points import Refusal
from ..ir.dims import same
from ..ir.graph import Node
from ..ir.reasons import Reason
from .facts import device_type

MOST_COLUMNS = 256
"""Wider heads do not fit the tiles."""


@dataclass(frozen=True)
class Walked:
    """What the template of a device walks. multiple: of which the columns of a head are. gradients: the most columns of heads whose
    gradients it walks, too."""

    dtypes: frozenset[torch.dtype]
    multiple: int
    gradients: int


WALKED: dict[str, Walked] = {
    "cpu": Walked(frozenset({torch.float32, torch.bfloat16, torch.float16}), 4, 0),
    "cuda": Walked(frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}), 1, 128),
}
"""Device type -> attentions that are kernels of ours there."""

ATTENTIONS = frozenset({"attention", "attention_gradient"})


def is_native_attention(node: Node) -> bool:
    return node.op.name in ATTENTIONS and device_type(node) in WALKED and attention_refusal(node) is None


def attention_refusal(node: Node) -> Refusal | None:
    """Why an attention or a gradient of one is left to the library; nothing where we have no template for the device."""
    walked = WALKED.get(device_type(node))
    if walked is None:
        return None
    gradient = node.op.name == "attention_gradient"
    q, k, v = node.inputs[gradient : gradient + 3]
    if q.dtype not in walked.dtypes:
        return Refusal(Reason.UNSUPPORTED_DTYPE, node, str(q.type))
    widths, most = (k.shape[-1], v.shape[-1]), walked.gradients if gradient else MOST_COLUMNS
    if any(not isinstance(d, int) or d > most or d % walked.multiple for d in widths):
        what = "gradients of heads" if gradient else "heads"
        return Refusal(Reason.LIBRARY_CALL, node, f"{what} of {widths[0]} and {widths[1]} columns")
    lengths = (k.shape[-2], q.shape[-2]) if gradient else (k.shape[-2],)
    if any(same(length, n) for length in lengths for n in (0, 1)) or any(d == 1 for d in widths):
        return Refusal(Reason.LIBRARY_CALL, node, f"{' and '.join(map(str, lengths))} rows of {widths[0]} and {widths[1]} columns")
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
