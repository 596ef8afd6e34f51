"""Computed right operands: narrow integers as int32, and bytes that lie in words as the words.

    float(q[4*(n % 48) + t] >> s & 15)   -->   float(words[n % 48] >> (8*t + s & 31) & 15)        words: q, as int32

Lanes along the columns then read neighbouring words, and do with them what registers do well. Ranges are kept track of: a result wraps
only where its own type would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from ...ir.dims import Mod, floordiv
from ...ir.scalar import Apply, Const, Scalar
from ..kernel import Axis, Buffer, Kernel, Load, Position, cone

I32 = torch.int32
RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-(1 << 15), (1 << 15) - 1), I32: (-(1 << 31), (1 << 31) - 1)}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Int:
    """An int32 within lo .. hi. word, shift: of which word it is the bits above, cut to 8 less those that were shifted out."""

    value: Scalar
    lo: int
    hi: int
    word: Load | None = None
    shift: sympy.Expr = sympy.Integer(0)


def in_int32(value: Scalar, kernel: Kernel) -> tuple[Scalar, tuple[Buffer, ...]]:
    """The value, and the buffers of words that it reads: named after those of the bytes."""
    made = _Widening(kernel)
    return made.run(value), tuple(made.buffers.values())


def words_of(buffer: str) -> str:
    return f"{buffer} as words"


class _Widening:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.axes = {a.name: a for a in kernel.axes}
        self.buffers: dict[str, Buffer] = {}
        self.ints: dict[Scalar, Int] = {}
        self.done: dict[Scalar, Scalar] = {}

    def run(self, root: Scalar) -> Scalar:
        for value in cone([root]):
            found = self.integer(value)
            if found is not None:
                self.ints[value] = found
            self.done[value] = self.rebuilt(value)
        return self.done[root]

    def rebuilt(self, value: Scalar) -> Scalar:
        """The value in its own type, of operands that were widened."""
        found = self.ints.get(value)
        if found is not None:
            return found.value if value.dtype == I32 else Apply(value.dtype, "cast", (found.value,))
        if not isinstance(value, Apply):
            return value
        ints = [self.ints.get(v) for v in value.args]
        if value.op == "cast" and ints[0] is not None:
            return Apply(value.dtype, "cast", (ints[0].value,))
        if value.op in COMPARISONS and ints[0] is not None and ints[1] is not None:
            return Apply(value.dtype, value.op, (ints[0].value, ints[1].value))
        return replace(value, args=tuple(self.done[v] for v in value.args))

    # ---- integers

    def integer(self, value: Scalar) -> Int | None:
        """The value as an int32, if it is a narrow integer that can be one."""
        if value.dtype not in RANGES:
            return None
        if isinstance(value, Const):
            return Int(Const(I32, int(value.value)), int(value.value), int(value.value))
        if isinstance(value, Load):
            return self.load(value)
        if not isinstance(value, Apply):
            return None
        if value.op == "cast" and isinstance(value.args[0], Position):
            bound = self.bound(value.args[0].index)
            return None if bound is None else Int(Apply(I32, "cast", (value.args[0],)), 0, bound, None, value.args[0].index)
        ints = [self.ints.get(v) for v in value.args]
        rule = _RULES.get(value.op)
        if rule is None or any(i is None for i in ints):
            return None
        found = rule(self, *ints)
        return None if found is None else _wrapped(found, value.dtype)

    def load(self, load: Load) -> Int | None:
        lo, hi = RANGES[load.dtype]
        if load.dtype.itemsize != 1 or load.mask is not None or load.indirect:
            return None
        place = self.place(load.index)
        if place is None:
            return Int(Apply(I32, "cast", (load,)), lo, hi)
        index, byte = place
        buffer = self.kernel.buffer(load.buffer)
        self.buffers[buffer.name] = Buffer(words_of(buffer.name), I32, floordiv(buffer.size, 4))
        word = Load(I32, words_of(buffer.name), index)
        if load.dtype == torch.uint8:
            return Int(_and(_shr(word, 8 * byte), 255), lo, hi, word, 8 * byte)
        left = Apply(I32, "shl", (word, _count(24 - 8 * byte)))
        return Int(_shr(left, sympy.Integer(24)), lo, hi)

    def place(self, index: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
        """(the word, the byte in it) of an index of bytes in words."""
        terms = sympy.Add.make_args(sympy.expand(index))
        whole = [t for t in terms if int(t.as_coeff_Mul()[0]) % 4 == 0]  # type: ignore[call-overload]
        byte = sympy.Add(*(t for t in terms if t not in whole))
        bound = self.bound(byte)
        return None if bound is None or bound > 3 else (sympy.Add(*(t / 4 for t in whole)), byte)

    def bound(self, index: sympy.Expr) -> int | None:
        """The largest value of an index over axes that are known; None for what may be negative, or without a bound."""
        total = 0
        for term in sympy.Add.make_args(sympy.expand(index)):
            factor, rest = term.as_coeff_Mul()
            most = 1 if rest == 1 else self._most(rest)
            if most is None or not factor.is_Integer or int(factor) < 0:
                return None
            total += int(factor) * most
        return total

    def _most(self, value: sympy.Expr) -> int | None:
        if isinstance(value, Mod) and value.args[1].is_Integer:
            return int(value.args[1]) - 1  # type: ignore[call-overload]
        axis: Axis | None = self.axes.get(getattr(value, "name", ""))
        return int(axis.extent) - 1 if axis is not None and isinstance(axis.extent, int) else None


# ---- operations


def _count(shift: sympy.Expr) -> Scalar:
    """A number of bits below 32."""
    if shift.is_Integer:
        return Const(I32, int(shift))
    return Apply(I32, "and", (Apply(I32, "cast", (Position(torch.int64, shift),)), Const(I32, 31)))


def _shr(value: Scalar, shift: sympy.Expr) -> Scalar:
    return value if shift == 0 else Apply(I32, "shr", (value, _count(shift)))


def _and(value: Scalar, mask: int) -> Scalar:
    return Apply(I32, "and", (value, Const(I32, mask)))


def _wrapped(found: Int, dtype: torch.dtype) -> Int:
    """What a type of so many bits keeps."""
    lo, hi = RANGES[dtype]
    if lo <= found.lo and found.hi <= hi or dtype == I32:
        return replace(found, lo=max(found.lo, lo), hi=min(found.hi, hi))
    if lo == 0:
        return Int(_and(found.value, hi), lo, hi)
    unused = sympy.Integer(32 - 8 * dtype.itemsize)
    return Int(_shr(Apply(I32, "shl", (found.value, _count(unused))), unused), lo, hi)


def _cast(widening: _Widening, a: Int) -> Int:
    return a


def _moved_right(widening: _Widening, a: Int, count: Int) -> Int | None:
    shift = sympy.Integer(count.lo) if count.lo == count.hi else count.shift
    if count.lo < 0 or count.hi > 31 or widening.bound(shift) != count.hi or a.lo < 0:
        return None
    if a.word is not None and a.hi == 255:
        moved = a.shift + shift
        return Int(_shr(a.value, shift), 0, a.hi >> count.lo, a.word, moved)
    return Int(_shr(a.value, shift), 0, a.hi >> count.lo)


def _moved_left(widening: _Widening, a: Int, count: Int) -> Int | None:
    if count.lo != count.hi or not 0 <= count.lo < 24:
        return None
    return _product(widening, a, Int(count.value, 1 << count.lo, 1 << count.lo), Apply(I32, "shl", (a.value, count.value)))


def _masked(widening: _Widening, a: Int, b: Int) -> Int | None:
    """Bits of a byte that are left are those of its word."""
    a, b = (a, b) if b.lo == b.hi else (b, a)
    if a.lo < 0 or b.lo < 0:
        return None
    high = min(a.hi, b.hi)
    mask = b.hi if b.lo == b.hi else None
    if a.word is not None and mask is not None and _inside_byte(widening, a, mask):
        return Int(_and(_shr(a.word, a.shift), mask), 0, high)
    return Int(Apply(I32, "and", (a.value, b.value)), 0, high)


def _inside_byte(widening: _Widening, a: Int, mask: int) -> bool:
    """Whether bits under the mask are of the byte for every shift: those of one that was shifted by at most 8 - bits."""
    byte = sum((t for t in sympy.Add.make_args(sympy.expand(a.shift)) if t.as_coeff_Mul()[0] % 8 == 0), sympy.Integer(0))
    inner = widening.bound(sympy.expand(a.shift - byte))
    return inner is not None and inner + mask.bit_length() <= 8


def _either(widening: _Widening, a: Int, b: Int) -> Int | None:
    if a.lo < 0 or b.lo < 0:
        return None
    return Int(Apply(I32, "or", (a.value, b.value)), 0, (1 << max(a.hi, b.hi).bit_length()) - 1)


def _sum(widening: _Widening, a: Int, b: Int) -> Int:
    return Int(Apply(I32, "add", (a.value, b.value)), a.lo + b.lo, a.hi + b.hi)


def _difference(widening: _Widening, a: Int, b: Int) -> Int:
    return Int(Apply(I32, "sub", (a.value, b.value)), a.lo - b.hi, a.hi - b.lo)


def _product(widening: _Widening, a: Int, b: Int, value: Scalar | None = None) -> Int | None:
    ends = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Int(value or Apply(I32, "mul", (a.value, b.value)), min(ends), max(ends))


_RULES: Mapping[str, Callable[..., Int | None]] = {
    "cast": _cast, "shr": _moved_right, "shl": _moved_left, "and": _masked, "or": _either, "add": _sum, "sub": _difference, "mul": _product,
}  # fmt: skip
