"""Hand-written kernels through the C++ printer, against the slow reference evaluator; all are compiled in one build."""

from __future__ import annotations

import pytest
import torch
from handmade import TARGETS, Cases, inputs_of, kernel, launch, load, target_for
from support import NATIVE
from tilewright.codegen import reference
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.kernel import Kernel, Position, Reduce, Scan
from tilewright.codegen.target import Compiled
from tilewright.ir.dims import FloorDiv, Mod, symbol
from tilewright.ir.scalar import Apply, Const, Scalar, apply, cast, where

pytestmark = NATIVE

F32, F64, I64, I32, BOOL = torch.float32, torch.float64, torch.int64, torch.int32, torch.bool
i, j, r, s, n, m = (symbol(name) for name in "ijrsnm")

CASES = Cases()
case = CASES.case


def total(op: str, value: Scalar, *axes: str) -> Reduce:
    return Reduce(I64 if op.startswith("arg") else value.dtype, op, value, axes)


def softmax_of(x: Scalar) -> Scalar:
    e = apply("exp", x - total("max", x, "r"))
    return e / total("sum", e, "r")


# ---- pointwise


@case()
def bias_gelu() -> Kernel:
    x = load("x", 37 * i + j) + load("b", j)
    y = x * 0.5 * (apply("erf", x * 0.7071067811865476) + 1.0)
    return kernel({"i": 3, "j": 37}, {}, {"x": (F32, 111), "b": (F32, 37)}, {"out": (37 * i + j, y, 111)})


@case()
def transposed() -> Kernel:
    return kernel({"i": 19, "j": 21}, {}, {"x": (F32, 399)}, {"out": (21 * i + j, load("x", 19 * j + i) * 2.0, 399)})


@case()
def strided_store() -> Kernel:
    return kernel({"i": 50, "j": 3}, {}, {"x": (F32, 150)}, {"out": (50 * j + i, apply("abs", load("x", 3 * i + j)), 150)})


@case({"n": 0}, {"n": 1}, {"n": 15}, {"n": 16}, {"n": 9001})
def symbolic_pointwise() -> Kernel:
    x = load("x", i)
    return kernel({"i": n}, {}, {"x": (F32, n)}, {"out": (i, apply("tanh", x) + x, n), "pos": (i, Position(I64, i * 2 + 1), n)}, "n")


@case({"n": 0, "m": 4}, {"n": 4, "m": 0}, {"n": 5, "m": 3})
def symbolic_grid() -> Kernel:
    value = load("x", m * i + j) * load("y", j, mask=Position(I64, j) < 2, other=1.0)
    outputs = {"out": (6 * m * i + 6 * j + r, value + load("z", r), 6 * n * m)}
    return kernel(
        {"i": n, "j": m}, {"r": 6}, {"x": (F32, n * m), "y": (F32, m), "z": (F32, 6)}, outputs, "nm", label="a label\\\nof two lines"
    )


@case()
def scalar_point() -> Kernel:
    return kernel({}, {}, {"x": (F32, 1)}, {"out": (0, apply("exp", load("x", 0)), 1)})


@case()
def constant_fill() -> Kernel:
    values = {"a": Const(F32, float("-inf")), "b": Const(BOOL, True), "c": Const(F64, 0.1)}
    return kernel({"i": 33}, {}, {}, {k: (i, v, 33) for k, v in values.items()})


@case()
def rotate_half() -> Kernel:
    low, high = Position(I64, r) < 32, Position(I64, r) >= 32
    x = load("x", 64 * i + r)
    turned = where(low, -load("x", 64 * i + r + 32, mask=low), load("x", 64 * i + r - 32, mask=high))
    y = x * load("cos", r) + turned * load("sin", r)
    buffers = {"x": (F32, 640), "cos": (F32, 64), "sin": (F32, 64)}
    return kernel({"i": 10, "r": 64}, {}, buffers, {"out": (64 * i + r, y, 640)})


@case()
def cat_uneven() -> Kernel:
    first = Position(I64, j) < 5
    value = where(first, load("x", 5 * i + j, mask=first), load("y", 18 * i + j - 5, mask=~first, other=7.0))
    return kernel({"i": 4, "j": 23}, {}, {"x": (F32, 20), "y": (F32, 72)}, {"out": (23 * i + j, value, 92)})


@case()
def pad_reflect_free() -> Kernel:
    inside = (Position(I64, j - 2) >= 0) & (Position(I64, j - 2) < 30) & (Position(I64, i) < 3)
    value = load("x", 30 * i + j - 2, mask=inside, other=-1.5)
    bools = load("b", 30 * i + j - 2, BOOL, mask=inside, other=True)
    outputs = {"out": (35 * i + j, value, 140), "flag": (35 * i + j, bools, 140)}
    return kernel({"i": 4, "j": 35}, {}, {"x": (F32, 90), "b": (BOOL, 90)}, outputs)


@case()
def heads_split() -> Kernel:
    value = load("x", 64 * FloorDiv(j, 32) + Mod(j, 32) + 128 * i) + load("x", 128 * i + Mod(j + 32, 64))
    return kernel({"i": 3, "j": 64}, {}, {"x": (F32, 384)}, {"out": (64 * i + j, value, 192)})


@case()
def odd_reshape() -> Kernel:
    return kernel({"i": 70}, {}, {"x": (F32, 70)}, {"out": (i, load("x", 10 * Mod(i, 7) + FloorDiv(i, 7)), 70)})


@case(ranges={"ids": 11})
def embedding() -> Kernel:
    value = load("table", 40 * symbol("row") + j, indirect=(("row", load("ids", i, I64)),))
    return kernel({"i": 6, "j": 40}, {}, {"ids": (I64, 6), "table": (F32, 440)}, {"out": (40 * i + j, value, 240)})


@case(ranges={"at": 100})
def gather_elements() -> Kernel:
    at = load("at", i, I32)
    value = load("x", symbol("k"), indirect=(("k", at),))
    guarded = load("x", symbol("k") + 90, indirect=(("k", at),), mask=at < 10)
    return kernel({"i": 45}, {}, {"x": (F32, 100), "at": (I32, 45)}, {"out": (i, value, 45), "some": (i, guarded, 45)})


@case()
def causal_mask() -> Kernel:
    score = where(Position(I64, r) <= Position(I64, i + 3), load("x", 40 * i + r), float("-inf"))
    return kernel({"i": 20}, {"r": 40}, {"x": (F32, 800)}, {"out": (40 * i + r, softmax_of(score), 800)})


@case()
def half_types() -> Kernel:
    y = load("x", i) * load("h", i)
    outputs = {"out": (i, y, 77, torch.bfloat16), "thin": (i, y, 77, torch.float16), "wide": (i, y, 77)}
    return kernel({"i": 77}, {}, {"x": (torch.bfloat16, 77), "h": (torch.float16, 77)}, outputs)


def _integer_case(dtype: torch.dtype) -> Kernel:
    a, b = load("a", i, dtype), load("b", i, dtype)
    value = a * b + a - (b ^ apply("shr", a, 1))
    outputs = {"out": (i, value, 83), "less": (i, apply("lt", a, b), 83), "largest": (i, apply("max", a, b), 83)}
    outputs["real"] = (i, cast(value, F32), 83)
    outputs["quotient"] = (i, apply("floordiv", a, 7) + apply("mod", a, 7) * apply("truncdiv", a, 5) + apply("fmod", a, 5), 83)
    return kernel({"i": 83}, {}, {"a": (dtype, 83), "b": (dtype, 83)}, outputs)


for _dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
    _make = lambda dtype=_dtype: _integer_case(dtype)  # noqa: E731
    _make.__name__ = f"integers_{str(_dtype).removeprefix('torch.')}"
    case()(_make)


@case()
def bool_logic() -> Kernel:
    a, b, x = load("a", i, BOOL), load("b", i, BOOL), load("x", i)
    values = {
        "o1": (a & b) | ~a, "o2": a ^ b, "o3": apply("eq", a, b), "o4": apply("lt", a, b), "o5": cast(a, F32) + x, "o6": cast(x, BOOL),
        "o7": where(a & (x > 0.0), x, -x), "o8": apply("isnan", x), "o9": cast(a, I64) + cast(b, I64), "o10": apply("ge", a, b),
    }  # fmt: skip
    return kernel({"i": 51}, {}, {"a": (BOOL, 51), "b": (BOOL, 51), "x": (F32, 51)}, {k: (i, v, 51) for k, v in values.items()})


@case()
def bools_of_rows_and_columns() -> Kernel:
    row, column = load("row", i, BOOL), load("column", j, BOOL)
    values = [row ^ column, row & column, column | row, apply("eq", row, column), apply("lt", column, row), apply("ne", row, column)]
    values += [~(row ^ column) & (Position(I64, j) < 20)]
    outputs = {f"o{k}": (40 * i + j, v, 160) for k, v in enumerate(values)}
    return kernel({"i": 4, "j": 40}, {}, {"row": (BOOL, 4), "column": (BOOL, 40)}, outputs)


@case()
def doubles() -> Kernel:
    x = load("x", i, F64)
    y = apply("exp", x) / (apply("abs", x) + 1.0)
    return kernel({"i": 41}, {}, {"x": (F64, 41)}, {"out": (i, y, 41), "f": (i, cast(x, F32), 41)})


@case()
def rounding() -> Kernel:
    x = load("x", i) * 3.0
    outputs = {op: (i, apply(op, x), 60) for op in ("floor", "ceil", "trunc", "round", "neg", "signbit")}
    outputs |= {"mod_": (i, apply("mod", x, 1.25), 60), "fmod_": (i, apply("fmod", x, -1.25), 60), "int_": (i, cast(x, I32), 60)}
    return kernel({"i": 60}, {}, {"x": (F32, 60)}, outputs)


# ---- reductions


@case({"n": 0, "m": 3}, {"n": 5, "m": 0}, {"n": 3, "m": 1}, {"n": 2, "m": 7}, {"n": 4, "m": 100}, {"n": 1, "m": 5000}, {"n": 300, "m": 33})
def symbolic_softmax() -> Kernel:
    return kernel({"i": n}, {"r": m}, {"x": (F32, n * m)}, {"out": (m * i + r, softmax_of(load("x", m * i + r)), n * m)}, "nm")


@case()
def layernorm() -> Kernel:
    x = load("x", 100 * i + r)
    d = x - total("sum", x, "r") * 0.01
    y = d * apply("rsqrt", total("sum", d * d, "r") * 0.01 + 1e-5) * load("g", r)
    return kernel({"i": 9}, {"r": 100}, {"x": (F32, 900), "g": (F32, 100)}, {"out": (100 * i + r, y, 900)})


@case()
def inplace_softmax() -> Kernel:
    x = load("x", 48 * i + r)
    again = load("x", 48 * i + r)
    outputs = {"out": (48 * i + r, softmax_of(x), 480), "twice": (48 * i + r, again * 2.0, 480)}
    return kernel({"i": 10}, {"r": 48}, {"x": (F32, 480)}, outputs, inplace=(("out", "x"),))


@case()
def inplace_early_store() -> Kernel:
    x = load("x", 48 * i + r)
    outputs = {"out": (48 * i + r, x + 1.0, 480), "c": (48 * i + r, x - total("max", x, "r"), 480)}
    return kernel({"i": 10}, {"r": 48}, {"x": (F32, 480)}, outputs, inplace=(("out", "x"),))


@case()
def column_sum() -> Kernel:
    return kernel({"i": 70}, {"r": 300}, {"x": (F32, 21000)}, {"out": (i, total("sum", load("x", 70 * r + i), "r"), 70)})


@case({"n": 3, "m": 0}, {"n": 391, "m": 300})
def symbolic_column_sum() -> Kernel:
    return kernel({"i": n}, {"r": m}, {"x": (F32, n * m)}, {"out": (i, total("sum", load("x", n * r + i), "r"), n)}, "nm")


@case({"n": 9, "m": 21}, {"n": 200, "m": 200})
def column_softmax() -> Kernel:
    value = softmax_of(load("x", n * r + i))
    return kernel({"i": n}, {"r": m}, {"x": (F32, n * m)}, {"out": (n * r + i, value, n * m)}, "nm")


@case()
def group_norm() -> Kernel:
    x = load("x", 5 * 90 * i + 90 * r + s)
    d = x - total("sum", x, "r", "s") * (1 / 450)
    y = d * apply("rsqrt", total("sum", d * d, "r", "s") * (1 / 450) + 1e-5) * load("g", r) + load("b", r)
    buffers = {"x": (F32, 1800), "g": (F32, 5), "b": (F32, 5)}
    return kernel({"i": 4}, {"r": 5, "s": 90}, buffers, {"out": (5 * 90 * i + 90 * r + s, y, 1800)})


@case()
def nested_reduce() -> Kernel:
    x = load("x", 6 * 50 * i + 50 * r + s)
    norm = x / apply("sqrt", total("sum", x * x, "s"))
    peak = total("max", norm, "s")
    outputs = {"out": (i, total("sum", peak, "r"), 7), "each_row": (6 * i + r, peak, 42), "all_": (300 * i + 50 * r + s, norm - peak, 2100)}
    return kernel({"i": 7}, {"r": 6, "s": 50}, {"x": (F32, 2100)}, outputs)


@case({"n": 3}, {"n": 100000})
def full_reduce() -> Kernel:
    x = load("x", r)
    outputs = {"sum_": (0, total("sum", x, "r"), 1), "max_": (0, total("max", x, "r"), 1), "at": (0, total("argmin", x, "r"), 1)}
    return kernel({}, {"r": n}, {"x": (F32, n)}, outputs, "n")


@case()
def two_long_rows() -> Kernel:
    x = load("x", 40960 * i + 512 * r + s)
    outputs = {
        "out": (40960 * i + 512 * r + s, x - total("sum", x, "r", "s") * (1 / 40960), 81920),
        "at": (i, total("argmax", x, "r", "s"), 2),
    }
    return kernel({"i": 2}, {"r": 80, "s": 512}, {"x": (F32, 81920)}, outputs)


@case()
def full_softmax() -> Kernel:
    return kernel({}, {"r": 50000}, {"x": (F32, 50000)}, {"out": (r, softmax_of(load("x", r)), 50000)})


@case(ranges={"k": 3})
def kinds_of_reductions() -> Kernel:
    x, k = load("x", 45 * i + r), load("k", 45 * i + r, I64)
    small = cast(k, I32)
    outputs = {f"{op}_{name}": (i, total(op, v, "r"), 8) for op in ("sum", "prod", "max", "min", "argmax", "argmin")
               for name, v in (("x", x), ("k", k), ("small", small))}  # fmt: skip
    outputs |= {"any_": (i, total("any", x > 2.5, "r"), 8), "all_": (i, total("all", x < 2.5, "r"), 8)}
    outputs["const_"] = (i, total("sum", Const(F32, 2.0), "r"), 8)
    return kernel({"i": 8}, {"r": 45}, {"x": (F32, 360), "k": (I64, 360)}, outputs)


@case(ranges={"k": 3})
def kinds_of_column_reductions() -> Kernel:
    x, k = load("x", 40 * r + i), load("k", 40 * r + i, I64)
    outputs = {f"{op}_{name}": (i, total(op, v, "r"), 40) for op in ("sum", "prod", "max", "min", "argmax", "argmin")
               for name, v in (("x", x), ("k", k))}  # fmt: skip
    outputs |= {"any_": (i, total("any", x > 1.5, "r"), 40), "all_": (i, total("all", x < 1.5, "r"), 40)}
    outputs["rows"] = (i, total("sum", load("x", r), "r"), 40)
    return kernel({"i": 40}, {"r": 9}, {"x": (F32, 360), "k": (I64, 360)}, outputs)


@case()
def smallest_and_elements() -> Kernel:
    """Not a window: its elements are stored too."""
    x = load("x", 34 * i + j + 17 * r)
    outputs = {"out": (17 * i + j, total("min", x, "r"), 289), "less": (34 * i + j + 17 * r, 1.0 - x, 578)}
    return kernel({"i": 17, "j": 17}, {"r": 2}, {"x": (F32, 578)}, outputs)


@case()
def argmax_two_axes() -> Kernel:
    x = load("x", 60 * i + 20 * r + s)
    return kernel({"i": 5}, {"r": 3, "s": 20}, {"x": (F32, 300)}, {"out": (i, total("argmax", x, "r", "s"), 5)})


@case()
def nan_extrema() -> Kernel:
    x = load("x", 32 * i + r)
    bad = where(apply("eq", Position(I64, r), Position(I64, i * 5)), float("nan"), x)
    outputs = {op: (i, total(op, bad, "r"), 6) for op in ("max", "min", "argmax", "argmin", "sum")}
    return kernel({"i": 6}, {"r": 32}, {"x": (F32, 192)}, outputs)


@case()
def row_scans() -> Kernel:
    x = load("x", 30 * i + r)
    outputs = {"sums": (30 * i + r, Scan(F32, "cumsum", x, "r"), 120), "prods": (30 * i + r, Scan(F32, "cumprod", x * 0.9, "r"), 120)}
    outputs["shares"] = (30 * i + r, Scan(F32, "cumsum", x, "r") / total("max", x, "r"), 120)
    return kernel({"i": 4}, {"r": 30}, {"x": (F32, 120)}, outputs)


@case(ranges={"k": 9})
def column_scans() -> Kernel:
    outputs = {"out": (50 * r + i, Scan(F32, "cumsum", load("x", 50 * r + i), "r"), 400)}
    outputs["whole"] = (50 * r + i, Scan(I64, "cumsum", load("k", 50 * r + i, I64), "r"), 400)
    return kernel({"i": 50}, {"r": 8}, {"x": (F32, 400), "k": (I64, 400)}, outputs)


@case()
def mixed_ranks() -> Kernel:
    x = load("x", 36 * i + r)
    t = total("sum", x, "r")
    outputs = {"row": (i, t, 12), "scaled": (36 * i + r, x / t, 432), "only_r": (0, Const(F32, 3.0), 1)}
    return kernel({"i": 12}, {"r": 36}, {"x": (F32, 432)}, {k: v for k, v in outputs.items() if k != "only_r"})


# ---- every operation on every dtype

FLOAT_OPS = [
    "add", "sub", "mul", "div", "mod", "fmod", "neg", "abs", "min", "max", "fmin", "fmax", "floor", "ceil", "trunc", "round", "sqrt",
    "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh",
    "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "pow", "fma", "copysign", "hypot", "nextafter", "eq", "ne",
    "lt", "le", "gt", "ge", "isnan", "isinf", "signbit", "where", "cast", "bitcast",
]  # fmt: skip
INTEGER_OPS = [
    "add", "sub", "mul", "floordiv", "truncdiv", "mod", "fmod", "neg", "abs", "min", "max", "ipow", "eq", "ne", "lt", "le", "gt", "ge",
    "and", "or", "xor", "not", "shl", "shr", "where", "cast", "bitcast",
]  # fmt: skip
BOOL_OPS = [
    "and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge", "where", "cast",
]  # fmt: skip
OF_ONE = [
    "neg", "abs", "floor", "ceil", "trunc", "round", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin",
    "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "isnan", "isinf",
    "signbit", "not",
]  # fmt: skip
ARITY = {"fma": 3} | dict.fromkeys(OF_ONE, 1)
COUNT = 45


def _operation(op: str, dtype: torch.dtype, scalar: bool) -> list[Scalar]:
    """The operation on loads; `scalar`: one operand is the same in all lanes."""
    a, b, c = load("a", i, dtype), load("b", 0 if scalar else i, dtype), load("c", i, dtype)
    if op == "where":
        return [where(apply("eq", a, b), b, c)]
    if op == "cast":
        return [Apply(t, "cast", (a,)) for t in (F32, F64, I64, I32, torch.int8, torch.uint8, BOOL) if t != dtype]
    if op == "bitcast":
        same = {1: torch.uint8, 2: torch.int16, 4: I32, 8: I64}[dtype.itemsize]
        return [Apply(same, "bitcast", (a,))]
    if op == "ipow":
        return [apply(op, a, 3)]
    if op in ("shl", "shr"):
        return [apply(op, a, n) for n in (3, 64, b)] + ([apply(op, a, -1)] if dtype.is_signed else [])
    if op in ("floordiv", "truncdiv") or op in ("mod", "fmod") and not dtype.is_floating_point:
        return [apply(op, a, 5), apply(op, a, -3)] if dtype.is_signed else [apply(op, a, 5)]
    return [apply(op, *(a, b, c)[: ARITY.get(op, 2)])]


def _operations(dtype: torch.dtype, ops: list[str], scalar: bool) -> Kernel:
    values = [v for op in ops for v in _operation(op, dtype, scalar)]
    outputs = {f"o{k}": (i, v, COUNT) for k, v in enumerate(values)}
    return kernel({"i": COUNT}, {}, {name: (dtype, COUNT) for name in "abc"}, outputs)


OPERATIONS = {F32: FLOAT_OPS, F64: FLOAT_OPS, BOOL: BOOL_OPS}
OPERATIONS |= dict.fromkeys((I64, I32, torch.int16, torch.int8, torch.uint8), INTEGER_OPS)
for _dtype, _ops in OPERATIONS.items():
    for _scalar in (False, True):
        _make = lambda d=_dtype, o=_ops, s=_scalar: _operations(d, o, s)  # noqa: E731
        _make.__name__ = f"operations_{str(_dtype).removeprefix('torch.')}{'_scalar' if _scalar else ''}"
        case()(_make)


# ---- running them


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> dict[str, object]:
    names = [n for n in CASES if request.param == "native" or not n.startswith("operations")]  # one level shows what compiles
    return dict(zip(names, compile_kernels([CASES[n][0].kernel for n in names], target_for(request.param))))


@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_what_the_reference_does(name: str, compiled: dict[str, object]) -> None:
    if name not in compiled:
        pytest.skip("compiled for the native level only")
    function = compiled[name]
    assert isinstance(function, Compiled), function.reason  # type: ignore[attr-defined]
    for number, case in enumerate(CASES[name]):
        inputs = inputs_of(case, number)
        expected = reference.run(case.kernel, inputs, case.sizes)
        actual = launch(function, case, inputs)
        for buffer, a, e in zip(case.kernel.outputs, actual, expected):
            tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3, F64: 1e-12}.get(buffer.dtype, 2e-5)
            note = f"{buffer.name} at sizes {case.sizes}\n{function.source}"
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, note=note: f"{m}\n{note}")
