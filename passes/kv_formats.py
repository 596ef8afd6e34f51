"""In which formats keys and values are kept: a table from names to how a value becomes parts, and parts a value again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.types import compute_dtype

Parts = tuple[Node, ...]


@dataclass(frozen=True)
class KvFormat:
    """encode: a value [..., d] as the parts that are kept, each [..., its own last dimension]. decode: the parts as a value of a dtype."""

    encode: Callable[[Node], Parts]
    decode: Callable[[Parts, torch.dtype], Node]


def _cast(x: Node, dtype: torch.dtype) -> Node:
    return x if x.dtype == dtype else OPS["cast"](x, dtype=dtype)


def _cast_to(dtype: torch.dtype | None) -> KvFormat:
    def encode(x: Node) -> Parts:
        return (x if dtype is None else _cast(x, dtype),)

    def decode(parts: Parts, wanted: torch.dtype) -> Node:
        return _cast(parts[0], wanted)

    return KvFormat(encode, decode)


def _int8(x: Node) -> Parts:
    both = OPS["quantize_rows"](x)
    return OPS["item"](both, index=0), OPS["item"](both, index=1)


def _from_int8(parts: Parts, wanted: torch.dtype) -> Node:
    return OPS["dequantize"](*parts, dtype=wanted)


MOST = 7.0
"""The largest level of 4 bits; they are kept as 1 .. 15, 8 being 0."""


def _int4(x: Node) -> Parts:
    """Levels of 4 bits and a scale for each row, NaN for one with NaN or infinities. The second half of the columns is in the high bits
    of the bytes that hold the first, so that neighbours among columns are neighbours in memory."""
    rank, half = x.tensor.rank, x.shape[-1] // 2
    wide = _cast(x, compute_dtype(x.dtype))
    largest = OPS["amax"](OPS["abs"](wide), dims=(rank - 1,), keepdim=True)
    finite, step = OPS["isfinite"](largest), OPS["div"](largest, MOST)
    scale = OPS["where"](finite, OPS["where"](OPS["gt"](step, 0.0), step, 1.0), math.nan)
    rounded = OPS["where"](finite, OPS["round"](OPS["div"](wide, scale)), 0.0)
    levels = OPS["cast"](OPS["add"](OPS["clamp"](rounded, -MOST, MOST), 8.0), dtype=torch.uint8)
    low, high = (OPS["slice"](levels, dim=rank - 1, start=i * half, stop=(i + 1) * half) for i in (0, 1))
    return OPS["bitwise_or"](low, OPS["bitwise_left_shift"](high, 4)), scale


def _from_int4(parts: Parts, wanted: torch.dtype) -> Node:
    packed, scale = parts
    rank, (*lead, half) = packed.tensor.rank, packed.shape
    pairs = OPS["reshape"](OPS["unpack"](packed, bits=4), shape=(*lead, half, 2))
    levels = OPS["reshape"](OPS["permute"](pairs, dims=(*range(rank - 1), rank, rank - 1)), shape=(*lead, 2 * half))
    zero = OPS["full"](shape=(1,) * rank, value=8.0, dtype=scale.dtype, device=scale.tensor.device)
    return OPS["dequantize"](levels, scale, zero, dtype=wanted)


KV_FORMATS: dict[str, KvFormat] = {
    "same": _cast_to(None),
    "f32": _cast_to(torch.float32),
    "bf16": _cast_to(torch.bfloat16),
    "int8": KvFormat(_int8, _from_int8),
    "int4": KvFormat(_int4, _from_int4),
}
"""Name -> format. "same" keeps values as they are computed; int8 and int4 have a scale for each token and head."""
