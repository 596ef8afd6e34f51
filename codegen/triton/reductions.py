"""Reductions and scans as Triton text: identities, combining functions, and the helper functions that a printed module defines.

`tl.max` and `tl.argmax` drop NaN, so floating-point extrema and arg-reductions use combining functions of our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...ir.scalar import Const
from ..kernel import Reduce
from .scalars import Text, constant

HELPERS: dict[str, str] = {
    "_maximum": '''
@triton.jit
def _maximum(a, b):
    """The larger; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "_minimum": '''
@triton.jit
def _minimum(a, b):
    """The smaller; NaN if either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "_product": """
@triton.jit
def _product(a, b):
    return a * b
""",
    "_argmax": '''
@triton.jit
def _argmax(a, i, b, j):
    """The larger value and its position; NaN is largest, the lower position wins ties."""
    tie = (a == b) | (a != a) & (b != b)
    first = (a > b) | (a != a) & (b == b) | tie & (i < j)
    return tl.where(first, a, b), tl.where(first, i, j)
''',
    "_argmin": '''
@triton.jit
def _argmin(a, i, b, j):
    """The smaller value and its position; NaN is smallest, the lower position wins ties."""
    tie = (a == b) | (a != a) & (b != b)
    first = (a < b) | (a != a) & (b == b) | tie & (i < j)
    return tl.where(first, a, b), tl.where(first, i, j)
''',
    "_ipow": '''
@triton.jit
def _ipow(a, b):
    """a ** b on integers, b >= 0, by squaring; wraps like multiplication."""
    power = a
    result = a * 0 + 1
    for bit in range(b.dtype.primitive_bitwidth):
        result = tl.where((b >> bit) & 1 != 0, result * power, result)
        power = power * power
    return result
''',
    "_from_e4m3": '''
def _knows_e4m3(_semantic=None):
    """Whether the target of the compilation converts 8-bit floats of 4 exponent bits."""
    return _semantic is not None and "fp8e4nv" in _semantic.builder.options.supported_fp8_dtypes


_knows_e4m3.__triton_builtin__ = True


@triton.jit
def _from_e4m3(byte):
    """What a byte is as a float of 4 exponent bits. As one of 16 bits its exponent is 8 too small."""
    if _knows_e4m3():
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = byte.to(tl.uint16)
        number = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(bits & 0x7F == 0x7F, float("nan"), number)
''',
    "_from_e5m2": '''
@triton.jit
def _from_e5m2(byte):
    """What a byte is as a float of 5 exponent bits: the upper half of one of 16 bits."""
    return (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
''',
    "_soften": '''
@triton.jit
def _soften(scores, unit: tl.constexpr, largest, total):
    """Weights 2^(unit * score - largest), by what to scale what earlier ones gave, and the largest and total up to now."""
    most = tl.maximum(largest, tl.max(scores, axis=1, keep_dims=True) * unit)
    base = tl.where(most == float("-inf"), 0.0, most)  # nothing to attend to yet: all weights are 0
    weights = tl.exp2(tl.fma(scores, unit, -base))
    decay = tl.exp2(largest - base)
    return weights, decay, most, total * decay + tl.sum(weights, axis=1, keep_dims=True)
''',
    "_soften_wide": '''
@triton.jit
def _soften_wide(scores, unit: tl.constexpr, largest, total):
    """Weights 2^(unit * score - largest), by what to scale what earlier ones gave, and the largest and total up to now."""
    most = tl.maximum(largest, tl.max(scores, axis=1, keep_dims=True) * unit)
    base = tl.where(most == float("-inf"), 0.0, most)  # nothing to attend to yet: all weights are 0
    weights = libdevice.exp2(scores * unit - base)
    decay = libdevice.exp2(largest - base)
    return weights, decay, most, total * decay + tl.sum(weights, axis=1, keep_dims=True)
''',
    "_find_group": '''
@triton.jit
def _find_group(ends_ptr, block, rows, count: tl.constexpr, lanes: tl.constexpr, length: tl.constexpr, dtype: tl.constexpr):
    """The group that a block of rows is of, its first row, and where the group ends. Group `count` has the rows behind the last one."""
    group = tl.arange(0, lanes)
    begin = tl.minimum(tl.maximum(tl.load(ends_ptr + group - 1, (group > 0) & (group <= count), other=0), 0), rows).to(dtype)
    end = tl.minimum(tl.maximum(tl.load(ends_ptr + group, group < count, other=rows), 0), rows).to(dtype)
    blocks = tl.where(group <= count, (tl.maximum(end - begin, 0) + length - 1) // length, 0)
    until = tl.cumsum(blocks, axis=0)
    own = tl.sum((until <= block).to(dtype), axis=0)
    first = tl.sum(tl.where(group == own, begin + (block - until + blocks) * length, 0), axis=0)
    return own, first, tl.sum(tl.where(group == own, end, 0), axis=0)
''',
}


@dataclass(frozen=True)
class Reducer:
    """How one reduction is written.

    word: what its result is called; dtype: of the accumulator; identity: literal of an empty reduction;
    helper: the combining function, or "" where `whole` is a function of `tl` that reduces a block.
    """

    word: str
    dtype: torch.dtype
    identity: Text
    helper: str = ""
    whole: str = ""

    def over(self, block: str, axis: int, keep: bool) -> str:
        """The reduction of a block along one of its dimensions."""
        dims = f"axis={axis}, keep_dims=True" if keep else f"axis={axis}"
        return f"{self.whole}({block}, {dims})" if self.whole else f"tl.reduce({block}, combine_fn={self.helper}, {dims})"

    def combined(self, accumulator: str, value: Text) -> str:
        """The line that takes one more block of values into the accumulator."""
        if self.whole == "tl.sum":
            return f"{accumulator} += {value.code}"
        function = self.helper or {"tl.max": "tl.maximum", "tl.min": "tl.minimum"}[self.whole]
        return f"{accumulator} = {function}({accumulator}, {value.code})"


_WORDS = {"sum": "total", "prod": "product", "max": "largest", "min": "smallest", "any": "found", "all": "every",
          "argmax": "largest", "argmin": "smallest"}  # fmt: skip


def reducer(value: Reduce) -> Reducer:
    """How `value` is reduced; argmax and argmin accumulate pairs (value, position), of which this describes the value."""
    word = _WORDS[value.op]
    if value.op in ("any", "all"):
        return Reducer(word, torch.int32, Text(str(int(value.op == "all"))), whole="tl.max" if value.op == "any" else "tl.min")
    if value.op in ("argmax", "argmin"):
        dtype = value.value.dtype
        return Reducer(word, dtype, _extreme(dtype, value.op == "argmin"), helper=f"_{value.op}")
    dtype = value.dtype
    if value.op in ("sum", "prod"):
        identity = constant(Const(dtype, 0 if value.op == "sum" else 1))
        return Reducer(word, dtype, identity, whole="tl.sum") if value.op == "sum" else Reducer(word, dtype, identity, "_product")
    largest = value.op == "max"
    if dtype.is_floating_point:
        return Reducer(word, dtype, _extreme(dtype, not largest), helper="_maximum" if largest else "_minimum")
    return Reducer(word, dtype, _extreme(dtype, not largest), whole="tl.max" if largest else "tl.min")


def _extreme(dtype: torch.dtype, highest: bool) -> Text:
    """The highest or lowest value of a dtype."""
    if dtype.is_floating_point:
        return constant(Const(dtype, math.inf if highest else -math.inf))
    limits = torch.iinfo(dtype)
    return constant(Const(dtype, limits.max if highest else limits.min))


def small_integer(dtype: torch.dtype) -> bool:
    """Whether `tl.sum` and its like return a wider type than this one."""
    return not dtype.is_floating_point and dtype != torch.bool and dtype.itemsize < 4
