"""Group norm with channels last: statistics by rows of pixels and by channels, so that memory is read in order and vectors are full.

x [n, h, w, c]  -->  mean and squares of each row [n, h, c]  -->  of each channel [n, c]  -->  of each group: scale, shift [n, c]
y = x * scale + shift
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ir.analysis.primitives import EXPANDED
from ..ir.dims import Dim, dim, product
from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.provenance import Provenance
from ..ir.types import compute_dtype

Statistics = tuple[Node, Node]
"""(mean, sum of squared distances from it) over some dimensions, which are kept as 1."""


def group_norm_last(node: Node, x: Node, w: Node | None, b: Node | None, rule: str) -> Node:
    """The group_norm `node` of x [n, *space, c] with w and b [c], as [n, *space, c]. Sums of squares are about means, as they merge."""
    make = _Make(node.prov.with_rule(EXPANDED + node.op.name).with_rule(rule))
    n, *space, channels = x.shape
    assert isinstance(channels, int)
    groups = (node.attrs["groups"], channels // node.attrs["groups"])
    wide = compute_dtype(x.dtype)
    value = make.cast(x, wide)
    mean, squares = make.statistics(value, x.tensor.rank - 2, space[-1])
    lead = product(space[:-1])
    if lead != 1:
        mean, squares = make.merged(*(make.reshape(s, n, lead, channels) for s in (mean, squares)), 1, space[-1], lead)
    mean, squares = make.merged(*(make.reshape(s, n, *groups) for s in (mean, squares)), 2, product(space), groups[1])
    variance = make("div", squares, dim(product(space) * groups[1]))
    scale = make("rsqrt", make("add", variance, node.attrs["eps"]))
    scale = scale if w is None else make("mul", scale, make.reshape(make.cast(w, wide), *groups))
    shift = make("neg", make("mul", mean, scale))
    shift = shift if b is None else make("add", shift, make.reshape(make.cast(b, wide), *groups))
    scale, shift = (make.reshape(make("expand", p, shape=(n, *groups)), n, *(1,) * len(space), channels) for p in (scale, shift))
    return make.cast(make("add", make("mul", value, scale), shift), x.dtype)


@dataclass(frozen=True)
class _Make:
    """Makes nodes of one provenance."""

    prov: Provenance

    def __call__(self, name: str, *operands: Any, **attrs: Any) -> Node:
        return OPS[name](*operands, prov=self.prov, **attrs)

    def statistics(self, x: Node, d: int, count: Dim) -> Statistics:
        """Of the `count` elements along d."""
        mean = self("div", self("sum", x, dims=(d,), keepdim=True), count)
        apart = self("sub", x, mean)
        return mean, self("sum", self("mul", apart, apart), dims=(d,), keepdim=True)

    def merged(self, means: Node, squares: Node, d: int, each: Dim, count: Dim) -> Statistics:
        """Of `count` parts of `each` elements, whose own statistics lie along d."""
        mean = self("div", self("sum", means, dims=(d,), keepdim=True), count)
        apart = self("sub", means, mean)
        between = self("mul", self("mul", apart, apart), each)
        return mean, self("sum", self("add", squares, between), dims=(d,), keepdim=True)

    def reshape(self, x: Node, *shape: Dim) -> Node:
        return self("reshape", x, shape=shape)

    def cast(self, x: Node, dtype: Any) -> Node:
        return x if x.dtype == dtype else self("cast", x, dtype=dtype)
