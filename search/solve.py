"""The integer program of an allocation: GLOP prices the limits, CP-SAT finds the optimum, and the bounds around both are exact.

    x[group, option] in {0, 1}, one per group;  y = x[g, a] and x[h, b] for each pair
    limits       sum of amounts <= most, in exact units
    objective    sum of amounts, its leading BITS bits

No amount is rounded in the user's favour. A limit whose units do not fit is relaxed to its leading digits (each amount rounded down);
should a solution break the exact limit, the next digits are added and the program is solved again. The prices of the limits give a bound
in exact arithmetic (any prices give one, so GLOP's rounding does not matter) that tells which options no optimum takes: the program is
solved over the options that look best, then over more, until it has all that the bound leaves. Source: the core of "A minimal algorithm
for the multiple-choice knapsack problem" (Pisinger, 1995).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .problem import Picks, Problem, Row

if TYPE_CHECKING:
    from ortools.sat.python.cp_model import CpModel, IntVar

BITS = 45
"""Of the largest sum in a program: CP-SAT's numbers have 64, those of its linear relaxation 53."""
CORE = 256
"""Options beyond one per group that the first program may take."""
GROWTH = 3
"""How many times more the next one may; a better solution makes its bound leave fewer."""
EFFORT = 1.0
"""Deterministic seconds of CP-SAT: what is not proved by then comes with the bound proved so far, the same on every run. Only where
nothing is found, and nothing ruled out, it goes on."""
PRECISION = 2.0**-32
"""How near to the bound, relative to the objective, is near enough."""

Limits = Mapping[str, tuple[Row, int]]
"""Name -> a sum, and the most units it may have."""


@dataclass(frozen=True)
class Kept:
    """What a program may take: for each group its options; and of the pairs, which."""

    options: Sequence[Sequence[int]]
    pairs: Sequence[bool]


@dataclass(frozen=True)
class Solution:
    """bound: nothing within the limits has less, in units of the objective. prices: see `prices`."""

    picks: Picks
    bound: int
    prices: Mapping[str, Fraction]


def solve(problem: Problem, objective: Row, limits: Limits) -> Solution | None:
    """The picks of least objective within the limits; None where nothing is. Equal questions have equal answers."""
    priced = prices(problem, objective, limits)
    bound, reduced, pairs = _lagrangian(objective, limits, priced)
    widths = sorted([*(r for options in reduced for r in options), *pairs]) or [Fraction(0)]
    base, extra, best, lower = len(reduced) + len(pairs), CORE, None, math.ceil(bound)
    width = _at(widths, base + extra)
    while True:
        kept = Kept([[j for j, r in enumerate(options) if r <= width] for options in reduced], [r <= width for r in pairs])
        found = _solve_kept(problem, objective, limits, kept, best)
        if found is None and width >= widths[-1]:
            return None
        if found is None:
            width = widths[-1]
            continue
        best, units = found.picks, problem.units(objective, found.picks)
        gap = units - bound  # with any option above, there would be more
        complete = width >= min(gap, widths[-1])
        lower = max(lower, math.ceil(found.bound if complete else min(Fraction(found.bound), bound + width)))
        if not found.proved or complete and not _coarse(units - lower, units, gap, width, widths):
            return Solution(best, lower, priced)
        extra *= GROWTH
        width = gap if complete else min(gap, _at(widths, base + extra))


def _coarse(slack: int, units: int, gap: Fraction, width: Fraction, widths: list[Fraction]) -> bool:
    """Whether amounts were rounded too much, and a program without options that are now known to be too large would do better."""
    return slack > PRECISION * abs(units) and bisect_right(widths, gap) < bisect_right(widths, width)


def least_excess(problem: Problem, limits: Limits) -> Picks | None:
    """The picks that exceed limits least: the sum, over limits, of the excess relative to the limit. None where all is forbidden."""
    return _Program(problem, Kept([range(len(group.names)) for group in problem.groups], [True] * len(problem.pairs))).least_excess(limits)


def prices(problem: Problem, objective: Row, limits: Limits) -> dict[str, Fraction]:
    """By how many units the objective of the linear relaxation falls where a limit is raised by one unit: its duals, never negative."""
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("GLOP")
    options: list[list[Any]] = [[solver.NumVar(0, 1, "") for _ in group.names] for group in problem.groups]
    for variables in options:
        solver.Add(solver.Sum(variables) == 1)
    pairs = [_relaxed_pair(solver, options[g][a], options[h][b]) for g, a, h, b in problem.pairs]
    scale, terms, _ = _relaxed(objective, options, pairs)
    solver.Minimize(solver.Sum([x * v for x, v in terms]))
    rows = {}
    for name, (row, most) in limits.items():
        size, terms, least = _relaxed(row, options, pairs)
        if _span(row)[1] > most:
            rows[name] = size, solver.Add(solver.Sum([x * v for x, v in terms]) <= float(Fraction(most - least, size)))
    if solver.Solve() != pywraplp.Solver.OPTIMAL:  # no solution, or too badly scaled: no price is a valid price
        return dict.fromkeys(limits, Fraction(0))
    duals = {name: Fraction(max(0.0, -row.dual_value())) * scale / size for name, (size, row) in rows.items()}
    return {name: duals.get(name, Fraction(0)) for name in limits}


def _relaxed_pair(solver: Any, first: Any, second: Any) -> Any:
    both = solver.NumVar(0, 1, "")
    solver.Add(both <= first)
    solver.Add(both <= second)
    solver.Add(both >= first + second - 1)
    return both


def _relaxed(row: Row, options: list[list[Any]], pairs: list[Any]) -> tuple[int, list[tuple[Any, float]], int]:
    """Divisor, terms scaled to at most one, and the units left out of them: the least amount of each group."""
    least = [min(amounts) for amounts in row.amounts]
    units = [(x, a - low) for group, amounts, low in zip(options, row.amounts, least) for x, a in zip(group, amounts)]
    units += zip(pairs, row.pairs)
    size = max((abs(u) for _, u in units), default=0) or 1
    return size, [(x, float(Fraction(u, size))) for x, u in units if u], sum(least)


def _span(row: Row) -> tuple[int, int]:
    """What a sum lies between."""
    low, high = sum(min(a) for a in row.amounts), sum(max(a) for a in row.amounts)
    return low + sum(p for p in row.pairs if p < 0), high + sum(p for p in row.pairs if p > 0)


def _lagrangian(objective: Row, limits: Limits, prices: Mapping[str, Fraction]) -> tuple[Fraction, list[list[Fraction]], list[Fraction]]:
    """A bound on the objective, and for each option and each pair by how much the bound rises with it."""
    priced = [(price, *limits[name]) for name, price in prices.items() if price]
    amounts = [
        [Fraction(a) + sum(price * row.amounts[g][j] for price, row, _ in priced) for j, a in enumerate(options)]
        for g, options in enumerate(objective.amounts)
    ]
    pairs = [Fraction(a) + sum(price * row.pairs[p] for price, row, _ in priced) for p, a in enumerate(objective.pairs)]
    least = [min(options) for options in amounts]
    bound = sum(least, Fraction(0)) + sum(min(Fraction(0), p) for p in pairs) - sum(price * most for price, _, most in priced)
    return bound, [[a - low for a in options] for options, low in zip(amounts, least)], [max(Fraction(0), p) for p in pairs]


def _at(widths: list[Fraction], count: int) -> Fraction:
    """How far above the bound so many options are."""
    return widths[min(len(widths), count) - 1]


def _solve_kept(problem: Problem, objective: Row, limits: Limits, kept: Kept, known: Picks | None) -> _Found | None:
    """Over the options kept. known: a solution among them."""
    digits = 1
    while True:
        found = _Program(problem, kept).solve(objective, limits, digits, known)
        if found is None or all(problem.units(row, found.picks) <= most for row, most in limits.values()):
            break
        digits += 1
    if found is None or known is None:
        return found
    return replace(found, picks=min(found.picks, known, key=lambda picks: problem.units(objective, picks)))


@dataclass(frozen=True)
class _Found:
    """Of a program: picks, and a bound on the objective over the options kept. proved: within the effort."""

    picks: Picks
    bound: int
    proved: bool


class _Sum:
    """A row over the options kept: terms that are not negative but for pairs, what was taken out of them, and what they lie between."""

    def __init__(self, program: _Program, row: Row) -> None:
        self.terms: list[tuple[IntVar, int]] = []
        self.constant = self.low = self.high = 0
        for amounts, options in zip(row.amounts, program.options):
            least = min(amounts[j] for j in options)
            self.constant += least
            self.high += max(amounts[j] for j in options) - least
            self.terms += [(x, amounts[j] - least) for j, x in options.items()]
        for p, both in program.pairs.items():
            self.low += min(0, row.pairs[p])
            self.high += max(0, row.pairs[p])
            self.terms.append((both, row.pairs[p]))
        self.shift = max(0, (self.high - self.low).bit_length() - BITS)

    def digits(self, begin: int, end: int | None) -> list[tuple[IntVar, int]]:
        """The terms' bits from number `begin`, to `end` or to the last, rounded down."""
        return [(x, _bits(amount, begin, end)) for x, amount in self.terms]


def _bits(amount: int, begin: int, end: int | None) -> int:
    return amount >> begin if end is None else (amount >> begin) & ((1 << (end - begin)) - 1)


class _Program:
    """CP-SAT's model of a problem over what is kept."""

    def __init__(self, problem: Problem, kept: Kept) -> None:
        from ortools.sat.python import cp_model

        self.model: CpModel = cp_model.CpModel()
        self.options = [{j: self.model.new_bool_var("") for j in options} for options in kept.options]
        for options in self.options:
            self.model.add_exactly_one(options.values())
        self.pairs: dict[int, IntVar] = {}
        for p, (g, a, h, b) in enumerate(problem.pairs):
            first, second = self.options[g].get(a), self.options[h].get(b)
            if first is None or second is None:
                continue
            if kept.pairs[p]:
                self.pairs[p] = self._both(first, second)
            else:
                self.model.add_bool_or([first.negated(), second.negated()])
        for picks in problem.forbidden:
            if all(pick in options for pick, options in zip(picks, self.options)):
                self.model.add_bool_or([options[pick].negated() for pick, options in zip(picks, self.options)])

    def _both(self, first: IntVar, second: IntVar) -> IntVar:
        both = self.model.new_bool_var("")
        self.model.add_bool_or([both, first.negated(), second.negated()])
        self.model.add_implication(both, first)
        self.model.add_implication(both, second)
        return both

    def limit(self, row: Row, most: int, digits: int) -> None:
        """The sum is at most so much, as far as its leading digits tell."""
        amount = _Sum(self, row)
        most -= amount.constant
        if most < amount.low:
            self.model.add_bool_or([])
        if not amount.low <= most < amount.high:
            return
        count = len(self.options) + len(self.pairs)  # of terms taken, at most; what they carry from one digit to the one before is less
        step = BITS - count.bit_length()
        end, begin, left = None, amount.shift, 0
        for _ in range(digits):
            total = sum(x * a for x, a in amount.digits(begin, end))
            more = self.model.new_int_var(0, count, "") if begin else 0
            self.model.add(total + more <= _bits(most, begin, end) + left)
            end, begin = begin, max(0, begin - step)
            left = more * (1 << (end - begin))
            if not end:
                return

    def solve(self, objective: Row, limits: Limits, digits: int, known: Picks | None) -> _Found | None:
        """The least objective, as far as the leading digits of the limits tell."""
        for row, most in limits.values():
            self.limit(row, most, digits)
        amount = _Sum(self, objective)
        self.model.minimize(sum(x * a for x, a in amount.digits(amount.shift, None)))
        for options, pick in zip(self.options, known or ()):
            for j, x in options.items():
                self.model.add_hint(x, j == pick)
        found = self._run()
        return found and replace(found, bound=amount.constant + (found.bound << amount.shift))

    def least_excess(self, limits: Limits) -> Picks | None:
        """Excesses count in equal fractions of their limits (of the range of the sum where that is zero), and so add up."""
        spans = {name: _span(row) for name, (row, _) in limits.items()}
        sizes = {name: abs(most) or max(1, spans[name][1] - spans[name][0]) for name, (_, most) in limits.items()}
        widest = max((Fraction(high - low, sizes[name]) for name, (low, high) in spans.items()), default=Fraction(0))
        fine = Fraction(1 << BITS) / (widest or 1) / (len(limits) or 1)
        excesses = []
        for name, (row, most) in limits.items():
            amount, scale = _Sum(self, row), fine / sizes[name]
            excess = self.model.new_int_var(0, 1 << (BITS + 1), "")
            least = min(max(most - amount.constant, amount.low), amount.high)  # beyond these it is the same for all picks, or none
            self.model.add(sum(x * math.floor(a * scale) for x, a in amount.terms) - math.floor(least * scale) <= excess)
            excesses.append(excess)
        self.model.minimize(sum(excesses))
        found = self._run()
        return found and found.picks

    def _run(self) -> _Found | None:
        from ortools.sat.python import cp_model

        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1  # more of them race, and equal questions would have different answers
        solver.parameters.linearization_level = 2  # knapsacks: its bound is nearly the optimum
        # OR-Tools 9.15 adds up coefficients in 32 bits there, and calls programs infeasible that are not (its issue 5293)
        solver.parameters.presolve_inclusion_work_limit = 0
        solver.parameters.max_deterministic_time = EFFORT
        status = solver.solve(self.model)
        bound, proved = solver.best_objective_bound, status == cp_model.OPTIMAL
        if status == cp_model.UNKNOWN:
            solver.parameters.max_deterministic_time = math.inf
            solver.parameters.stop_after_first_solution = True
            status = solver.solve(self.model)
        if status == cp_model.INFEASIBLE:
            return None
        picks = tuple(next(j for j, x in options.items() if solver.boolean_value(x)) for options in self.options)
        return _Found(picks, round(bound), proved)
