"""How a recurrence is walked on a GPU: the roles of its axes, `RecurrenceTiles`, which of them are legal, and those to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ...ir.dims import Dim, dim, product, symbol
from ...ir.scalar import Scalar
from ..kernel import Attend, Axis, Buffer, Dot, Kernel, Last, Previous, Recurrence, Reduce, Scan, cone, free_axes
from ..names import unique
from ..space import Limit, Space
from .legalize import UnsupportedByTriton
from .schedule import LARGEST_BLOCK, is_wide, next_power_of_two
from .tiles import ANY, SEVERAL_ROWS, UNITS, Unit

LEAST = 16
"""Rows, columns and depth of a product by matrix units are at least this many; what is missing is padded."""

MOST_UNITS = 1024
"""One program reads all weights of a layer at every step. With more of them the library, whose programs share them, is far ahead."""

HELD = 128 * 128
"""Weights that stay in registers from step to step: a quarter of those of a processor."""

WHOLE = 32
"""Units up to which one block is multiplied with all weights at once: threads that multiply alone would spill more of them."""


@dataclass(frozen=True)
class RecurrenceTiles:
    """A program walks all steps of block_m rows. It computes all of their units: block_n at a time, from block_k terms at a time.

    Where one block holds all units, both ways, states stay in registers; otherwise a step leaves them in memory for the next one.
    walk: as in `Tiles`. wide: index arithmetic in 64 bits.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 16
    num_warps: int = 4
    num_stages: int = 2
    walk: str = "dot"
    wide: bool = False


@dataclass(frozen=True)
class Layer:
    """The axes of a recurrence by what they are to its walk. rows: know nothing of each other; source: of the terms of a product.

    dots: of the states before and weights, all that a step needs; memory: of each state, twice, where steps leave it there.
    """

    kernel: Kernel
    recurrence: Recurrence
    rows: tuple[Axis, ...]
    unit: Axis
    step: Axis
    source: Axis
    dots: tuple[Dot, ...]
    memory: tuple[Buffer, ...]

    @property
    def units(self) -> int:
        assert isinstance(self.unit.extent, int)
        return self.unit.extent

    @property
    def multiplied(self) -> frozenset[str]:
        """The states that products read."""
        return frozenset(d.left.state for d in self.dots if isinstance(d.left, Previous))


def is_recurrence(kernel: Kernel) -> bool:
    return kernel.recurrence is not None


def find_layer(kernel: Kernel) -> Layer:
    """The roles of the axes of a kernel with a recurrence. Raises UnsupportedByTriton where it is none that is walked."""
    recurrence = kernel.recurrence
    assert recurrence is not None
    axes = {a.name: a for a in kernel.axes}
    unit = axes[recurrence.unit]
    dots = tuple(v for v in cone(values_of_step(kernel, recurrence)) if isinstance(v, Dot))
    problem = _problem(kernel, recurrence, unit, dots)
    if problem is not None:
        raise UnsupportedByTriton(what=kernel.name, reason=problem)
    rows = tuple(a for a in kernel.grid if a is not unit)
    taken = {b.name for b in (*kernel.inputs, *kernel.outputs)} | set(axes) | set(kernel.sizes)
    size = dim(sympy.sympify(product(a.extent for a in rows)) * unit.extent * 2)
    memory = tuple(Buffer(unique(f"{s.name}_kept", taken), s.following.dtype, size) for s in recurrence.states)
    return Layer(kernel, recurrence, rows, unit, axes[recurrence.step], axes[dots[0].axes[0]], dots, memory)


def values_of_step(kernel: Kernel, recurrence: Recurrence) -> list[Scalar]:
    """What a step computes: the states after it, and what it stores."""
    return [*(s.following for s in recurrence.states), *(s.value for s in kernel.stores if not isinstance(s.value, Last))]


def _problem(kernel: Kernel, recurrence: Recurrence, unit: Axis, dots: Sequence[Dot]) -> str | None:
    """Why a recurrence is not walked."""
    dtypes = {s.following.dtype for s in recurrence.states} | {d.dtype for d in dots}
    starts, steps = cone(s.initial for s in recurrence.states), cone(values_of_step(kernel, recurrence))
    summed = [v for v in (*starts, *steps) if isinstance(v, (Reduce, Scan, Attend)) or isinstance(v, Dot) and v in starts]
    problems = (
        (dtypes != {torch.float32}, "its states are not float32"),
        (not isinstance(unit.extent, int), f"it has {unit.extent} units, known at the launch only"),
        (bool(kernel.inplace), "an output lies over an operand"),
        (any(isinstance(v, Last) for v in steps), "something is computed from the last states"),
        (bool(summed), "something but products of states is summed up"),
        (not dots, "no state is multiplied by weights"),
        (not _are_products(kernel, unit, dots), "its products are not of the states before and weights of each unit"),
    )
    return next((reason for broken, reason in problems if broken), None)


def _are_products(kernel: Kernel, unit: Axis, dots: Sequence[Dot]) -> bool:
    """Whether each is a state times weights that depend on the unit and its own axis only, the same one for all."""
    free, extents = free_axes(kernel), {a.name: a.extent for a in kernel.axes}
    return all(
        isinstance(d.left, Previous)
        and d.axes == dots[0].axes == (d.left.at,)
        and extents[d.left.at] == unit.extent
        and free[d.right] <= {unit.name, d.left.at}
        for d in dots
    )


# ---- what is legal


def in_registers(found: Layer, tiles: RecurrenceTiles) -> bool:
    """Whether states stay in registers."""
    return found.units <= min(tiles.block_n, tiles.block_k)


def holds_weights(found: Layer, tiles: RecurrenceTiles) -> bool:
    """Whether weights stay in registers, too: those of matrix units would be there several times."""
    return tiles.walk == "sum" and in_registers(found, tiles) and len(found.dots) * tiles.block_n**2 <= HELD


def refusal(found: Layer, tiles: RecurrenceTiles, target: str | None = None) -> str | None:
    """The limit that the tiles break for this recurrence (on a target); None where they are legal."""
    if tiles.walk not in _SPACES:
        return f"walk is one of {', '.join(_SPACES)}, not {tiles.walk}"
    return space(found, tiles.walk, target).refusal(vars(tiles))


def space(found: Layer, walk: str = "dot", target: str | None = None) -> Space:
    """The legal tiles of a walk."""
    unit = UNITS[target] if target else ANY
    m, n, k, warps, stages = (symbol(s) for s in ("block_m", "block_n", "block_k", "num_warps", "num_stages"))
    blocks, limits = _SPACES[walk](found, unit, m, n, k, warps, stages)
    common = (
        Limit("a program computes all units of its rows", found.units, MOST_UNITS),
        Limit("a program has no more threads than the target runs", unit.lanes * warps, unit.threads),
        Limit("a block is one that Triton takes", sympy.Max(m * n, n * k), LARGEST_BLOCK),
    )
    return Space(blocks | {"num_warps": (1, 2, 4, 8, 16)}, (*common, *limits))


Offered = tuple[dict[str, tuple[int, ...]], list[Limit]]
"""Values of variables, and limits."""


def _dot_space(found: Layer, unit: Unit, m: Any, n: Any, k: Any, warps: Any, stages: Any) -> Offered:
    gates, room = len(found.dots), unit.room(warps)
    numbers = gates + len(found.recurrence.states)
    limits = [
        Limit("sums and states fit half of the registers", 2 * numbers * m * n, room),
        Limit("blocks of states and weights fit shared memory", 4 * (stages - unit.unbuffered) * k * (m + gates * n), unit.shared),
    ]
    if torch.float32 in unit.plain:  # threads hold what they multiply
        limits.append(Limit("sums and what is multiplied fit half of the registers", 2 * (numbers * m * n + k * (m + n)), room))
    blocks = {"block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128, 256), "block_k": (16, 32, 64, 128, 256)}
    return blocks | {"num_stages": (1, 2, 3)}, limits


def _sum_space(found: Layer, unit: Unit, m: Any, n: Any, k: Any, warps: Any, stages: Any) -> Offered:
    limits = [Limit("products fit half of the registers", 2 * len(found.dots) * m * n * k, unit.room(warps))]
    blocks = {"block_m": (1, 2, 4, 8, 16), "block_n": (4, 8, 16, 32, 64, 128), "block_k": (16, 32, 64, 128, 256, 512)}
    return blocks | {"num_stages": (1, 2)}, limits


_SPACES = {"dot": _dot_space, "sum": _sum_space}


# ---- a start


def layer_tiles(kernel: Kernel) -> RecurrenceTiles:
    """Reasonable tiles from sizes; the tuner starts here."""
    found = find_layer(kernel)
    wide = is_wide(kernel, found.memory)
    rows = product(a.extent for a in found.rows)
    few = isinstance(rows, int) and rows <= SEVERAL_ROWS
    return replace(_few_rows(found, rows) if few else _many_rows(found), wide=wide)


def _few_rows(found: Layer, rows: Dim) -> RecurrenceTiles:
    """Weights set the time: they stay in registers where they fit, and are read along the terms where not."""
    m, gates, whole = next_power_of_two(int(rows)), next_power_of_two(len(found.dots)), max(LEAST, next_power_of_two(found.units))
    if gates * m * whole * whole <= HELD:
        return RecurrenceTiles(m, whole, whole, 8, 1, "sum")
    return RecurrenceTiles(m, 16, max(16, 512 // (m * gates)), 8, 2, "sum")


def _many_rows(found: Layer) -> RecurrenceTiles:
    """As few rows to a program as matrix units take: the more programs there are, the shorter is a step."""
    whole = max(LEAST, next_power_of_two(found.units))
    return RecurrenceTiles(LEAST, whole, whole, 8, 1) if whole <= WHOLE else RecurrenceTiles()
