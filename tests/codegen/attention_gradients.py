"""Attentions whose gradients are checked: the tensors of each, and what torch's autograd makes of them in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lowering import x
from tilewright.ir import ops
from tilewright.ir.graph import Node
from tilewright.ir.ops.attention_gradients import OF

SCALE = 0.3


@dataclass(frozen=True)
class Gradients:
    """operands: grad, q, k, v, logsumexp, delta and perhaps a mask. exact: gradients of q, k and v; of each query head, by name."""

    operands: tuple[torch.Tensor, ...]
    causal: bool
    exact: dict[str, torch.Tensor]

    def build(self, of: str) -> Callable[..., Node]:
        return lambda *nodes: ops.op("attention_gradient")(*nodes, of=of, causal=self.causal, scale=SCALE)


def gradients(
    shape: tuple[int, ...], keys: int | None = None, groups: int | None = None, values: int | None = None, causal: bool = False,
    mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Gradients:  # fmt: skip
    """shape: [b, h, m, d] of the queries; keys: n; groups: heads of keys; values: their columns."""
    b, h, m, d = shape
    n, g, e = keys or m, groups or h, values or d
    leaves = [x(b, h, m, d).to(dtype), x(b, g, n, d).flip(-1).to(dtype), x(b, g, n, e).flip(-2).to(dtype)]
    grad = x(b, h, m, e).flip(-1).to(dtype)
    q, k, v = (t.double().requires_grad_() for t in leaves)
    wide_k, wide_v = (t.repeat_interleave(h // g, 1) for t in (k, v))
    wide_k.retain_grad(), wide_v.retain_grad()
    scores = q @ wide_k.mT * SCALE
    if causal:
        scores = scores.masked_fill(~torch.ones(m, n, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    empty = (scores == -math.inf).all(-1, keepdim=True)  # autograd through a softmax of nothing is NaN; of such a row all is 0
    out = torch.where(empty, 0, scores.masked_fill(empty, 0).softmax(-1)) @ wide_v
    out.backward(grad.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [t.detach().to(wide) for t in (scores.logsumexp(-1), (out * grad).sum(-1))]
    operands = (grad, *leaves, *rows, *([] if mask is None else [mask]))
    return Gradients(operands, causal, dict(zip(OF, (q.grad, wide_k.grad, wide_v.grad))))  # type: ignore[arg-type]


def assert_within(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """The largest error is at most twice eager's, or a few units in the last place of the largest element."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape and ours.isfinite().all()
    error, theirs = ((t.double() - exact).abs().max().item() for t in (ours, eager))
    assert error <= max(2 * theirs, 4 * torch.finfo(eager.dtype).eps * exact.abs().max().item()), (error, theirs)


def kept(*shape: int, empty: int | None = None) -> torch.Tensor:
    """A bool mask; `empty`: a row that attends to nothing."""
    found = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) > 0.3
    if empty is not None:
        found[..., empty, :] = False
    return found


def low(keep: torch.Tensor) -> torch.Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, -math.inf)


BF16, F16 = torch.bfloat16, torch.float16
CASES: dict[str, dict[str, Any]] = {
    "heads of 16": {"shape": (2, 3, 37, 16)},
    "heads of 64, causal": {"shape": (1, 2, 70, 64), "causal": True},
    "heads of 128, causal": {"shape": (1, 1, 45, 128), "causal": True},
    "more keys": {"shape": (1, 2, 33, 16), "keys": 70, "causal": True},
    "fewer keys": {"shape": (1, 2, 70, 16), "keys": 33, "causal": True},
    "values of another width": {"shape": (1, 2, 20, 32), "keys": 41, "values": 16},
    "odd widths": {"shape": (1, 2, 20, 12), "keys": 41, "values": 20},
    "grouped heads": {"shape": (2, 4, 37, 16), "groups": 2, "causal": True},
    "one head of keys": {"shape": (1, 4, 21, 16), "groups": 1, "keys": 30},
    "bool mask": {"shape": (2, 3, 40, 16), "keys": 50, "mask": kept(40, 50, empty=3)},
    "mask of each head": {"shape": (2, 3, 40, 16), "keys": 50, "mask": low(kept(2, 3, 40, 50, empty=0))},
    "causal and a mask": {"shape": (1, 2, 40, 16), "mask": kept(1, 1, 40, 40, empty=7), "causal": True},
    "bfloat16": {"shape": (1, 2, 70, 64), "causal": True, "dtype": BF16},
    "float16, grouped heads": {"shape": (1, 4, 33, 64), "groups": 2, "dtype": F16},
    "float64": {"shape": (1, 2, 40, 16), "causal": True, "dtype": torch.float64},
}  # fmt: skip
