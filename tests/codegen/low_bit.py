"""Contractions with operands of few bits, as the formats of models have them: for the tests of printers."""

from __future__ import annotations

from typing import Any

import torch
from lowering import Build, Cases, x
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol

F32, F16, BF16, I8, U8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8
F8 = {"f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}


def integers(*shape: int, low: int = -128, high: int = 128, dtype: torch.dtype = I8) -> torch.Tensor:
    """Random integers, the same for equal shapes."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def packed(*shape: int) -> torch.Tensor:
    """Random bytes."""
    return integers(*shape, low=0, high=256, dtype=U8)


def steps(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Scales: positive, and small beside 1."""
    return (x(*shape).abs() / 512 + 0.001).to(dtype)


def unpacking(bits: int, dtype: torch.dtype, zero: bool) -> Build:
    """relu(x @ dequantize(unpack(w), scale, unpack(zero)).T)"""

    def build(a: Any, w: Any, scale: Any, *zeros: Any) -> Any:
        offsets = [ops.unpack(z, bits=bits) for z in zeros]
        return ops.relu(ops.linear(a, ops.dequantize(ops.unpack(w, bits=bits), scale, *offsets, dtype=dtype)))

    return build


def dequantizing(dtype: torch.dtype) -> Build:
    return lambda a, w, scale: ops.linear(a, ops.dequantize(w, scale, dtype=dtype))


def of_integers(q: Any, w: Any, s: Any, t: Any, b: Any) -> Any:
    product = ops.cast(ops.int_linear(q, w), dtype=F32)
    return ops.add(ops.mul(ops.mul(product, s), t), b)


def experts(a: Any, w: Any, scale: Any, ends: Any) -> Any:
    """relu of rows of groups times the weights of their group, which are of 4 bits."""
    weight = ops.dequantize(ops.unpack(w, bits=4), scale, dtype=F32)
    return ops.relu(ops.grouped_matmul(a, ops.permute(weight, dims=(0, 2, 1)), ends))


CASES = Cases()
add = CASES.add

for word, kind, counts in (("f32", F32, (1, 3, 19)), ("bf16", BF16, (1, 19)), ("f16", F16, (3,))):
    for rows in counts:
        add(f"i8_{rows}_{word}", dequantizing(kind), x(rows, 64, dtype=kind), integers(24, 64), steps(24, 1))
        add(f"int4_channels_{rows}_{word}", unpacking(4, kind, False), x(rows, 64, dtype=kind), packed(24, 32), steps(24, 1))
        for groups in (2, 4):
            given = (x(rows, 128, dtype=kind), packed(24, 64), steps(24, groups), packed(24, groups // 2))
            add(f"int4_{groups}_groups_{rows}_{word}", unpacking(4, kind, True), *given)
for bits in (1, 2):
    add(f"int{bits}_{5}", unpacking(bits, F32, False), x(5, 128), packed(24, 16 * bits), steps(24, 4))
    add(f"int{bits}_1", unpacking(bits, BF16, False), x(1, 128, dtype=BF16), packed(24, 16 * bits), steps(24, 4, dtype=BF16))
for word, storage in F8.items():
    for rows in (1, 20):
        weight = x(24, 64).to(storage)
        add(f"{word}_{rows}", dequantizing(BF16), x(rows, 64, dtype=BF16), weight, steps(24, 1, dtype=BF16))
for rows in (1, 3, 20):
    add(f"int_linear_{rows}", of_integers, integers(rows, 64), integers(24, 64), steps(rows, 1), steps(24), x(24))
add("int_linear_tails", of_integers, integers(19, 50), integers(21, 50), steps(19, 1), steps(21), x(21))
add("int_linear_no_rows", of_integers, integers(0, 64), integers(24, 64), steps(0, 1), steps(24), x(24))
add("tails_i8", dequantizing(BF16), x(19, 50, dtype=BF16), integers(21, 50), steps(21, 1))
add("tails_int4", unpacking(4, F32, False), x(19, 50), packed(21, 25), steps(21, 1))
add("tails_int4_groups", unpacking(4, F32, True), x(19, 60), packed(21, 30), steps(21, 6), packed(21, 3))
add("six_bits", lambda a, low, high, s: ops.linear(a, ops.dequantize(
    ops.bitwise_or(ops.unpack(low, bits=4), ops.bitwise_left_shift(ops.unpack(high, bits=2), 4)), s, dtype=F32)),
    x(7, 64), packed(24, 32), packed(24, 16), steps(24, 2))  # fmt: skip
add("computed_left", lambda a, w: ops.relu(ops.linear(ops.mul(ops.cast(a, dtype=F32), 1 / 256), w)), integers(20, 48), x(24, 48))
add("experts", experts, x(19, 128), packed(3, 24, 64), steps(3, 24, 2), torch.tensor([7, 7, 16], dtype=torch.int32))
add("symbolic_rows", unpacking(4, BF16, False), x(9, 128, dtype=BF16), packed(24, 64), steps(24, 2),
    shapes=((symbol("b"), 128), (24, 64), (24, 2)), symbols={"b": SymbolRange()})  # fmt: skip
add("symbolic_sizes", dequantizing(F32), x(9, 60), integers(24, 60), steps(24, 1),
    shapes=((symbol("b"), symbol("k")), (symbol("n"), symbol("k")), (symbol("n"), 1)),
    symbols={s: SymbolRange() for s in "bnk"})  # fmt: skip
