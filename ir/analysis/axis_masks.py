"""Which keys a query cannot see: read off the data of masks, through what is computed from them.

    add(scores [h, S, S], constant [1, S, S] with -inf above the diagonal) -> softmax -> matmul(., v)       row i reads keys up to i

A value with two dimensions of the axis has, for each fill, a matrix [S, S]: True where all of its elements hold that fill, whatever the
inputs are. Very low logits become zero weights in a softmax, zero weights select nothing in a product.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping

import torch

from ..dims import Dim
from ..graph import Graph, Node, is_scalar, scalar_value, topological
from ..interpret import interpret
from ..op import Category
from .axis_spread import Conflict, spread
from .places import OUT, PARALLEL, Along, How, Label

Matrix = torch.Tensor


class Fill(enum.Enum):
    """What elements are known to be. LOW: -inf, or so low that exp yields 0 beside any live logit. ZERO, ONE: False and True, too.

    SCALE: positive, and of a size that logits are scaled by.
    """

    LOW = "low"
    ZERO = "zero"
    ONE = "one"
    SCALE = "scale"


Fills = Mapping[Fill, Matrix]
Spot = tuple[int, Along] | None
"""A dimension of a value and how it holds the axis; None where the value is the same for all indices."""

LEAST = 1e-2
LOWEST = -1e9
"""Logits from here down count as LOW; models write the lowest number of the dtype, -1e9 or -inf."""


class Masks:
    """What masks hide, along an axis of this size; nothing where the size is not known. Keeps what it has found."""

    def __init__(self, size: Dim) -> None:
        self.size = size
        self._known: dict[tuple[Node, Spot, Spot], Fills] = {}
        self._fixed: dict[Node, bool] = {}

    def fills(self, node: Node, row: Spot, column: Spot) -> Fills:
        """fill -> where the value holds it, as a matrix over the positions of `row` and `column`; 1 where it is the same for all."""
        key = (node, row, column)
        if key not in self._known:
            self._known[key] = self._fills(node, row, column)
        return self._known[key]

    def _fills(self, node: Node, row: Spot, column: Spot) -> Fills:
        known = (row is None or row[1].whole) and (column is None or (column[1].order is None and column[1].stride == 1))
        if not isinstance(self.size, int) or isinstance(node.type, tuple) or not known:
            return {}
        if is_scalar(node):
            value = scalar_value(node)
            return _of_tensor(torch.tensor(value), None, None, self.size) if isinstance(value, (bool, int, float)) else {}
        if self._is_fixed(node):
            return _of_tensor(interpret(Graph("mask", (), (node,)), ())[0], row, column, self.size)
        if node.op.name == "softmax" and (column is None or node.attrs["dim"] % node.tensor.rank != column[0]):
            return {}  # what is low for all that it is compared with has a share like theirs
        if column is not None and node.op.name in ALONG_KEYS and node.attrs["dim"] % node.tensor.rank == column[0]:
            return ALONG_KEYS[node.op.name](node, [self.fills(x, row, self._positions(x, column)) for x in node.inputs])
        rule = _carry if node.op.category is Category.VIEW else RULES.get(node.op.name)
        operands = self._operands(node, row, column) if rule and (row or column) else []
        return rule(node, operands) if rule and operands else {}

    def _positions(self, x: Node, column: tuple[int, Along]) -> Spot:
        """The same dimension of an operand of another length; only its positions count."""
        length = x.shape[column[0]]
        return (column[0], Along(extra=length - self.size)) if isinstance(length, int) and isinstance(self.size, int) else None

    def _is_fixed(self, node: Node) -> bool:
        """Whether its value is known now: it depends on no input and no draw, and the data of constants is at hand."""
        for n in topological([node]):
            if n not in self._fixed:
                unknown = n.op.name == "input" or n.attrs.get("sequence") is not None
                unknown = unknown or (n.op.name == "constant" and not n.attrs["data"].known)
                self._fixed[n] = not unknown and all(self._fixed[x] for x in n.inputs)
        return self._fixed[node]

    def _operands(self, node: Node, row: Spot, column: Spot) -> list[Fills]:
        """The fills of the operands; empty where the dimensions cannot be followed."""
        try:
            at = {spot: spread(node, {(OUT, spot[0]): spot[1]}, self.size) for spot in (row, column) if spot is not None}
        except Conflict:
            return []

        def spot_in(operand: int, spot: Spot) -> Spot:
            return next(((d, along) for (k, d), along in at[spot].items() if k == operand), None) if spot else None

        spots = [(spot_in(i, row), spot_in(i, column)) for i in range(len(node.inputs))]
        broadcasts = node.op.category is Category.POINTWISE or node.op.name == "expand"  # elsewhere what is lost has not size 1
        if not broadcasts and any((a is None) != (row is None) or (b is None) != (column is None) for a, b in spots):
            return []
        return [self.fills(x, a, b) for x, (a, b) in zip(node.inputs, spots)]


def _of_tensor(value: torch.Tensor, row: Spot, column: Spot, size: int) -> Fills:
    wide = value.double() if value.dtype != torch.bool else value
    low = (
        wide <= max(LOWEST, torch.finfo(value.dtype).min / 2) if value.dtype.is_floating_point else torch.zeros_like(wide, dtype=torch.bool)
    )
    found = {Fill.LOW: low, Fill.ZERO: wide == 0, Fill.ONE: wide == 1, Fill.SCALE: (wide >= LEAST) & (wide <= 1 / LEAST)}
    return {fill: _square(where, row, column, size) for fill, where in found.items()}


def _square(where: torch.Tensor, row: Spot, column: Spot, size: int) -> Matrix:
    """All over every dimension but the two, which are brought in order."""
    shape, marks = [], {}
    for d, extent in enumerate(where.shape):
        spot = next((s for s in (row, column) if s is not None and s[0] == d), None)
        if spot is None:
            shape.append(extent)
            continue
        marks[d] = len(shape) + 1
        shape += [int(spot[1].outer), int(spot[1].length(size)), int(spot[1].inner)]
    kept = [marks[s[0]] for s in (row, column) if s is not None]
    where = where.reshape(shape)
    others = [d for d in range(where.dim()) if d not in kept]
    where = where.permute((*kept, *others))
    where = where.flatten(len(kept)).all(-1) if others else where
    if row is None:
        where = where.unsqueeze(0)
    if column is None:
        where = where.unsqueeze(-1)
    return where


def any_of(*fills: Matrix | None) -> Matrix | None:
    given = [f for f in fills if f is not None]
    return functools.reduce(torch.logical_or, given) if given else None


def _both(a: Matrix | None, b: Matrix | None) -> Matrix | None:
    return None if a is None or b is None else a & b


def _made(**found: Matrix | None) -> Fills:
    return {Fill(k): v for k, v in found.items() if v is not None}


Rule = Callable[[Node, list[Fills]], Fills]


def _carry(node: Node, xs: list[Fills]) -> Fills:
    return xs[0]


def _joined(node: Node, xs: list[Fills]) -> Fills:
    """Keys behind keys: those of a sink behind those of the axis."""
    lengths = [int(x.shape[node.attrs["dim"]]) for x in node.inputs]  # type: ignore[arg-type]
    found = {}
    for fill in {fill for x in xs for fill in x}:
        parts = [x[fill] if fill in x else torch.zeros(1, 1, dtype=torch.bool) for x in xs]
        rows = max(p.shape[0] for p in parts)
        found[fill] = torch.cat([p.expand(rows, length) for p, length in zip(parts, lengths)], 1)
    return found


def _part(node: Node, xs: list[Fills]) -> Fills:
    kept = slice(node.attrs["start"], node.attrs["stop"], node.attrs["step"])
    return {fill: found[:, kept] if found.shape[1] > 1 else found for fill, found in xs[0].items()}


ALONG_KEYS: dict[str, Rule] = {"cat": _joined, "slice": _part}
"""Ops that join or cut keys: what they do along that dimension."""


def _add(node: Node, xs: list[Fills]) -> Fills:
    a, b = xs
    return _made(low=any_of(a.get(Fill.LOW), b.get(Fill.LOW)), zero=_both(a.get(Fill.ZERO), b.get(Fill.ZERO)))


def _sub(node: Node, xs: list[Fills]) -> Fills:
    a, b = xs
    ones, zeros = a.get(Fill.ONE), a.get(Fill.ZERO)
    zero = any_of(_both(ones, b.get(Fill.ONE)), _both(zeros, b.get(Fill.ZERO)))
    return _made(low=a.get(Fill.LOW), zero=zero, one=_both(ones, b.get(Fill.ZERO)))


def _mul(node: Node, xs: list[Fills]) -> Fills:
    """Low logits stay low when they are scaled, but not by next to nothing."""
    a, b = xs
    low = any_of(_both(a.get(Fill.SCALE), b.get(Fill.LOW)), _both(a.get(Fill.LOW), b.get(Fill.SCALE)))
    return _made(low=low, zero=any_of(a.get(Fill.ZERO), b.get(Fill.ZERO)), one=_both(a.get(Fill.ONE), b.get(Fill.ONE)))


def _div(node: Node, xs: list[Fills]) -> Fills:
    """By what may be anything, only zeros stay (a row that is divided by its sum)."""
    return _made(zero=xs[0].get(Fill.ZERO), low=_both(xs[0].get(Fill.LOW), xs[1].get(Fill.SCALE)))


def _and(node: Node, xs: list[Fills]) -> Fills:
    a, b = xs
    return _made(zero=any_of(a.get(Fill.ZERO), b.get(Fill.ZERO)), one=_both(a.get(Fill.ONE), b.get(Fill.ONE)))


def _or(node: Node, xs: list[Fills]) -> Fills:
    a, b = xs
    return _made(zero=_both(a.get(Fill.ZERO), b.get(Fill.ZERO)), one=any_of(a.get(Fill.ONE), b.get(Fill.ONE)))


def _not(node: Node, xs: list[Fills]) -> Fills:
    if node.dtype != torch.bool:
        return {}
    return _made(zero=xs[0].get(Fill.ONE), one=xs[0].get(Fill.ZERO))


def _where(node: Node, xs: list[Fills]) -> Fills:
    condition, a, b = xs

    def chosen(fill: Fill) -> Matrix | None:
        first, second = a.get(fill), b.get(fill)
        return any_of(_both(condition.get(Fill.ONE), first), _both(condition.get(Fill.ZERO), second), _both(first, second))

    return {fill: found for fill in Fill if (found := chosen(fill)) is not None}


def _vanish(node: Node, xs: list[Fills]) -> Fills:
    """exp, sigmoid and softmax of what is low are 0."""
    return _made(zero=xs[0].get(Fill.LOW))


def _relu(node: Node, xs: list[Fills]) -> Fills:
    return _made(zero=any_of(xs[0].get(Fill.LOW), xs[0].get(Fill.ZERO)), one=xs[0].get(Fill.ONE))


def _extremum(node: Node, xs: list[Fills]) -> Fills:
    a, b = xs
    return {fill: found for fill in Fill if (found := _both(a.get(fill), b.get(fill))) is not None}


RULES: dict[str, Rule] = {
    "cast": _carry,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "logical_and": _and,
    "bitwise_and": _and,
    "logical_or": _or,
    "bitwise_or": _or,
    "logical_not": _not,
    "bitwise_not": _not,
    "where": _where,
    "softmax": _vanish,
    "exp": _vanish,
    "sigmoid": _vanish,
    "relu": _relu,
    "maximum": _extremum,
    "minimum": _extremum,
}


def reach(hidden: Matrix | None, column: Along, size: int, otherwise: Label) -> Label:
    """How row i reads the indices of the axis in a dimension `column`, where `hidden` says which of its positions a row does not read.

    A row in which all are hidden may read all: logits that are equally low have equal shares.
    """
    if hidden is None:
        return otherwise
    hidden = hidden.expand(size, int(column.length(size)))
    rows, columns = (~hidden | hidden.all(1, keepdim=True)).nonzero(as_tuple=True)
    columns = columns + column.start
    ours = (columns >= 0) & (columns < size)
    rows, columns = rows[ours], columns[ours]
    before = max(int((rows - columns).max()), 0) if len(rows) else 0
    after = max(int((columns - rows).max()), 0) if len(rows) else 0
    if before == after == 0:
        return PARALLEL
    if after == 0:
        return Label(How.PREFIX, before if before < size - 1 else 0)
    return Label(How.WINDOW, before, after) if max(before, after) < size - 1 else otherwise


def later(size: int) -> Matrix:
    """True where the column comes after the row: what causal attention hides."""
    return torch.ones(size, size, dtype=torch.bool).triu(1)
