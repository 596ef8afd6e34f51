"""Hand-written kernels with a contraction through the C++ printer, against the slow reference; compiled in one build each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from handmade import TARGETS, Case, Cases, inputs_of, kernel, launch, load, target_for
from support import NATIVE
from tilewright.codegen import reference
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.kernel import Dot, Kernel, Load, Position, Reduce, inside
from tilewright.codegen.target import Compiled, Failed
from tilewright.ir.dims import FloorDiv, Mod, symbol
from tilewright.ir.scalar import Const, Scalar, apply, cast, where

pytestmark = NATIVE

F32, F64, I64, BF16, F16 = torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float16
b, h, i, j, r, s, t, m, n = (symbol(name) for name in "bhijrstmn")

CASES = Cases()
case = CASES.case


def dot(left: Scalar, right: Scalar, *axes: str) -> Dot:
    return Dot(left.dtype, left, right, axes or ("r",))


def gelu(x: Scalar) -> Scalar:
    return x * 0.5 * (apply("erf", x * 0.7071067811865476) + 1.0)


def packed(name: str, columns: int, depth: int, dtype: torch.dtype = F32) -> tuple[Load, tuple[torch.dtype, int]]:
    """A weight in panels of 48 columns, and its buffer."""
    at = FloorDiv(j, 48) * 48 * depth + 48 * r + Mod(j, 48)
    return load(name, at, torch.float32 if dtype.itemsize == 2 else dtype), (dtype, -(-columns // 48) * 48 * depth)


def linear(rows: object, columns: object, depth: object, right: str, sizes: str = "") -> Kernel:
    """x[rows, depth] @ w with w as [depth, columns], [columns, depth] or packed."""
    x = load("x", depth * i + r)
    w, size = load("w", {"rows": columns * r + j, "columns": depth * j + r}.get(right, 0)), (F32, depth * columns)  # type: ignore[operator]
    if right == "packed":
        w, size = packed("w", columns, depth)  # type: ignore[arg-type]
    inputs = {"x": (F32, rows * depth), "w": size}  # type: ignore[operator]
    return kernel({"i": rows, "j": columns}, {"r": depth}, inputs, {"out": (columns * i + j, dot(x, w), rows * columns)}, sizes)  # type: ignore[operator]


# ---- plain products: every layout of the right operand, tails on every side

SHAPES = [
    (64, 96, 32),
    (70, 50, 33),
    (1, 100, 65),
    (3, 17, 400),
    (130, 7, 19),
    (9, 1, 40),
    (1, 1, 1),
    (5, 49, 1),
    (40, 48, 1000),
    (17, 64, 0),
]
for _rows, _columns, _depth in SHAPES:
    for _right in ("rows", "columns", "packed"):
        _make = lambda a=(_rows, _columns, _depth, _right): linear(*a)  # noqa: E731
        _make.__name__ = f"linear_{_right}_{_rows}_{_columns}_{_depth}"
        case()(_make)


def panels_of(width: int, columns: int) -> Kernel:
    at = FloorDiv(j, width) * width * 40 + width * r + Mod(j, width)
    inputs = {"x": (F32, 30 * 40), "w": (F32, -(-columns // width) * width * 40)}
    return kernel(
        {"i": 30, "j": columns}, {"r": 40}, inputs, {"out": (columns * i + j, dot(load("x", 40 * i + r), load("w", at)), 30 * columns)}
    )


for _width, _columns in ((64, 100), (32, 90), (16, 20), (48, 95)):
    _make = lambda a=(_width, _columns): panels_of(*a)  # noqa: E731
    _make.__name__ = f"panels_of_{_width}"
    case()(_make)

for _right, _rows in (("rows", 2), ("columns", 3), ("columns", 20), ("packed", 10)):
    _make = lambda a=(_rows, 40, 6500, _right): linear(*a)  # noqa: E731
    _make.__name__ = f"deep_{_right}_{_rows}"
    case()(_make)

SIZES = [{"n": 1}, {"n": 0}, {"n": 7}, {"n": 8}, {"n": 75}, {"n": 200}]


@case(*SIZES)
def symbolic_rows() -> Kernel:
    return linear(n, 50, 40, "columns", "n")


@case(*SIZES)
def symbolic_rows_packed() -> Kernel:
    return linear(n, 50, 40, "packed", "n")


@case(*SIZES)
def symbolic_columns() -> Kernel:
    return linear(20, n, 40, "columns", "n")


@case(*SIZES)
def symbolic_depth() -> Kernel:
    return linear(20, 50, n, "rows", "n")


@case({"n": 12, "m": 77}, {"n": 100, "m": 0}, {"n": 0, "m": 3})
def symbolic_all() -> Kernel:
    return linear(n, m, m, "columns", "nm")


# ---- epilogues


@case()
def bias_gelu_residual() -> Kernel:
    w, size = packed("w", 100, 48)
    y = gelu(dot(load("x", 48 * i + r), w) + load("b", j)) + load("y", 100 * i + j)
    inputs = {"x": (F32, 70 * 48), "w": size, "b": (F32, 100), "y": (F32, 7000)}
    return kernel({"i": 70, "j": 100}, {"r": 48}, inputs, {"out": (100 * i + j, y, 7000)})


@case()
def residual_of_several_rounds_of_panels() -> Kernel:
    """Contiguous columns that are turned as many at a time as stay near: here in two rounds, the last panel has a tail."""
    y = dot(load("x", 801 * i + r), load("w", 801 * j + r)) + load("b", j) + load("y", 403 * i + j)
    inputs = {"x": (F32, 70 * 801), "w": (F32, 403 * 801), "b": (F32, 403), "y": (F32, 70 * 403)}
    return kernel({"i": 70, "j": 403}, {"r": 801}, inputs, {"out": (403 * i + j, y, 70 * 403)})


@case()
def residual_in_place() -> Kernel:
    y = dot(load("x", 48 * i + r), load("w", 48 * j + r)) + load("y", 100 * i + j)
    inputs = {"x": (F32, 70 * 48), "w": (F32, 4800), "y": (F32, 7000)}
    return kernel({"i": 70, "j": 100}, {"r": 48}, inputs, {"out": (100 * i + j, y, 7000)}, inplace=(("out", "y"),))


@case()
def several_stores() -> Kernel:
    d = dot(load("x", 48 * i + r), load("w", 48 * j + r))
    big = apply("gt", d, 0.5)
    outputs = {"out": (100 * i + j, d, 7000), "flag": (100 * i + j, big, 7000), "turned": (70 * j + i, where(big, d, 0.0), 7000),
               "thin": (100 * i + j, d, 7000, BF16), "at": (100 * i + j, Position(I64, 100 * i + j), 7000)}  # fmt: skip
    return kernel({"i": 70, "j": 100}, {"r": 48}, {"x": (F32, 70 * 48), "w": (F32, 4800)}, outputs)


@case()
def transposed_output() -> Kernel:
    d = dot(load("x", 48 * i + r), load("w", 48 * j + r)) + load("b", j)
    inputs = {"x": (F32, 70 * 48), "w": (F32, 4800), "b": (F32, 100)}
    return kernel({"i": 70, "j": 100}, {"r": 48}, inputs, {"out": (70 * j + i, d, 7000)})


@case()
def heads_epilogue() -> Kernel:
    """Rows (b, s) and columns (h, t): a projection that stores [b, h, s, t]."""
    w = load("w", 40 * (32 * h + t) + r)
    d = dot(load("x", 40 * (11 * b + s) + r), w) + load("bias", 32 * h + t)
    index = 32 * s + t + 32 * 11 * h + 32 * 11 * 3 * b
    inputs = {"x": (F32, 2 * 11 * 40), "w": (F32, 96 * 40), "bias": (F32, 96)}
    return kernel({"b": 2, "h": 3, "s": 11, "t": 32}, {"r": 40}, inputs, {"out": (index, d, 2 * 3 * 11 * 32)})


@case({"n": 5}, {"n": 40})
def odd_heads_symbolic() -> Kernel:
    d = dot(load("x", 40 * (n * b + s) + r), load("w", 40 * (20 * h + t) + r))
    index = 20 * s + t + 20 * n * h + 20 * n * 3 * b
    inputs = {"x": (F32, 2 * n * 40), "w": (F32, 60 * 40)}
    return kernel({"b": 2, "s": n, "h": 3, "t": 20}, {"r": 40}, inputs, {"out": (index, d, 2 * 3 * n * 20)}, "n")


# ---- prologues


@case(ranges={"ids": 30})
def gathered_rows() -> Kernel:
    x = load("table", 40 * symbol("row") + r, indirect=(("row", load("ids", i, I64)),))
    d = dot(x, load("w", 50 * r + j))
    return kernel({"i": 21, "j": 50}, {"r": 40}, {"ids": (I64, 21), "table": (F32, 1200), "w": (F32, 2000)}, {"out": (50 * i + j, d, 1050)})


@case()
def normalized_rows() -> Kernel:
    x = load("x", 64 * i + t)
    scale = apply("rsqrt", Reduce(F32, "sum", x * x, ("t",)) * (1 / 64) + 1e-5)
    d = dot(load("x", 64 * i + r) * scale * load("g", r), load("w", 64 * j + r))
    inputs = {"x": (F32, 20 * 64), "g": (F32, 64), "w": (F32, 64 * 50)}
    return kernel({"i": 20, "j": 50}, {"r": 64, "t": 64}, inputs, {"out": (50 * i + j, d, 1000)})


@case()
def causal_left() -> Kernel:
    x = where(Position(I64, r) <= Position(I64, i), load("x", 64 * i + r), 0.0)
    return kernel(
        {"i": 64, "j": 50}, {"r": 64}, {"x": (F32, 4096), "w": (F32, 3200)}, {"out": (50 * i + j, dot(x, load("w", 50 * r + j)), 3200)}
    )


def patches(index: sympy.Expr, extent: int, step: int = 1) -> tuple[Scalar, sympy.Expr, sympy.Expr]:
    """Is (step*i + s - 1, step*j + t - 1) inside the image; these positions."""
    y, x = step * symbol("oy") + s - 1, step * symbol("ox") + t - 1
    ok = (Position(I64, y) >= 0) & (Position(I64, y) < extent) & (Position(I64, x) >= 0) & (Position(I64, x) < extent)
    return ok, y, x


@case()
def convolution_channels_last() -> Kernel:
    """3x3, padded, weights [o, kh, kw, c]; out [b, y, x, o]."""
    ok, y, x = patches(r, 9)
    oy, ox, o = symbol("oy"), symbol("ox"), symbol("o")
    left = load("x", 16 * (81 * b + 9 * y + x) + r, mask=ok)
    d = dot(left, load("w", 144 * o + 48 * s + 16 * t + r), "s", "t", "r")
    inputs = {"x": (F32, 2 * 81 * 16), "w": (F32, 20 * 144)}
    out = (20 * (81 * b + 9 * oy + ox) + o, d, 2 * 81 * 20)
    return kernel({"b": 2, "oy": 9, "ox": 9, "o": 20}, {"s": 3, "t": 3, "r": 16}, inputs, {"out": out})


@case()
def convolution_channels_first() -> Kernel:
    """3x3, stride 2, padded, weights [o, c, kh, kw]; out [b, o, y, x]."""
    ok, y, x = patches(r, 14, 2)
    oy, ox, o = symbol("oy"), symbol("ox"), symbol("o")
    right = load("x", 196 * (5 * b + r) + 14 * y + x, mask=ok)
    d = dot(load("w", 45 * o + 9 * r + 3 * s + t), right, "r", "s", "t") + load("bias", o)
    inputs = {"x": (F32, 2 * 5 * 196), "w": (F32, 20 * 45), "bias": (F32, 20)}
    out = (49 * (20 * b + o) + 7 * oy + ox, apply("max", d, 0.0), 2 * 20 * 49)
    return kernel({"b": 2, "o": 20, "oy": 7, "ox": 7}, {"r": 5, "s": 3, "t": 3}, inputs, {"out": out})


@case()
def depthwise() -> Kernel:
    """Neither rows nor columns: an ordinary reduction."""
    d = dot(load("x", 32 * (i + s) + j), load("w", 32 * s + j), "s")
    return kernel({"i": 10, "j": 32}, {"s": 3}, {"x": (F32, 12 * 32), "w": (F32, 96)}, {"out": (32 * i + j, d, 320)})


# ---- batches and dtypes


@case()
def batched() -> Kernel:
    d = dot(load("x", 240 * b + 24 * i + r), load("y", 1200 * b + 24 * j + r)) * 0.125
    return kernel({"b": 6, "i": 10, "j": 50}, {"r": 24}, {"x": (F32, 1440), "y": (F32, 7200)}, {"out": (500 * b + 50 * i + j, d, 3000)})


@case({"n": 2}, {"n": 33})
def batched_twice_rows_contiguous() -> Kernel:
    d = dot(load("x", n * 20 * (3 * b + h) + n * i + r), load("y", 30 * (n * (3 * b + h) + r) + j))
    inputs = {"x": (F32, 2 * 3 * 20 * n), "y": (F32, 2 * 3 * 30 * n)}
    return kernel({"b": 2, "h": 3, "i": 20, "j": 30}, {"r": n}, inputs, {"out": (600 * (3 * b + h) + 30 * i + j, d, 3600)}, "n")


@case()
def one_batch_vector() -> Kernel:
    """A matrix times a vector for each batch: one column."""
    d = dot(load("x", 200 * b + 20 * i + r), load("y", 20 * b + r))
    return kernel({"b": 7, "i": 10}, {"r": 20}, {"x": (F32, 1400), "y": (F32, 140)}, {"out": (10 * b + i, d, 70)})


def _thin(dtype: torch.dtype, right: str) -> Kernel:
    w, size = packed("w", 50, 40, dtype) if right == "packed" else (load("w", 50 * r + j if right == "rows" else 40 * j + r), (dtype, 2000))
    y = dot(load("x", 40 * i + r), w) + load("b", j)
    return kernel({"i": 21, "j": 50}, {"r": 40}, {"x": (dtype, 840), "w": size, "b": (dtype, 50)}, {"out": (50 * i + j, y, 1050, dtype)})


for _dtype in (BF16, F16):
    for _right in ("rows", "columns", "packed"):
        _make = lambda d=_dtype, w=_right: _thin(d, w)  # noqa: E731
        _make.__name__ = f"thin_{str(_dtype).removeprefix('torch.')}_{_right}"
        case()(_make)


@case()
def doubles() -> Kernel:
    d = dot(load("x", 70 * i + r, F64), load("w", 70 * j + r, F64))
    return kernel({"i": 21, "j": 50}, {"r": 70}, {"x": (F64, 21 * 70), "w": (F64, 3500)}, {"out": (50 * i + j, d, 1050)})


@case()
def doubles_packed() -> Kernel:
    w, size = packed("w", 50, 70, F64)
    d = dot(load("x", 70 * i + r, F64), w)
    return kernel({"i": 21, "j": 50}, {"r": 70}, {"x": (F64, 21 * 70), "w": size}, {"out": (50 * i + j, d, 1050)})


@case()
def cast_left() -> Kernel:
    d = dot(cast(load("x", 40 * i + r, torch.int32), F32), load("w", 40 * j + r))
    return kernel({"i": 21, "j": 50}, {"r": 40}, {"x": (torch.int32, 840), "w": (F32, 2000)}, {"out": (50 * i + j, d, 1050)})


# ---- running them


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> dict[str, object]:
    return dict(zip(CASES, compile_kernels([c[0].kernel for c in CASES.values()], target_for(request.param))))


@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_what_the_reference_does(name: str, compiled: dict[str, object]) -> None:
    function = compiled[name]
    assert isinstance(function, Compiled), function.reason  # type: ignore[attr-defined]
    for number, case in enumerate(CASES[name]):
        inputs = inputs_of(case, number)
        expected = reference.run(case.kernel, inputs, case.sizes)
        actual = launch(function, case, inputs)
        for buffer, a, e in zip(case.kernel.outputs, actual, expected):
            tolerance = {BF16: 1e-2, F16: 1e-3, F64: 1e-12}.get(buffer.dtype, 2e-4 if name.startswith("deep") else 2e-5)
            note = f"{buffer.name} at sizes {case.sizes}\n{function.source}"
            torch.testing.assert_close(a, e, rtol=tolerance, atol=4 * tolerance, msg=lambda m, note=note: f"{m}\n{note}")
        for threads in (1, 3, 8):
            assert all(torch.equal(x, y) for x, y in zip(actual, launch(function, case, inputs, threads))), f"{threads} threads differ"


@pytest.mark.parametrize("right", ["rows", "columns", "packed"])
def test_large_products_are_as_exact_as_the_library(right: str) -> None:
    """Beyond what is packed at once, and beyond one block of rows and of depth."""
    rows, columns, depth = 150, 700, 800
    case = Case(replace(linear(rows, columns, depth, right), name=f"k_large_{right}"), {}, {})
    (function,) = compile_kernels([case.kernel])
    assert isinstance(function, Compiled), function.reason
    x, w = inputs_of(case, 0)
    matrix = {"rows": lambda: w.view(depth, columns), "columns": lambda: w.view(columns, depth).t(),
              "packed": lambda: w.view(-1, depth, 48).transpose(1, 2).reshape(-1, depth)[:columns].t()}[right]()  # fmt: skip
    exact = x.view(rows, depth).double() @ matrix.double()
    theirs = (x.view(rows, depth) @ matrix).double() - exact
    for threads in (1, 2, 5):
        (out,) = launch(function, case, [x, w], threads)
        ours = out.view(rows, columns).double() - exact
        assert ours.abs().max() <= 2 * theirs.abs().max()
        assert ours.square().mean() <= 4 * theirs.square().mean()


def test_a_position_out_of_range_is_reported() -> None:
    at = inside(load("ids", i, I64), Const(I64, 30), 1)
    d = dot(load("table", 40 * symbol("row") + r, indirect=(("row", at),)), load("w", 50 * r + j))
    inputs = {"ids": (I64, 21), "table": (F32, 1200), "w": (F32, 2000)}
    gather = kernel({"i": 21, "j": 50}, {"r": 40}, inputs, {"out": (50 * i + j, d, 1050)}, faults=("embedding",))
    (function,) = compile_kernels([gather])
    assert isinstance(function, Compiled), function.reason
    ids, table, w, out = torch.full((21,), 29), torch.ones(1200), torch.ones(2000), torch.zeros(1050)
    addresses = [v.data_ptr() for v in (ids, table, w, out)]
    assert function.launch(*addresses, 2) == 0
    assert (out == 40).all()
    ids[20] = 30
    assert function.launch(*addresses, 2) == 1


@pytest.mark.parametrize("make", [lambda: integers(), lambda: two_products(), lambda: over_operand()])
def test_other_contractions_are_refused_with_a_reason(make: Callable[[], Kernel]) -> None:
    (function,) = compile_kernels([make()])
    assert isinstance(function, Failed)
    assert len(function.reason.split()) > 3


def integers() -> Kernel:
    d = dot(load("x", 8 * i + r, I64), load("w", 8 * j + r, I64))
    return kernel({"i": 4, "j": 5}, {"r": 8}, {"x": (I64, 32), "w": (I64, 40)}, {"out": (5 * i + j, d, 20)})


def two_products() -> Kernel:
    d = dot(load("x", 8 * i + r), load("w", 8 * j + r)) * dot(load("x", 8 * i + t), load("y", 8 * j + t), "t")
    return kernel({"i": 4, "j": 5}, {"r": 8, "t": 8}, {"x": (F32, 32), "w": (F32, 40), "y": (F32, 40)}, {"out": (5 * i + j, d, 20)})


def over_operand() -> Kernel:
    d = dot(load("x", 5 * i + r), load("w", 5 * j + r))
    return kernel({"i": 4, "j": 5}, {"r": 5}, {"x": (F32, 20), "w": (F32, 25)}, {"out": (5 * i + j, d, 20)}, inplace=(("out", "x"),))
