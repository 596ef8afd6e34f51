"""Every pointwise op: inferred types against torch, eager against the function a user calls, the scalar expression against both."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_reference import MEANING, evaluate
from tilewright.ir import ops
from tilewright.ir.errors import TypeInferenceError
from tilewright.ir.graph import graph_input
from tilewright.ir.ops.pointwise import POINTWISE, PROMOTION, number_as, operand_dtype, unprintable
from tilewright.ir.scalar import SCALAR_OPS, Scalar, apply, lift
from tilewright.ir.types import NATIVE_DTYPES, ScalarType, TensorType, compute_dtype, scalar_type

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SIMPLE = [op for op in POINTWISE if op.name not in ("cast", "gelu")]
ARITY = {op.name: len(inspect.signature(op.scalar).parameters) for op in SIMPLE if op.scalar}
# what a user calls, where the name is not that of a torch function
USER: dict[str, Any] = {
    "silu": F.silu, "clamp": torch.clamp, "trunc_divide": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}  # fmt: skip
# torch takes these, we hand them to ATen: the result dtype is a special case, or depends on the storage format
LEFT_TO_ATEN = {"square": (torch.bool,), "pow": (torch.bool,), "nextafter": (torch.float16, torch.bfloat16)}


def type_of(value: Any) -> TensorType | ScalarType:
    return TensorType(value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else scalar_type(value)


def outcome(function: Any, *args: Any) -> Any:
    """(dtype, shape) of the result, None where the function refuses."""
    try:
        out = function(*args)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return (out.dtype, tuple(out.shape))


def operand_sets(op: Any) -> Any:
    tensors = [torch.ones(2, dtype=d) for d in DTYPES]
    zero_d = [torch.ones((), dtype=d) for d in DTYPES]
    if ARITY[op.name] == 1:
        return [(t,) for t in tensors + zero_d]
    if ARITY[op.name] == 2:
        pool = [*tensors, *zero_d, True, 2, 1.5]
        return [p for p in itertools.product(pool, pool) if any(isinstance(a, torch.Tensor) for a in p)]
    rest = [*tensors[1::3], *zero_d[1::4], True, 2, 1.5]
    if op.name == "where":
        return [(torch.ones(2, dtype=torch.bool), a, b) for a in [*tensors, *rest] for b in rest]
    return [(x, a, b) for x in tensors[::2] for a in rest for b in rest]


@pytest.mark.parametrize("op", SIMPLE, ids=lambda op: op.name)
def test_inferred_type_is_that_of_eager(op: Any) -> None:
    for args in operand_sets(op):
        expected = outcome(op.eager, *args)
        inferred = outcome(op.infer, *(type_of(a) for a in args))
        special = inferred is None and any(getattr(a, "dtype", None) in LEFT_TO_ATEN.get(op.name, ()) for a in args)
        assert special or inferred == expected, f"{op.name}{[str(type_of(a)) for a in args]}: infer {inferred}, eager {expected}"


EDGES = {
    "float": [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -2.5, 0.1, -7.0, 10.0, -20.0, 100.0, 1e-6, 6e4, math.inf, -math.inf, math.nan],
    "int": [0, 1, -1, 2, -2, 3, 5, 7, -7, 9, 31, 33, 100, -100, 127, -128],
    "bool": [False, True],
}  # fmt: skip


def edge_values(dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.tensor(EDGES["bool"])
    if dtype.is_floating_point:
        return torch.tensor(EDGES["float"], dtype=torch.float64).to(dtype)
    limits = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype)
    return torch.cat([torch.tensor(EDGES["int"], dtype=torch.int64).to(dtype), limits])


def grid(op: Any, dtypes: tuple[torch.dtype, ...]) -> tuple[torch.Tensor, ...]:
    """Every combination of edge values, one tensor per operand; no integer division by zero, nor of MIN by -1, where eager traps."""
    values = [edge_values(d) for d in dtypes]
    if unprintable(op, tuple(TensorType(d, (1,)) for d in dtypes)):
        values = [values[0][:-2], values[1][values[1] != 0]]
    axes = torch.meshgrid(*(torch.arange(len(v)) for v in values), indexing="ij")
    return tuple(v[a.flatten()] for v, a in zip(values, axes))


def by_scalar(op: Any, *args: Any, **attrs: Any) -> torch.Tensor:
    """The op by its scalar expression, converting operands as `operand_dtype` says."""
    types = tuple(type_of(a) for a in args)
    promoted = operand_dtype(op, types)
    wide = compute_dtype(promoted)
    env: dict[Scalar, torch.Tensor] = {}
    operands: list[Scalar] = []
    for i, a in enumerate(args):
        condition = op.name == "where" and i == 0
        if not isinstance(a, torch.Tensor):
            dtype = promoted if PROMOTION[op.name].name == "BOOL" else wide
            operands.append(lift(number_as(a, dtype), wide))
            continue
        variable = Scalar(torch.bool if condition else wide)
        exact = a.to(promoted) if PROMOTION[op.name].name == "BOOL" else a
        env[variable] = a if condition else exact.to(wide)
        operands.append(variable)
    out = op.infer(*types, **attrs)
    value = evaluate(op.scalar(*operands, **attrs), env)
    shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, torch.Tensor)))
    return value.to(out.dtype).expand(shape)


def reference(op: Any, args: tuple[Any, ...], **attrs: Any) -> torch.Tensor | None:
    """Eager in float64, None where that is another op (integers in, or a bool out)."""
    if not any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args):
        return None
    return op.eager(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args), **attrs)


def assert_close(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor | None, k: float = 2.0) -> None:
    """Integers and bools equal; floats by the float64 rule, within a few units in the last place; NaN and inf at the same places."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    if not eager.is_floating_point():
        assert torch.equal(ours, eager)
        return
    exact = eager.double() if exact is None else exact.double()
    a, e = ours.double(), eager.double()
    budget = 4 * torch.finfo(eager.dtype).eps * exact.abs().nan_to_num() + torch.finfo(eager.dtype).tiny
    agrees = (a == e) | (a.isnan() & e.isnan()) | ((a - exact).abs() <= torch.maximum(k * (e - exact).abs().nan_to_num(), budget))
    assert bool(agrees.all()), f"ours {a[~agrees][:5].tolist()}, eager {e[~agrees][:5].tolist()}, exact {exact[~agrees][:5].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", SIMPLE, ids=lambda op: op.name)
def test_scalar_expression_computes_the_op(op: Any, dtype: torch.dtype) -> None:
    dtypes = (torch.bool, dtype, dtype) if op.name == "where" else (dtype,) * ARITY[op.name]
    if outcome(op.infer, *(TensorType(d, (1,)) for d in dtypes)) is None:
        return
    args = grid(op, dtypes)
    assert_close(by_scalar(op, *args), op.eager(*args), reference(op, args))


@pytest.mark.parametrize("op", [op for op in SIMPLE if ARITY[op.name] == 2], ids=lambda op: op.name)
def test_numbers_beside_tensors_are_weak(op: Any) -> None:
    for dtype, number, first in itertools.product(DTYPES, (True, 3, 300, -1, 0.1, 2.0), (False, True)):
        args = (number, edge_values(dtype)) if first else (edge_values(dtype), number)
        types = tuple(type_of(a) for a in args)
        if outcome(op.infer, *types) is None or unprintable(op, types):
            continue
        if op.name == "pow" and number == 300:
            continue  # eager refuses a number that its dtype cannot hold
        if number == -1 and not first and op.name in ("trunc_divide", "fmod", "remainder"):
            args = (args[0][:-2], number)  # eager traps on MIN / -1
        assert_close(by_scalar(op, *args), op.eager(*args), reference(op, args))


@pytest.mark.parametrize("op", SIMPLE, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_eager_is_the_function_a_user_calls(op: Any, dtype: torch.dtype) -> None:
    dtypes = (torch.bool, dtype, dtype) if op.name == "where" else (dtype,) * ARITY[op.name]
    if outcome(op.infer, *(TensorType(d, (1,)) for d in dtypes)) is None:
        return
    args = grid(op, dtypes)
    expected = USER.get(op.name, getattr(torch, op.name, None))(*args)
    torch.testing.assert_close(op.eager(*args), expected, rtol=0, atol=0, equal_nan=True)


def test_shapes_broadcast_and_may_be_empty() -> None:
    for a, b in [((3, 1), (1, 4)), ((0, 3), (3,)), ((), (2,)), ((), ()), ((2, 0), (1, 1)), ((1,), (0,))]:
        x, y = torch.ones(a), torch.ones(b)
        assert ops.add.infer(type_of(x), type_of(y)).shape == tuple((x + y).shape)
    strided = torch.arange(12.0).reshape(3, 4).t()
    assert torch.equal(by_scalar(ops.mul, strided, strided), strided * strided)


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_cast(source: torch.dtype) -> None:
    x = edge_values(source)
    for target in DTYPES:
        kept = x
        if source.is_floating_point and not target.is_floating_point and target != torch.bool:
            kept = x[x.isfinite()]  # what an integer cannot hold has no defined value
        expected = ops.cast.eager(kept, dtype=target)
        variable = Scalar(compute_dtype(source))
        got = evaluate(ops.cast.scalar(variable, dtype=target), {variable: kept.to(compute_dtype(source))}).to(target)
        assert ops.cast.infer(type_of(kept), dtype=target) == type_of(expected)
        assert_close(got, expected, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(dtype: torch.dtype, approximate: str) -> None:
    x = torch.cat([edge_values(dtype), torch.linspace(-12, 12, 500, dtype=torch.float64).to(dtype)])
    variable = Scalar(compute_dtype(dtype))
    got = evaluate(ops.gelu.scalar(variable, approximate=approximate), {variable: x.to(variable.dtype)}).to(dtype)
    exact = F.gelu(x.double(), approximate=approximate)
    finite = x.isfinite()
    # 1 + erf(x) cancels for x << 0 in every float32 implementation: the error is absolute there
    atol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[finite].double(), exact[finite], rtol=atol, atol=atol)
    assert torch.equal(got.isnan(), exact.isnan())  # eager is NaN for inf in float32, which float64 shows to be wrong


@pytest.mark.parametrize("name", ["sigmoid", "silu", "tanh", "exp", "expm1", "log1p"])
def test_extreme_arguments_give_no_new_nan(name: str) -> None:
    x = torch.tensor([-1e4, -745.0, -104.0, -88.8, -87.0, 87.0, 88.8, 1e4, 1e30, -1e30, math.inf, -math.inf])
    got, expected = by_scalar(ops.op(name), x), ops.op(name).eager(x)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-30, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_float_division_family_on_any_floats(xs: list[float], ys: list[float]) -> None:
    x, y = torch.tensor(xs)[:, None], torch.tensor(ys)[None]
    for name in ("floor_divide", "remainder", "fmod", "trunc_divide"):
        torch.testing.assert_close(by_scalar(ops.op(name), x, y), ops.op(name).eager(x, y), rtol=0, atol=0, equal_nan=True)


def test_numbers_convert_as_torch_does() -> None:
    assert number_as(300, torch.uint8) == 44 and number_as(-129, torch.int8) == 127
    assert number_as(0.1, torch.float16) == torch.tensor(0.1).half().item()
    assert lift(300, torch.uint8).value == 44  # type: ignore[attr-defined]


def test_division_by_what_may_be_zero_is_not_printable() -> None:
    i32, f32 = TensorType(torch.int32, (2,)), TensorType(torch.float32, (2,))
    assert unprintable(ops.floor_divide, (i32, i32)) and unprintable(ops.remainder, (i32, scalar_type(0)))
    assert not unprintable(ops.floor_divide, (i32, scalar_type(3))) and not unprintable(ops.remainder, (f32, f32))
    assert not unprintable(ops.add, (i32, i32))
    assert unprintable(ops.remainder, (TensorType(torch.uint8, (2,)), scalar_type(256)))


def test_the_scalar_vocabulary_is_complete() -> None:
    assert set(MEANING) | {"cast", "bitcast"} == set(SCALAR_OPS)
    with pytest.raises(ValueError, match="different dtypes"):
        apply("add", Scalar(torch.float32), Scalar(torch.float64))


X = graph_input("x", TensorType(torch.float32, (2, 3)))
Z = graph_input("z", TensorType(torch.bool, (2, 3)))
C = graph_input("c", TensorType(torch.complex64, (2, 3)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ops.add(X, graph_input("y", TensorType(torch.float32, (4,)))), "sizes 3 and 4 do not broadcast at dimension -1"),
        (lambda: ops.add(X), "it takes 2 operands, not 1"),
        (lambda: ops.sub(Z, Z), "subtraction is not defined for bool"),
        (lambda: ops.neg(Z), "it is not defined for bool"),
        (lambda: ops.bitwise_and(X, X), "it takes integer or bool tensors"),
        (lambda: ops.where(X, X, X), "the condition must be bool"),
        (lambda: ops.add(C, C), "torch.complex64 arithmetic is left to ATen"),
        (lambda: ops.add(1, 2), "at least one operand must be a tensor"),
        (
            lambda: ops.add(X, graph_input("g", TensorType(torch.float32, (2, 3), "cuda:0"))),
            "operands live on different devices: cpu, cuda:0",
        ),
        (lambda: ops.add(X, X, dim=1), "it has no such attribute"),
        (lambda: ops.cast(X), "that attribute is required"),
        (lambda: ops.gelu(X, approximate="erf"), "approximate must be 'none' or 'tanh'"),
    ],
)
def test_errors_name_the_reason(build: Any, reason: str) -> None:
    with pytest.raises(TypeInferenceError, match=reason.replace("(", r"\(")):
        build()


def test_native_dtypes() -> None:
    assert set(DTYPES) == NATIVE_DTYPES
