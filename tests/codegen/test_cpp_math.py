"""The math of vec.h against float64 references, over sweeps with special values; the error is measured in ulp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from support import NATIVE
from tilewright.codegen.build import BuildError, Source, build
from tilewright.codegen.cpp.schedule import detect_target

pytestmark = NATIVE
np.seterr(all="ignore")


def by_torch(function: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    return lambda *a: function(*(torch.from_numpy(np.ascontiguousarray(v)) for v in a)).numpy()


# name -> reference in float64, largest error allowed in ulp of float32
UNARY: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "exp": (by_torch(torch.exp), 1.5), "exp2": (by_torch(torch.exp2), 1.5), "expm1": (by_torch(torch.expm1), 2),
    "log": (by_torch(torch.log), 1), "log2": (by_torch(torch.log2), 2), "log10": (by_torch(torch.log10), 2),
    "log1p": (by_torch(torch.log1p), 2), "tanh": (by_torch(torch.tanh), 2), "erf": (by_torch(torch.erf), 2),
    "erfc": (by_torch(torch.erfc), 1), "sin": (np.sin, 1), "cos": (np.cos, 1), "tan": (np.tan, 1), "asin": (np.arcsin, 1),
    "acos": (np.arccos, 1), "atan": (np.arctan, 1), "sinh": (np.sinh, 1), "cosh": (np.cosh, 1), "asinh": (np.arcsinh, 1),
    "acosh": (np.arccosh, 1), "atanh": (np.arctanh, 1), "lgamma": (by_torch(torch.lgamma), 1), "sqrt": (np.sqrt, 0.5),
    "rsqrt": (lambda a: 1 / np.sqrt(a), 1.5), "floor": (np.floor, 0), "ceil": (np.ceil, 0), "trunc": (np.trunc, 0), "round": (np.rint, 0),
    "abs": (np.abs, 0),
}  # fmt: skip
BINARY: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], float]] = {
    "pow": (np.power, 1), "atan2": (np.arctan2, 1), "hypot": (np.hypot, 1), "copysign": (np.copysign, 0), "max": (np.maximum, 0),
    "min": (np.minimum, 0), "fmax": (np.fmax, 0), "fmin": (np.fmin, 0), "fmod": (np.fmod, 0),
}  # fmt: skip
BY_F32: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"nextafter": np.nextafter, "mod": np.mod}
CONVERSIONS = {"bf16": torch.bfloat16, "half": torch.float16}
PREDICATES = {"isnan": np.isnan, "isinf": np.isinf, "signbit": np.signbit}


def _function(name: str, kind: str, lanes: int, body: str, parameters: int = 1, out: str = "") -> Source:
    inputs = ", ".join(f"const {kind}* {p}" for p in "xz"[:parameters])
    text = f"""void {name}({inputs}, {out or kind}* y, int64_t n) {{
  each<{lanes}, 4, 1>(0, n, [&]<int L>(int64_t i) LANES {{ store<L>(y + i, {body}); }});
}}
"""
    return Source(name, text, (ctypes.c_void_p,) * (parameters + 1) + (ctypes.c_int64,))


def _sources(lanes: int) -> list[Source]:
    x, z = "load<L>(x + i)", "load<L>(z + i)"
    sources = []
    for kind, tag, width in (("float", "f32", lanes), ("double", "f64", lanes // 2)):
        sources += [_function(f"{op}_{tag}", kind, width, f"{op}({x})") for op in UNARY]
        sources += [_function(f"{op}_{tag}", kind, width, f"{op}({x}, {z})", 2) for op in (*BINARY, *BY_F32)]
    sources += [_function(f"{op}_f32", "float", lanes, f"{op}({x})", 1, "bool") for op in PREDICATES]
    sources += [_function("sigmoid", "float", lanes, f"inverse(1.0f + exp(-{x}))")]
    sources += [_function(f"to_{t}", "float", lanes, x, 1, t) for t in CONVERSIONS]
    sources += [_function(f"from_{t}", t, lanes, x, 1, "float") for t in CONVERSIONS]
    return sources


@pytest.fixture(scope="module", params=["native", "x86-64-v3", "x86-64-v2"])
def functions(request: pytest.FixtureRequest) -> dict[str, Callable[..., None]]:
    lanes = {"x86-64-v3": 8, "x86-64-v2": 4}.get(request.param, detect_target().vector_bytes // 4)
    if request.param != "native" and detect_target().vector_bytes < 64:
        pytest.skip("native is no wider")
    if request.param == "x86-64-v2":
        lanes = 8  # two registers a vector: slow, but it must be right
    sources = _sources(lanes)
    built = build(sources, request.param)
    assert not [f for f in built if isinstance(f, BuildError)]
    return {s.name: f for s, f in zip(sources, built)}  # type: ignore[misc]


def call(function: Callable[..., None], *inputs: np.ndarray, out: np.dtype | type | None = None) -> np.ndarray:
    arrays = [np.ascontiguousarray(a) for a in inputs]
    y = np.empty(arrays[0].shape, out or arrays[0].dtype)
    function(*(a.ctypes.data for a in (*arrays, y)), len(y))
    return y


def sweep() -> np.ndarray:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 40000, dtype=np.uint32).view(np.float32)
    ranges = [rng.uniform(-a, a, 15000) for a in (1e-3, 1.2, 4, 12, 110, 1e5)] + [rng.uniform(0.5, 2, 15000)]
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 1e-45, -1e-45, 1e-39, 2**-126, 3.4e38, -3.4e38, 0.5, -0.5, 1.5, 2.5, 88.72284,
               88.7229, -87.34, -103.97, -104.5, 127.99999, 128, -149, -150, 2**20, 2**22, 2**23, 2**24, -(2**31)]  # fmt: skip
    x = np.concatenate([bits[~np.isnan(bits)], *ranges, np.array(special)]).astype(np.float32)
    return rng.permutation(x)


def ulp_errors(actual: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|actual - reference| in units of float32's spacing at the reference; inf where one is not finite and they differ."""
    rounded = reference.astype(np.float32)
    spacing = np.spacing(np.abs(rounded)).astype(np.float64)
    error = np.abs(actual.astype(np.float64) - reference) / spacing
    both = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    return np.where(both, np.nan_to_num(error, nan=0, posinf=0), np.nan_to_num(error, nan=np.inf))


@pytest.mark.parametrize("op", UNARY)
def test_float_functions(functions: dict[str, Callable[..., None]], op: str) -> None:
    reference, limit = UNARY[op]
    x = sweep()
    y, expected = call(functions[f"{op}_f32"], x), reference(x.astype(np.float64))
    errors = ulp_errors(y, expected)
    worst = errors.argmax()
    assert errors[worst] <= max(limit, 0.5001), f"{op}({x[worst]!r}) = {y[worst]!r}, not {expected[worst]!r}: {errors[worst]} ulp"
    zeros = (y == 0) & (expected == 0)
    assert (np.signbit(y) == np.signbit(expected))[zeros].all(), "the sign of zero"


def test_sigmoid(functions: dict[str, Callable[..., None]]) -> None:
    """1 / (1 + e^-x), by a division or without; what is less than the least normal number may be 0."""
    x = sweep()
    y, expected = call(functions["sigmoid"], x), by_torch(torch.sigmoid)(x.astype(np.float64))
    normal = np.isnan(x) | (expected > 2.0**-124)
    assert ulp_errors(y, expected)[normal].max() <= 2 and (np.abs(y - expected)[~normal] <= 2.0**-124).all()


@pytest.mark.parametrize("op", BINARY)
def test_float_functions_of_two(functions: dict[str, Callable[..., None]], op: str) -> None:
    reference, limit = BINARY[op]
    x = sweep()
    rng = np.random.default_rng(1)
    z = np.where(rng.random(len(x)) < 0.5, rng.integers(-6, 7, len(x)), rng.permutation(x)).astype(np.float32)
    y, expected = call(functions[f"{op}_f32"], x, z), reference(x.astype(np.float64), z.astype(np.float64))
    errors = ulp_errors(y, expected)
    worst = errors.argmax()
    assert errors[worst] <= max(limit, 0.5001), f"{op}({x[worst]!r}, {z[worst]!r}) = {y[worst]!r}, not {expected[worst]!r}"


@pytest.mark.parametrize("op", BY_F32)
def test_functions_exact_in_float(functions: dict[str, Callable[..., None]], op: str) -> None:
    x = sweep()
    z = np.random.default_rng(2).permutation(x)
    np.testing.assert_array_equal(call(functions[f"{op}_f32"], x, z), BY_F32[op](x, z))


@pytest.mark.parametrize("op", PREDICATES)
def test_predicates(functions: dict[str, Callable[..., None]], op: str) -> None:
    x = sweep()
    np.testing.assert_array_equal(call(functions[f"{op}_f32"], x, out=np.bool_), PREDICATES[op](x))


@pytest.mark.parametrize("op", [*UNARY, *BINARY])
def test_double_functions(functions: dict[str, Callable[..., None]], op: str) -> None:
    x = sweep().astype(np.float64)[:20000]
    inputs = (x,) if op in UNARY else (x, np.random.default_rng(3).permutation(x))
    reference = (UNARY.get(op) or BINARY[op])[0]
    y, expected = call(functions[f"{op}_f64"], *inputs), reference(*inputs)
    np.testing.assert_allclose(y, expected, rtol=2e-15 if op != "lgamma" else 1e-13, atol=5e-324, equal_nan=True)


@pytest.mark.parametrize("op", ["sin", "cos", "tan", "exp", "log1p", "erf"])
def test_against_many_digits(functions: dict[str, Callable[..., None]], op: str) -> None:
    x = np.array([1e-30, 0.1, 3.14159274, 355, 1e4, 123456.7, 1e6, 1e22, 3e38, 80.0, -0.9999999], np.float32)
    x = x[np.abs(x) < 88] if op == "exp" else x
    with mpmath.workdps(80):
        expected = np.array([float(getattr(mpmath, op)(mpmath.mpf(float(v)))) for v in x])
    assert ulp_errors(call(functions[f"{op}_f32"], x), expected).max() <= 2


@pytest.mark.parametrize("name", CONVERSIONS)
def test_sixteen_bit_floats_convert_as_torch_does(functions: dict[str, Callable[..., None]], name: str) -> None:
    dtype = CONVERSIONS[name]
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = torch.from_numpy(call(functions[f"from_{name}"], every.numpy(), out=np.float32))
    torch.testing.assert_close(wide, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    edges = np.concatenate([np.linspace(60000, 70000, 5001), np.logspace(-9, -3, 5001)]).astype(np.float32)
    x = torch.from_numpy(np.concatenate([sweep(), edges]))
    thin = torch.from_numpy(call(functions[f"to_{name}"], x.numpy(), out=np.int16)).view(dtype)
    torch.testing.assert_close(thin, x.to(dtype), rtol=0, atol=0, equal_nan=True)
