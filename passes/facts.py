"""Small questions that rules ask about nodes: which number it is, whether a dtype holds another, how to fit a value to a type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set

import torch

from ..ir.dims import same_shape
from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.types import Number, ScalarType, TensorType, Type, category


def literal(node: Node) -> Number | None:
    """The number that every element of `node` is, if that is known: scalars, fills, constants of one element."""
    if isinstance(node.type, ScalarType):
        value = node.type.value
    elif node.op.name == "full":
        value = node.attrs["value"]
    elif node.op.name == "constant" and node.tensor.numel == 1 and node.attrs["data"].known:
        value = node.attrs["data"].value.item()
    else:
        return None
    return value if isinstance(value, (bool, int, float, complex)) else None


def device_type(node: Node) -> str:
    """ "cuda" of a tensor on "cuda:0"."""
    return node.tensor.device.split(":")[0]


def is_literal(node: Node, value: Number) -> bool:
    """`node` is exactly `value` everywhere; 0.0 and -0.0 differ."""
    found = literal(node)
    if found is None or found != value:
        return False
    return isinstance(found, complex) or found != 0 or math.copysign(1, found) == math.copysign(1, float(value.real))


def fit(x: Node, like: Type) -> Node | None:
    """`x` cast and expanded to the type `like`; None where that is not possible."""
    if not isinstance(x.type, TensorType) or not isinstance(like, TensorType) or x.type.device != like.device:
        return None
    if x.type.dtype != like.dtype:
        x = OPS["cast"](x, dtype=like.dtype)
    return x if same_shape(x.shape, like.shape) else OPS["expand"](x, shape=like.shape)


def is_float(node: Node) -> bool:
    return isinstance(node.type, TensorType) and node.type.dtype.is_floating_point


def is_integer(node: Node) -> bool:
    """Integers; bool is none."""
    return isinstance(node.type, TensorType) and category(node.type.dtype) == 1


def power_of_two(value: Number) -> bool:
    """x * (1 / value) == x / value exactly, in float32 and wider: a power of two whose reciprocal is far from denormal."""
    if isinstance(value, (bool, complex)) or value == 0 or not math.isfinite(value):
        return False
    mantissa, exponent = math.frexp(abs(value))
    return mantissa == 0.5 and abs(exponent) < 120


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Every value of `narrow` is a value of `wide`."""
    if wide == narrow or narrow == torch.bool:
        return True
    if wide == torch.bool or category(wide) < category(narrow) or category(wide) == 3:
        return False
    if category(narrow) == 1:
        bits = _integer_bits(narrow)
        return bits <= _mantissa_bits(wide) if category(wide) == 2 else _integer_holds(wide, narrow)
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.tiny * a.eps <= b.tiny * b.eps


def _integer_bits(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max.bit_length()


def _mantissa_bits(dtype: torch.dtype) -> int:
    """Integers of up to that many bits are exact; no more than the exponent reaches."""
    info = torch.finfo(dtype)
    return min(1 - int(math.log2(info.eps)), int(math.log2(info.max)))


def _integer_holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    a, b = torch.iinfo(wide), torch.iinfo(narrow)
    return a.min <= b.min and a.max >= b.max


_NEVER_MINUS_ZERO = frozenset({"abs", "square", "exp", "exp2", "sigmoid", "softmax", "erfc", "hypot", "iota"})


def never_minus_zero(node: Node) -> bool:
    """No element is -0.0, so that adding +0.0 changes nothing."""
    if not is_float(node) or node.op.name in _NEVER_MINUS_ZERO:
        return True
    if node.op.name == "cast":
        return not is_float(node.inputs[0])
    return node.op.name == "add" and any(never_minus_zero(i) for i in node.inputs if isinstance(i.type, TensorType))


def readers_through(node: Node, readers: Mapping[Node, list[Node]], roots: Set[Node], is_view: Callable[[Node], bool]) -> set[Node | None]:
    """Who reads the value, directly or through views; None stands for the caller."""
    found: set[Node | None] = set()
    stack = [node]
    while stack:
        value = stack.pop()
        if value in roots:
            found.add(None)
        for reader in readers[value]:
            if is_view(reader):
                stack.append(reader)
            else:
                found.add(reader)
    return found
