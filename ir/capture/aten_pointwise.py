"""ATen pointwise ops -> ours. Most keep their name; the table says which overloads exist, converters do what differs."""

from __future__ import annotations

from typing import Any

import torch

from ..graph import Node
from ..types import TensorType, compute_dtype, promote
from .call import Call, Converter, Result, cast, full, make

_UNARY = (
    "neg", "abs", "sign", "square", "reciprocal", "floor", "ceil", "trunc", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2",
    "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
    "lgamma", "sigmoid", "relu", "silu", "logical_not", "isnan", "isinf", "isfinite", "signbit", "bitwise_not", "round",
)  # fmt: skip

# our name: the overloads of the ATen op of the same name
_BINARY = {
    "mul": ("Tensor", "Scalar"), "floor_divide": ("default", "Scalar"), "remainder": ("Tensor", "Scalar", "Scalar_Tensor"),
    "fmod": ("Tensor", "Scalar"), "pow": ("Tensor_Tensor", "Tensor_Scalar", "Scalar"), "atan2": ("default",), "hypot": ("default",),
    "copysign": ("Tensor", "Scalar"), "nextafter": ("default",), "maximum": ("default",), "minimum": ("default",), "fmax": ("default",),
    "fmin": ("default",), "eq": ("Tensor", "Scalar"), "ne": ("Tensor", "Scalar"), "lt": ("Tensor", "Scalar"), "le": ("Tensor", "Scalar"),
    "gt": ("Tensor", "Scalar"), "ge": ("Tensor", "Scalar"), "logical_and": ("default",), "logical_or": ("default",),
    "logical_xor": ("default",), "bitwise_and": ("Tensor", "Scalar", "Scalar_Tensor"), "bitwise_or": ("Tensor", "Scalar", "Scalar_Tensor"),
    "bitwise_xor": ("Tensor", "Scalar", "Scalar_Tensor"), "bitwise_left_shift": ("Tensor", "Tensor_Scalar", "Scalar_Tensor"),
    "bitwise_right_shift": ("Tensor", "Tensor_Scalar", "Scalar_Tensor"),
}  # fmt: skip


def _plain(name: str) -> Converter:
    return lambda call, *operands: make(name, *operands)


def scaled(x: Any, factor: Any) -> Any:
    """factor * x."""
    if isinstance(factor, (int, float)) and factor == 1:
        return x
    return make("mul", x, factor) if isinstance(x, Node) else x * factor


def _linear_combination(name: str) -> Converter:
    """x +- alpha * y, the product not rounded on the way to a 16-bit result, as in ATen."""

    def convert(call: Call, x: Any, y: Any, alpha: Any = 1) -> Result:
        if isinstance(alpha, (int, float)) and alpha == 1:
            return make(name, x, y)
        wide = compute_dtype(call.type.dtype)
        x, y = (cast(v, wide) if isinstance(v, Node) and isinstance(v.type, TensorType) else v for v in (x, y))
        return cast(make(name, x, scaled(y, alpha)), call.type.dtype)

    return convert


def _rsub(call: Call, x: Any, y: Any, alpha: Any) -> Result:
    return _linear_combination("sub")(call, y, x, alpha)


_DIVISIONS = {None: "div", "floor": "floor_divide", "trunc": "trunc_divide"}


def _div_mode(call: Call, x: Any, y: Any, mode: str | None) -> Result:
    return make(_DIVISIONS[mode], x, y)


def _clamp(call: Call, x: Node, lo: Any, hi: Any) -> Result:
    if lo is None:
        return make("minimum", x, hi)
    if hi is None:
        return make("maximum", x, lo)
    return make("clamp", x, lo, hi)


def _clamp_min(call: Call, x: Node, lo: Any) -> Result:
    return make("maximum", x, lo)


def _clamp_max(call: Call, x: Node, hi: Any) -> Result:
    return make("minimum", x, hi)


def _where(call: Call, condition: Node, x: Any, y: Any) -> Result:
    return make("where", condition, x, y) if condition.dtype == torch.bool else None


def _gelu(call: Call, x: Node, approximate: str) -> Result:
    return make("gelu", x, approximate=approximate)


def _masked_fill(call: Call, x: Node, mask: Node, value: Any) -> Result:
    """The result keeps the dtype of x."""
    if isinstance(value, Node) and isinstance(value.type, TensorType):
        value = cast(value, x.dtype)
    return cast(make("where", mask, value, x), x.dtype) if mask.dtype == torch.bool else None


def _to_copy(call: Call, x: Node, dtype: Any, layout: Any, device: Any, *rest: Any) -> Result:
    return cast(x, call.type.dtype) if x.tensor.device == call.type.device and layout in (None, torch.strided) else None


def _convert_element_type(call: Call, x: Node, dtype: torch.dtype) -> Result:
    return cast(x, dtype)


def _leaky_relu(call: Call, x: Node, slope: Any) -> Result:
    return cast(make("where", make("gt", x, 0), x, make("mul", x, slope)), x.dtype)


def _threshold(call: Call, x: Node, threshold: Any, value: Any) -> Result:
    return cast(make("where", make("le", x, threshold), value, x), x.dtype)


def _copy(call: Call, x: Node, source: Node, non_blocking: bool) -> Result:
    """x.copy_(source), functionally: source in the type of x."""
    if x.tensor.device != source.tensor.device:
        return None
    moved = cast(source, x.dtype)
    return moved if moved.shape == x.shape else make("expand", moved, shape=x.shape)


def _fill(call: Call, x: Node, value: Any) -> Result:
    if isinstance(value, Node) and isinstance(value.type, TensorType):
        return make("expand", cast(value, x.dtype), shape=x.shape)
    return full(call.type, value)


def _fused_multiply(name: str) -> Converter:
    """x + value * (a * b) or x + value * (a / b), in compute dtype as ATen has it for 16-bit floats."""

    def convert(call: Call, x: Node, a: Node, b: Node, value: Any) -> Result:
        dtype = promote(x.tensor, a.tensor, b.tensor)
        wide = compute_dtype(dtype)
        if not dtype.is_floating_point:
            return None
        if name == "div":
            term = make("div", scaled(cast(a, wide), value), cast(b, wide))
        else:
            term = make("mul", scaled(cast(a, wide), value), cast(b, wide))
        return cast(make("add", cast(x, wide), term), call.type.dtype)

    return convert


def _lerp(call: Call, a: Node, b: Node, weight: Any) -> Result:
    """a + w (b - a), from the nearer end: for |w| >= 0.5 it is b - (b - a)(1 - w)."""
    wide = compute_dtype(call.type.dtype)
    a, b = cast(a, wide), cast(b, wide)
    gap = make("sub", b, a)
    if not isinstance(weight, Node):
        far = abs(weight) >= 0.5
        out = make("sub", b, make("mul", gap, 1 - weight)) if far else make("add", a, make("mul", gap, weight))
        return cast(out, call.type.dtype)
    w = cast(weight, wide)
    near = make("add", a, make("mul", gap, w))
    far = make("sub", b, make("mul", gap, make("sub", 1, w)))
    return cast(make("where", make("lt", make("abs", w), 0.5), near, far), call.type.dtype)


POINTWISE: dict[str, Converter] = {
    **{f"aten.{name}.default": _plain(name) for name in _UNARY},
    **{f"aten.{name}.{overload}": _plain(name) for name, overloads in _BINARY.items() for overload in overloads},
    "aten.add.Tensor": _linear_combination("add"), "aten.add.Scalar": _linear_combination("add"),
    "aten.sub.Tensor": _linear_combination("sub"), "aten.sub.Scalar": _linear_combination("sub"),
    "aten.rsub.Tensor": _rsub, "aten.rsub.Scalar": _rsub,
    "aten.div.Tensor": _plain("div"), "aten.div.Scalar": _plain("div"),
    "aten.true_divide.Tensor": _plain("div"), "aten.true_divide.Scalar": _plain("div"),
    "aten.div.Tensor_mode": _div_mode, "aten.div.Scalar_mode": _div_mode,
    "aten.clamp.default": _clamp, "aten.clamp.Tensor": _clamp,
    "aten.clamp_min.default": _clamp_min, "aten.clamp_min.Tensor": _clamp_min,
    "aten.clamp_max.default": _clamp_max, "aten.clamp_max.Tensor": _clamp_max,
    "aten.hardtanh.default": _clamp,
    "aten.where.self": _where, "aten.where.ScalarOther": _where, "aten.where.ScalarSelf": _where,
    "aten.gelu.default": _gelu, "aten.masked_fill.Scalar": _masked_fill, "aten.masked_fill.Tensor": _masked_fill,
    "aten._to_copy.default": _to_copy, "prims.convert_element_type.default": _convert_element_type,
    "aten.leaky_relu.default": _leaky_relu, "aten.threshold.default": _threshold,
    "aten.copy.default": _copy, "aten.fill.Scalar": _fill, "aten.fill.Tensor": _fill,
    "aten.addcmul.default": _fused_multiply("mul"), "aten.addcdiv.default": _fused_multiply("div"),
    "aten.lerp.Scalar": _lerp, "aten.lerp.Tensor": _lerp,
}  # fmt: skip
