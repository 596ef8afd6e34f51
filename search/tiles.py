"""Legal schedules are the integer solutions of a constraint program: CP-SAT enumerates a template's `Space`, and names what rules all out.

Source: "ConstrINT" of FlashRNN (Pöppel et al., 2024), which solves for tile sizes over divisibility and memory limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sympy

from ..codegen.space import Limit, Space
from ..ir.dims import Dim, FloorDiv, Mod
from ..ir.errors import TilewrightError

if TYPE_CHECKING:
    from ortools.sat.python.cp_model import CpModel, IntVar

MOST = 20_000
"""Schedules: more are not worth ranking."""


class NoSchedule(TilewrightError):
    """limits: a smallest set of limits that no schedule keeps together."""

    template = "no schedule is legal: {reason}"

    def __init__(self, limits: tuple[Limit, ...]) -> None:
        super().__init__(reason=" together with ".join(map(str, limits)) or "a variable has no values")
        self.limits = limits


def schedules(space: Space, most: int = MOST) -> list[dict[str, int]]:
    """Every legal assignment of the variables, in the order of their values; the first `most` found where there are more.

    Raises NoSchedule.
    """
    if not all(space.variables.values()):
        raise NoSchedule(())
    model, variables = _model(space, space.limits)
    found = _solutions(model, list(variables.values()), most)
    if not found:
        raise NoSchedule(_conflict(space))
    return [dict(zip(variables, values)) for values in sorted(found)]


def _solutions(model: CpModel, variables: list[IntVar], most: int) -> list[tuple[int, ...]]:
    from ortools.sat.python import cp_model

    found: list[tuple[int, ...]] = []

    class Collect(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            found.append(tuple(self.value(v) for v in variables))
            if len(found) >= most:
                self.stop_search()

    solver = cp_model.CpSolver()
    solver.parameters.enumerate_all_solutions = True
    solver.parameters.num_workers = 1  # enumeration is sequential, and so reproducible
    solver.parameters.keep_all_feasible_solutions_in_presolve = True
    solver.solve(model, Collect())
    return found


def _conflict(space: Space) -> tuple[Limit, ...]:
    """A smallest set of limits that rule out everything: each in turn is left out if the others do."""
    needed = list(space.limits)
    for limit in space.limits:
        others = [x for x in needed if x is not limit]
        if not _satisfiable(space, others):
            needed = others
    return tuple(needed)


def _satisfiable(space: Space, limits: list[Limit]) -> bool:
    model, variables = _model(space, tuple(limits))
    return bool(_solutions(model, list(variables.values()), 1))


def _model(space: Space, limits: tuple[Limit, ...]) -> tuple[CpModel, dict[str, IntVar]]:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables = {
        name: model.new_int_var_from_domain(cp_model.Domain.from_values(sorted(values)), name) for name, values in space.variables.items()
    }
    ranges = {name: (min(values), max(values)) for name, values in space.variables.items()}
    terms = _Terms(model, variables, ranges)
    for limit in limits:
        model.add(terms.of(limit.amount)[0] <= terms.of(limit.at_most)[0])
    return model, variables


Term = tuple[Any, int, int]  # a linear expression of the model, and its least and largest value


class _Terms:
    """Integer expressions over the variables, as linear expressions over helper variables, which their operands determine."""

    def __init__(self, model: CpModel, variables: Mapping[str, IntVar], ranges: Mapping[str, tuple[int, int]]) -> None:
        self.model = model
        self.known: dict[Any, Term] = {sympy.Symbol(n, integer=True, nonnegative=True): (v, *ranges[n]) for n, v in variables.items()}

    def of(self, value: Dim) -> Term:
        if isinstance(value, int) or value.is_Integer:
            return int(value), int(value), int(value)
        if value not in self.known:
            self.known[value] = self._made(value)
        return self.known[value]

    def _made(self, value: sympy.Expr) -> Term:
        if value.is_Symbol:
            raise KeyError(f"{value} is no variable of the space")
        arguments = list(value.args)
        if value.is_Pow:
            arguments = [value.args[0]] * int(value.args[1])  # type: ignore[call-overload]
        terms = [self.of(a) for a in arguments]  # type: ignore[arg-type]
        if value.is_Add:
            return sum(t[0] for t in terms), sum(t[1] for t in terms), sum(t[2] for t in terms)
        if value.is_Mul or value.is_Pow:
            total = terms[0]
            for term in terms[1:]:
                total = self._times(total, term)
            return total
        return self._function(type(value), terms)

    def _times(self, a: Term, b: Term) -> Term:
        if a[1] == a[2] or b[1] == b[2]:
            ends = [a[1] * b[1], a[2] * b[2]] if a[1] == a[2] else [a[1] * b[1], a[2] * b[1]]
            return (a[1] * b[0] if a[1] == a[2] else b[1] * a[0]), min(ends), max(ends)
        ends = [x * y for x in a[1:] for y in b[1:]]
        made = self.model.new_int_var(min(ends), max(ends), "")
        self.model.add_multiplication_equality(made, [a[0], b[0]])
        return made, min(ends), max(ends)

    def _function(self, kind: type, terms: list[Term]) -> Term:
        low, high = {
            FloorDiv: lambda a, b: (a[1] // b[2], a[2] // b[1]),
            Mod: lambda a, b: (0, b[2] - 1),
            sympy.Max: lambda *t: (max(x[1] for x in t), max(x[2] for x in t)),
            sympy.Min: lambda *t: (min(x[1] for x in t), min(x[2] for x in t)),
        }[kind](*terms)
        made = self.model.new_int_var(low, high, "")
        values = [t[0] for t in terms]
        if kind is FloorDiv:
            self.model.add_division_equality(made, *values)
        elif kind is Mod:
            self.model.add_modulo_equality(made, *values)
        else:
            add = self.model.add_max_equality if kind is sympy.Max else self.model.add_min_equality
            add(made, values)
        return made, low, high
