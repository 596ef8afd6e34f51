"""attention_gradient: its meaning against torch's autograd, its expansion against its meaning, and what has no type."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_composites import FLOATS, check, values
from tilewright.ir import ops
from tilewright.ir.errors import TypeInferenceError
from tilewright.ir.graph import graph_input
from tilewright.ir.ops.attention_gradients import OF
from tilewright.ir.types import TensorType


def operands(
    dtype: torch.dtype, h: int, g: int, m: int, n: int, mask: torch.Tensor | None = None, causal: bool = False
) -> list[torch.Tensor]:
    """grad, q, k, v, logsumexp, delta."""
    q, grad = values(2, h, m, 8, dtype=dtype), values(2, h, m, 4, dtype=dtype, seed=3)
    k, v = values(2, g, n, 8, dtype=dtype, seed=1), values(2, g, n, 4, dtype=dtype, seed=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    whole = [t.double() for t in (q, k, v)]
    scores = whole[0] @ whole[1].repeat_interleave(h // g, 1).mT * 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(m, n, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    out = ops.op("attention").eager(*whole, mask, causal=causal, scale=0.5, weights="softmax")
    return [grad, q, k, v, scores.logsumexp(-1).to(wide), (out * grad).sum(-1).to(wide)]


@pytest.mark.parametrize(("h", "g", "m", "n", "causal"), [(2, 2, 5, 7, False), (4, 2, 5, 5, True), (2, 1, 7, 5, True), (2, 2, 1, 4, False)])
def test_is_what_autograd_gives(h: int, g: int, m: int, n: int, causal: bool) -> None:
    grad, q, k, v, *rows = operands(torch.float64, h, g, m, n, causal=causal)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=0.5, enable_gqa=h != g).backward(grad)
    for of, leaf in zip(OF, leaves):
        found = ops.op("attention_gradient").eager(grad, q, k, v, *rows, of=of, causal=causal, scale=0.5)
        if found.shape != leaf.shape:  # of each query head: those that share a key add up
            found = found.unflatten(1, (g, h // g)).sum(2)
        torch.testing.assert_close(found, leaf.grad)


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_expansion(dtype: torch.dtype, of: str) -> None:
    keep = values(5, 7, dtype=torch.float64) > 0
    keep[2] = False
    low = torch.zeros(5, 7).masked_fill(~keep, -math.inf)
    for h, g, mask, causal in [(2, 2, None, False), (4, 2, None, True), (2, 2, keep, False), (4, 1, low, False), (2, 2, keep, True)]:
        given = None if mask is None else keep
        found = check(
            "attention_gradient",
            *operands(dtype, h, g, 5, 7, given, causal),
            *([] if mask is None else [mask]),
            of=of,
            causal=causal,
            scale=0.5,
        )
        assert found.isfinite().all() and (of != "query" or given is None or not found[:, :, 2].any())


def test_has_no_type() -> None:
    def made(heads: int = 2, rows: int = 2, dtype: torch.dtype = torch.float32, **attrs: Any) -> object:
        def given(*shape: int, dtype: torch.dtype = dtype) -> object:
            return graph_input("x", TensorType(dtype, shape))

        q, k, row = given(2, 4, 8), given(heads, 6, 8), given(rows, 4, dtype=torch.float32)
        return ops.op("attention_gradient")(given(2, 4, 8), q, k, k, row, row, **{"of": "key", "scale": 1.0, **attrs})

    assert str(made().type) == "f32[2, 6, 8]" and str(made(1, dtype=torch.float16).type) == "f32[2, 6, 8]"  # type: ignore[attr-defined]
    wrong: list[tuple[dict[str, Any], str]] = [({"of": "mask"}, "of query, key or value"), ({"rows": 1}, "a number of"),
        ({"dtype": torch.float64}, "a number of"), ({"heads": 3}, "do not group")]  # fmt: skip
    for attrs, reason in wrong:
        with pytest.raises(TypeInferenceError, match=reason):
            made(**attrs)
