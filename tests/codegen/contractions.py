"""Contractions as they stand in models, and hand-written kernels of sorts that lowering does not make: for the tests of printers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from lowering import Build, Cases, x
from tilewright.codegen.kernel import Axis, Buffer, Dot, Kernel, Load, Position, Reduce, Store, inside
from tilewright.ir import ops
from tilewright.ir.dims import FloorDiv, Mod, SymbolRange, symbol
from tilewright.ir.scalar import Const, Scalar, apply, cast
from tilewright.ir.types import compute_dtype

F32, F16, BF16, F64, I8, I32, I64 = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64,
)  # fmt: skip

CASES = Cases()
add = CASES.add


def layer(a, w, b, r):
    return ops.add(ops.gelu(ops.linear(a, w, b)), r)


def heads(a, w):
    return ops.exp(ops.permute(ops.reshape(ops.linear(a, w), shape=(2, 5, 4, 6)), dims=(0, 2, 1, 3)))


def product(a, b):
    return ops.neg(ops.matmul(a, b))


def convolution(stride: int, padding: int, dilation: int, groups: int, last: bool) -> Build:
    settings = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2, "groups": groups}
    return lambda a, w, b: ops.relu(ops.conv(a, w, b, channels_last=last, **settings))


for word, kind in {"f32": F32, "f16": F16, "bf16": BF16, "f64": F64}.items():
    add(f"layer_{word}", layer, x(33, 40, dtype=kind), x(21, 40, dtype=kind), x(21, dtype=kind), x(33, 21, dtype=kind))
add("whole", layer, x(32, 32), x(16, 32), x(16), x(32, 16))
add("many_rows", layer, x(150, 20), x(50, 20), x(50), x(150, 50))  # tiles in several groups, the last not full
add("heads", heads, x(2, 5, 8), x(24, 8))
for sides in [((20, 5), (5, 18)), ((2, 4, 5), (5, 6)), ((3, 1, 4, 5), (2, 5, 6)), ((5,), (5, 6)), ((4, 5), (5,)), ((20, 5), (5, 3))]:
    add("matmul_" + "_by_".join("x".join(map(str, s)) for s in sides), product, *(x(*s) for s in sides))
add("turned", lambda a, b: product(ops.permute(a, dims=(1, 0)), b), x(24, 33), x(24, 18))
add("both_turned", lambda a, b: product(ops.permute(a, dims=(1, 0)), ops.permute(b, dims=(1, 0))), x(24, 33), x(18, 24))
add("strided", lambda a, w: ops.relu(ops.linear(a, w)), x(20, 64)[:, ::2], x(18, 32))
add("one_row", layer, x(1, 70), x(40, 70), x(40), x(1, 40))
add("one_by_one", lambda a, w: ops.relu(ops.linear(a, w)), x(1, 50), x(1, 50))
add("three_rows_bf16", layer, *(x(*s, dtype=BF16) for s in ((3, 70), (40, 70), (40,), (3, 40))))
add("padded", lambda a, w: ops.relu(ops.linear(ops.pad(a, low=(0, 1), high=(0, 2), value=1.5), w)), x(3, 5), x(4, 8))
add("rounded", lambda a, w: ops.relu(ops.linear(ops.cast(a, dtype=BF16), w)), x(18, 24), x(17, 24, dtype=BF16))
add("widened", lambda a, w: ops.relu(ops.linear(ops.cast(a, dtype=F32), w)), x(18, 24, dtype=BF16), x(17, 24))
add("no_depth", lambda a, w, b: ops.relu(ops.linear(a, w, b)), x(5, 0), x(6, 0), x(6))
add("no_rows", lambda a, w: ops.relu(ops.linear(a, w)), x(0, 4), x(6, 4))
for settings in [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2), (1, 1, 1, 4)]:
    for last in (True, False):
        image = x(2, 7, 6, 4) if last else x(2, 4, 7, 6)
        add(
            f"conv_{'_'.join(map(str, settings))}{'_last' * last}", convolution(*settings, last), image, x(8, 4 // settings[-1], 3, 3), x(8)
        )
_B, _N, _K = (symbol(s) for s in ("b", "n", "k"))
_SIZES = {s: SymbolRange() for s in ("b", "n", "k")}
add("sizes", layer, x(33, 40), x(21, 40), x(21), x(33, 21), shapes=((_B, _K), (_N, _K), (_N,), (_B, _N)), symbols=_SIZES)
add("some_rows", layer, x(7, 40), x(21, 40), x(21), x(7, 21), shapes=((_B, 40), (21, 40), (21,), (_B, 21)), symbols={"b": SymbolRange()})


# ---- written by hand

i, j, a = symbol("i"), symbol("j"), symbol("a")
M, N, K = 20, 18, 24


@dataclass(frozen=True)
class HandCase:
    """a kernel, its inputs by buffer, and its outputs as a function of them."""

    kernel: Kernel
    inputs: dict[str, torch.Tensor]
    expected: Callable[..., tuple[torch.Tensor, ...]]


def load(buffer: str, index: Any, dtype: torch.dtype = F32, **more: Any) -> Load:
    return Load(compute_dtype(dtype), buffer, sympy.sympify(index), **more)


def dot(left: Scalar, right: Scalar, axes: tuple[str, ...] = ("a",), dtype: torch.dtype = F32) -> Dot:
    return Dot(dtype, left, right, axes)


def _kernel(
    name: str, stores: list[Store], inputs: dict[str, torch.Tensor], outputs: dict[str, Any], axes: Any = None, **more: Any
) -> Kernel:
    axes = axes or (Axis("i", M), Axis("j", N), Axis("a", K, True))
    buffers = (tuple(Buffer(k, v.dtype, v.numel()) for k, v in inputs.items()), tuple(Buffer(k, *v) for k, v in outputs.items()))
    return Kernel(name, tuple(axes), *buffers, tuple(stores), **more)


def _gate_and_up() -> HandCase:
    """silu(x @ gate) * (x @ up), and the first of them too: two contractions over axes of their own that read one operand."""
    b, inputs = symbol("b"), {"x": x(M, K), "gate": x(N, K), "up": x(N, K) / 2}
    gate = dot(load("x", K * i + a), load("gate", K * j + a))
    up = dot(load("x", K * i + b), load("up", K * j + b), ("b",))
    stores = [Store("out", N * i + j, gate / (apply("exp", -gate) + 1.0) * up), Store("kept", M * j + i, gate)]
    axes = (Axis("i", M), Axis("j", N), Axis("a", K, True), Axis("b", K, True))

    def expected(x, gate, up):
        return torch.nn.functional.silu(x @ gate.T) * (x @ up.T), (x @ gate.T).T

    return HandCase(_kernel("gate_and_up", stores, inputs, {"out": (F32, M * N), "kept": (F32, M * N)}, axes), inputs, expected)


def _dequantized() -> HandCase:
    """Weights of 4 bits, two in a byte, with a scale and a zero for each group of 8 along the depth."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": x(M, K), "q": torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8),
        "scale": x(N, K // 8), "zero": torch.randint(0, 16, (N, K // 8), generator=generator, dtype=torch.uint8),
    }  # fmt: skip
    byte, group = load("q", K // 2 * j + FloorDiv(a, 2), torch.uint8), K // 8 * j + FloorDiv(a, 8)
    four = apply("shr", cast(byte, I32), cast(Position(I64, Mod(a, 2)) * 4, I32)) & 15
    weight = cast(four - cast(load("zero", group, torch.uint8), I32), F32) * load("scale", group)
    kernel = _kernel("dequantized", [Store("out", N * i + j, dot(load("x", K * i + a), weight))], inputs, {"out": (F32, M * N)})

    def expected(x, q, scale, zero):
        w = torch.stack((q & 15, q >> 4), -1).reshape(N, K).float() - zero.float().repeat_interleave(8, 1)
        return (x @ (w * scale.repeat_interleave(8, 1)).T,)

    return HandCase(kernel, inputs, expected)


def _gathered() -> HandCase:
    """Rows that a table of numbers names: x[ids] @ w."""
    inputs = {"ids": torch.arange(M).flip(0) % 7, "x": x(7, K), "w": x(K, N)}
    row = inside(load("ids", i, I64), Const(I64, 7), 1)
    left = load("x", K * symbol("row") + a, indirect=(("row", row),))
    stores = [Store("out", N * i + j, dot(left, load("w", N * a + j)))]
    kernel = _kernel("gathered", stores, inputs, {"out": (F32, M * N)}, faults=("embedding",))
    return HandCase(kernel, inputs, lambda ids, x, w: (x[ids] @ w,))


def _normed() -> HandCase:
    """What follows is normalized by its row: x @ w over the root of the mean of its squares; the root is stored too."""
    inputs = {"x": x(M, K), "w": x(N, K), "b": x(N)}
    value = dot(load("x", K * i + a), load("w", K * j + a)) + load("b", j)
    root = apply("rsqrt", Reduce(F32, "sum", value * value, ("j",)) / float(N) + 1e-6)
    axes = (Axis("i", M), Axis("j", N, True), Axis("a", K, True))
    stores = [Store("out", N * i + j, value * root), Store("root", i, root)]
    kernel = _kernel("normed", stores, inputs, {"out": (F32, M * N), "root": (F32, M)}, axes)

    def expected(x, w, b):
        y = x @ w.T + b
        root = (y.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        return y * root, root[:, 0]

    return HandCase(kernel, inputs, expected)


def _bytes() -> HandCase:
    generator = torch.Generator().manual_seed(2)
    inputs = {k: torch.randint(-128, 128, s, generator=generator, dtype=I8) for k, s in {"x": (M, K), "w": (N, K)}.items()}
    total = dot(cast(load("x", K * i + a, I8), I32), cast(load("w", K * j + a, I8), I32), dtype=I32)
    kernel = _kernel("bytes", [Store("out", N * i + j, cast(total, F32) * 0.5)], inputs, {"out": (F32, M * N)})
    return HandCase(kernel, inputs, lambda x, w: (x.float() @ w.float().T * 0.5,))


def _update() -> HandCase:
    """height + tile @ first.T over the memory of height: buffers with names that a walk has for itself."""
    inputs = {"tile": x(M, K), "first": x(N, K), "height": x(M, N)}
    value = load("height", N * i + j) + dot(load("tile", K * i + a), load("first", K * j + a))
    kernel = _kernel("update", [Store("out", N * i + j, value)], inputs, {"out": (F32, M * N)}, inplace=(("out", "height"),))
    return HandCase(kernel, inputs, lambda tile, first, height: (height + tile @ first.T,))


HAND: dict[str, HandCase] = {c.kernel.name: c for c in (_gate_and_up(), _dequantized(), _gathered(), _normed(), _bytes(), _update())}
