"""Weights in bfloat16 with their exponents entropy-coded: two thirds of the bytes, every bit kept. For storing only.

    bf16[n]   sign, exponent (8 bits), mantissa (7 bits)    -->    u8: n bytes of sign and mantissa, then all exponents, Huffman coded

Exponents of weights take few values (N(0, 0.02): 2.6 bits of entropy); signs and mantissas are noise, and stay as they are. The code is
that of DEFLATE (RFC 1951) without its matches, in a table for each 32768 exponents: zlib decodes it. float32 whose low halves are all
zero, as of a model that was trained in bfloat16, is coded as what it is.
After DFloat11 ("70% Size, 100% Accuracy", Zhang et al., 2025).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch

WORTH = 0.9
"""What does not get smaller than this share stays as it is."""

STEP = 1 << 16
"""Values that are taken apart or put together at a time: they stay in the cache."""


MEMORY = 9
"""The most that zlib takes for itself: tables are for 32768 values then."""


def compressed(tensor: torch.Tensor) -> torch.Tensor | None:
    """The bytes that a tensor is stored as; None for one of another kind, or that would not get much smaller."""
    bits = _bits(tensor)
    if bits is None:
        return None
    found = code(bits)
    return torch.from_numpy(found) if found.nbytes < WORTH * tensor.nbytes else None


def restored(data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that `compressed` made these bytes of. Raises ValueError."""
    if dtype not in _WIDE or data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"{data.dtype} of {data.dim()} dimensions is no code of {dtype}")
    if not all(isinstance(d, int) and d >= 0 for d in shape):
        raise ValueError(f"{list(shape)} is no shape")
    return torch.from_numpy(decode(data.numpy(), math.prod(shape), _WIDE[dtype])).view(dtype).reshape(*shape)


_WIDE = {torch.bfloat16: np.dtype(np.uint16), torch.float32: np.dtype(np.uint32)}


def _bits(tensor: torch.Tensor) -> np.ndarray | None:
    """The bits of its values as bfloat16, where these say all."""
    plain = tensor.detach().reshape(-1)
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(np.uint16)
    if plain.dtype != torch.float32:
        return None
    halves = plain.view(torch.int16).numpy().view(np.uint16)
    return None if halves[::2].any() else halves[1::2]


def code(bits: np.ndarray) -> np.ndarray:
    """u16[n] --> u8: signs and mantissas, then the exponents as Huffman codes."""
    plain = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
    coder = zlib.compressobj(zlib.Z_BEST_SPEED, zlib.DEFLATED, -zlib.MAX_WBITS, MEMORY, zlib.Z_HUFFMAN_ONLY)
    codes = coder.compress((bits >> 7).astype(np.uint8).data) + coder.flush()
    return np.concatenate((plain, np.frombuffer(codes, np.uint8)))


def decode(data: np.ndarray, count: int, dtype: np.dtype) -> np.ndarray:
    """The bits of `count` values, in the upper half of a u32 if that is the dtype. Raises ValueError."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        codes = np.frombuffer(decoder.decompress(data[count:].data, count + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"its codes do not decode ({error})") from error
    if len(codes) != count or not decoder.eof or decoder.unused_data:
        raise ValueError(f"its codes are not those of {count} values")
    found = np.empty(count, dtype)
    up = 8 * dtype.itemsize - 16
    for start in range(0, count, STEP):
        part = slice(start, start + STEP)
        plain, out = data[:count][part].astype(dtype), found[part]
        np.left_shift(codes[part], 7 + up, out=out, dtype=dtype)
        out |= (plain & 0x7F) << up
        out |= (plain & 0x80) << 8 + up
    return found
