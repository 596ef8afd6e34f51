"""Rules of arithmetic for `canonicalize`: each is bitwise exact, NaN, infinities, -0.0 and dtypes included.

What looks like a rule but is none is refused with a reason: x + 0.0 turns -0.0 into 0.0, x * 0.0 keeps NaN, x / 3 is not x * (1 / 3).
"""

from __future__ import annotations

from typing import Any

import torch

from ..ir.graph import Node, is_scalar
from ..ir.ops import OPS
from ..ir.patterns import Refusal
from ..ir.reasons import Reason
from ..ir.rules import Outcome, Site
from ..ir.types import Number, TensorType, category, same_type
from .facts import fit, holds, is_float, is_integer, is_literal, literal, never_minus_zero, power_of_two
from .rules import Table

_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_WIDE = (torch.float32, torch.float64)


def _full(node: Node, value: Number) -> Node:
    t = node.tensor
    return OPS["full"](shape=t.shape, value=value, dtype=t.dtype, device=t.device)


def literal_right(node: Node, site: Site) -> Outcome:
    """2 * x --> x * 2;  1 < x --> x > 1"""
    a, b = node.inputs
    if literal(a) is None or literal(b) is not None:
        return None
    return OPS[_FLIPPED.get(node.op.name, node.op.name)](b, a)


def add_zero(node: Node, site: Site) -> Outcome:
    """x + 0 --> x, where x is an integer or cannot be -0.0;  x + -0.0 --> x"""
    x, zero = node.inputs
    if literal(zero) != 0 or is_scalar(x):
        return None
    if is_float(node) and not is_literal(zero, -0.0) and not never_minus_zero(x) or category(node.dtype) == 3:
        return Refusal(Reason.SIGNED_ZERO, x.hint or x.op.name)
    return fit(x, node.type)


def sub_zero(node: Node, site: Site) -> Outcome:
    """x - 0 --> x"""
    x, zero = node.inputs
    if is_scalar(x) or category(node.dtype) == 3 or not (is_literal(zero, 0) or is_literal(zero, -0.0) and not is_float(node)):
        return None
    return fit(x, node.type)


def zero_sub(node: Node, site: Site) -> Outcome:
    """0 - x --> -x on integers;  0.0 - x differs for x = 0.0"""
    zero, x = node.inputs
    if literal(zero) != 0 or is_scalar(x):
        return None
    if not is_integer(node):
        return Refusal(Reason.SIGNED_ZERO, x.hint or x.op.name)
    whole = fit(x, node.type)
    return whole and OPS["neg"](whole)


def times_one(node: Node, site: Site) -> Outcome:
    """x * 1 --> x;  x / 1 --> x"""
    x, one = node.inputs
    return fit(x, node.type) if literal(one) == 1 and not is_scalar(x) else None


def times_minus_one(node: Node, site: Site) -> Outcome:
    """x * -1 --> -x"""
    x, factor = node.inputs
    if literal(factor) != -1 or is_scalar(x) or category(node.dtype) == 3:
        return None
    whole = fit(x, node.type)
    return whole and OPS["neg"](whole)


def times_zero(node: Node, site: Site) -> Outcome:
    """x * 0 --> 0 on integers;  NaN * 0.0 is NaN"""
    x, zero = node.inputs
    if literal(zero) != 0 or is_scalar(x):
        return None
    if category(node.dtype) > 1:
        return Refusal(Reason.NOT_FINITE, x.hint or x.op.name)
    return _full(node, 0)


def square_of(node: Node, site: Site) -> Outcome:
    """x * x --> square(x)"""
    a, b = node.inputs
    return OPS["square"](a) if a is b and category(node.dtype) in (1, 2) else None


def div_by_power_of_two(node: Node, site: Site) -> Outcome:
    """x / 8 --> x * 0.125"""
    x, by = node.inputs
    value = literal(by)
    if value is None or is_scalar(x) or not is_float(node) or value == 1:
        return None
    if not power_of_two(value):
        return Refusal(Reason.ROUNDING, str(value))
    product = OPS["mul"](x, 1 / value)
    return fit(product, node.type)


def one_over(node: Node, site: Site) -> Outcome:
    """1 / x --> reciprocal(x)"""
    one, x = node.inputs
    if literal(one) != 1 or is_scalar(x) or not is_float(node):
        return None
    whole = fit(x, node.type)
    return whole and OPS["reciprocal"](whole)


def reciprocal_of_sqrt(node: Node, site: Site) -> Outcome:
    """reciprocal(sqrt(x)) --> rsqrt(x), which torch computes so in float32 and float64"""
    (x,) = node.inputs
    if x.op.name != "sqrt":
        return None
    if node.dtype not in _WIDE or x.inputs[0].dtype != node.dtype:
        return Refusal(Reason.ROUNDING, str(node.dtype))
    return OPS["rsqrt"](x.inputs[0])


def neg_of_neg(node: Node, site: Site) -> Outcome:
    """-(-x) --> x"""
    (x,) = node.inputs
    return x.inputs[0] if x.op.name == "neg" else None


def not_of_not(node: Node, site: Site) -> Outcome:
    """not not x --> x on bool"""
    (x,) = node.inputs
    return x.inputs[0] if x.op is node.op and same_type(x.inputs[0].type, node.type) else None


def not_of_equal(node: Node, site: Site) -> Outcome:
    """not (a == b) --> a != b, also with NaN;  not (a < b) is no a >= b"""
    (x,) = node.inputs
    other = {"eq": "ne", "ne": "eq"}.get(x.op.name)
    return OPS[other](*x.inputs) if other else None


def add_of_neg(node: Node, site: Site) -> Outcome:
    """x + -y --> x - y;  -x + y --> y - x"""
    for x, y in (node.inputs, node.inputs[::-1]):
        if y.op.name == "neg" and y.dtype == node.dtype:
            return OPS["sub"](x, y.inputs[0])
    return None


def sub_of_neg(node: Node, site: Site) -> Outcome:
    """x - -y --> x + y"""
    x, y = node.inputs
    return OPS["add"](x, y.inputs[0]) if y.op.name == "neg" and y.dtype == node.dtype else None


def drop_sign(node: Node, site: Site) -> Outcome:
    """abs(-x), abs(abs(x)) --> abs(x);  square(-x), square(abs(x)) --> square(x)"""
    (x,) = node.inputs
    return OPS[node.op.name](x.inputs[0]) if x.op.name in ("neg", "abs") and x.inputs[0].dtype == x.dtype else None


def idempotent(node: Node, site: Site) -> Outcome:
    """relu(relu(x)) --> relu(x); likewise floor, ceil, trunc, round, sign"""
    (x,) = node.inputs
    return x if x.op is node.op else None


def same_operands(node: Node, site: Site) -> Outcome:
    """maximum(x, x) --> x; likewise minimum, and, or"""
    a, b = node.inputs
    return a if a is b and same_type(a.type, node.type) else None


def bool_operator(node: Node, site: Site) -> Outcome:
    """bitwise_and on bool --> logical_and; likewise or, xor, not"""
    return OPS[node.op.name.replace("bitwise", "logical")](*node.inputs) if node.dtype == torch.bool else None


def logical_constant(node: Node, site: Site) -> Outcome:
    """x and True --> x;  x and False --> False;  x or False --> x;  x or True --> True"""
    x, other = node.inputs
    value = literal(other)
    if not isinstance(value, (bool, int, float)) or is_scalar(x):
        return None
    if bool(value) != (node.op.name == "logical_and"):
        return _full(node, bool(value))
    return fit(x, node.type) if x.dtype == torch.bool else None


def power(node: Node, site: Site) -> Outcome:
    """x ** 0 --> 1;  1 --> x;  2 --> square(x);  3 --> x * x * x;  0.5 --> sqrt(x);  -0.5 --> rsqrt(x);  -1 --> reciprocal(x)"""
    x, exponent = node.inputs
    n = literal(exponent)
    if is_scalar(x) or isinstance(n, complex) or n not in _POWERS or category(node.dtype) not in (1, 2):
        return None
    if n not in (0, 1, 2) and not is_float(node):
        return None
    if n == 0:
        return _full(node, 1)
    if n in (3, -0.5) and node.dtype not in _WIDE:
        return Refusal(Reason.ROUNDING, str(node.dtype))
    whole = fit(x, node.type)
    if whole is None or n == 1:
        return whole
    return OPS["mul"](OPS["square"](whole), whole) if n == 3 else OPS[_POWERS[n]](whole)


_POWERS: dict[Any, str] = {0: "full", 1: "", 2: "square", 3: "mul", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


def where_constant(node: Node, site: Site) -> Outcome:
    """where(True, a, b) --> a;  where(c, a, a) --> a"""
    condition, a, b = node.inputs
    value = literal(condition)
    if a is b and not is_scalar(a):
        return fit(a, node.type)
    if value is None:
        return None
    kept = a if value else b
    number = literal(kept)
    if is_scalar(kept):
        return None if number is None or isinstance(number, complex) else _full(node, number)
    return fit(kept, node.type)


def where_not(node: Node, site: Site) -> Outcome:
    """where(not c, a, b) --> where(c, b, a)"""
    condition, a, b = node.inputs
    if condition.op.name != "logical_not" or condition.inputs[0].dtype != torch.bool:
        return None
    return OPS["where"](condition.inputs[0], b, a)


def cast_same(node: Node, site: Site) -> Outcome:
    """cast(x, dtype of x) --> x"""
    (x,) = node.inputs
    return x if x.dtype == node.dtype else None


def cast_of_cast(node: Node, site: Site) -> Outcome:
    """cast(cast(x: f16, f32), bf16) --> cast(x, bf16), where the first cast loses nothing"""
    (middle,) = node.inputs
    if middle.op.name != "cast":
        return None
    x = middle.inputs[0]
    if not holds(middle.dtype, x.dtype):
        return Refusal(Reason.ROUNDING, f"{x.dtype} to {middle.dtype}".replace("torch.", ""))
    if is_float(x) and category(node.dtype) == 1:  # out-of-range floats become whatever the hardware says, which may depend on the width
        return None
    return OPS["cast"](x, dtype=node.dtype)


def cast_of_full(node: Node, site: Site) -> Outcome:
    """cast(full(1.0), i64) --> full(1)"""
    (x,) = node.inputs
    value = literal(x) if x.op.name == "full" else None
    if value is None:
        return None
    converted = torch.full((), value, dtype=x.dtype).to(node.dtype)
    return _full(node, converted.item())


def mean_of_sum(node: Node, site: Site) -> Outcome:
    """sum(x, dims) / (size of dims) --> mean(x, dims)"""
    total, by = node.inputs
    if total.op.name != "sum" or not isinstance(by.type, TensorType) and not is_scalar(by) or node.dtype not in _WIDE:
        return None
    x = total.inputs[0]
    count: Any = 1
    for d in total.attrs["dims"]:
        count = count * x.shape[d]
    value = by.type.value if is_scalar(by) else literal(by)  # type: ignore[union-attr]
    if value is None or isinstance(value, (bool, complex)) or x.dtype != node.dtype or not total.attrs["dims"] or value != count:
        return None
    return OPS["mean"](x, dims=total.attrs["dims"], keepdim=total.attrs["keepdim"])


ALGEBRA: Table = {
    "add": (literal_right, add_zero, add_of_neg),
    "sub": (sub_zero, zero_sub, sub_of_neg),
    "mul": (literal_right, times_one, times_minus_one, times_zero, square_of),
    "div": (times_one, mean_of_sum, div_by_power_of_two, one_over),
    "reciprocal": (reciprocal_of_sqrt,),
    "neg": (neg_of_neg,),
    "abs": (drop_sign,), "square": (drop_sign,),
    "pow": (power,),
    **dict.fromkeys(("relu", "floor", "ceil", "trunc", "round", "sign"), (idempotent,)),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), (literal_right, same_operands)),
    **dict.fromkeys(("eq", "ne", *_FLIPPED), (literal_right,)),
    **dict.fromkeys(("logical_and", "logical_or"), (literal_right, same_operands, logical_constant)),
    "logical_xor": (literal_right,),
    "logical_not": (not_of_not, not_of_equal), "bitwise_not": (bool_operator, not_of_not),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), (bool_operator, literal_right)),
    "where": (where_constant, where_not),
    "cast": (cast_same, cast_of_cast, cast_of_full),
}  # fmt: skip
