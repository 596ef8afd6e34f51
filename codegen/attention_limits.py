"""Which keys a query can attend to at all: conditions on positions that mask a score bound the loop over keys.

    where(key <= query, s, -inf)                              -->   keys before query + 1, and there the score is s
    where(key >= first[query] and key < last[query], s, -inf)  -->   keys first[query] .. last[query]; the score is s
    exp(where(key <= query, s, -inf) - lse)                    -->   the same, for weights that are given: there it is exp(s - lse)

Limits may be computed or loaded (offsets of packed sequences, the filled length of a cache), as long as they know no key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch

from ..ir.dims import symbol
from ..ir.scalar import Apply, Const, Scalar, apply, lift, where
from .attentions import all_of, hidden, selections
from .hashcons import rebuilt
from .kernel import Attend, Dot, Kernel, Position, cone, free_axes

LOG2_E = 1.4426950408889634
_INTEGERS = frozenset({torch.int32, torch.int64})
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


@dataclass(frozen=True)
class Limits:
    """Keys that a query attends to are none before any of `begins`, and none from any of `ends` on.

    inside: the score of the keys within, as far as these limits mask it.
    """

    inside: Scalar
    begins: tuple[Scalar, ...] = ()
    ends: tuple[Scalar, ...] = ()

    @property
    def any(self) -> bool:
        return bool(self.begins or self.ends)


@dataclass
class _Search:
    key: str
    known: set[Scalar]
    begins: dict[Scalar, None] = field(default_factory=dict)
    ends: dict[Scalar, None] = field(default_factory=dict)

    def bounds(self, condition: Scalar) -> bool:
        """Whether the condition is a limit; notes it."""
        if not isinstance(condition, Apply) or condition.op not in _MIRRORED:
            return False
        left, right = (self.linear(v) for v in condition.args)
        if left is None or right is None or abs(left[0] - right[0]) != 1:
            return False
        op, below, above = condition.op, left, right
        if left[0] < right[0]:
            op, below, above = _MIRRORED[op], right, left
        at = difference(above[1], below[1])  # key `op` at
        limit = difference(at, Const(torch.int64, -1)) if op in ("le", "gt") else at
        (self.ends if op in ("lt", "le") else self.begins)[limit] = None
        return True

    def linear(self, value: Scalar) -> tuple[int, Scalar] | None:
        """(n, rest) of a value that is n * key + rest, the rest free of the key."""
        if value.dtype not in _INTEGERS:
            return None
        if value not in self.known:
            return 0, value
        if isinstance(value, Position):
            return _linear_position(value, self.key)
        if isinstance(value, Apply) and value.op == "cast" and value.args[0].dtype == torch.int32:
            return self.linear(value.args[0])
        if not isinstance(value, Apply) or value.op not in ("add", "sub"):
            return None
        left, right = (self.linear(v) for v in value.args)
        if left is None or right is None:
            return None
        sign = -1 if value.op == "sub" else 1
        rest = difference(left[1], right[1] if sign < 0 else difference(Const(torch.int64, 0), right[1]))
        return left[0] + sign * right[0], rest


def _linear_position(value: Position, key: str) -> tuple[int, Scalar] | None:
    index, at = sympy.sympify(value.index), symbol(key)
    step = sympy.expand(index.subs(at, at + 1) - index)  # type: ignore[operator]
    rest = sympy.expand(index - step * at)
    if not step.is_Integer or at in rest.free_symbols:
        return None
    return int(step), Position(torch.int64, rest)


def difference(a: Scalar, b: Scalar) -> Scalar:
    """a - b; one position where both are."""
    indices = [_index(v) for v in (a, b)]
    if indices[0] is not None and indices[1] is not None:
        return Position(torch.int64, sympy.expand(indices[0] - indices[1]))
    if indices[1] == 0:
        return a
    wide = (v if v.dtype == torch.int64 else Apply(torch.int64, "cast", (v,)) for v in (a, b))
    return apply("sub", *wide)


def _index(value: Scalar) -> sympy.Expr | None:
    if isinstance(value, Position):
        return sympy.sympify(value.index)
    return sympy.Integer(int(value.value)) if isinstance(value, Const) else None


def find_limits(kernel: Kernel, attend: Attend) -> Limits:
    """The limits that the masks of an attention set, and what its score is within them."""
    free, score, key = free_axes(kernel), attend.score, attend.axis
    search = _Search(key, {v for v in cone([score]) if key in free[v]})
    kept: dict[Scalar, list[Scalar]] = {}
    for masked in hidden(attend):
        assert isinstance(masked, Apply)
        kept[masked] = [c for c in all_of(masked.args[0]) if not search.bounds(c)]
    new: dict[Scalar, Scalar] = {}
    for value in cone([score]):
        new[value] = _shown(rebuilt(value, new), kept[value]) if value in kept else rebuilt(value, new)
    return Limits(new[score], tuple(search.begins), tuple(search.ends))


def _shown(masked: Scalar, conditions: list[Scalar]) -> Scalar:
    """The selection under those of its conditions that are no limits."""
    assert isinstance(masked, Apply)
    condition, value, low = masked.args
    if not conditions:
        return value
    if len(conditions) == len(all_of(condition)):
        return masked
    joined = conditions[0]
    for other in conditions[1:]:
        joined = joined & other
    return where(joined, value, low)


def in_base_two(weights: Scalar, dot: Dot) -> Scalar:
    """Scaling costs nothing in an exponent, as in a softmax.

    exp(0.3 * dot - lse), also under masks  -->  2 ** fma(dot, 0.3 * log2(e), lse * -log2(e))
    """
    new: dict[Scalar, Scalar] = {}
    for value in cone([weights]):
        new[value] = rebuilt(value, new)
        shifted = value.args[0] if isinstance(value, Apply) and value.op == "exp" and value.dtype == torch.float32 else None
        if isinstance(shifted, Apply) and shifted.op == "sub":
            factor, score = unscaled(shifted.args[0], dot)
            unit, base = lift(factor * LOG2_E, torch.float32), new[shifted.args[1]] * -LOG2_E
            new[value] = apply("exp2", apply("fma", score, unit, base))
    return new[weights]


def unscaled(score: Scalar, dot: Dot) -> tuple[float, Scalar]:
    """(factor, rest) of a score that is factor * rest, factor > 0: a number by which a product is scaled under its masks.

    where(keep, 0.3 * dot, -inf)  -->  0.3, where(keep, dot, -inf)
    """
    if isinstance(score, Apply) and score.op == "where" and score in selections(score, float("-inf")):
        condition, value, low = score.args
        factor, rest = unscaled(value, dot)
        return (factor, score) if rest is value else (factor, where(condition, rest, low))
    if isinstance(score, Apply) and score.op == "mul" and score.args[0] is dot and isinstance(score.args[1], Const):
        factor = float(score.args[1].value)
        return (factor, dot) if factor > 0 else (1.0, score)
    return 1.0, score
