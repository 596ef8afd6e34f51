"""The meaning of the scalar language by torch: evaluates a `Scalar` expression elementwise. The oracle of both printers' op tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tilewright.ir.scalar import Apply, Const, Scalar


def evaluate(expression: Scalar, env: dict[Scalar, torch.Tensor]) -> torch.Tensor:
    """The values of `expression`, its free variables (plain `Scalar`s) bound to tensors by `env`; checks dtypes at each step."""
    done: dict[Scalar, torch.Tensor] = dict(env)

    def visit(node: Scalar) -> torch.Tensor:
        if node not in done:
            value = torch.tensor(node.value, dtype=node.dtype) if isinstance(node, Const) else step(node)
            assert value.dtype == node.dtype, f"{getattr(node, 'op', 'const')} yields {value.dtype}, its node says {node.dtype}"
            done[node] = value
        return done[node]

    def step(node: Scalar) -> torch.Tensor:
        assert isinstance(node, Apply), f"unbound variable {node}"
        args = [visit(a) for a in node.args]
        if node.op == "cast":
            return _cast(args[0], node.dtype)
        return args[0].view(node.dtype) if node.op == "bitcast" else MEANING[node.op](*args)

    return visit(expression)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow = x.is_floating_point() and not dtype.is_floating_point and dtype != torch.bool and dtype.itemsize < 4
    return x.to(torch.int32).to(dtype) if narrow else x.to(dtype)


def _mod(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r = torch.fmod(a, b)
    return torch.where((r != 0) & ((r < 0) ^ (b < 0)), r + b, r)


def _shift(a: torch.Tensor, b: torch.Tensor, left: bool) -> torch.Tensor:
    width = torch.iinfo(a.dtype).bits
    outside = (b < 0) | (b >= width)
    if left:
        return torch.where(outside, torch.zeros_like(a), a << b.clamp(0, width - 1))
    return torch.where(outside, -(a < 0).to(a.dtype), a >> b.clamp(0, width - 1))


def _logical(bitwise: Callable[..., Any], logical: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (logical if args[0].dtype == torch.bool else bitwise)(*args)


MEANING: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in (
        "add", "sub", "mul", "div", "fmod", "neg", "abs", "fmin", "fmax", "floor", "ceil", "trunc", "round", "sqrt", "rsqrt", "exp",
        "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh",
        "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "pow", "copysign", "nextafter", "hypot", "eq", "ne", "lt", "le", "gt", "ge",
        "isnan", "isinf", "signbit", "where",
    )},
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": _mod,
    "min": torch.minimum,
    "max": torch.maximum,
    "ipow": torch.pow,
    "fma": lambda a, b, c: a * b + c,
    "and": _logical(torch.bitwise_and, torch.logical_and),
    "or": _logical(torch.bitwise_or, torch.logical_or),
    "xor": _logical(torch.bitwise_xor, torch.logical_xor),
    "not": _logical(torch.bitwise_not, torch.logical_not),
    "shl": lambda a, b: _shift(a, b, True),
    "shr": lambda a, b: _shift(a, b, False),
}  # fmt: skip
