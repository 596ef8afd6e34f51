"""Pointwise ops: out[i] from in[i], operands broadcast and promoted by torch's rules; each with its torch meaning and scalar expression."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import torch

from ..op import Category, Cost, Op, streaming_cost
from ..scalar import Scalar, apply, cast, lift, where
from ..types import (
    NATIVE_DTYPES,
    Number,
    ScalarType,
    TensorType,
    Type,
    broadcast,
    category,
    compute_dtype,
    one_device,
    promote,
    scalar_type,
)


class Promotion(enum.Enum):
    """How the result dtype follows from the operands' (torch's ELEMENTWISE_TYPE_PROMOTION_KIND)."""

    SAME = "the promoted dtype"
    FLOAT = "integers and bool become the default float dtype"
    BOOL = "operands are promoted together, the result is bool"
    CONDITION = "the first operand is a bool condition, the rest are promoted"


class Domain(enum.Enum):
    """Which promoted dtypes torch defines an op for; the value is the reason given for any other."""

    ANY = ""
    NUMBER = "it is not defined for bool"
    FLOAT = "it takes floating-point tensors"
    WIDE = "it takes float32 or float64 tensors"  # its result depends on the storage format, which scalar expressions do not see
    INTEGER = "it takes integer tensors"
    INTEGRAL = "it takes integer or bool tensors"

    def allows(self, dtype: torch.dtype) -> bool:
        return _ALLOWS[self](dtype)


_ALLOWS: dict[Domain, Callable[[torch.dtype], bool]] = {
    Domain.ANY: lambda d: True,
    Domain.NUMBER: lambda d: d != torch.bool,
    Domain.FLOAT: lambda d: d.is_floating_point,
    Domain.WIDE: lambda d: d in (torch.float32, torch.float64),
    Domain.INTEGER: lambda d: category(d) == 1,
    Domain.INTEGRAL: lambda d: category(d) < 2,
}


def operand_dtype(op: Op, types: tuple[TensorType | ScalarType, ...]) -> torch.dtype:
    """The dtype the operands of a pointwise op are promoted to.

    Its scalar expression applies to operands in `compute_dtype` of it: operands go there directly (a number beside a float16 tensor is
    not rounded to float16), except in comparisons (Promotion.BOOL), where they are first converted to this dtype, as in torch.
    """
    rule = PROMOTION[op.name]
    values = types[1:] if rule is Promotion.CONDITION else types
    dtype = promote(*values)
    if rule is Promotion.FLOAT and category(dtype) < 2:
        return torch.get_default_dtype()
    return dtype


def number_as(value: Number, dtype: torch.dtype) -> bool | int | float:
    """A number converted to a dtype as torch converts numbers beside tensors: integers wrap (300 as uint8 is 44), floats round."""
    wide = torch.float64 if isinstance(value, float) else torch.int64
    return torch.tensor(value, dtype=wide).to(dtype).item()


def unprintable(op: Op, types: tuple[TensorType | ScalarType, ...]) -> str:
    """Why a kernel cannot compute this pointwise op element by element, "" if it can.

    Integer division by zero raises in eager on the CPU; a kernel cannot raise, so only division by a non-zero literal is native.
    """
    if op.name not in _INTEGER_DIVISIONS or operand_dtype(op, types).is_floating_point:
        return ""
    divisor = types[1]
    if isinstance(divisor, ScalarType) and isinstance(divisor.value, int) and number_as(divisor.value, operand_dtype(op, types)):
        return ""
    return "integer division by a value that may be zero"


_INTEGER_DIVISIONS = frozenset({"floor_divide", "trunc_divide", "remainder", "fmod"})


def _infer(name: str, arity: int, rule: Promotion) -> Callable[..., Type]:
    domain = _DOMAIN.get(name, Domain.ANY)

    def infer(*types: Any) -> Type:
        if len(types) != arity:
            raise ValueError(f"it takes {arity} operand{'s' * (arity > 1)}, not {len(types)}")
        tensors = [t for t in types if isinstance(t, TensorType)]
        if not tensors:
            raise ValueError("at least one operand must be a tensor")
        check_native(*tensors)
        if rule is Promotion.CONDITION and types[0].dtype != torch.bool:
            raise ValueError("the condition must be bool")
        dtype = operand_dtype(OPS_BY_NAME[name], types)
        if dtype not in NATIVE_DTYPES or not domain.allows(dtype):
            raise ValueError(domain.value or f"{dtype} arithmetic is left to ATen")
        if name in _REFUSALS and (reason := _REFUSALS[name](types)):
            raise ValueError(reason)
        shape = tensors[0].shape if len(tensors) == 1 else broadcast(*(t.shape for t in tensors))
        return TensorType(torch.bool if rule is Promotion.BOOL else dtype, shape, one_device(*tensors))

    return infer


def check_native(*types: TensorType) -> None:
    """Raises ValueError for element types that have no native arithmetic: complex, 8-bit floats, wide unsigned integers."""
    for t in types:
        if t.dtype not in NATIVE_DTYPES:
            raise ValueError(f"{t.dtype} arithmetic is left to ATen")


def _sub_refusal(types: tuple[Any, ...]) -> str:
    return "subtraction is not defined for bool" if any(t.dtype == torch.bool for t in types) else ""


def _pow_refusal(types: tuple[Any, ...]) -> str:
    exponent = types[1]
    negative = isinstance(exponent, ScalarType) and isinstance(exponent.value, int) and exponent.value < 0
    return "integers to negative integer powers are not allowed" if negative and category(types[0].dtype) < 2 else ""


_REFUSALS: dict[str, Callable[[tuple[Any, ...]], str]] = {"sub": _sub_refusal, "pow": _pow_refusal}

_DOMAIN: dict[str, Domain] = {
    **dict.fromkeys(("floor_divide", "trunc_divide", "remainder", "fmod", "pow", "neg", "abs", "square"), Domain.NUMBER),
    **dict.fromkeys(("floor", "ceil", "trunc", "round", "relu", "clamp"), Domain.NUMBER),
    **dict.fromkeys(("hypot", "silu"), Domain.FLOAT),
    "nextafter": Domain.WIDE,
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"), Domain.INTEGRAL),
    **dict.fromkeys(("bitwise_left_shift", "bitwise_right_shift"), Domain.INTEGER),
}


def _cost(flops: int) -> Callable[..., Cost]:
    return lambda types, out, attrs: streaming_cost(types, out, flops)


def _relu(x: Scalar) -> Scalar:
    return apply("max", x, 0)


def _sigmoid(x: Scalar) -> Scalar:
    return 1 / (1 + apply("exp", -x))


def _sign(x: Scalar) -> Scalar:
    if x.dtype == torch.bool:
        return x
    return cast(x > 0, x.dtype) - cast(x < 0, x.dtype)


def _pow(x: Scalar, y: Scalar) -> Scalar:
    return apply("pow" if x.dtype.is_floating_point else "ipow", x, y)


def _integer(real: Callable[[Scalar], Scalar]) -> Callable[[Scalar], Scalar]:
    """Rounding functions are the identity on integers."""
    return lambda x: real(x) if x.dtype.is_floating_point else x


def _nan_free(real: Callable[[Scalar], Scalar], value: bool) -> Callable[[Scalar], Scalar]:
    """Predicates on NaN and inf are constant on integers."""
    return lambda x: real(x) if x.dtype.is_floating_point else lift(value, torch.bool)


def _floor_divide(x: Scalar, y: Scalar) -> Scalar:
    """On floats as torch and Python do it: floor of the exact quotient, not of the rounded one (1.0 // 0.1 is 9)."""
    if not x.dtype.is_floating_point:
        return apply("floordiv", x, y)
    rest = apply("fmod", x, y)
    crosses = apply("ne", rest, 0) & ((y < 0) ^ (rest < 0))
    quotient = (x - rest) / y - cast(crosses, x.dtype)
    floor = apply("floor", quotient)
    nearest = where(quotient - floor > 0.5, floor + 1, floor)
    signed = where(apply("eq", quotient, 0), apply("copysign", 0.0 * x, x / y), nearest)
    return where(apply("eq", y, 0), x / y, signed)


def _trunc_divide(x: Scalar, y: Scalar) -> Scalar:
    return apply("trunc", x / y) if x.dtype.is_floating_point else apply("truncdiv", x, y)


def _logical(op: str) -> Callable[[Scalar, Scalar], Scalar]:
    return lambda a, b: apply(op, cast(a, torch.bool), cast(b, torch.bool))


def _clamp(x: Scalar, lo: Scalar, hi: Scalar) -> Scalar:
    return apply("min", apply("max", x, lo), hi)


def _unary(name: str) -> Callable[[Scalar], Scalar]:
    return lambda x: apply(name, x)


def _binary(name: str) -> Callable[[Scalar, Scalar], Scalar]:
    return lambda a, b: apply(name, a, b)


def _operand_type(value: Any) -> TensorType | ScalarType:
    return TensorType(value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else scalar_type(value)


def _as_tensors(*values: Any, real: bool = False) -> tuple[torch.Tensor, ...]:
    """Numbers as 0-d tensors of the promoted dtype (a floating one if `real`), on the device of the tensors."""
    dtype = promote(*(_operand_type(v) for v in values))
    if real and category(dtype) < 2:
        dtype = torch.get_default_dtype()
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    return tuple(v if isinstance(v, torch.Tensor) else torch.tensor(number_as(v, dtype), dtype=dtype, device=device) for v in values)


def _scalars_as_tensors(function: Callable[..., Any], real: bool = False) -> Callable[..., Any]:
    """Some torch functions take no Python number, or not as first operand: a 0-d tensor of the promoted dtype stands for it."""
    return lambda *args: function(*(args if all(isinstance(a, torch.Tensor) for a in args) else _as_tensors(*args, real=real)))


def _eager_clamp(x: Any, lo: Any, hi: Any) -> torch.Tensor:
    """torch.clamp, all three promoted together."""
    dtype = promote(*(_operand_type(a) for a in (x, lo, hi)))
    return torch.clamp(*(t.to(dtype) for t in _as_tensors(x, lo, hi)))


S, F, B, C = Promotion.SAME, Promotion.FLOAT, Promotion.BOOL, Promotion.CONDITION

# name, operands, promotion, torch meaning, scalar expression, flops per element
_TABLE: tuple[tuple[str, int, Promotion, Callable[..., Any], Callable[..., Scalar], int], ...] = (
    ("add", 2, S, torch.add, lambda a, b: a + b, 1),
    ("sub", 2, S, torch.sub, lambda a, b: a - b, 1),
    ("mul", 2, S, torch.mul, lambda a, b: a * b, 1),
    ("div", 2, F, torch.div, lambda a, b: a / b, 1),
    ("floor_divide", 2, S, torch.floor_divide, _floor_divide, 2),
    ("trunc_divide", 2, S, lambda a, b: torch.div(a, b, rounding_mode="trunc"), _trunc_divide, 2),
    ("remainder", 2, S, torch.remainder, _binary("mod"), 4),
    ("fmod", 2, S, _scalars_as_tensors(torch.fmod), _binary("fmod"), 4),
    ("pow", 2, S, torch.pow, _pow, 20),
    ("atan2", 2, F, _scalars_as_tensors(torch.atan2, real=True), _binary("atan2"), 20),
    ("hypot", 2, S, _scalars_as_tensors(torch.hypot), _binary("hypot"), 4),
    ("copysign", 2, F, _scalars_as_tensors(torch.copysign, real=True), _binary("copysign"), 1),
    ("nextafter", 2, S, _scalars_as_tensors(torch.nextafter), _binary("nextafter"), 1),
    ("maximum", 2, S, _scalars_as_tensors(torch.maximum), _binary("max"), 1),
    ("minimum", 2, S, _scalars_as_tensors(torch.minimum), _binary("min"), 1),
    ("fmax", 2, S, _scalars_as_tensors(torch.fmax), _binary("fmax"), 1),
    ("fmin", 2, S, _scalars_as_tensors(torch.fmin), _binary("fmin"), 1),
    ("neg", 1, S, torch.neg, lambda x: -x, 1),
    ("abs", 1, S, torch.abs, lambda x: x if x.dtype in (torch.bool, torch.uint8) else apply("abs", x), 1),
    ("sign", 1, S, torch.sign, _sign, 2),
    ("square", 1, S, torch.square, lambda x: x * x, 1),
    ("reciprocal", 1, F, torch.reciprocal, lambda x: 1 / x, 1),
    ("floor", 1, S, torch.floor, _integer(_unary("floor")), 1),
    ("ceil", 1, S, torch.ceil, _integer(_unary("ceil")), 1),
    ("trunc", 1, S, torch.trunc, _integer(_unary("trunc")), 1),
    ("round", 1, S, torch.round, _integer(_unary("round")), 1),
    ("sqrt", 1, F, torch.sqrt, _unary("sqrt"), 1),
    ("rsqrt", 1, F, torch.rsqrt, _unary("rsqrt"), 1),
    ("exp", 1, F, torch.exp, _unary("exp"), 10),
    ("exp2", 1, F, torch.exp2, _unary("exp2"), 10),
    ("expm1", 1, F, torch.expm1, _unary("expm1"), 10),
    ("log", 1, F, torch.log, _unary("log"), 10),
    ("log2", 1, F, torch.log2, _unary("log2"), 10),
    ("log10", 1, F, torch.log10, _unary("log10"), 10),
    ("log1p", 1, F, torch.log1p, _unary("log1p"), 10),
    ("sin", 1, F, torch.sin, _unary("sin"), 12),
    ("cos", 1, F, torch.cos, _unary("cos"), 12),
    ("tan", 1, F, torch.tan, _unary("tan"), 20),
    ("asin", 1, F, torch.asin, _unary("asin"), 20),
    ("acos", 1, F, torch.acos, _unary("acos"), 20),
    ("atan", 1, F, torch.atan, _unary("atan"), 20),
    ("sinh", 1, F, torch.sinh, _unary("sinh"), 20),
    ("cosh", 1, F, torch.cosh, _unary("cosh"), 20),
    ("tanh", 1, F, torch.tanh, _unary("tanh"), 14),
    ("asinh", 1, F, torch.asinh, _unary("asinh"), 20),
    ("acosh", 1, F, torch.acosh, _unary("acosh"), 20),
    ("atanh", 1, F, torch.atanh, _unary("atanh"), 20),
    ("erf", 1, F, torch.erf, _unary("erf"), 16),
    ("erfc", 1, F, torch.erfc, _unary("erfc"), 20),
    ("lgamma", 1, F, torch.lgamma, _unary("lgamma"), 40),
    ("sigmoid", 1, F, torch.sigmoid, _sigmoid, 12),
    ("relu", 1, S, torch.relu, _relu, 1),
    ("silu", 1, S, torch.nn.functional.silu, lambda x: x / (1 + apply("exp", -x)), 13),
    ("clamp", 3, S, _eager_clamp, _clamp, 2),
    ("where", 3, C, torch.where, where, 1),
    ("eq", 2, B, _scalars_as_tensors(torch.eq), _binary("eq"), 1),
    ("ne", 2, B, _scalars_as_tensors(torch.ne), _binary("ne"), 1),
    ("lt", 2, B, _scalars_as_tensors(torch.lt), _binary("lt"), 1),
    ("le", 2, B, _scalars_as_tensors(torch.le), _binary("le"), 1),
    ("gt", 2, B, _scalars_as_tensors(torch.gt), _binary("gt"), 1),
    ("ge", 2, B, _scalars_as_tensors(torch.ge), _binary("ge"), 1),
    ("logical_and", 2, B, _scalars_as_tensors(torch.logical_and), _logical("and"), 1),
    ("logical_or", 2, B, _scalars_as_tensors(torch.logical_or), _logical("or"), 1),
    ("logical_xor", 2, B, _scalars_as_tensors(torch.logical_xor), _logical("xor"), 1),
    ("logical_not", 1, B, torch.logical_not, lambda x: ~cast(x, torch.bool), 1),
    ("isnan", 1, B, torch.isnan, _nan_free(_unary("isnan"), False), 1),
    ("isinf", 1, B, torch.isinf, _nan_free(_unary("isinf"), False), 1),
    ("isfinite", 1, B, torch.isfinite, _nan_free(lambda x: ~(apply("isnan", x) | apply("isinf", x)), True), 1),
    ("signbit", 1, B, torch.signbit, lambda x: apply("signbit", x) if x.dtype.is_floating_point else x < 0, 1),
    ("bitwise_and", 2, S, torch.bitwise_and, lambda a, b: a & b, 1),
    ("bitwise_or", 2, S, torch.bitwise_or, lambda a, b: a | b, 1),
    ("bitwise_xor", 2, S, torch.bitwise_xor, lambda a, b: a ^ b, 1),
    ("bitwise_not", 1, S, torch.bitwise_not, lambda x: ~x, 1),
    ("bitwise_left_shift", 2, S, torch.bitwise_left_shift, _binary("shl"), 1),
    ("bitwise_right_shift", 2, S, torch.bitwise_right_shift, _binary("shr"), 1),
)  # fmt: skip


_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor", "bitwise_and",
                "bitwise_or", "bitwise_xor"}  # fmt: skip


def _infer_cast(x: TensorType, *, dtype: torch.dtype) -> Type:
    """x.to(dtype)"""
    if category(x.dtype) == 3 or category(dtype) == 3:
        raise ValueError("complex arithmetic is left to ATen")
    return x.with_dtype(dtype)


def _scalar_cast(x: Scalar, *, dtype: torch.dtype) -> Scalar:
    """In compute dtype; rounding to a 16-bit float is code generation's."""
    return cast(x, compute_dtype(dtype))


def _infer_gelu(x: TensorType, *, approximate: str = "none") -> Type:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    check_native(x)
    if not x.dtype.is_floating_point:
        raise ValueError(Domain.FLOAT.value)
    return x


def _scalar_gelu(x: Scalar, *, approximate: str) -> Scalar:
    if approximate == "tanh":
        return 0.5 * x * (1 + apply("tanh", math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * x * (1 + apply("erf", x * math.sqrt(0.5)))


def _eager_gelu(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


POINTWISE: tuple[Op, ...] = tuple(
    Op(name, Category.POINTWISE, _infer(name, arity, rule), eager, _cost(flops), scalar=scalar, commutative=name in _COMMUTATIVE)
    for name, arity, rule, eager, scalar, flops in _TABLE
) + (
    Op("cast", Category.POINTWISE, _infer_cast, lambda x, *, dtype: x.to(dtype), scalar=_scalar_cast),
    Op("gelu", Category.POINTWISE, _infer_gelu, _eager_gelu, _cost(20), scalar=_scalar_gelu),
)

PROMOTION: dict[str, Promotion] = {row[0]: row[2] for row in _TABLE} | {"cast": S, "gelu": S}
OPS_BY_NAME: dict[str, Op] = {op.name: op for op in POINTWISE}
