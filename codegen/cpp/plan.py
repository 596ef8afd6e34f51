"""What a block of a kernel computes in which phase, and which values it keeps in row buffers between phases.

A block is a place in the loop nest where some axes are bound. A reduction needs a loop over its axes before its result exists, so
the loops of a block come in phases: phase p walks the inner axes when all reductions of the phases before are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Kernel, Load, Position, Reduce, Scan, Store, cone, operands

# cost of an operation in cycles per vector, where it is more than 1
COSTS: dict[str, int] = {
    "div": 6, "sqrt": 8, "rsqrt": 12, "exp": 12, "exp2": 11, "expm1": 20, "log": 16, "log2": 16, "log10": 16, "log1p": 20, "tanh": 24,
    "erf": 28, "sin": 30, "cos": 30, "tan": 40, "pow": 60, "mod": 20, "fmod": 20, "floordiv": 20, "truncdiv": 20, "ipow": 30,
    "asin": 200, "acos": 200, "atan": 200, "atan2": 200, "sinh": 200, "cosh": 200, "asinh": 200, "acosh": 200, "atanh": 200,
    "erfc": 200, "lgamma": 300, "hypot": 100, "nextafter": 50,
}  # fmt: skip
KEEP_COST = 10  # recomputing costs more than a store and a load from the first-level cache


@dataclass
class Phase:
    """Reductions whose operands, and stores whose values, can be computed in one walk."""

    reduces: list[Reduce] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)


@dataclass
class Block:
    """phases: in order. kept: value -> phase in which it is computed and put into a row buffer."""

    phases: list[Phase]
    kept: dict[Scalar, int] = field(default_factory=dict)


def plan_block(kernel: Kernel, free: dict[Scalar, frozenset[str]], bound: frozenset[str], stores: list[Store],
               wants: list[Scalar], known: set[Scalar]) -> Block:  # fmt: skip
    """The phases of a block that must make `stores` and compute `wants`, where `known` values exist already."""
    values = cone([s.value for s in stores] + wants, known)
    ready: dict[Scalar, int] = {}
    phases: dict[int, Phase] = {}
    for value in values:
        level = max((ready.get(v, 0) for v in operands(value)), default=0)
        if isinstance(value, Reduce) and free[value] <= bound:
            phases.setdefault(level, Phase()).reduces.append(value)
            level += 1
        ready[value] = level
    last_read = _last_reads(kernel, phases)
    for store in stores:
        level = max(ready.get(store.value, 0), _aliased_read(kernel, store, last_read, stores, ready))
        phases.setdefault(level, Phase()).stores.append(store)
    count = max(phases, default=-1) + 1
    return Block([phases.get(p, Phase()) for p in range(count)])


def _last_reads(kernel: Kernel, phases: dict[int, Phase]) -> dict[str, int]:
    last: dict[str, int] = {}
    for level, phase in phases.items():
        for value in cone([r.value for r in phase.reduces]):
            if isinstance(value, Load):
                last[value.buffer] = max(level, last.get(value.buffer, 0))
    return last


def _aliased_read(kernel: Kernel, store: Store, last_read: dict[str, int], stores: list[Store], ready: dict[Scalar, int]) -> int:
    """An output that lies over an input is written in the last phase that reads that input."""
    source = dict(kernel.inplace).get(store.buffer)
    if source is None:
        return 0
    readers = [ready.get(s.value, 0) for s in stores if any(isinstance(v, Load) and v.buffer == source for v in cone([s.value]))]
    return max([last_read.get(source, 0), *readers])


def phase_roots(phase: Phase) -> list[Scalar]:
    return [r.value for r in phase.reduces] + [s.value for s in phase.stores]


def keep_rows(block: Block, free: dict[Scalar, frozenset[str]], bound: frozenset[str]) -> None:
    """Chooses the values worth a row buffer: needed in two phases and dear to recompute. Fills `block.kept`."""
    first: dict[Scalar, int] = {}
    for number, phase in enumerate(block.phases):
        seen: set[Scalar] = set()
        stack = phase_roots(phase)
        while stack:
            value = stack.pop()
            if value in seen or free[value] <= bound:
                continue
            seen.add(value)
            if first.get(value, number) < number and (value in block.kept or _cost(value, block.kept, free, bound) >= KEEP_COST):
                block.kept.setdefault(value, first[value])
                continue
            first.setdefault(value, number)
            stack.extend(operands(value))


def _cost(value: Scalar, kept: dict[Scalar, int], free: dict[Scalar, frozenset[str]], bound: frozenset[str]) -> float:
    """Cycles per vector to compute a value again from memory and row buffers."""
    total = 0.0
    for v in cone([value], kept):
        if not free[v] <= bound:
            total += operation_cost(v)
    return total


def operation_cost(value: Scalar) -> float:
    if isinstance(value, Apply):
        return COSTS.get(value.op, 1)
    if isinstance(value, Load):
        return 1 if not value.indirect and value.mask is None else 8
    if isinstance(value, (Reduce, Scan)):
        return 1000
    return 0 if isinstance(value, (Const, Position)) else 1


def index_axes(kernel: Kernel, index: object) -> frozenset[str]:
    """Names of the kernel's axes in an index expression."""
    return frozenset(a.name for a in kernel.axes) & {s.name for s in sympy.sympify(index).free_symbols}  # type: ignore[attr-defined]
