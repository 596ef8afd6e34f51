"""Which tokens become one, and values of tokens carried along: bipartite matching as plain ops of the IR, with static sizes.

    keys [b, t, d]  -->  places [b, t], each in 0 .. t - count: where each token is afterwards; tokens keep their order

Tokens at even and odd positions are two sets. Each of the first finds the one of the second whose key is most alike (by the cosine), and
the `count` best pairs become one. Source: "Token Merging: Your ViT But Faster" (Bolya et al., 2022).

Nothing is sorted: a token is among the best if fewer than `count` others are better or, where they are equal, come before it. So ties are
broken alike on every device, and exactly `count` tokens go whatever the values are; a similarity that is NaN is the least.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.provenance import Provenance
from ..ir.types import compute_dtype

LEAST_NORM = 1e-12
"""A key that is shorter is like no other."""


def most_merged(tokens: int, protected: int) -> int:
    """How many of so many tokens can go, the first `protected` of which stay as they are."""
    sources = len(range(_first(protected, 0), tokens, 2))
    return sources if tokens > _first(protected, 1) else 0


def _first(protected: int, parity: int) -> int:
    """The first position of a parity that is not protected."""
    return protected + (protected + parity) % 2


class Builder:
    """Nodes with one provenance."""

    def __init__(self, prov: Provenance) -> None:
        self.prov = prov

    def __call__(self, op: str, *operands: Any, hint: str = "", **attrs: Any) -> Node:
        return OPS[op](*operands, hint=hint, prov=self.prov, **attrs)

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        return x if x.dtype == dtype else self("cast", x, dtype=dtype)


def places_after(keys: Node, count: int, protected: int, make: Builder) -> Node:
    """keys [b, t, d] of any float dtype -> places i64 [b, t]. count: from 1 to `most_merged`."""
    b, tokens, _ = keys.shape
    device = keys.tensor.device
    odd: dict[str, Any]
    even: dict[str, Any]
    odd, even = ({"dim": 1, "start": _first(protected, parity), "stop": tokens, "step": 2} for parity in (1, 0))
    wide = make.cast(keys, compute_dtype(keys.dtype))
    norm = make("sqrt", make("sum", make("square", wide), dims=(2,), keepdim=True))
    unit = make("div", wide, make("maximum", norm, LEAST_NORM))
    alike = make("matmul", make("slice", unit, **even), make("permute", make("slice", unit, **odd), dims=(0, 2, 1)), hint="alike")
    alike = make("where", make("isnan", alike), -math.inf, alike)
    partner = make("argmax", alike, dims=(2,), hint="partner")
    goes = make("lt", _better(make("amax", alike, dims=(2,)), make), count, hint="goes")
    stays = make.cast(make("logical_not", goes), torch.int64)
    all_stay = make("full", shape=(b, tokens), value=1, dtype=torch.int64, device=device)
    place = make("sub", make("cumsum", make("slice_scatter", all_stay, stays, **even), dim=1), 1, hint="place")
    joined = make("gather", make("slice", place, **odd), partner, dim=1)
    return make("slice_scatter", place, make("where", goes, joined, make("slice", place, **even)), **even, hint="places")


def _better(score: Node, make: Builder) -> Node:
    """score [b, n] -> i64 [b, n]: how many entries of a row are larger, or equal and come before."""
    b, n = score.shape
    one, other = make("reshape", score, shape=(b, n, 1)), make("reshape", score, shape=(b, 1, n))
    at = make("iota", length=n, device=score.tensor.device)
    before = make("lt", at, make("reshape", at, shape=(n, 1)))
    first = make("logical_or", make("gt", other, one), make("logical_and", make("eq", other, one), before))
    return make("sum", make.cast(first, torch.int64), dims=(2,))


def rows_of(places: Node, tokens: int, make: Builder) -> Node:
    """places [b, t] as rows i64 [b * t] of a matrix [b * tokens, c]."""
    b, t = places.shape
    start = make("reshape", make("iota", length=b, step=tokens, device=places.tensor.device), shape=(b, 1))
    return make("reshape", make("add", places, start), shape=(b * t,))


def merged(x: Node, sizes: Node | None, rows: Node, tokens: int, make: Builder) -> tuple[Node, Node]:
    """x [b, t, c], sizes [b, t] (None: all 1) -> x [b, tokens, c], the mean of what became one, by size; and its sizes [b, tokens]."""
    b, t, c = x.shape
    wide = compute_dtype(x.dtype)
    device = x.tensor.device
    if sizes is None:
        sizes = make("full", shape=(b, t), value=1.0, dtype=wide, device=device)
    weighted = make("mul", make.cast(x, wide), make("reshape", sizes, shape=(b, t, 1)))
    index = make("expand", make("reshape", rows, shape=(b * t, 1)), shape=(b * t, c))
    nothing = make("full", shape=(b * tokens, c), value=0.0, dtype=wide, device=device)
    total = make("scatter", nothing, index, make("reshape", weighted, shape=(b * t, c)), dim=0, reduce="sum")
    none = make("full", shape=(b * tokens,), value=0.0, dtype=wide, device=device)
    size = make("scatter", none, rows, make("reshape", sizes, shape=(b * t,)), dim=0, reduce="sum", hint="sizes")
    mean = make.cast(make("div", total, make("reshape", size, shape=(b * tokens, 1))), x.dtype)
    return make("reshape", mean, shape=(b, tokens, c), hint="merged"), make("reshape", size, shape=(b, tokens))


def apart(x: Node, places: Node, make: Builder) -> Node:
    """x [b, n, c], places [b, t] -> [b, t, c]: every token gets what it became part of."""
    b, n, c = x.shape
    t = places.shape[1]
    read = make("index", make("reshape", x, shape=(b * n, c)), rows_of(places, n, make), dims=(0,))
    return make("reshape", read, shape=(b, t, c), hint="apart")


def share_of(sizes: Node, make: Builder) -> Node:
    """sizes [b, n] -> [b, 1, 1, n]: what a key of several tokens adds to its logits, so that softmax counts it as often."""
    b, n = sizes.shape
    return make("reshape", make("log", sizes), shape=(b, 1, 1, n), hint="share")
