"""`recognize`: finds softmax, norms, activations, rotary embedding and attention in primitive form and names them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Union

import torch

from ..ir.dims import dim, same, same_shape
from ..ir.graph import Graph, Node
from ..ir.ops import OPS
from ..ir.patterns import Pat, Refusal, Var, pat
from ..ir.rules import Match, Rule, pattern_rule
from ..ir.types import same_type
from .attention_gradients import GRADIENT_RULES
from .attention_rules import ATTENTION_RULES
from .base import Notes, Pass, Reason
from .facts import literal
from .rules import settle

Answer = Union[bool, Refusal]


@dataclass(frozen=True)
class Recognize(Pass):
    """What was decomposed becomes one op again, so that fusion and the vendor library see it whole.

        s = sigmoid(x)           -->    y = silu(x)
        y = mul(x, s)

        m = matmul(q, kt)
        l = mul(m, 0.125)
        a = add(l, mask)         -->    y = attention(q, permute(kt), v, mask, scale=0.125)
        p = softmax(a, dim=3)
        y = matmul(p, v)

    Composites compute in float32 inside, so that 16-bit values are rounded once instead of after each step. A form is left alone
    if something outside reads one of its inner values (SHARED), or if the composite would differ on masked, infinite or -0.0 values.
    """

    name: ClassVar[str] = "recognize"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        return settle(graph, RULES, notes or Notes())


# -- patterns


def num(value: float) -> Var:
    """A literal of that value: a scalar or a fill, an integer or a float, perhaps rounded to float32."""
    return Var("", lambda n: _close(literal(n), value))


def _close(found: Any, value: float) -> bool:
    return isinstance(found, (int, float)) and math.isclose(found, value, rel_tol=1e-7)


def number(name: str) -> Var:
    return Var(name, lambda n: isinstance(literal(n), (int, float)))


X = Var("x")


def closed(match: Match, *conditions: bool) -> Answer:
    """The usual check: `conditions` hold (else the shapes do not fit), and nothing outside reads an inner value."""
    if not all(conditions):
        return Refusal(Reason.SHAPE_MISMATCH, match.root)
    inner = match.escaping()
    return True if inner is None else Refusal(Reason.SHARED, inner)


def _make(op: str, *names: str, **attrs: Any) -> Callable[[Match], Node]:
    return lambda m: OPS[op](*(m[n] for n in names), **attrs)


def _keeps(match: Match) -> bool:
    """The composite has the type of x; so must the root."""
    return same_type(match["x"].type, match.root.type)


# -- softmax


_MAX = pat("amax", X, name="max", attrs={"keepdim": True})
_SHIFTED = pat("sub", X, _MAX, name="shifted")
_EXP = pat("exp", _SHIFTED, name="e")
_TOTAL = pat("sum", _EXP, name="sum", attrs={"keepdim": True})
_SOFTMAX = pat("div", _EXP, _TOTAL), pat("mul", _EXP, pat("reciprocal", _TOTAL))
_LOG_SOFTMAX = pat("sub", _SHIFTED, pat("log", pat("sum", pat("exp", _SHIFTED), name="sum", attrs={"keepdim": True})))


def _one_dim(m: Match) -> Answer:
    dims = m["sum"].attrs["dims"]
    return closed(m, dims == m["max"].attrs["dims"], len(dims) == 1, m["x"].dtype.is_floating_point)


def _softmax(op: str) -> Callable[[Match], Node]:
    return lambda m: OPS[op](m["x"], dim=m["sum"].attrs["dims"][0])


def _narrow(m: Match) -> Answer:
    """cast(op(cast(x: f16, f32)), f16): the composite on x does just that inside."""
    x = m["x"]
    narrow = x.dtype.is_floating_point and x.dtype.itemsize == 2 and m["wide"].dtype == torch.float32
    if not narrow or m.root.dtype != x.dtype:
        return Refusal(Reason.ROUNDING, m.root)
    return closed(m)


def _narrowed(m: Match) -> Node:
    return OPS[m["op"].op.name](m["x"], **m["op"].attrs)


_WIDENED = ("softmax", "log_softmax", "layer_norm", "rms_norm")
_NORMS = ("layer_norm", "rms_norm", "group_norm")
_SHIFTED_NORMS = ("layer_norm", "group_norm")

# -- norms


def _scaled_by_root(value: Any, under: Any) -> tuple[Pat, ...]:
    """value / sqrt(under + eps), in its two forms."""
    shifted = pat("add", under, number("eps"))
    return pat("mul", value, pat("rsqrt", shifted)), pat("div", value, pat("sqrt", shifted))


_MEAN = pat("mean", X, name="mean", attrs={"keepdim": True})
_CENTERED = pat("sub", X, _MEAN, name="centered")
_VARIANCES = (
    pat("mean", pat("square", _CENTERED), name="var", attrs={"keepdim": True}),
    pat("var", X, name="var", attrs={"keepdim": True, "correction": lambda c: c == 0}),
)
_SQUARES = pat("mean", pat("square", X), name="var", attrs={"keepdim": True})


def _trailing(dims: tuple[int, ...], rank: int) -> bool:
    return bool(dims) and dims == tuple(range(rank - len(dims), rank))


def _normalizes(m: Match) -> Answer:
    dims, mean = m["var"].attrs["dims"], m.get("mean")
    fits = mean is None or mean.attrs["dims"] == dims
    return closed(m, fits, _trailing(dims, m["x"].tensor.rank), m["x"].dtype.is_floating_point, _keeps(m))


def _norm(op: str) -> Callable[[Match], Node]:
    return lambda m: OPS[op](m["x"], axes=len(m["var"].attrs["dims"]), eps=float(literal(m["eps"])))  # type: ignore[arg-type]


def _affine(m: Match) -> Answer:
    """The operand has the shape of the normalized dimensions, or of the channels for a group norm."""
    norm, p = m["norm"], m["p"]
    if not same_type(m.root.type, norm.type) or getattr(p.type, "dtype", None) != norm.dtype:
        return Refusal(Reason.SHAPE_MISMATCH, p)
    if norm.op.name == "group_norm":
        wanted = (norm.shape[1], *(1,) * (norm.tensor.rank - 2))
        whole = p.shape[1:] if p.tensor.rank == norm.tensor.rank and same(p.shape[0], 1) else p.shape
        return closed(m, same_shape(whole, wanted))
    return closed(m, same_shape(p.shape, norm.shape[norm.tensor.rank - norm.attrs["axes"] :]))


def _with_parameter(m: Match) -> Node:
    norm, p = m["norm"], m["p"]
    if norm.op.name == "group_norm":
        vector = (norm.shape[1],)
        direct = p.op.name == "reshape" and same_shape(p.inputs[0].shape, vector)
        p = p.inputs[0] if direct else OPS["reshape"](p, shape=vector)
    return OPS[norm.op.name](*norm.inputs, p, **norm.attrs)


def _groups(m: Match) -> Answer:
    x, grouped = m["x"], m["grouped"]
    fits = grouped.tensor.rank == 3 and x.tensor.rank >= 2 and m["norm"].attrs["axes"] == 1 and isinstance(grouped.shape[1], int)
    fits = fits and same(grouped.shape[0], x.shape[0]) and isinstance(x.shape[1], int) and x.shape[1] % max(grouped.shape[1], 1) == 0
    return closed(m, fits and same_shape(m.root.shape, x.shape))


# -- activations


_HALF, _ONE = num(0.5), num(1.0)
_BY_ROOT_TWO = (pat("mul", X, num(math.sqrt(0.5))), pat("div", X, num(math.sqrt(2.0))))
_CUBE = (pat("mul", pat("square", X), X), pat("pow", X, num(3.0)))
_TANH_ARGUMENT = tuple(pat("mul", pat("add", X, pat("mul", cube, num(0.044715))), num(math.sqrt(2 / math.pi))) for cube in _CUBE)


def _half_times(factor: Pat) -> tuple[Pat, ...]:
    """0.5 * x * factor in its three groupings."""
    return pat("mul", pat("mul", X, _HALF), factor), pat("mul", X, pat("mul", factor, _HALF)), pat("mul", pat("mul", X, factor), _HALF)


def _gelu_patterns(op: str, arguments: tuple[Pat, ...]) -> list[Pat]:
    return [p for u in arguments for p in _half_times(pat("add", pat(op, u), _ONE))]


_CONSTANTS = (0.5, 1.0, 3.0, 0.044715, math.sqrt(0.5), math.sqrt(2.0), math.sqrt(2 / math.pi))


def _activation(m: Match) -> Answer:
    """In float64 a constant that was rounded to float32 makes another function."""
    numbers = [literal(i) for node in m.nodes for i in node.inputs]
    rounded = [n for n in numbers if isinstance(n, (int, float)) and not any(math.isclose(n, c, rel_tol=1e-11) for c in _CONSTANTS)]
    if m["x"].dtype == torch.float64 and rounded:
        return Refusal(Reason.ROUNDING, rounded[0])
    return closed(m, _keeps(m), m["x"].dtype.is_floating_point)


_EXP_SUM = pat("add", pat("exp", pat("neg", X)), _ONE)

# -- rotary position embedding


def _rotated(m: Match) -> Answer:
    """The two parts are the halves of x along its last dimension, the second one negated in front."""
    x, first, second = m["x"], m["first"], m["second"]
    last = x.tensor.rank - 1
    if m["cat"].attrs["dim"] != last or first.inputs[0] is not second.inputs[0]:
        return Refusal(Reason.SHAPE_MISMATCH, m["cat"])
    base, offset = (x.inputs[0], x.attrs["start"]) if _slice_of(first, x, last) else (x, 0)
    size = x.shape[last]
    half = size // 2 if isinstance(size, int) else dim(size / 2)
    wanted = ((first, 0, half), (second, half, size))
    fits = first.inputs[0] is base and all(_covers(part, last, offset + lo, offset + hi) for part, lo, hi in wanted)
    return closed(m, fits, _keeps(m), isinstance(size, int) and size % 2 == 0)


def _slice_of(part: Node, x: Node, last: int) -> bool:
    """x is itself a slice, and the part was composed with it."""
    return x.op.name == "slice" and x.attrs["dim"] == last and x.attrs["step"] == 1 and part.inputs[0] is x.inputs[0]


def _covers(part: Node, last: int, start: Any, stop: Any) -> bool:
    a = part.attrs
    return a["dim"] == last and a["step"] == 1 and same(a["start"], start) and same(a["stop"], stop)


_HALVES = pat("cat", pat("neg", pat("slice", Var("base"), name="second")), pat("slice", Var("base"), name="first"), name="cat")
_ROPE = pat("add", pat("mul", X, Var("cos")), pat("mul", _HALVES, Var("sin")))

# -- the table


def _rules() -> list[Rule]:
    """Every rule: (name, patterns, what it makes, check)."""
    table: list[tuple[str, tuple[Pat, ...] | list[Pat], Callable[[Match], Node], Callable[[Match], Answer]]] = [
        ("softmax", _SOFTMAX, _softmax("softmax"), _one_dim),
        ("log-softmax", (_LOG_SOFTMAX,), _softmax("log_softmax"), _one_dim),
        ("narrow", (pat("cast", pat(_WIDENED, pat("cast", X, name="wide"), name="op")),), _narrowed, _narrow),
        ("layer-norm", [p for v in _VARIANCES for p in _scaled_by_root(_CENTERED, v)], _norm("layer_norm"), _normalizes),
        ("rms-norm", _scaled_by_root(X, _SQUARES), _norm("rms_norm"), _normalizes),
        ("group-norm", (pat("reshape", pat("layer_norm", pat("reshape", X, name="grouped"), name="norm")),),
         lambda m: OPS["group_norm"](m["x"], groups=m["grouped"].shape[1], eps=m["norm"].attrs["eps"]), _groups),
        ("norm-scale", (pat("mul", pat(_NORMS, Var("x"), name="norm"), Var("p")),), _with_parameter, _affine),
        ("norm-shift", (pat("add", pat(_SHIFTED_NORMS, Var("x"), Var("w"), name="norm"), Var("p")),), _with_parameter, _affine),
        ("gelu", _gelu_patterns("erf", _BY_ROOT_TWO), _make("gelu", "x"), _activation),
        ("gelu-tanh", _gelu_patterns("tanh", _TANH_ARGUMENT), _make("gelu", "x", approximate="tanh"), _activation),
        ("sigmoid", (pat("reciprocal", _EXP_SUM), pat("div", _ONE, _EXP_SUM)), _make("sigmoid", "x"), _activation),
        ("silu", (pat("mul", X, pat("sigmoid", X)), pat("div", X, _EXP_SUM)), _make("silu", "x"), _activation),
        ("rope", (_ROPE,), _make("rope", "x", "cos", "sin"), _rotated),
    ]  # fmt: skip
    return [pattern_rule(f"recognize.{name}", pattern, make, check) for name, patterns, make, check in table for pattern in patterns]


RULES: list[Rule] = [*_rules(), *ATTENTION_RULES, *GRADIENT_RULES]
