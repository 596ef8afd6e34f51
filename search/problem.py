"""What an allocation is asked for, checked and exact: groups of tied layers, their options, and costs as whole numbers of a unit.

A float is a whole number of some power of two, so sums of costs and their comparison with a limit need no rounding anywhere.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..ir.errors import TilewrightError

Pair = tuple[int, str, int, str]
"""Layer, name of its choice, another layer, name of its choice."""
Interactions = Mapping[Pair, "float | Mapping[str, float]"]
Picks = tuple[int, ...]
"""For each group the number of the option it takes."""


class AllocationError(TilewrightError, ValueError):
    """The question itself is wrong."""

    template = "cannot allocate: {reason}"


@dataclass(frozen=True)
class Choice:
    """What a layer may be: a name, and what it costs in any units. An infinite cost means that it is never taken."""

    name: str
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Layers that take choices of the same name, and the names they have in common."""

    layers: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A sum over the options taken, exact: `amounts[group][option]` and `pairs[pair]` count units."""

    unit: Fraction
    amounts: tuple[tuple[int, ...], ...]
    pairs: tuple[int, ...]

    def within(self, limit: float) -> int:
        """The most units whose sum, rounded to a float, is not above the limit."""
        above = math.nextafter(limit, math.inf)
        step = Fraction(math.ulp(limit)) if math.isinf(above) else Fraction(above) - Fraction(limit)
        middle = Fraction(limit) + step / 2
        units = math.floor(middle / self.unit)
        return units - 1 if units * self.unit == middle and rounded(middle) > limit else units


@dataclass(frozen=True)
class Problem:
    """pairs: group, option, another group, option; `extra[pair]` is what taking both adds, by cost. forbidden: picks not to return."""

    layers: tuple[tuple[Choice, ...], ...]
    groups: tuple[Group, ...]
    pairs: tuple[tuple[int, int, int, int], ...]
    extra: tuple[Mapping[str, float], ...]
    forbidden: tuple[Picks, ...]

    def row(self, weights: Mapping[str, Fraction]) -> Row:
        """The weighted sum of costs."""
        amounts = [[self._amount(group, name, weights) for name in group.names] for group in self.groups]
        pairs = [sum((w * Fraction(extra.get(cost, 0.0)) for cost, w in weights.items()), Fraction(0)) for extra in self.extra]
        unit = _unit([*(x for options in amounts for x in options), *pairs])
        whole = tuple(tuple(int(x / unit) for x in options) for options in amounts)
        return Row(unit, whole, tuple(int(x / unit) for x in pairs))

    def _amount(self, group: Group, name: str, weights: Mapping[str, Fraction]) -> Fraction:
        taken = [self.choice(layer, name) for layer in group.layers]
        return sum((w * Fraction(float(choice.costs[cost])) for choice in taken for cost, w in weights.items()), Fraction(0))

    def choice(self, layer: int, name: str) -> Choice:
        return next(c for c in self.layers[layer] if c.name == name)

    def choices(self, picks: Picks) -> tuple[Choice, ...]:
        """One per layer, in order."""
        names = {layer: group.names[pick] for group, pick in zip(self.groups, picks) for layer in group.layers}
        return tuple(self.choice(i, names[i]) for i in range(len(self.layers)))

    def taken(self, picks: Picks) -> list[bool]:
        """Which pairs the picks hold."""
        return [picks[g] == a and picks[h] == b for g, a, h, b in self.pairs]

    def units(self, row: Row, picks: Picks) -> int:
        """What the picks add up to."""
        options = sum(amounts[pick] for amounts, pick in zip(row.amounts, picks))
        return options + sum(x for x, both in zip(row.pairs, self.taken(picks)) if both)

    def total(self, cost: str, picks: Picks) -> float:
        """Of a cost, correctly rounded: what `math.fsum` gives."""
        added = [extra.get(cost, 0.0) for extra, both in zip(self.extra, self.taken(picks)) if both]
        taken = [choice.costs[cost] for choice in self.choices(picks)]
        return rounded(sum((Fraction(float(x)) for x in [*taken, *added]), Fraction(0)))


def rounded(value: Fraction) -> float:
    """The nearest float; beyond them all, infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def _unit(values: Iterable[Fraction]) -> Fraction:
    """The largest number that all of them are whole multiples of."""
    values = [v for v in values if v]
    if not values:
        return Fraction(1)
    denominator = math.lcm(*(v.denominator for v in values))
    return Fraction(math.gcd(*(v.numerator * (denominator // v.denominator) for v in values)), denominator)


def make_problem(
    layers: Sequence[Sequence[Choice]],
    used: Iterable[str],
    minimize: str,
    ties: Iterable[Sequence[int]],
    interactions: Interactions | None,
    forbidden: Iterable[Sequence[str]],
) -> Problem:
    """used: the costs that every choice must have. Raises AllocationError."""
    rows = tuple(tuple(layer) for layer in layers)
    _check_choices(rows)
    for cost in used:
        _check_cost(rows, cost)
    groups = _groups(rows, ties)
    where = {(layer, name): (g, o) for g, group in enumerate(groups) for o, name in enumerate(group.names) for layer in group.layers}
    pairs, extra = _pairs(rows, where, minimize, interactions or {})
    return Problem(rows, groups, pairs, extra, _forbidden(rows, groups, where, forbidden))


def _check_choices(layers: tuple[tuple[Choice, ...], ...]) -> None:
    for i, layer in enumerate(layers):
        if not layer:
            raise AllocationError(reason=f"layer {i} offers no choice")
        names = [choice.name for choice in layer]
        if len(set(names)) < len(names):
            raise AllocationError(reason=f"layer {i} offers two choices named {max(names, key=names.count)!r}")
        for choice in layer:
            for cost, value in choice.costs.items():
                check_number(value, f"the {cost} of {choice.name!r} in layer {i}")


def check_number(value: float, what: str) -> float:
    """As a float; a number or plus infinity."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise AllocationError(reason=f"{what} is {value!r}, which is no number") from None
    if math.isnan(number) or number == -math.inf:
        raise AllocationError(reason=f"{what} is {number}")
    return number


def _check_cost(layers: tuple[tuple[Choice, ...], ...], cost: str) -> None:
    known = sorted({name for layer in layers for choice in layer for name in choice.costs})
    if layers and cost not in known:
        raise AllocationError(reason=f"no choice has a cost named {cost!r}; there are {', '.join(known) or 'none'}")
    for i, layer in enumerate(layers):
        for choice in layer:
            if cost not in choice.costs:
                raise AllocationError(reason=f"the choice {choice.name!r} of layer {i} has no cost named {cost!r}")


def _groups(layers: tuple[tuple[Choice, ...], ...], ties: Iterable[Sequence[int]]) -> tuple[Group, ...]:
    """In the order of their first layers."""
    root = list(range(len(layers)))
    for tie in ties:
        members = [_layer(index, len(layers), "a tie") for index in tie]
        roots = {root[m] for m in members}
        root = [min(roots) if r in roots else r for r in root]
    return tuple(_group(layers, tuple(i for i, r in enumerate(root) if r == first)) for first in sorted(set(root)))


def _layer(index: int, count: int, what: str) -> int:
    if not hasattr(index, "__index__") or not 0 <= operator.index(index) < count:
        raise AllocationError(reason=f"{what} names layer {index!r}; layers are numbered from 0 to {count - 1}")
    return operator.index(index)


def _group(layers: tuple[tuple[Choice, ...], ...], members: tuple[int, ...]) -> Group:
    by_name = [{choice.name: choice for choice in layers[i]} for i in members]
    common = [name for name in by_name[0] if all(name in choices for choices in by_name)]
    if not common:
        raise AllocationError(reason=f"the tied layers {_listed(members)} have no choice of the same name")
    finite = tuple(n for n in common if all(math.isfinite(v) for choices in by_name for v in choices[n].costs.values()))
    if not finite:
        raise AllocationError(reason=f"every choice of layer {_listed(members)} has an infinite cost")
    return Group(members, finite)


def _listed(members: tuple[int, ...]) -> str:
    return ", ".join(map(str, members))


def _pairs(
    layers: tuple[tuple[Choice, ...], ...], where: Mapping[tuple[int, str], tuple[int, int]], minimize: str, interactions: Interactions
) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[Mapping[str, float], ...]]:
    """A pair that can never be taken (an option that is ruled out, two names in one group) is left out."""
    pairs, extra = [], []
    for (i, first, j, second), value in interactions.items():
        for layer, name in ((i, first), (j, second)):
            _check_name(layers, _layer(layer, len(layers), "an interaction"), name, "an interaction")
        if i == j:
            raise AllocationError(reason=f"an interaction of layer {i} with itself")
        added = _added(layers, value if isinstance(value, Mapping) else {minimize: value}, f"the interaction of layers {i} and {j}")
        (g, a), (h, b) = where.get((i, first), (-1, 0)), where.get((j, second), (-2, 0))
        if g >= 0 and h >= 0 and (g != h or a == b):
            pairs.append((g, a, h, b))
            extra.append(added)
    return tuple(pairs), tuple(extra)


def _added(layers: tuple[tuple[Choice, ...], ...], value: Mapping[str, float], what: str) -> dict[str, float]:
    """What an interaction adds, by cost."""
    for cost in value:
        if all(cost not in choice.costs for layer in layers for choice in layer):
            raise AllocationError(reason=f"{what} adds to a cost named {cost!r}, which no choice has")
    added = {cost: check_number(x, what) for cost, x in value.items()}
    if math.inf in added.values():
        raise AllocationError(reason=f"{what} is infinite; give the cost of what cannot be as infinite in a choice")
    return added


def _check_name(layers: tuple[tuple[Choice, ...], ...], layer: int, name: str, what: str) -> None:
    if all(choice.name != name for choice in layers[layer]):
        raise AllocationError(reason=f"{what} names the choice {name!r}, which layer {layer} does not offer")


def _forbidden(
    layers: tuple[tuple[Choice, ...], ...],
    groups: tuple[Group, ...],
    where: Mapping[tuple[int, str], tuple[int, int]],
    forbidden: Iterable[Sequence[str]],
) -> tuple[Picks, ...]:
    """As picks. What ties or infinite costs rule out anyway is left out."""
    made = []
    for names in forbidden:
        if len(names) != len(layers):
            raise AllocationError(reason=f"a forbidden allocation names {len(names)} choices for {len(layers)} layers")
        for i, name in enumerate(names):
            _check_name(layers, i, name, "a forbidden allocation")
        picks = [{where.get((layer, names[layer]), (g, -1))[1] for layer in group.layers} for g, group in enumerate(groups)]
        if all(len(options) == 1 and -1 not in options for options in picks):
            made.append(tuple(options.pop() for options in picks))
    return tuple(made)
