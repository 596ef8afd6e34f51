"""What a mask of padded keys does to the values computed from it: ranges of values at tokens that are padding, and at tokens that are not.

    keep = reshape(cast(mask [b, s], bool), [b, 1, 1, s])              at a padded key: 0
    bias = where(logical_and(causal, keep), 0.0, -3.4e38)              at a padded key: -3.4e38, whatever the query

Ranges are proofs: they hold for every input. A mask is 1 and 0; which of both stands for padding is found by trying.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..dims import Dim, same
from ..graph import Node, is_scalar, scalar_value, topological
from ..op import Category
from .axis_masks import Spot
from .axis_spread import Conflict, spread
from .places import Along

HIDDEN = -1e4
"""A key whose score is moved so far down has weight 0 in float32: e^-104 is the smallest number there is."""


@dataclass(frozen=True)
class Range:
    """lo <= every element <= hi, none of them NaN; False and True are 0 and 1."""

    lo: float
    hi: float

    @property
    def known(self) -> bool:
        return self.lo == self.hi


ANY, TRUTH = Range(-math.inf, math.inf), Range(0, 1)
Spots = tuple[Spot, Spot]
"""The dimensions of a value that are its tokens and its batch, None where it is the same for all."""


@dataclass(frozen=True)
class Tokens:
    """Which tokens are looked at: those where `mask` [b, s] holds `held`.

    everywhere: the mask holds that at every token; else at the one that is looked at. finite: floats that are not known are finite.
    """

    mask: Node
    held: int
    everywhere: bool = False
    finite: bool = False

    @property
    def sizes(self) -> tuple[Dim, Dim]:
        batch, tokens = self.mask.shape
        return tokens, batch

    def range(self, node: Node, spots: Spots) -> Range:
        """The range of a value, at every index of its other dimensions."""
        return _Ranges(self).of(node, spots)


class _Ranges:
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.known: dict[tuple[Node, Spots], Range] = {}

    def of(self, node: Node, spots: Spots) -> Range:
        key = (node, spots)
        if key not in self.known:
            self.known[key] = self._of(node, spots)
        return self.known[key]

    def _of(self, node: Node, spots: Spots) -> Range:
        if node is self.tokens.mask:
            own = spots == ((1, Along()), (0, Along()))
            return Range(self.tokens.held, self.tokens.held) if own or self.tokens.everywhere else TRUTH
        leaf = _leaf(node)
        if leaf is not None:
            return leaf
        rule = _same if node.op.category is Category.VIEW else RULES.get(node.op.name)
        operands = self._operands(node, spots) if rule else None
        return _tidy(rule(node, operands)) if rule and operands else self._unknown(node)

    def _unknown(self, node: Node) -> Range:
        if is_scalar(node) or isinstance(node.type, tuple):
            return ANY
        if node.dtype == torch.bool:
            return TRUTH
        if self.tokens.finite and node.dtype.is_floating_point:
            most = torch.finfo(node.dtype).max
            return Range(-most, most)
        return ANY

    def _operands(self, node: Node, spots: Spots) -> list[Range] | None:
        """The ranges of the operands; None where their dimensions cannot be followed."""
        try:
            found = [spread(node, {(-1, s[0]): s[1]}, size) if s else {} for s, size in zip(spots, self.tokens.sizes)]
        except Conflict:
            return None
        broadcasts = node.op.category is Category.POINTWISE or node.op.name == "expand"
        ranges = []
        for k, x in enumerate(node.inputs):
            below = tuple(next(((d, along) for (at, d), along in ends.items() if at == k), None) for ends in found)
            if not broadcasts and any(s and not t for s, t in zip(spots, below)):
                return None
            ranges.append(self.of(x, below))  # type: ignore[arg-type]
        return ranges


def _leaf(node: Node) -> Range | None:
    """What is known without looking at operands."""
    if is_scalar(node):
        return _single(scalar_value(node))
    if node.op.name == "full":
        return _single(node.attrs["value"])
    if node.op.name == "iota" and isinstance(node.attrs["start"], int) and node.attrs["step"] in (0, 1):
        return Range(node.attrs["start"], math.inf)
    if node.op.name != "constant" or not node.attrs["data"].known:
        return None
    value = node.attrs["data"].value
    if not value.numel() or value.is_complex() or bool(value.isnan().any()):
        return None
    return Range(float(value.min()), float(value.max())) if value.dtype != torch.bool else Range(int(value.all()), int(value.any()))


def _single(value: Any) -> Range | None:
    fine = isinstance(value, (bool, int, float)) and not math.isnan(value)
    return Range(float(value), float(value)) if fine else None


def _tidy(found: Range) -> Range:
    return ANY if math.isnan(found.lo) or math.isnan(found.hi) else found


Rule = Callable[[Node, Sequence[Range]], Range]


def _same(node: Node, xs: Sequence[Range]) -> Range:
    return xs[0]


def _product(node: Node, xs: Sequence[Range]) -> Range:
    """0 times what may be infinite may be NaN."""
    a, b = xs
    if any(x.lo <= 0 <= x.hi and math.inf in (abs(y.lo), abs(y.hi)) for x, y in ((a, b), (b, a))):
        return ANY
    ends = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Range(min(ends), max(ends))


def _sum(node: Node, xs: Sequence[Range]) -> Range:
    """inf - inf is NaN."""
    a, b = xs
    mixed = (a.lo == -math.inf and b.hi == math.inf) or (b.lo == -math.inf and a.hi == math.inf)
    return ANY if mixed else Range(a.lo + b.lo, a.hi + b.hi)


def _difference(node: Node, xs: Sequence[Range]) -> Range:
    return _sum(node, (xs[0], _negative(node, xs[1:])))


def _negative(node: Node, xs: Sequence[Range]) -> Range:
    return Range(-xs[0].hi, -xs[0].lo)


def _cast(node: Node, xs: Sequence[Range]) -> Range:
    (x,) = xs
    if node.dtype == torch.bool:
        return Range(0, 0) if x == Range(0, 0) else TRUTH if x.lo <= 0 <= x.hi else Range(1, 1)
    if not node.dtype.is_floating_point and (not math.isfinite(x.lo) or not math.isfinite(x.hi)):
        return ANY
    return x if node.dtype.is_floating_point else Range(math.trunc(x.lo), math.trunc(x.hi))


def _truth(x: Range) -> Range:
    """As a condition: 0 is false, all else is true."""
    return Range(0, 0) if x == Range(0, 0) else TRUTH if x.lo <= 0 <= x.hi else Range(1, 1)


def _and(node: Node, xs: Sequence[Range]) -> Range:
    a, b = map(_truth, xs)
    return Range(min(a.lo, b.lo), min(a.hi, b.hi))


def _or(node: Node, xs: Sequence[Range]) -> Range:
    a, b = map(_truth, xs)
    return Range(max(a.lo, b.lo), max(a.hi, b.hi))


def _not(node: Node, xs: Sequence[Range]) -> Range:
    x = _truth(xs[0])
    return Range(1 - x.hi, 1 - x.lo)


def _of_bools(rule: Rule) -> Rule:
    return lambda node, xs: rule(node, xs) if node.dtype == torch.bool else ANY


def _where(node: Node, xs: Sequence[Range]) -> Range:
    condition, a, b = xs
    if _truth(condition).known:
        return a if _truth(condition).lo else b
    return Range(min(a.lo, b.lo), max(a.hi, b.hi))


def _less(strict: bool, mirrored: bool) -> Rule:
    def rule(node: Node, xs: Sequence[Range]) -> Range:
        a, b = xs[::-1] if mirrored else xs
        if a.hi < b.lo or (a.hi == b.lo and not strict and math.isfinite(a.hi)):
            return Range(1, 1)
        never = a.lo > b.hi or (a.lo == b.hi and strict and math.isfinite(a.lo))
        return Range(0, 0) if never else TRUTH

    return rule


def _equal(negated: bool) -> Rule:
    def rule(node: Node, xs: Sequence[Range]) -> Range:
        a, b = xs
        if a.hi < b.lo or b.hi < a.lo:
            return Range(int(negated), int(negated))
        return Range(1 - negated, 1 - negated) if a.known and a == b else TRUTH

    return rule


def _most(pick: Callable[..., float]) -> Rule:
    return lambda node, xs: Range(pick(xs[0].lo, xs[1].lo), pick(xs[0].hi, xs[1].hi))


def _exp(node: Node, xs: Sequence[Range]) -> Range:
    """Exactly known of what it makes 0 only."""
    return Range(0, 0) if xs[0].hi == -math.inf else ANY


RULES: dict[str, Rule] = {
    "cast": _cast, "add": _sum, "sub": _difference, "mul": _product, "neg": _negative, "where": _where, "exp": _exp,
    "relu": lambda node, xs: Range(max(xs[0].lo, 0), max(xs[0].hi, 0)), "maximum": _most(max), "minimum": _most(min),
    "logical_and": _and, "logical_or": _or, "logical_not": _not,
    "bitwise_and": _of_bools(_and), "bitwise_or": _of_bools(_or), "bitwise_not": _of_bools(_not),
    "lt": _less(True, False), "le": _less(False, False), "gt": _less(True, True), "ge": _less(False, True),
    "eq": _equal(False), "ne": _equal(True),
}  # fmt: skip
"""Op -> the range of its result; what is not here, and no view, is unknown."""


def hides(attention: Node, tokens: Tokens) -> bool:
    """Whether no query of an attention [b, .., queries, d] sees the keys of these tokens."""
    if len(attention.inputs) < 4:
        return False
    mask = attention.inputs[3]
    rank = mask.tensor.rank
    length, batch = tokens.sizes
    meets = rank == attention.tensor.rank and same(mask.shape[0], batch) and same(mask.shape[-1], length)
    if not meets:
        return False
    found = tokens.range(mask, ((rank - 1, Along()), (0, Along())))
    return found.hi == 0 if mask.dtype == torch.bool else found.hi <= HIDDEN


def key_mask(attention: Node) -> Tokens | None:
    """The padded tokens of an attention: the input [b, s] whose keys no query sees where it holds 0, or else 1."""
    if len(attention.inputs) < 4:
        return None
    below = [n for n in topological([attention.inputs[3]]) if n.op.name == "input" and not is_scalar(n) and n.tensor.rank == 2]
    found = (Tokens(mask, held) for mask in below for held in (0, 1))
    return next((tokens for tokens in found if hides(attention, tokens)), None)
