"""Pointwise ops: out[i] from in[i], operands broadcast and promoted by torch's rules. Each gives its torch meaning and its scalar expression."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import torch

from ..op import Category, Cost, Op, streaming_cost
from ..scalar import Scalar, apply, cast, lift, where
from ..types import ScalarType, TensorType, Type, broadcast, category, compute_dtype, promote


class Promotion(enum.Enum):
    """How the result dtype follows from the operands' (torch's ELEMENTWISE_TYPE_PROMOTION_KIND)."""

    SAME = "the promoted dtype"
    FLOAT = "integers and bool become the default float dtype"
    BOOL = "operands are promoted together, the result is bool"
    CONDITION = "the first operand is a bool condition, the rest are promoted"


def operand_dtype(op: Op, types: tuple[TensorType | ScalarType, ...]) -> torch.dtype:
    """The dtype the operands of a pointwise op are converted to before its scalar expression applies (before widening to compute dtype)."""
    rule = PROMOTION[op.name]
    values = types[1:] if rule is Promotion.CONDITION else types
    dtype = promote(*values)
    if rule is Promotion.FLOAT and category(dtype) < 2:
        return torch.get_default_dtype()
    return dtype


def _infer(name: str, arity: int, rule: Promotion) -> Callable[..., Type]:
    def infer(*types: Any) -> Type:
        if len(types) != arity:
            raise ValueError(f"it takes {arity} operands, not {len(types)}")
        tensors = [t for t in types if isinstance(t, TensorType)]
        if not tensors:
            raise ValueError("at least one operand must be a tensor")
        if rule is Promotion.CONDITION and types[0].dtype != torch.bool:
            raise ValueError("the condition must be bool")
        dtype = torch.bool if rule is Promotion.BOOL else operand_dtype(OPS_BY_NAME[name], types)
        return TensorType(dtype, broadcast(*(t.shape for t in tensors)), _device(tensors))

    return infer


def _device(tensors: list[TensorType]) -> str:
    """The device of the operands with dimensions; 0-d CPU tensors follow the others, as in torch."""
    devices = {t.device for t in tensors if t.rank} or {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"operands live on different devices: {', '.join(sorted(devices))}")
    return devices.pop()


def _cost(flops: int) -> Callable[..., Cost]:
    return lambda types, out, attrs: streaming_cost(types, out, flops)


def _relu(x: Scalar) -> Scalar:
    return apply("max", x, 0)


def _sigmoid(x: Scalar) -> Scalar:
    return 1 / (1 + apply("exp", -x))


def _tanh(x: Scalar) -> Scalar:
    return apply("tanh", x)


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
    return apply("floor", x / y) if x.dtype.is_floating_point else apply("floordiv", x, y)


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


def _compare(name: str) -> Callable[[Scalar, Scalar], Scalar]:
    return lambda a, b: apply(name, a, b)


def _scalars_as_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Some torch functions take no Python number; weak promotion is kept by wrapping it on the tensors' terms."""

    def call(*args: Any) -> Any:
        if all(isinstance(a, torch.Tensor) for a in args):
            return function(*args)
        dtype = torch.result_type(*args) if len(args) == 2 else next(a.dtype for a in args if isinstance(a, torch.Tensor))
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        return function(*(a if isinstance(a, torch.Tensor) else torch.tensor(a, dtype=dtype, device=device) for a in args))

    return call


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
    ("fmod", 2, S, torch.fmod, _binary("fmod"), 4),
    ("pow", 2, S, torch.pow, _pow, 20),
    ("atan2", 2, F, torch.atan2, _binary("atan2"), 20),
    ("hypot", 2, S, _scalars_as_tensors(torch.hypot), _binary("hypot"), 4),
    ("copysign", 2, F, torch.copysign, _binary("copysign"), 1),
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
    ("tanh", 1, F, torch.tanh, _tanh, 14),
    ("asinh", 1, F, torch.asinh, _unary("asinh"), 20),
    ("acosh", 1, F, torch.acosh, _unary("acosh"), 20),
    ("atanh", 1, F, torch.atanh, _unary("atanh"), 20),
    ("erf", 1, F, torch.erf, _unary("erf"), 16),
    ("erfc", 1, F, torch.erfc, _unary("erfc"), 20),
    ("lgamma", 1, F, torch.lgamma, _unary("lgamma"), 40),
    ("sigmoid", 1, F, torch.sigmoid, _sigmoid, 12),
    ("relu", 1, S, torch.relu, _relu, 1),
    ("silu", 1, S, torch.nn.functional.silu, lambda x: x / (1 + apply("exp", -x)), 13),
    ("clamp", 3, S, lambda x, lo, hi: torch.minimum(torch.maximum(x, _like(lo, x)), _like(hi, x)), _clamp, 2),
    ("where", 3, C, torch.where, where, 1),
    ("eq", 2, B, torch.eq, _compare("eq"), 1),
    ("ne", 2, B, torch.ne, _compare("ne"), 1),
    ("lt", 2, B, torch.lt, _compare("lt"), 1),
    ("le", 2, B, torch.le, _compare("le"), 1),
    ("gt", 2, B, torch.gt, _compare("gt"), 1),
    ("ge", 2, B, torch.ge, _compare("ge"), 1),
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


def _like(value: Any, x: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, device=x.device).to(torch.result_type(x, value))


_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor", "bitwise_and",
                "bitwise_or", "bitwise_xor"}  # fmt: skip


def _infer_cast(x: TensorType, *, dtype: torch.dtype) -> Type:
    return x.with_dtype(dtype)


def _scalar_cast(x: Scalar, *, dtype: torch.dtype) -> Scalar:
    """In compute dtype; rounding to a 16-bit float is code generation's."""
    return cast(x, compute_dtype(dtype))


def _infer_gelu(x: TensorType, *, approximate: str = "none") -> Type:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    if not x.dtype.is_floating_point:
        raise ValueError("it takes a floating-point tensor")
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
