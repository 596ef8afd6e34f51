"""How a contraction is walked on a GPU, which walks are legal, and one to start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import sympy
import torch

from ...ir.dims import Dim, symbol
from ..kernel import Axis, Kernel
from ..space import Limit, Space
from .features import FEATURES, lacking
from .matrices import matrices
from .product import ACCUMULATORS, FEW, NARROW, Product, deep_loads, find_product, is_computed, shared_terms, stride
from .ragged_roles import Blocks, Groups
from .schedule import LARGEST_BLOCK, is_wide, next_power_of_two

PROCESSORS = 128
"""Programs that fill a large GPU: fewer leave parts of it idle."""

SEVERAL_ROWS = 4
"""Up to so many rows are multiplied and summed: the right operand sets the time, and matrix units would pad the left one."""


class Unit(NamedTuple):
    """What a target has for one program: bytes of shared memory, threads of a warp, 32-bit registers of a thread and of all, most threads.

    unbuffered: stages of a pipeline that hold no block of their own. plain: dtypes that it multiplies without matrix units.
    processors: that run programs.
    """

    shared: int
    lanes: int = 32
    registers: int = 256
    file: int = 65_536
    threads: int = 1024
    unbuffered: int = 0
    plain: tuple[torch.dtype, ...] = (torch.float32,)
    processors: int = 132

    def room(self, warps: sympy.Expr) -> sympy.Expr:
        """Registers of a program."""
        return sympy.Min(self.registers * self.lanes * warps, self.file)  # type: ignore[return-value]


UNITS: dict[str, Unit] = {
    "sm_80": Unit(166_912, processors=108),
    "sm_90": Unit(232_448),
    "gfx942": Unit(65_536, lanes=64, registers=512, file=131_072, unbuffered=1, plain=(), processors=304),
}
ANY = Unit(1 << 30, lanes=64, registers=512, file=131_072, plain=())
"""What is legal on some target."""


MOST_GROUPS = 4095
"""Groups of rows, each of which every program counts the blocks of."""


@dataclass(frozen=True)
class Tiles:
    """Options of a contraction. A program makes block_m x block_n results, block_k terms at a time.

    walk: "dot" by matrix units, "sum" by products that are added when all is read (few rows). group_m: rows of tiles whose programs
    follow each other, so that they read the same columns from the cache. split_k: programs that share a tile's depth; their sums are
    added by a second kernel, always in the same order. wide: index arithmetic in 64 bits.

    programs: how many walk all tiles, one after the other (persistent); 0: each has one. descriptors: blocks of operands that are matrices
    in memory are copied by a unit of the GPU (TMA). specialized: some warps of a program copy while others multiply.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    group_m: int = 8
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    walk: str = "dot"
    wide: bool = False
    programs: int = 0
    descriptors: bool = False
    specialized: bool = False


_LEAST_DEPTH = {torch.int8: 32}  # of a block; 16 for others
_BLOCKS: dict[torch.dtype, tuple[int, int, int]] = {
    torch.float16: (128, 128, 64), torch.bfloat16: (128, 128, 64), torch.int8: (128, 128, 64),
    torch.float32: (64, 64, 32), torch.float64: (32, 32, 16),
}  # fmt: skip
"""Blocks of large products, by the dtype that is multiplied."""


def refusal(kernel: Kernel, tiles: Tiles, target: str | None = None) -> str | None:
    """The limit that the tiles break for this kernel (on a target); None where they are legal."""
    programs = ANY.processors if tiles.programs > 0 and target is None else tiles.programs  # any number of them gives the same results
    return space(find_product(kernel), tiles.walk, target).refusal(vars(tiles) | {"programs": programs})


def space(found: Product, walk: str = "dot", target: str | None = None) -> Space:
    """The legal tiles of a walk."""
    made = (_dot_space if walk == "dot" else _sum_space)(found, UNITS[target] if target else ANY)
    missing = {option: lacking(option, target) for option in FEATURES} if target else {}
    return Space(made.variables, (*made.limits, *(Limit(reason, symbol(option)) for option, reason in missing.items() if reason)))


def powers(low: int, high: int) -> tuple[int, ...]:
    """The powers of two from one to another."""
    return tuple(1 << n for n in range(low.bit_length() - 1, high.bit_length()))


def _dot_space(found: Product, unit: Unit) -> Space:
    m, n, k, warps, stages, split = _symbols("block_m", "block_n", "block_k", "num_warps", "num_stages", "split_k")
    dtypes = [dtype for *_, dtype in found.multiplied]
    size, several = max(d.itemsize for d in dtypes), len(dtypes)
    lefts, rights = (len({pair[side] for pair in found.operands}) for side in (0, 1))
    least = max(_LEAST_DEPTH.get(d, FEW) for d in dtypes)
    sums, operands = m * n * several * max(size // 4, 1), k * (lefts * m + rights * n)
    limits = [
        Limit("the sums fit half of the registers", 2 * sums, unit.room(warps * (1 + symbol("specialized")))),  # two groups multiply
        Limit("operand blocks fit shared memory", size * (stages - unit.unbuffered) * operands, unit.shared),
        Limit("a block of results fits shared memory", size * m * n, unit.shared),
        Limit("a block is one that Triton takes", sympy.Max(m * n, m * k, n * k), LARGEST_BLOCK),
        *_common(found, unit),
    ]
    if set(dtypes) & set(unit.plain):  # threads hold what they multiply; with more than this they spill
        limits.append(Limit("sums and operands fit half of the registers", 2 * (sums + operands), unit.room(warps)))
        limits.append(Limit("what threads multiply is not copied past them", symbol("descriptors")))
    limits.extend(Limit(f"matrix units multiply no {d}".replace("torch.", ""), 1) for d in dtypes if d not in ACCUMULATORS)
    if found.reduces:
        limits.append(Limit("a program has all columns that are reduced", found.size(found.columns), n))
        limits.append(Limit("what is reduced over columns is not split", split, 1))
    variables = {"block_m": powers(FEW, 256), "block_n": powers(FEW, 256 if not found.reduces else 4096), "block_k": powers(least, 256)}
    options = {"programs": (0, unit.processors), "descriptors": (0, 1), "specialized": (0, 1)}
    return Space(variables | _FREE | options, (*limits, *_option_limits(found)))


def _option_limits(found: Product) -> list[Limit]:
    """Limits of the options that are not about sizes alone."""
    m, n, k, split, warps, stages = _symbols("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages")
    programs, descriptors, specialized = _symbols(*FEATURES)
    copied, depth = matrices(found), found.size(found.depth)
    limits = [
        Limit("programs that walk all tiles have the whole depth of each", sympy.Min(programs, 1) * (split - 1)),
        Limit("a descriptor copies 256 rows at most", descriptors * sympy.Max(m, n, k), 256),
        Limit("warps that copy do so by descriptors", specialized, descriptors),
        Limit("warps that copy do so in the loop over the whole depth", specialized * (split - 1)),
        Limit("warps that copy are ahead of those that multiply", 2 * specialized, stages),
        Limit("groups of warps that multiply have four each", specialized * (warps - 4)),
        Limit("groups of warps that multiply have four", 4 * specialized, warps),
        Limit("groups of warps that multiply have 64 rows", 64 * specialized, m),
        Limit("groups of warps that multiply have twice as many columns as rows at most", specialized * n, 2 * m),
    ]
    if isinstance(depth, int):
        limits.append(Limit("a depth of a single block has no loop", specialized * k, max(depth - 1, 0)))
    if any(dtype not in NARROW for *_, dtype in found.multiplied):
        limits.append(Limit("groups of warps multiply floats of 16 bits and integers of 8", specialized))
    if found.parts is not None:
        limits.append(Limit("uneven parts are walked by programs of their own", programs + descriptors))
    if not copied:
        limits.append(Limit("no operand is a matrix in memory whose rows begin at multiples of 16 bytes", descriptors))
    elif len(copied) < 2 * len(found.dots):
        limits.append(Limit("an operand is no matrix in memory whose rows begin at multiples of 16 bytes", specialized))
    return limits


def _sum_space(found: Product, unit: Unit) -> Space:
    m, n, k, warps = _symbols("block_m", "block_n", "block_k", "num_warps")
    registers = len(found.dots) * max(1, max(d.dtype.itemsize for d in found.dots) // 4)
    limits = [Limit("the sums fit half of the registers", 2 * m * n * k * registers, unit.room(warps)), *_common(found, unit)]
    if found.reduces:
        limits.append(Limit("what is reduced over columns is multiplied by matrix units", 1))
    if found.parts is not None:
        limits.append(Limit("uneven parts are multiplied by matrix units", 1))
    return Space({"block_m": powers(1, FEW), "block_n": powers(1, 256), "block_k": powers(FEW, 2048)} | _FREE | _NO_OPTIONS, tuple(limits))


_NO_OPTIONS = {"programs": (0,), "descriptors": (0,), "specialized": (0,)}
_FREE = {"group_m": powers(1, 16), "split_k": powers(1, 64), "num_warps": powers(1, 16), "num_stages": tuple(range(1, 8))}


def _common(found: Product, unit: Unit) -> list[Limit]:
    k, warps, split = _symbols("block_k", "num_warps", "split_k")
    limits = [Limit("a program has no more threads than the target runs", unit.lanes * warps, unit.threads)]
    depth = found.size(found.depth)
    if isinstance(depth, int):
        limits.append(Limit("every program has a part of the depth", (split - 1) * k, max(depth - 1, 0)))
    if found.parts is not None:
        limits.append(Limit("the depth of uneven parts is not shared", split, 1))
    if isinstance(found.parts, Groups):
        limits.append(Limit("every program looks at all groups", found.parts.count, MOST_GROUPS))
    elif isinstance(found.parts, Blocks):
        limits.append(Limit("a sparse block is multiplied at once", depth, k))
    return limits


def _symbols(*names: str) -> list[sympy.Symbol]:
    return [symbol(n) for n in names]


# ---- a start


def default_tiles(kernel: Kernel) -> Tiles:
    """Reasonable tiles from sizes, dtypes and the order in memory; the tuner starts here."""
    found = find_product(kernel)
    wide = is_wide(kernel)
    rows = found.size(found.rows)
    dtypes = [dtype for *_, dtype in found.multiplied]
    if found.parts is not None:
        return _uneven(found, dtypes, wide)
    few = isinstance(rows, int) and rows <= SEVERAL_ROWS or any(d not in _BLOCKS for d in dtypes)
    return _streaming(found, wide) if few and not found.reduces else _tiled(found, dtypes, wide)


def _tiled(found: Product, dtypes: list[torch.dtype], wide: bool) -> Tiles:
    """Blocks that matrix units like, smaller where there are too few of them."""
    sizes = {name: found.size(axes) for name, axes in (("m", found.rows), ("n", found.columns), ("k", found.depth))}
    m, n, k = min((_BLOCKS.get(d, _BLOCKS[torch.float32]) for d in dtypes), key=lambda b: b[0] * b[1])
    m, n = (max(FEW, min(block, _above(sizes[name]))) for name, block in (("m", m), ("n", n)))
    k = min(k // next_power_of_two(len(dtypes)), _above(sizes["k"]), shared_terms(found) or k)
    k = max(_LEAST_DEPTH.get(dtypes[0], FEW), k)
    if found.reduces:
        n = max(FEW, _above(sizes["n"]))
        m = max(FEW, min(m, 8192 // n))
    while len(dtypes) * m * n > 128 * 128 and m > FEW:
        m //= 2
    batch = _planned(found.size(found.batch))

    def programs(m: int, n: int) -> int:
        return batch * -(-_planned(sizes["m"]) // m) * -(-_planned(sizes["n"]) // n)

    while not found.reduces and programs(m, n) < PROCESSORS and m * n > 32 * 32:
        m, n = (m // 2, n) if m >= n and m > FEW else (m, n // 2)
    split = 1 if found.reduces else _split(sizes["k"], k, programs(m, n))
    computed = is_computed(found)  # threads hold what they compute, and addresses for every stage: large blocks have no room for more
    warps = max(8 if computed and torch.float32 in dtypes else 4, min(8, len(dtypes) * m * n // 2048))
    return Tiles(m, n, k, split_k=split, num_warps=warps, num_stages=2 if computed and m >= 128 and k <= 32 else 3, wide=wide)


def _uneven(found: Product, dtypes: list[torch.dtype], wide: bool) -> Tiles:
    """Groups as if all had as many rows; blocks of a sparse matrix as wide as they are, with as many rows and columns as then fit."""
    if isinstance(found.parts, Groups):
        rows = -(-_planned(found.size(found.rows)) // found.parts.count)
        return replace(_tiled(replace(found, rows=(Axis("m", rows),)), dtypes, wide), split_k=1)
    tiles = _tiled(found, dtypes, wide)
    m, n, k = tiles.block_m, tiles.block_n, max(tiles.block_k, min(256, _above(found.size(found.depth))))
    usual = min((a + b) * c for a, b, c in (_BLOCKS.get(d, _BLOCKS[torch.float32]) for d in dtypes))
    while k * (m + n) > usual and max(m, n) > FEW:
        m, n = (m // 2, n) if m >= n else (m, n // 2)
    return replace(tiles, block_m=m, block_n=n, block_k=k, split_k=1)


def _streaming(found: Product, wide: bool) -> Tiles:
    """Few rows: the right operand is read once, along what is contiguous in memory."""
    rows, columns, depth = (found.size(axes) for axes in (found.rows, found.columns, found.depth))
    m = min(FEW, _above(rows))
    across = bool(found.columns) and any(stride(found.kernel, v.index, found.columns[-1]) == 1 for v in deep_loads(found, 1))
    n, k = (64, 32) if across else (max(1, 8 // m), 256)
    group = min(shared_terms(found) or k, k)  # a block reads one scale a row, and as many bytes as it would otherwise
    n, k = n * (k // group), group
    n, k = min(n, _above(columns)), max(FEW, min(k, _above(depth)))
    programs = _planned(found.size(found.batch)) * -(-_planned(rows) // m) * -(-_planned(columns) // n)
    return Tiles(m, n, k, 1, _split(depth, k, programs), 4, 2, "sum", wide)


def _split(depth: Dim, block: int, programs: int) -> int:
    """Parts of the depth: several where programs are few and the depth is long."""
    if not isinstance(depth, int):
        return 1
    parts = min(16, PROCESSORS // max(programs, 1), depth // (8 * block))
    return 1 << max(parts, 1).bit_length() - 1


def _above(size: Dim) -> int:
    """The power of two that covers a size, as far as it is known."""
    return next_power_of_two(_planned(size))


def _planned(size: Dim) -> int:
    return size if isinstance(size, int) else 4096
