"""What a tuner chooses from: the schedules of each template, as spaces that hold what is legal and may be worth it.

    linear_gelu for sm_90   -->   Offer(walk="dot"; block_m in 16 .. 256, block_n in 16 .. 256, ..., operand blocks fit shared memory, ...)

Legal is what a template says (`space` beside its options). Worth it is said here: no blocks far beyond the sizes, work for every warp,
a depth that is shared only where programs are few. Sizes that are known at the launch only limit nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

import sympy

from ...ir.dims import Dim, FloorDiv, dim, product, symbol
from ..kernel import Axis, Kernel, Load, scalars
from ..space import Limit, Space
from . import attention_tiles, recurrence_tiles, tiles
from .attention import roles
from .features import FEATURES
from .product import FEW, find_product, without_matrix
from .schedule import LARGEST_BLOCK, Schedule, element_width, inner_groups, needs_whole_block, next_power_of_two
from .templates import template_of
from .tiles import ANY, PROCESSORS, SEVERAL_ROWS, UNITS, Tiles, Unit, powers

LONGEST_LOOP = 8192
"""Elements of a chunk, at most."""

LEAST_CHUNK = 16

WARP_RESULTS = 256
"""Results that a warp should have of a product by matrix units: fewer leave them idle."""


@dataclass(frozen=True)
class Offer:
    """A space, and what all of its schedules have in common. start: the schedule that a template starts from."""

    space: Space
    start: Any
    common: Mapping[str, Any] = field(default_factory=dict)

    def schedule(self, values: Mapping[str, int]) -> Any:
        """The schedule of values of the variables."""
        kinds = get_type_hints(type(self.start))
        return replace(self.start, **self.common, **{name: kinds[name](value) for name, value in values.items()})


def offers(kernel: Kernel, target: str | None = None) -> list[Offer]:
    """The spaces of a kernel's template for a target, None for any. Raises UnsupportedByTriton where the kernel is not printed."""
    kernel = without_matrix(kernel)
    template = template_of(kernel)
    return _OFFERS[template.options](kernel, template.default(kernel), UNITS[target] if target else ANY, target)


# ---- contractions


def _products(kernel: Kernel, start: Tiles, unit: Unit, target: str | None) -> list[Offer]:
    found = find_product(kernel)
    rows, columns, depth = (found.size(axes) for axes in (found.rows, found.columns, found.depth))
    m, n, k, warps, split = (symbol(s) for s in ("block_m", "block_n", "block_k", "num_warps", "split_k"))
    programs = product((found.size(found.batch), *(_over(extent, block) for extent, block in ((rows, m), (columns, n)))))
    limits: list[Limit] = []
    if _known(programs):
        limits.append(Limit("the depth is shared where programs are few", sympy.Min(split - 1, 1) * programs, PROCESSORS))
        several = sympy.Min(symbol("programs"), 1) * (unit.processors + 1)
        limits.append(Limit("programs have several tiles", several, sympy.Max(programs, 1)))
    if isinstance(depth, int):
        limits.append(Limit("a part of the depth has two blocks", 2 * k * sympy.Min(split - 1, 1) * split, max(depth, 2)))
    few = isinstance(rows, int) and rows <= 2 * SEVERAL_ROWS and found.parts is None
    made: list[Offer] = []
    for walk in ("dot", "sum") if few and not found.reduces else ("dot",):
        space = tiles.space(found, walk, target)
        ranges = {
            "block_m": _covering(space, "block_m", rows), "block_n": _covering(space, "block_n", columns),
            "block_k": _covering(space, "block_k", depth, 128 if walk == "dot" else 1024),
            "split_k": (1, 2, 4, 8, 16) if _known(programs) else (1,),
            "group_m": (8,), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4, 5) if walk == "dot" else (1, 2, 3),
            **{option: space.variables[option] for option in FEATURES},
        }  # fmt: skip
        least = WARP_RESULTS if walk == "dot" else unit.lanes
        work = Limit("every warp has work", least * warps, sympy.Max(m * n * (k if walk == "sum" else 1), 2 * least))
        made.append(Offer(Space(ranges, (*space.limits, *limits, work)), start, {"walk": walk}))
    return made


def _covering(space: Space, name: str, size: Dim, most: int = LARGEST_BLOCK) -> tuple[int, ...]:
    """Lengths of blocks up to the first that covers a size, and the least that there is."""
    offered = space.variables[name]
    enough = next_power_of_two(size) if isinstance(size, int) else LARGEST_BLOCK
    return tuple(b for b in offered if b <= min(most, max(enough, offered[0])))


def _over(extent: Dim, block: sympy.Symbol) -> Dim:
    """Blocks that cover an extent."""
    return dim(FloorDiv(extent + block - 1, block))


def _known(amount: Any) -> bool:
    """Whether an expression is over variables of a space only."""
    names = {"block_m", "block_n"}
    return not isinstance(amount, sympy.Expr) or {s.name for s in amount.free_symbols} <= names  # type: ignore[attr-defined]


# ---- attentions and recurrences


def _attentions(kernel: Kernel, start: attention_tiles.AttentionTiles, unit: Unit, target: str | None) -> list[Offer]:
    found = roles(kernel)
    space = attention_tiles.space(kernel, found, target)
    m, n, splits = (symbol(s) for s in ("block_m", "block_n", "splits"))
    rows, keys = product(a.extent for a in found.rows), found.key.extent
    programs = product((_over(rows, m), *(a.extent for a in found.batch)))
    limits: list[Limit] = []
    if _known(programs):
        limits.append(Limit("keys are shared where programs are few", sympy.Min(splits - 1, 1) * programs, attention_tiles.BUSY))
    if attention_tiles.element_size(kernel, found) > 2:  # threads hold what they multiply; with more than this they spill
        words, depth, width = found.attend.dtype.itemsize // 4, attention_tiles.depth_of(found), attention_tiles.padded(found.column.extent)
        held = 2 * words * (m * (n + width) + (m + n) * depth)
        limits.append(Limit("what is multiplied fits half of the registers", held, unit.room(symbol("num_warps"))))
    if isinstance(keys, int):
        limits.append(Limit("a part of the keys has two blocks", 2 * n * sympy.Min(splits - 1, 1) * splits, max(keys, 2)))
    ranges = dict(space.variables) | {"block_m": _covering(space, "block_m", rows), "block_n": _covering(space, "block_n", keys)}
    return [Offer(Space(ranges, (*space.limits, *limits)), start)]


def _recurrences(kernel: Kernel, start: recurrence_tiles.RecurrenceTiles, unit: Unit, target: str | None) -> list[Offer]:
    found = recurrence_tiles.find_layer(kernel)
    rows = product(a.extent for a in found.rows)
    few = isinstance(rows, int) and rows <= FEW
    made: list[Offer] = []
    for walk in ("dot", "sum") if few else ("dot",):
        space = recurrence_tiles.space(found, walk, target)
        sizes: dict[str, Dim] = {"block_m": rows, "block_n": found.units, "block_k": found.units}
        ranges = dict(space.variables) | {name: _covering(space, name, size) for name, size in sizes.items()}
        made.append(Offer(Space(ranges, space.limits), start, {"walk": walk}))
    return made


# ---- points and reductions


def _blocks(kernel: Kernel, start: Schedule, unit: Unit, target: str | None) -> list[Offer]:
    groups = inner_groups(kernel)
    points = _enough(kernel.grid, 64 if groups else 4096)
    if not groups:
        return [_block_offer(kernel, start, unit, {"xblock": powers(min(32, points), points)}, symbol("xblock"), {"rblock": 1})]
    extents = [product(a.extent for a in group) for group in groups]
    made: list[Offer] = []
    if all(isinstance(e, int) for e in extents):
        inner = math.prod(next_power_of_two(e) for e in extents if isinstance(e, int))
        common = {"persistent": True, "rblock": inner}
        made.append(_block_offer(kernel, start, unit, {"xblock": powers(1, points)}, inner * symbol("xblock"), common))
    if not needs_whole_block(kernel, groups):
        longest = max(_enough(group, LONGEST_LOOP) for group in groups)
        ranges = {"xblock": powers(1, points), "rblock": powers(min(LEAST_CHUNK, longest), longest)}
        made.append(_block_offer(kernel, start, unit, ranges, symbol("xblock") * symbol("rblock"), {"persistent": False}))
    return made


def _block_offer(
    kernel: Kernel, start: Schedule, unit: Unit, ranges: dict[str, tuple[int, ...]], elements: sympy.Expr, common: dict[str, Any]
) -> Offer:
    """The schedules whose blocks have so many elements."""
    warps = symbol("num_warps")
    loads = len([v for v in scalars(kernel.stores) if isinstance(v, Load)])
    words = element_width(kernel) * max(loads, 1)
    limits = (
        Limit("what is loaded fits half of the registers", 2 * words * elements, unit.room(warps)),
        Limit("a program has no more threads than the target runs", unit.lanes * warps, unit.threads),
        Limit("a block is one that Triton takes", elements, LARGEST_BLOCK),
        Limit("every thread has an element", unit.lanes * warps, sympy.Max(unit.lanes, elements)),
    )
    return Offer(Space(ranges | {"num_warps": (1, 2, 4, 8, 16)}, limits), start, common)


def _enough(axes: tuple[Axis, ...], most: int) -> int:
    """The power of two that covers the axes, if that is not too many."""
    extent = product(a.extent for a in axes)
    return min(most, next_power_of_two(extent)) if isinstance(extent, int) else most


_OFFERS: dict[type, Callable[..., list[Offer]]] = {
    Tiles: _products,
    attention_tiles.AttentionTiles: _attentions,
    recurrence_tiles.RecurrenceTiles: _recurrences,
    Schedule: _blocks,
}
