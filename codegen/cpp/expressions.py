"""Scalars and indices as C++ text on the vocabulary of vec.h: tables from operations to text, minimal parentheses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import sympy
import torch

from ...ir.dims import Dim, FloorDiv, Mod
from ...ir.scalar import Apply, Const, Scalar
from ..errors import Unsupported

STORAGE: dict[torch.dtype, str] = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "half", torch.bool: "bool",
    torch.int8: "int8_t", torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t",
    torch.uint8: "uint8_t", torch.uint16: "uint16_t", torch.uint32: "uint32_t", torch.uint64: "uint64_t",
}  # fmt: skip

NARROW = frozenset({torch.int8, torch.int16, torch.uint8, torch.uint16})  # C++ computes these in int when they are no vectors

# C++ precedence, higher binds tighter
PRIMARY, UNARY, MULTIPLY, ADD, SHIFT, RELATION, EQUAL, AND, XOR, OR, LOWEST = 16, 15, 13, 12, 11, 9, 8, 7, 6, 5, 0

BINARY: dict[str, tuple[str, int]] = {
    "add": ("+", ADD), "sub": ("-", ADD), "mul": ("*", MULTIPLY), "div": ("/", MULTIPLY),
    "and": ("&", AND), "or": ("|", OR), "xor": ("^", XOR), "shl": ("<<", SHIFT), "shr": (">>", SHIFT),
}  # fmt: skip
COMPARE: dict[str, tuple[str, int]] = {
    "eq": ("==", EQUAL), "ne": ("!=", EQUAL), "lt": ("<", RELATION), "le": ("<=", RELATION), "gt": (">", RELATION), "ge": (">=", RELATION),
}  # fmt: skip
CALLS: frozenset[str] = frozenset({
    "floordiv", "truncdiv", "mod", "fmod", "abs", "min", "max", "fmin", "fmax", "floor", "ceil", "trunc", "round", "sqrt", "rsqrt",
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "pow", "ipow", "fma", "copysign", "nextafter", "hypot", "isnan", "isinf", "signbit",
})  # fmt: skip
INTEGRAL_IDENTITY = frozenset({"floor", "ceil", "trunc", "round"})

Text = tuple[str, int]  # an expression and its precedence


def wrap(text: Text, outer: int) -> str:
    return text[0] if text[1] >= outer else f"({text[0]})"


def literal(value: bool | int | float, dtype: torch.dtype) -> Text:
    """A constant of a compute dtype."""
    kind = STORAGE[dtype]
    if dtype == torch.bool:
        return ("true" if value else "false", PRIMARY)
    if dtype.is_floating_point:
        return _float_literal(float(value), dtype)
    number = int(value)
    if dtype == torch.int32 and number > -(1 << 31):
        return (str(number), PRIMARY if number >= 0 else UNARY)
    if dtype == torch.int64 and number == -(1 << 63):
        return ("least<int64_t>()", PRIMARY)
    suffix = "u" if dtype in (torch.uint64, torch.uint32) else ""
    return (f"{kind}({number}{suffix})", PRIMARY)


def _float_literal(value: float, dtype: torch.dtype) -> Text:
    kind = STORAGE[dtype]
    number = float(np.float32(value)) if dtype == torch.float32 else value
    if math.isnan(number):
        return (f"nan<{kind}>", PRIMARY)
    if math.isinf(number):
        return (f"inf<{kind}>", PRIMARY) if number > 0 else (f"-inf<{kind}>", UNARY)
    text = str(np.float32(number)) if dtype == torch.float32 else repr(number)
    text = text if any(c in text for c in ".en") else text + ".0"
    text += "f" if dtype == torch.float32 else ""
    return (text, UNARY if text.startswith("-") else PRIMARY)


def apply_text(value: Apply, args: list[Text]) -> Text:
    """The text of an operation on printed operands."""
    kind = value.args[0].dtype
    if value.op in BINARY:
        return _binary(value, args)
    if value.op in COMPARE:
        return _comparison(value.op, kind, args)
    if value.op in ("cast", "bitcast"):
        return _conversion(value, args[0])
    if value.op == "where":
        return _select(args)
    if value.op == "neg":
        return _fit(value.dtype, ("-" + wrap(args[0], UNARY + 1), UNARY))
    if value.op == "not":
        return _fit(value.dtype, (("!" if kind == torch.bool else "~") + wrap(args[0], UNARY), UNARY))
    if value.op in INTEGRAL_IDENTITY and not kind.is_floating_point or value.op == "abs" and not kind.is_signed:
        return args[0]
    if value.op in ("isnan", "isinf") and not kind.is_floating_point:
        return ("false", PRIMARY)
    if value.op in CALLS:
        return _fit(value.dtype, (f"{value.op}({', '.join(a[0] for a in args)})", PRIMARY))
    raise Unsupported(reason=f"the C++ printer has no text for the operation {value.op!r}")


def _binary(value: Apply, args: list[Text]) -> Text:
    sign, precedence = BINARY[value.op]
    left, right = args
    if _sigmoid(value):
        return (f"inverse({right[0]})", PRIMARY)
    if precedence == SHIFT and not _shifts_inside(value):
        return _fit(value.dtype, (f"{value.op}({left[0]}, {right[0]})", PRIMARY))
    # `a & b == c` and `a + b << c` are right but read wrong: parentheses around any other operator
    loose = precedence in (AND, OR, XOR, SHIFT)
    outer = UNARY if loose else precedence
    same = loose and sign not in ("<<", ">>") and left[1] == precedence
    text = f"{wrap(left, precedence if same else outer)} {sign} {wrap(right, outer + (not loose))}"
    return _fit(value.dtype, (text, precedence))


def _sigmoid(value: Apply) -> bool:
    """1 / (1 + e^x)."""
    if value.op != "div" or value.dtype != torch.float32 or not _is_one(value.args[0]):
        return False
    sum_ = value.args[1]
    return isinstance(sum_, Apply) and sum_.op == "add" and _is_one(sum_.args[0]) and _is_exp(sum_.args[1])


def _is_one(value: Scalar) -> bool:
    return isinstance(value, Const) and value.value == 1


def _is_exp(value: Scalar) -> bool:
    return isinstance(value, Apply) and value.op == "exp"


def _shifts_inside(value: Apply) -> bool:
    """By a literal for which C++ defines its operator, or by a few bits of something."""
    count, width = value.args[1], 8 * value.dtype.itemsize
    if isinstance(count, Apply) and count.op == "and" and isinstance(count.args[1], Const):
        return 0 <= count.args[1].value < width
    return isinstance(count, Const) and 0 <= count.value < width


def _fit(dtype: torch.dtype, text: Text) -> Text:
    return (f"as<{STORAGE[dtype]}>({text[0]})", PRIMARY) if dtype in NARROW else text


def _comparison(op: str, kind: torch.dtype, args: list[Text]) -> Text:
    sign, precedence = COMPARE[op]
    if kind == torch.bool and op not in ("eq", "ne"):
        return _bool_order(op, *(wrap(a, UNARY) for a in args))
    if kind == torch.bool:
        return (f"{'!' if op == 'eq' else ''}({wrap(args[0], UNARY)} ^ {wrap(args[1], UNARY)})", UNARY)
    return (f"mask({wrap(args[0], precedence + 1)} {sign} {wrap(args[1], precedence + 1)})", PRIMARY)


def _bool_order(op: str, a: str, b: str) -> Text:
    """Order of bools by logic: a vector's true is -1, a scalar's 1."""
    sides = {"lt": f"!{a} & {b}", "le": f"!{a} | {b}", "gt": f"{a} & !{b}", "ge": f"{a} | !{b}"}
    return (f"mask({sides[op]})", PRIMARY)


def _select(args: list[Text]) -> Text:
    return (f"select({', '.join(a[0] for a in args)})", PRIMARY)


def _conversion(value: Apply, arg: Text) -> Text:
    source, target = value.args[0].dtype, value.dtype
    name = STORAGE[target]
    if value.op == "bitcast":
        return (f"recast<{name}>({arg[0]})", PRIMARY)
    if source == target:
        return arg
    if target in (torch.bfloat16, torch.float16):
        return (f"rounded<{name}>({arg[0]})", PRIMARY)
    if target == torch.bool:
        return (f"mask({wrap(arg, EQUAL + 1)} != 0)", PRIMARY)
    if source == torch.bool:
        return (f"select({arg[0]}, {literal(1, target)[0]}, {literal(0, target)[0]})", PRIMARY)
    return (f"as<{name}>({arg[0]})", PRIMARY)


def const_text(value: Const) -> Text:
    return literal(value.value, value.dtype)


# ---- indices


def index_text(expr: Dim, names: Mapping[str, str], vectors: bool = False) -> Text:
    """An index expression; `names` renames symbols. With `vectors`, symbols may be vectors of int64 and division is by function."""
    expr = sympy.sympify(expr)
    if expr.is_Integer:
        return (str(int(expr)), PRIMARY if int(expr) >= 0 else UNARY)
    if expr.is_Symbol:
        name = names.get(expr.name, expr.name)  # type: ignore[attr-defined]
        return (name, PRIMARY)
    if expr.is_Add:
        return _sum_text(expr, names, vectors)
    args = [index_text(a, names, vectors) for a in expr.args]  # type: ignore[arg-type]
    if expr.is_Mul:
        return ("*".join(wrap(a, UNARY) for a in args), MULTIPLY)
    if expr.is_Pow:
        return ("*".join([wrap(args[0], UNARY)] * int(expr.args[1])), MULTIPLY)  # type: ignore[call-overload]
    if isinstance(expr, (FloorDiv, Mod)):
        return _division_text(expr, args, vectors)
    if isinstance(expr, (sympy.Max, sympy.Min)):
        name = "max" if isinstance(expr, sympy.Max) else "min"
        text = args[0][0]
        for a in args[1:]:
            text = f"{name}(int64_t({text}), int64_t({a[0]}))"
        return (text, PRIMARY)
    raise Unsupported(reason=f"the C++ printer cannot index by {expr}")


def _division_text(expr: sympy.Expr, args: list[Text], vectors: bool) -> Text:
    plain = not vectors and expr.args[0].is_nonnegative
    if plain:
        sign = "/" if isinstance(expr, FloorDiv) else "%"
        return (f"{wrap(args[0], UNARY)} {sign} {wrap(args[1], UNARY)}", MULTIPLY)
    name = "floordiv" if isinstance(expr, FloorDiv) else "mod"
    return (f"{name}({args[0][0]}, int64_t({args[1][0]}))", PRIMARY)


def _sum_text(expr: sympy.Expr, names: Mapping[str, str], vectors: bool) -> Text:
    terms = sorted(expr.args, key=lambda t: (bool(t.is_Integer), t.could_extract_minus_sign(), sympy.default_sort_key(t)))
    text = ""
    for term in terms:
        negative = bool(term.could_extract_minus_sign())
        body = wrap(index_text(-term if negative else term, names, vectors), ADD + negative)  # type: ignore[operator]
        joint = " - " if negative else " + "
        text = f"{text}{joint}{body}" if text else ("-" + body if negative else body)
    return (text, ADD)
