"""The dimensions of a printed block: which axes lie along which dimension, how long it is, and the variables that index and mask it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy

from ...ir.dims import Mod, product, to_source
from ..kernel import Axis, Kernel
from ..names import unique
from .indices import Span
from .schedule import Schedule, group_block, inner_groups


@dataclass(frozen=True)
class Dimension:
    """One dimension of the block. `constant`: name of its constexpr length; `block`: that length; looped: walked in chunks.

    within: only those chunks are walked that lie in the extent as a whole. shared: its blocks are of several programs, and of none where
    the extent is 0. start: the variable that holds where a chunk begins, a multiple of `block`; "" where there is none.
    """

    span: Span
    constant: str
    block: int
    looped: bool = False
    within: bool = False
    shared: bool = False
    start: str = ""

    @functools.cached_property
    def steady(self) -> frozenset[str]:
        """The axes that have one position in all of a chunk: groups that chunks do not cross."""
        axes = self.span.axes
        after = [product(a.extent for a in axes[n + 1 :]) for n in range(len(axes))]
        return frozenset(a.name for a, rest in zip(axes, after) if self.start and isinstance(rest, int) and rest % self.block == 0)

    @property
    def masked(self) -> bool:
        """False when blocks tile the extent exactly."""
        if self.within:
            return False
        extent = self.span.extent
        if isinstance(extent, int):
            return extent % self.block != 0 if extent else True
        several = self.looped or self.shared  # a single block has points where the extent has none
        return not several or Mod(extent, sympy.Integer(self.block)) != 0

    @property
    def mask(self) -> str:
        return f"mask_{self.span.flat}"


@dataclass(frozen=True)
class Layout:
    """`grid` lies along dimension 0 of a block when it has more than one point per program; the inner groups follow."""

    grid: Span
    points: Dimension | None
    groups: tuple[Dimension, ...]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return ((self.points,) if self.points else ()) + self.groups

    @property
    def rank(self) -> int:
        return len(self.dimensions)

    @property
    def shape(self) -> str:
        return f"[{', '.join(d.constant for d in self.dimensions)}]"

    def position(self, dimension: Dimension) -> int:
        return self.dimensions.index(dimension)

    def spread(self, dimension: Dimension) -> str:
        """The subscript that puts a row of points along a dimension: "[:, None]"."""
        if self.rank == 1:
            return ""
        return f"[{', '.join(':' if d is dimension else 'None' for d in self.dimensions)}]"

    def along(self, axes: Iterable[str]) -> tuple[Dimension, ...]:
        """The dimensions a value over these axes extends along."""
        names = set(axes)
        return tuple(d for d in self.dimensions if any(a.name in names and a.name not in d.steady for a in d.span.axes))

    def changes(self, axes: Iterable[str]) -> bool:
        """Whether a value over these axes is another one in every pass of a loop."""
        names = set(axes)
        return any(d.looped and any(a.name in names for a in d.span.axes) for d in self.dimensions)


def layout_of(kernel: Kernel, schedule: Schedule) -> Layout:
    """The block of a legalized kernel under a schedule."""
    groups = inner_groups(kernel)
    taken = {a.name for a in kernel.axes} | set(kernel.sizes)
    grid = Span(kernel.grid, flat_name(kernel.grid, "point", taken))
    scalar = not kernel.grid or (schedule.xblock == 1 and bool(groups))
    points = None if scalar else Dimension(grid, "XBLOCK", schedule.xblock, shared=True)
    dimensions = []
    for n, group in enumerate(groups):
        span = Span(group, flat_name(group, f"inner{n or ''}", taken))
        constant = f"RBLOCK{n or ''}"
        dimensions.append(Dimension(span, constant, group_block(group, schedule), looped=not schedule.persistent))
    return Layout(grid, points, tuple(dimensions))


def flat_name(axes: Sequence[Axis], many: str, taken: set[str]) -> str:
    """What the flat point over the axes is called; a single axis is its own."""
    return axes[0].name if len(axes) == 1 else unique(many, taken)


def extent_source(span: Span) -> str:
    return to_source(span.extent)


def mask_lines(dimension: Dimension) -> list[str]:
    """The line that defines the mask of a dimension that has one."""
    return [f"{dimension.mask} = {dimension.span.flat} < {extent_source(dimension.span)}"] if dimension.masked else []
