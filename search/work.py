"""What a kernel takes of a GPU under a schedule, before it is compiled: programs, operations and bytes, from the sizes alone.

    linear_gelu, 128 x 128 x 64   -->   Work(programs=1024, warps=8, flops=..., memory=..., cached=..., flight=...), one for each launch

The numbers are those of the walk: tiles beyond the sizes are paid for, operands are read again by every tile, and a program has so many
bytes under way at a time as its pipeline holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..codegen.attention_limits import find_limits
from ..codegen.kernel import Axis, Kernel, Load, Reduce, cone, free_axes, operands, scalars
from ..codegen.triton.attention import roles
from ..codegen.triton.attention_tiles import AttentionTiles, depth_of, element_size, padded
from ..codegen.triton.product import ACCUMULATORS, Product, find_product, without_matrix
from ..codegen.triton.ragged_roles import Blocks, Groups
from ..codegen.triton.recurrence_tiles import RecurrenceTiles, find_layer, holds_weights, in_registers
from ..codegen.triton.schedule import Schedule, group_block, inner_groups, next_power_of_two
from ..codegen.triton.templates import template_of
from ..codegen.triton.tiles import Tiles
from ..ir.dims import Dim, evaluate, free_symbols, product
from ..ir.scalar import Apply, Scalar

TYPICAL = 4096
"""A size that is known at the launch only and that nobody tells."""

SECTOR = 32
"""Bytes that memory gives at a time."""

TURN = 0.1
"""Of a wait for the cache, what each turn of a loop costs beside its work."""

WIDEST = 16
"""Bytes that a thread loads at a time, at most."""

FEED = 16
"""Matrix units wait for operands of a tile of m x n as if it were longer by so much, both ways."""

MOST_IN_FLIGHT = 64 << 10
"""Bytes that a program can wait for at a time."""

_DEAR = {"exp", "exp2", "erf", "tanh", "log", "pow", "sin", "cos", "log1p", "expm1", "erfc", "atan", "div", "sqrt", "rsqrt"}
_DEAR_COST = 16
_ADDRESS = 6
"""Operations of a thread for one load, whatever its width."""


@dataclass(frozen=True)
class Work:
    """One launch. flops: of a program, by units for `dtype`, which tiles of this shape keep busy by the fraction `fed`; plain: of float32
    arithmetic beside. memory: bytes from and to memory, of all programs; cached: of a program, through the second-level cache. flight:
    bytes of a program under way at a time. stages: blocks that are loaded while another is multiplied. waits: of a program, one after the
    other, for the cache. registers: of a thread, shared: bytes of a program, both estimated.
    """

    programs: int
    warps: int
    memory: float
    cached: float
    flight: float
    plain: float = 0.0
    flops: float = 0.0
    dtype: str = "float32"
    fed: float = 1.0
    stages: int = 1
    waits: float = 1.0
    registers: float = 32.0
    shared: int = 0
    rows: int = 0


Estimate = Callable[[Any], "list[Work]"]


def estimator(kernel: Kernel, sizes: Mapping[str, int] = {}) -> Estimate:
    """schedule -> the work of each launch. sizes: of symbolic extents; TYPICAL where one is missing. Raises UnsupportedByTriton."""
    kernel = without_matrix(kernel)
    return _ESTIMATORS[template_of(kernel).options](kernel, _Sizes(sizes))


class _Sizes:
    """Extents as numbers."""

    def __init__(self, known: Mapping[str, int]) -> None:
        self._known = known

    def __call__(self, value: Dim) -> int:
        if isinstance(value, int):
            return value
        return evaluate(value, {s.name: self._known.get(s.name, TYPICAL) for s in free_symbols([value])})  # type: ignore[attr-defined]

    def of(self, axes: Iterable[Axis]) -> int:
        return self(product(a.extent for a in axes))


def _over(extent: int, block: int) -> int:
    """Blocks that cover an extent."""
    return -(-extent // block)


def _cost(values: Iterable[Scalar]) -> int:
    """Operations of one point of these scalars."""
    return sum(_DEAR_COST if v.op in _DEAR else 1 for v in values if isinstance(v, Apply))


def _unique(kernel: Kernel, sizes: _Sizes) -> tuple[float, float]:
    """Bytes that are read, each once, and bytes that are written. Of a table that is looked up in, no more than is looked up."""
    free, extents = free_axes(kernel), {a.name: sizes(a.extent) for a in kernel.axes}
    looked: dict[str, int] = {}
    for v in free:
        if isinstance(v, Load):
            looked[v.buffer] = looked.get(v.buffer, 0) + math.prod(extents[a] for a in free[v])
    read = sum(min(sizes(b.size), looked.get(b.name, 0)) * b.dtype.itemsize for b in kernel.inputs)
    return read, sum(sizes(b.size) * b.dtype.itemsize for b in kernel.outputs)


def _streams(bytes_: float, points: int, warps: int = 4) -> Work:
    """An ordinary kernel that reads and writes so many bytes over so many points: what joins parts."""
    programs = max(1, _over(points, 1024))
    return Work(programs, warps, bytes_, bytes_ / programs, min(bytes_ / programs, 16 << 10))


# ---- contractions


def _of_product(kernel: Kernel, sizes: _Sizes) -> Estimate:
    found = find_product(kernel)
    kernel = found.kernel
    rows, columns, depth, batch = _extents(found, sizes)
    dtype = max((d for *_, d in found.multiplied), key=lambda d: d.itemsize)
    free, extents = free_axes(kernel), {a.name: sizes(a.extent) for a in kernel.axes}

    def loaded(side: int) -> tuple[float, int, int]:
        """Bytes for each element of the operands on one side, operations for one, and how many there are."""
        values = list({pair[side]: None for pair in found.operands})
        domains = [math.prod(extents[a] for a in free[v]) for v in values]
        loads = [v for v in cone(values) if isinstance(v, Load)]
        count = max(domains, default=1) or 1
        bytes_ = sum(kernel.buffer(v.buffer).dtype.itemsize * math.prod(extents[a] for a in free[v]) / count for v in loads)
        return bytes_, _cost(v for v in cone(values) if not isinstance(v, Load)), len(values)

    (left, left_ops, lefts), (right, right_ops, rights) = loaded(0), loaded(1)
    inside = set(cone(found.dots))
    after = _cost(v for v in scalars(kernel.stores) if v not in inside)
    read, written = _unique(kernel, sizes)

    def estimate(tiles: Tiles) -> list[Work]:
        m, n, k, split = tiles.block_m, tiles.block_n, tiles.block_k, tiles.split_k
        down, across = _over(rows, m), _over(columns, n)
        programs, blocks = batch * down * across * split, max(1, _over(_over(depth, k), split))
        block, results = k * (m * left + n * right), m * n * len(found.dots)
        flops, threads, matrix = 2.0 * results * k * blocks, 32 * tiles.num_warps, tiles.walk == "dot"
        units = matrix and dtype in ACCUMULATORS and dtype not in (torch.float32, torch.float64)
        plain = blocks * k * (m * left_ops + n * right_ops) + (after * results if split == 1 else results)
        plain += 0.0 if units else flops / (_reused(results / threads) if matrix else 1)
        operands_ = k * (lefts * m + rights * n) * dtype.itemsize
        held = results * max(dtype.itemsize // 4, 1) * (1 if matrix else k)
        pipelined = max(tiles.num_stages - 1, 1)
        once = _from_memory(read, (m * left, n * right), (down, across), depth / split * batch, tiles, programs)
        parts = 4.0 * split * rows * columns * batch * len(found.dots) if split > 1 else 0.0
        plain += 0.0 if tiles.descriptors else blocks * block / WIDEST * _ADDRESS / 2  # what threads do to copy
        first = Work(
            programs,
            tiles.num_warps,
            memory=once + (parts or written),
            cached=block * blocks + (parts or written) / programs,
            flight=pipelined * block,
            plain=plain,
            flops=flops if units else 0.0,
            dtype=str(dtype).removeprefix("torch."),
            fed=_fed(m, n),
            stages=pipelined,
            waits=2 + TURN * blocks,
            registers=40 + (held + (0 if units else operands_ / 4)) / threads,
            shared=operands_ * pipelined if matrix else 0,
            rows=m,
        )
        first = _persistent(first, tiles.programs) if tiles.programs else first
        return [first, _streams(parts + written, rows * columns * batch)] if split > 1 else [first]

    return estimate


def _persistent(work: Work, programs: int) -> Work:
    """The same tiles walked by so many programs: each has several, and starts once."""
    programs = min(programs, work.programs)
    turns = _over(work.programs, programs)
    more = {name: getattr(work, name) * turns for name in ("cached", "plain", "flops")}
    return replace(work, programs=programs, waits=2 + (work.waits - 2) * turns, **more)


def _reused(results: float) -> float:
    """The share of plain arithmetic's rate that a thread reaches which makes so many results of a product: it loads two operands for each
    row and column of them, and shared memory gives one for four multiplications."""
    return min(1.0, math.sqrt(results) / 8)


def _extents(found: Product, sizes: _Sizes) -> tuple[int, int, int, int]:
    """Rows, columns, depth and batch; of uneven parts as if they were even."""
    rows, columns, depth, batch = (sizes.of(axes) for axes in (found.rows, found.columns, found.depth, found.batch))
    if isinstance(found.parts, Groups):
        rows = _over(rows, found.parts.count)
    elif isinstance(found.parts, Blocks):
        depth *= _over(sizes(found.parts.axis.extent), max(batch, 1))
    return rows, columns, depth, batch


def _fed(m: int, n: int) -> float:
    """The share of their rate that matrix units reach on a tile."""
    return 1 / (1 + FEED * (1 / m + 1 / n))


CACHE = 32 << 20
"""What of operands stays near the processors while a kernel runs."""
TOGETHER = 128
"""Programs that run at a time, about, and share what they read."""


def _from_memory(read: float, per_term: tuple[float, float], counts: tuple[int, int], terms: float, tiles: Tiles, programs: int) -> float:
    """Bytes that a product reads from memory: operands once if they stay in the cache, else what programs that run together share."""
    if read <= CACHE:
        return read
    together = min(TOGETHER, counts[0] * counts[1])
    high = max(min(tiles.group_m, counts[0]), _over(together, counts[1]))
    wave = (min(high, counts[0]) * per_term[0] + min(_over(together, high), counts[1]) * per_term[1]) * terms
    every = counts[0] * counts[1] * sum(per_term) * terms * tiles.split_k
    return min(max(read, wave * _over(programs, together * max(1, tiles.split_k)) * tiles.split_k), max(every, read))


# ---- attentions


def _of_attention(kernel: Kernel, sizes: _Sizes) -> Estimate:
    found = roles(kernel)
    rows, batch, keys = sizes.of(found.rows), sizes.of(found.batch), sizes(found.key.extent)
    depth, width, size = depth_of(found), padded(found.column.extent), element_size(kernel, found)
    score = _cost(v for v in cone([found.attend.score]) if v not in set(cone(found.dots)))
    half = find_limits(kernel, found.attend).any and rows > 16
    words, units = found.attend.dtype.itemsize // 4, size <= 2
    single = 0 if units else 1  # matrix units take nothing wider
    read, written = _unique(kernel, sizes)

    def estimate(tiles: AttentionTiles) -> list[Work]:
        m, n, threads = tiles.block_m, tiles.block_n, 32 * tiles.num_warps
        down = _over(rows, m)
        programs = batch * down * tiles.splits
        mine = _over(keys, tiles.splits) * (0.5 if half else 1.0) + (n / 2 if half else 0)
        blocks = max(1, math.ceil(mine / n))
        block, query = n * (depth + width) * size, m * (depth + width) * size
        flops = 2.0 * m * n * (depth + width) * blocks
        plain = m * blocks * (n * (score + _DEAR_COST + 6) + 2 * width)
        parts = 4.0 * words * batch * rows * tiles.splits * (width + 2) if tiles.splits > 1 else 0.0
        pipelined = max(tiles.num_stages - 1, 1)
        again = read if read <= CACHE else read * max(1.0, min(down, 4.0) / 2)
        first = Work(
            programs,
            tiles.num_warps,
            memory=again + (parts or written),
            cached=block * blocks + query,
            flight=pipelined * block,
            plain=plain + single * flops / _reused(m * n / threads),
            flops=flops * (1 - single),
            dtype="float16",
            fed=_fed(m, n),
            stages=pipelined,
            waits=3 + TURN * blocks,
            registers=60 + words * (m * (n + width) + single * (m + n) * depth) / threads,
            shared=tiles.num_stages * block + query // 2,
            rows=m,
        )
        return [first, _streams(parts + written, batch * rows * width)] if tiles.splits > 1 else [first]

    return estimate


# ---- recurrences


def _of_recurrence(kernel: Kernel, sizes: _Sizes) -> Estimate:
    found = find_layer(kernel)
    rows, steps, units, gates = sizes.of(found.rows), sizes(found.step.extent), found.units, len(found.dots)
    states = len(found.recurrence.states)
    each = _cost(v for v in scalars(kernel.stores))
    read, written = _unique(kernel, sizes)

    def estimate(tiles: RecurrenceTiles) -> list[Work]:
        m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
        across, deep = _over(units, n), _over(units, k)
        programs, threads = max(1, _over(rows, m)), 32 * tiles.num_warps
        flops = 2.0 * gates * m * across * n * deep * k * steps / (_reused(gates * m * n / threads) if tiles.walk == "dot" else 1)
        block = 4.0 * k * (gates * n + m)
        weights = 0.0 if holds_weights(found, tiles) else across * deep * block
        held = m * n * (gates + states) * (k if tiles.walk == "sum" else 1) + (0 if tiles.walk == "sum" else k * (m + n))
        held += gates * n * k if holds_weights(found, tiles) else 0
        pipelined = max(tiles.num_stages - 1, 1)
        waits = steps * ((0.2 if in_registers(found, tiles) else 2.0) + (across * deep / tiles.num_stages if weights else 0.5))
        cached = steps * (weights + 8.0 * m * across * n)
        work = Work(
            programs,
            tiles.num_warps,
            memory=read + written,
            cached=cached,
            flight=pipelined * max(block, 4.0 * m * n),
            plain=flops + each * m * across * n * steps,
            stages=pipelined,
            waits=waits,
            registers=40 + held / threads,
            shared=int(block * pipelined) if tiles.walk == "dot" else 0,
        )
        return [work]

    return estimate


# ---- points and reductions


def _of_blocks(kernel: Kernel, sizes: _Sizes) -> Estimate:
    groups, free = inner_groups(kernel), free_axes(kernel)
    points = sizes.of(kernel.grid)
    inner_names = {a.name for a in kernel.inner}
    loads = [v for v in free if isinstance(v, Load)]
    each = _cost(free)
    passes = _passes(kernel, free, inner_names)
    read, written = _unique(kernel, sizes)
    reductions = sum(isinstance(v, Reduce) for v in free)

    def estimate(schedule: Schedule) -> list[Work]:
        programs, threads = max(1, _over(points, schedule.xblock)), 32 * schedule.num_warps
        block = math.prod(group_block(group, schedule) for group in groups)
        whole = math.prod(_over(sizes.of(g), group_block(g, schedule)) * group_block(g, schedule) for g in groups) if groups else 1
        again = 1 if schedule.persistent or not groups else passes
        elements, chunk = schedule.xblock * whole, schedule.xblock * block
        cached = flight = waste = work = 0.0
        for load in loads:
            size, inside = kernel.buffer(load.buffer).dtype.itemsize, bool(free[load] & inner_names)
            mine = (schedule.xblock if free[load] - inner_names else 1) * (whole if inside else 1)
            spread = _waste(kernel, load, schedule, block, size) if free[load] else 1.0
            cached += mine * size * spread * again
            flight += min(mine, chunk) * size
            waste = max(waste, spread)
            work += again * mine * _ADDRESS / max(1.0, min(WIDEST / size, mine / threads))
        kept = programs * cached <= CACHE * 4 or again == 1
        memory = read * (1.0 if kept else again) * max(1.0, waste / 4) + written
        vector = 1 + len(loads) * max(1.0, chunk / threads)
        per_wait = 0.5 + math.log2(max(threads / 32, 1)) / 4
        waits = 1 + reductions * per_wait + (again * _over(whole, block) if again > 1 else 0)
        made = Work(
            programs,
            schedule.num_warps,
            memory=memory,
            cached=cached + written / programs,
            flight=min(max(flight, 1.0), MOST_IN_FLIGHT),
            plain=each * elements * again + work,
            waits=waits,
            registers=24 + vector,
        )
        return [made]

    return estimate


def _passes(kernel: Kernel, free: Mapping[Scalar, frozenset[str]], inner: set[str]) -> int:
    """How often a looped walk reads its inner axes: once for each level of reductions, and to store what depends on them."""
    level: dict[Scalar, int] = {}
    for v in scalars(kernel.stores):
        level[v] = max((level[o] for o in operands(v)), default=0) + isinstance(v, Reduce)
    deepest = max(level.values(), default=0)
    stored = max((level[s.value] + 1 for s in kernel.stores if free[s.value] & inner), default=0)
    return max(deepest, stored, 1)


def _waste(kernel: Kernel, load: Load, schedule: Schedule, block: int, size: int) -> float:
    """Bytes that memory gives for a byte that is used: more than 1 where what lies side by side is not loaded by one program."""
    runs = {a.name: block for a in kernel.inner[-1:]} | {a.name: schedule.xblock for a in kernel.grid[-1:]}
    strides = {name: load.index.coeff(next(a.symbol for a in kernel.axes if a.name == name)) for name in runs}
    run = max((length for name, length in runs.items() if strides[name] == 1), default=1)
    return max(1.0, SECTOR / (next_power_of_two(run) * size))


_ESTIMATORS: dict[type, Callable[[Kernel, _Sizes], Estimate]] = {
    Tiles: _of_product, AttentionTiles: _of_attention, RecurrenceTiles: _of_recurrence, Schedule: _of_blocks,
}  # fmt: skip
