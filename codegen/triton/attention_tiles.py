"""How an attention is walked on a GPU: `AttentionTiles`, which of them are legal, and those to start from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...ir.dims import Dim, product, symbol
from ..attentions import Attention
from ..kernel import Kernel
from ..space import Limit, Space
from .product import narrow
from .program import blocks_of
from .schedule import is_wide, next_power_of_two
from .tiles import UNITS

LEAST = 16
"""Rows, columns and depth of a product of blocks are at least this many; what is missing is padded."""

SHARED_BYTES = max(unit.shared for unit in UNITS.values())
"""Of keys and values in flight, where no target is named."""

REGISTERS = 192
"""Of a thread, of 32 bits, for what is attended and its scores: the rest is for addresses."""

BUSY = 256
"""Programs that keep a GPU busy: where there are fewer, each shares its keys with others."""

SHARE = 256
"""Keys that are worth a program of their own."""

_IN_FLIGHT = 16 << 10
"""Bytes of keys and values that few queries wait for at a time."""

_DEFAULTS: dict[int, tuple[tuple[int, tuple[int, int, int, int]], ...]] = {
    2: ((64, (128, 64, 8, 3)), (128, (128, 64, 8, 2)), (256, (64, 32, 8, 2))),
    4: ((64, (64, 32, 8, 2)), (128, (32, 16, 8, 2)), (256, (32, 16, 8, 1))),
    8: ((64, (32, 16, 8, 1)), (128, (16, 16, 8, 1)), (256, (16, 16, 8, 1))),
}
"""Bytes of an element -> (widest head, (block_m, block_n, num_warps, num_stages)): without spills for sm_80, sm_90 and gfx942."""

_GIVEN: dict[int, tuple[tuple[int, tuple[int, int, int, int]], ...]] = {
    2: ((64, (64, 64, 4, 2)), (128, (64, 32, 4, 2)), (256, (32, 16, 4, 2))),
    4: ((64, (32, 32, 8, 2)), (128, (32, 16, 8, 2)), (256, (16, 16, 8, 1))),
    8: ((256, (16, 16, 8, 1)),),
}
"""The same where weights are given: a score may be made of two products, whose left operands all stay with the program."""


@dataclass(frozen=True)
class AttentionTiles:
    """block_m queries meet block_n keys at a time; `splits` programs share the keys of a block of queries. wide: 64-bit indices."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1
    wide: bool = False


def padded(extent: Dim) -> int:
    """The block that holds a whole head."""
    assert isinstance(extent, int)
    return max(LEAST, next_power_of_two(extent))


def element_size(kernel: Kernel, found: Attention) -> int:
    """Bytes of a key in the block that is multiplied: as it is stored, or in the dtype that it is computed in."""
    return max(narrow(kernel, d.right).dtype.itemsize for d in found.dots)


def depth_of(found: Attention) -> int:
    """Columns of what is read of one key to multiply it."""
    return sum(padded(a.extent) for a in found.depths)


def space(kernel: Kernel, found: Attention, target: str | None = None) -> Space:
    """The tiles of an attention (on a target)."""
    m, n, warps, stages = (symbol(s) for s in ("block_m", "block_n", "num_warps", "num_stages"))
    depth, width = depth_of(found), padded(found.column.extent)
    words, shared = found.attend.dtype.itemsize // 4, UNITS[target].shared if target else SHARED_BYTES
    limits = (
        Limit("keys and values in flight fit shared memory", stages * n * (depth + width) * element_size(kernel, found), shared),
        Limit("what is attended and its scores fit registers", m * (len(found.dots) * n + width) * words, 32 * REGISTERS * warps),
        Limit("every thread has a score", 32 * warps, m * n),
    )
    powers = (16, 32, 64, 128)
    splits = tuple(1 << k for k in range(8))
    return Space({"block_m": powers, "block_n": powers, "num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3, 4), "splits": splits}, limits)


def refusal(kernel: Kernel, found: Attention, tiles: AttentionTiles) -> str | None:
    """Why an attention cannot be walked in these tiles."""
    return space(kernel, found).refusal(vars(tiles))


def default_tiles(kernel: Kernel, found: Attention) -> AttentionTiles:
    """Reasonable tiles: no more rows than there are, and keys split where there are few programs (a step of decoding)."""
    size, width = element_size(kernel, found), max(padded(a.extent) for a in (*found.depths, found.column))
    size = max(size, found.attend.dtype.itemsize) if found.attend.dtype == torch.float64 else max(size, 2)
    m, n, warps, stages = next(tiles for widest, tiles in (_DEFAULTS if found.softmax else _GIVEN)[size] if width <= widest)
    rows = product(a.extent for a in found.rows)
    if isinstance(rows, int) and rows < m:
        m = padded(rows)
    if m == LEAST:  # the keys set the time
        flight = _IN_FLIGHT // ((depth_of(found) + padded(found.column.extent)) * size)
        n, warps, stages = max(LEAST, min(128, next_power_of_two(flight + 1) // 2)), 4, 3 if flight >= LEAST else 1
    tiles = AttentionTiles(m, n, warps, stages, wide=is_wide(kernel))
    return replace(tiles, splits=_splits(found, tiles))


def _splits(found: Attention, tiles: AttentionTiles) -> int:
    """As many as keep a GPU busy, each with enough keys; 1 where the heads are not known to be few."""
    programs = product((blocks_of(product(a.extent for a in found.rows), tiles.block_m), *(a.extent for a in found.batch)))
    keys = found.key.extent
    if not isinstance(programs, int) or programs == 0:
        return 1
    wanted = min(BUSY // programs, (keys if isinstance(keys, int) else 1 << 13) // SHARE, 64)
    return 1 << wanted.bit_length() - 1 if wanted > 1 else 1
