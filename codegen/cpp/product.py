"""What kind of product a kernel's `Dot` is: which axes are rows, columns, batch and depth, and where operands can be read in place.

    out[b, i, h, d] = sum over k of x[b, i, k] * w[64*h + d, k]      rows (b, i), columns (h, d), depth (k)

Axes of one role count as one flat position: `m` over rows, `n` over columns, `k` over the depth, row-major in the order chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ...ir.dims import Dim, FloorDiv, Mod, evaluate, free_symbols, product, symbol
from ...ir.scalar import Apply, Scalar
from ..errors import Unsupported
from ..kernel import Attend, Axis, Dot, Kernel, Load, Position, Reduce, Scan, Store, cone, free_axes, scalars
from .lanes import stride_along
from .schedule import CpuTarget
from .words import WORD, Words, find_words

TYPICAL = 64  # a size that is known at run time only, where strides are compared
COMPACT = 128  # rows of a panel no further apart are near each other


# vectors and rows of the micro-kernel's tile, best first: their sums fill the registers. 32 registers of 64 bytes, else 16.
WIDE_TILES, TILES = ((3, 8), (4, 6), (2, 12), (1, 14)), ((2, 6), (1, 8))
PADDING = {3: 1.0, 4: 1.27, 2: 1.04, 1: 1.35}  # time for one column, by vectors of a tile; wider ones wait for the second-level cache
FEW_ROWS = 8  # so few read the right operand as it lies, though its rows are far apart
MOST_WIDENING = 32  # rows up to which a narrow panel is not widened once for all of them
MOST_IN_COLUMNS = 8  # rows up to which sums along contiguous columns are no slower than turning them


@dataclass(frozen=True)
class Blocks:
    """The register tile of the micro-kernel: `rows` x (`vectors` * `lanes`)."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes


@dataclass(frozen=True)
class Product:
    """left[batch, rows, depth] @ right[batch, depth, columns]; each a tuple of axes, outermost first."""

    dot: Dot
    left: Scalar
    right: Scalar
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    depth: tuple[Axis, ...]


def dots(kernel: Kernel) -> list[Dot]:
    return [v for v in scalars(kernel.stores) if isinstance(v, Dot)]


def find_product(kernel: Kernel, target: CpuTarget) -> Product:
    """The roles of the axes of a kernel with one Dot. Raises Unsupported with a reason where it is no product of matrices."""
    dot = _only_dot(kernel)
    free = free_axes(kernel)
    left, right = free[dot.left] - set(dot.axes), free[dot.right] - set(dot.axes)
    if not left - right and not right - left:
        raise Unsupported(reason="a contraction without rows and columns")
    _check(kernel, dot, free)
    others = {a.name for a in kernel.grid} - right  # axes of neither operand are rows that repeat
    axes = {role: tuple(a for a in kernel.grid if a.name in names) for role, names in
            {"batch": left & right, "left": others, "right": right - left}.items()}  # fmt: skip
    depth = tuple(a for a in kernel.axes if a.name in dot.axes)
    as_written = Product(dot, dot.left, dot.right, axes["batch"], axes["left"], axes["right"], depth)
    swapped = Product(dot, dot.right, dot.left, axes["batch"], axes["right"], axes["left"], depth)
    return max((_ordered(kernel, p) for p in (as_written, swapped)), key=lambda p: _preference(kernel, p, target))


def without_matrix(kernel: Kernel) -> Kernel | None:
    """A contraction that has a batch but neither rows nor columns (depthwise) as a sum that is reduced; None for others."""
    free = free_axes(kernel)
    found = dots(kernel)
    if any(d.within or (free[d.left] ^ free[d.right]) - set(d.axes) for d in found):
        return None
    if not all(d.dtype == d.left.dtype == d.right.dtype for d in found):
        return None
    sums: dict[Scalar, Scalar] = {d: Reduce(d.dtype, "sum", Apply(d.dtype, "mul", (d.left, d.right)), d.axes) for d in found}
    return replace(kernel, stores=tuple(replace(s, value=Rewrite(sums, {})(s.value)) for s in kernel.stores))


# ---- legality


def _only_dot(kernel: Kernel) -> Dot:
    found = dots(kernel)
    if len(found) != 1 or any(isinstance(v, Attend) for v in scalars(kernel.stores)):
        raise Unsupported(reason="a kernel with several contractions")
    if found[0].within:
        raise Unsupported(reason="a contraction within limits that are read")
    if found[0].dtype not in (torch.float32, torch.float64, torch.int32):
        raise Unsupported(reason=f"a contraction of elements of {found[0].dtype}")
    return found[0]


def _check(kernel: Kernel, dot: Dot, free: Mapping[Scalar, frozenset[str]]) -> None:
    below = cone([dot])
    if any(isinstance(v, (Reduce, Scan)) for v in cone([s.value for s in kernel.stores], below)):
        raise Unsupported(reason="a reduction beside a contraction")
    grid = {a.name for a in kernel.grid}
    for store in kernel.stores:
        used = free[store.value] | {s.name for s in free_symbols([store.index])}
        if any(a.name not in used and a.extent != 1 for a in kernel.grid) or free[store.value] - grid:
            raise Unsupported(reason="a store over other points than those of the contraction")
    read = {v.buffer for v in below if isinstance(v, Load)}
    if any(source in read for _, source in kernel.inplace):
        raise Unsupported(reason="an output over an operand of a contraction")


# ---- order and preference


def _ordered(kernel: Kernel, found: Product) -> Product:
    """Columns and depth in the order of the operand that is read in place most likely: largest stride first."""
    columns = sorted(found.columns, key=lambda a: -_stride(kernel, found.right, a))
    deep = found.right if isinstance(found.right, Load) and found.right.mask is None else found.left
    depth = sorted(found.depth, key=lambda a: -_stride(kernel, deep, a))
    return replace(found, columns=tuple(columns), depth=tuple(depth))


def _stride(kernel: Kernel, value: Scalar, axis: Axis) -> int:
    """By how much the largest index under the value moves with the axis, near 0."""
    return max((abs(_move(kernel, v.index, axis)) for v in cone([value]) if isinstance(v, Load)), default=0)


def _move(kernel: Kernel, index: sympy.Expr, axis: Axis) -> int:
    at = {s.name: 0 if s.name in {a.name for a in kernel.axes} else TYPICAL for s in free_symbols([index])}
    return int(evaluate(index, at | {axis.name: 1}) - evaluate(index, at | {axis.name: 0})) if axis.name in at else 0


def _preference(kernel: Kernel, found: Product, target: CpuTarget) -> tuple[bool, bool, int]:
    """A packed right operand beats all; then contiguous stores; then few rows rather than few columns."""
    packed = plan_right(kernel, found, target).kind in ("panels", "widened", "words", "bytes")
    last = found.columns[-1] if found.columns else None
    contiguous = last is not None and all(_move(kernel, s.index, last) == 1 for s in kernel.stores)
    sizes = [product(a.extent for a in side) for side in (found.columns, found.rows)]
    columns, rows = (d if isinstance(d, int) else TYPICAL for d in sizes)
    return packed, contiguous and columns > 1, columns - rows


# ---- flat positions


def flatten(axes: Sequence[Axis], flat: Any) -> dict[str, sympy.Expr]:
    """Each axis as an expression of the row-major position over all of them."""
    found: dict[str, sympy.Expr] = {}
    for axis in reversed(axes[1:]):
        extent = sympy.sympify(axis.extent)
        found[axis.name] = _expr(Mod(flat, extent))
        flat = FloorDiv(flat, extent)
    return found | {a.name: flat for a in axes[:1]}


def substitute(expr: Dim, places: Mapping[str, sympy.Expr]) -> sympy.Expr:
    """`expr` with symbols replaced; quotient and remainder of one division become the number again where their factors fit."""
    result: Any = sympy.expand(sympy.sympify(expr).xreplace({symbol(k): v for k, v in places.items()}))
    joined = True
    while joined:
        joined = False
        for rest in sorted(result.atoms(Mod), key=sympy.count_ops, reverse=True):
            number, divisor = rest.args
            quotient = FloorDiv(number, divisor)
            factor = result.coeff(rest)
            if factor != 0 and sympy.expand(result.coeff(quotient) - factor * divisor) == 0:
                result = sympy.expand(result + factor * (number - rest - divisor * quotient))
                joined = True
                break
    return result


def merge(value: Scalar, axes: Sequence[Axis]) -> tuple[Scalar, tuple[Axis, ...]]:
    """The value with neighbouring axes as one wherever its indices go through both as through one: [3, 64] as [192]."""
    merged = list(axes)
    for position in range(len(axes) - 2, -1, -1):
        outer, inner = merged[position : position + 2]
        rewritten = Rewrite({}, flatten((outer, inner), inner.symbol))(value)
        indices = [v.index for v in cone([rewritten]) if isinstance(v, (Load, Position))]
        if not any(inner.symbol in a.free_symbols for index in indices for a in sympy.sympify(index).atoms(FloorDiv, Mod)):
            value = rewritten
            merged[position : position + 2] = [replace(inner, extent=product((outer.extent, inner.extent)))]
    return value, tuple(merged)


class Rewrite:
    """Copies scalars with some replaced and with symbols of their indices replaced; what does not change is shared."""

    def __init__(self, values: Mapping[Scalar, Scalar], places: Mapping[str, sympy.Expr]) -> None:
        self._done: dict[Scalar, Scalar] = dict(values)
        self._places = places

    def __call__(self, root: Scalar) -> Scalar:
        for value in cone([root], self._done):
            self._done[value] = self._copy(value)
        return self._done[root]

    def index(self, index: Dim) -> sympy.Expr:
        if not self._places or not {s.name for s in free_symbols([sympy.sympify(index)])} & set(self._places):
            return sympy.sympify(index)
        return substitute(index, self._places)

    def store(self, store: Store) -> Store:
        return replace(store, index=self.index(store.index), value=self(store.value))

    def _copy(self, value: Scalar) -> Scalar:
        done = self._done
        if isinstance(value, Apply):
            return replace(value, args=tuple(done[v] for v in value.args))
        if isinstance(value, Load):
            indirect = tuple((n, done[v]) for n, v in value.indirect)
            return replace(value, index=self.index(value.index), indirect=indirect, mask=value.mask and done[value.mask])
        if isinstance(value, Position):
            return replace(value, index=self.index(value.index))
        if isinstance(value, (Reduce, Scan)):
            return replace(value, value=done[value.value])
        return value


# ---- the right operand


@dataclass(frozen=True)
class Right:
    """How the micro-kernel gets at the right operand.

    kind: "panels" and "row_major" are read in place, row by row of a tile's columns, "columns" by contiguous columns; "turned" copies
    contiguous columns into panels, "widened" panels of narrower elements, "from_rows" and "from_columns" what is computed, along what is
    contiguous. "words" are levels of few bits in panels, "bytes" such of 8 bits that meet bytes.
    start: index of column `n` (a symbol) at depth 0 in the buffer of `load`, ld: how far its rows (columns, if these are contiguous) are
    apart; of plain loads and of `words`.
    """

    kind: str
    blocks: Blocks
    load: Load | None = None
    n: sympy.Symbol | None = None
    start: sympy.Expr | None = None
    ld: sympy.Expr | None = None
    words: Words | None = None


def plan_right(kernel: Kernel, found: Product, target: CpuTarget) -> Right:
    load = found.right
    rows = product(a.extent for a in found.rows)
    shapes = WIDE_TILES if target.vector_bytes == 64 else TILES
    lanes, place = target.vector_bytes // found.dot.dtype.itemsize, None
    if isinstance(load, Load) and load.mask is None and not load.indirect:
        place = _in_place(kernel, found, load, rows, shapes, lanes)
    else:
        place = _in_words(kernel, found, rows, shapes, lanes)
    if place is not None:
        return place
    vectors, most = _least_padding(product(a.extent for a in found.columns), shapes, lanes)
    kind = "from_columns" if _contiguous(found, found.depth) > _contiguous(found, found.columns) else "from_rows"
    return Right(kind, Blocks(_tile_rows(rows, most), vectors, lanes))


def _in_place(kernel: Kernel, found: Product, load: Load, rows: Dim, shapes: Sequence[tuple[int, int]], lanes: int) -> Right | None:
    n, k = sympy.Dummy("n", integer=True, nonnegative=True), sympy.Dummy("k", integer=True, nonnegative=True)
    index = substitute(load.index, flatten(found.columns, n) | flatten(found.depth, k))
    down, across = (_expr(sympy.expand(index.subs(x, x + 1) - index)) for x in (k, n))
    few = isinstance(rows, int) and rows <= FEW_ROWS
    start = index.subs(k, 0)
    if not {n, k} & down.free_symbols:
        for vectors, most in shapes:
            width = vectors * lanes
            if stride_along(index, n, width) == 1 and _is_compact(down) and _overrun(kernel, found, load, index, n, k, width):
                narrow = kernel.buffer(load.buffer).dtype.itemsize < found.dot.dtype.itemsize
                kind = "widened" if narrow and isinstance(rows, int) and rows > MOST_WIDENING else "panels"
                return Right(kind, Blocks(_tile_rows(rows, most), vectors, lanes), load, n, start, down)
        if across == 1 and (few or _is_compact(down)):
            vectors, most = shapes[0]
            vectors = vectors * most // int(rows) if few and rows else vectors  # type: ignore[arg-type]
            return Right("row_major", Blocks(_tile_rows(rows, most), vectors, lanes), load, n, start, down)
    if down != 1 or {n, k} & across.free_symbols:
        return None
    if isinstance(rows, int) and rows <= MOST_IN_COLUMNS:
        return Right("columns", Blocks(_tile_rows(rows, 4), 1, lanes), load, n, start, across)
    vectors, most = _least_padding(product(a.extent for a in found.columns), shapes, lanes)
    return Right("turned", Blocks(_tile_rows(rows, most), vectors, lanes), load, n, start, across)


def _in_words(kernel: Kernel, found: Product, rows: Dim, shapes: Sequence[tuple[int, int]], lanes: int) -> Right | None:
    n = sympy.Dummy("n", integer=True, nonnegative=True)
    moved = Rewrite({}, flatten(found.columns, n))(found.right)
    words = find_words(found.right, moved, found.depth)
    if words is None or found.dot.dtype == torch.int32 and not (words.level.signed and _is_int8(found.left)):
        return None
    load, ld, depth = words.level.load, sympy.Integer(words.ld), product(a.extent for a in found.depth)
    for vectors, most in shapes:
        width = vectors * lanes
        last = words.start + (depth * words.level.bits - 1) // WORD * ld + 3
        if stride_along(words.start, n, width) == 4 and _overrun(kernel, found, load, last, n, sympy.Symbol("k"), width):
            kind = "bytes" if found.dot.dtype == torch.int32 else "words"
            return Right(kind, Blocks(_tile_rows(rows, most), vectors, lanes), load, n, words.start, ld, words)
    return None


def _is_int8(value: Scalar) -> bool:
    return isinstance(value, Apply) and value.op == "cast" and value.args[0].dtype == torch.int8


def _expr(value: Any) -> sympy.Expr:
    return sympy.sympify(value)


def _is_compact(ld: sympy.Expr) -> bool:
    return bool(ld.is_Integer) and 0 < int(ld) <= COMPACT


def _overrun(kernel: Kernel, found: Product, load: Load, index: Any, n: Any, k: Any, width: int) -> bool:
    """May the last panel be read to its end?"""
    columns, depth = (product(a.extent for a in axes) for axes in (found.columns, found.depth))
    size = kernel.buffer(load.buffer).size
    if isinstance(columns, int) and columns % width == 0:
        return True
    batch = {a.symbol: a.extent - 1 for a in found.batch}
    if not all(isinstance(d, int) for d in (columns, depth, size, *batch.values())):
        return False
    last = index.subs(batch | {n: max(-(-int(columns) // width) * width - 1, 0), k: max(int(depth) - 1, 0)})  # type: ignore[arg-type]
    return bool(last.is_Integer) and int(last) < int(size)  # type: ignore[arg-type]


def _least_padding(columns: Dim, shapes: Sequence[tuple[int, int]], lanes: int) -> tuple[int, int]:
    if not isinstance(columns, int):
        return shapes[0]
    return min(shapes, key=lambda s: -(-columns // (s[0] * lanes)) * s[0] * PADDING[s[0]])


def _tile_rows(rows: Dim, most: int) -> int:
    """At most so many; fewer where that leaves less padding, though reading a panel then serves fewer."""
    if not isinstance(rows, int):
        return most
    return min(range(most, most // 2, -1), key=lambda r: -(-rows // r) * (r + most / 6)) if rows > most else max(rows, 1)


def _contiguous(found: Product, axes: Sequence[Axis]) -> int:
    """How many loads of the right operand are contiguous along one of the axes."""
    loads = [v for v in cone([found.right]) if isinstance(v, Load)]
    return sum(any(sympy.expand(v.index.subs(a.symbol, a.symbol + 1) - v.index) == 1 for a in axes) for v in loads)
