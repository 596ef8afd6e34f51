"""Lowering: a region's body becomes a `Kernel`, each evaluated point one scalar.

    region(x: f32[b, 384]) { y = relu(x); return y }   -->   for i in 384*b (grid): store out[i] = max(load x[i], 0)

Operands are converted to the promoted dtype, widened (f16, bf16 compute in f32), then the op's scalar expression applies. Results of
16-bit ops stay wide inside a kernel; only stores and explicit casts round.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy
import torch

from ..ir import ops
from ..ir.analysis.indices import ONE, ZERO, Poly, Quotient, expression
from ..ir.analysis.iteration import Placement, place
from ..ir.analysis.points import Kind, Point, Refusal, dims_of
from ..ir.analysis.primitives import expanded
from ..ir.dims import Dim, dim
from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, order
from ..ir.reasons import Reason
from ..ir.scalar import Apply, Const, Scalar, apply, cast, lift, where
from ..ir.types import ScalarType, compute_dtype
from .hashcons import shared
from .kernel import INSIDE, Attend, Axis, Buffer, Dot, Kernel, Load, Position, Reduce, Scan, Store, inside, scalars
from .names import RESERVED, sizes_of, unique
from .recurrences import lower_recurrence, recurrence_of

REDUCE_OPS = {
    "sum": "sum",
    "prod": "prod",
    "amax": "max",
    "amin": "min",
    "any": "any",
    "all": "all",
    "argmax": "argmax",
    "argmin": "argmin",
}


class LoweringError(TilewrightError):
    """A region that is not one kernel; `reason` is a Reason. The caller runs the region by its ops' eager meaning."""

    template = "cannot lower region {name!r}: {detail}"

    @property
    def reason(self) -> Reason:
        return self.fields["reason"]


def lower(body: Graph, name: str, label: str = "", sources: tuple[str, ...] = (), inplace: Sequence[tuple[int, int]] = ()) -> Kernel:
    """The kernel that computes `body`: inputs and outputs in the order of the body's. Raises LoweringError.

    inplace: (output, input) by number that may be the same memory (`ir.analysis.overwrite` says which).
    """
    body = expanded(body)
    try:
        recurrence = recurrence_of(body)
        if recurrence is not None:
            names = _buffer_names(body, set(body.symbols))
            kernel = lower_recurrence(body, recurrence, names, name, label, sources or tuple(_sources(body)))
        else:
            kernel = _Lowering(body, place(body)).kernel(name, label, sources or tuple(_sources(body)))
        kernel = replace(kernel, ranges=tuple((s, body.symbols[s]) for s in kernel.sizes if s in body.symbols))
        return in_place(kernel, inplace) if inplace else kernel
    except Refusal as refusal:
        source = refusal.node.prov.source if refusal.node else ""
        raise LoweringError(source, name=name, detail=str(refusal), reason=refusal.reason) from refusal


def in_place(kernel: Kernel, pairs: Sequence[tuple[int, int]]) -> Kernel:
    """The kernel for outputs that lie over inputs, given as numbers."""
    for k, i in pairs:
        store = next(s for s in kernel.stores if s.buffer == kernel.outputs[k].name)
        loads = [v for v in scalars(kernel.stores) if isinstance(v, Load) and v.buffer == kernel.inputs[i].name]
        assert all(v.index == store.index and not v.indirect for v in loads), f"{kernel.inputs[i].name} is read after it is overwritten"
    return replace(kernel, inplace=tuple((kernel.outputs[k].name, kernel.inputs[i].name) for k, i in pairs))


def position_readers(body: Graph) -> list[Node]:
    """The nodes that read at computed positions, in order: what the fault numbers of the body's kernel count."""
    return [n for n in order(expanded(body)) if n.op.name in ("gather", "index", "embedding")]


def _sources(body: Graph) -> dict[str, None]:
    """The user's source lines behind a body's nodes, in order."""
    return dict.fromkeys(s for n in order(body) if n.op.name != "input" for s in n.prov.sources)


class _Lowering:
    def __init__(self, body: Graph, placement: Placement) -> None:
        self.body = body
        self.placement = placement
        self.axes, self.final = placement.normal_form()
        self.inner = tuple(a.name for a in self.axes if a.inner)
        self.values: dict[Point, Scalar] = {}
        self.readers = position_readers(body)
        self.names = _buffer_names(body, {a.name for a in self.axes} | set(placement.ranges.extents) | set(body.symbols))

    def kernel(self, name: str, label: str, sources: tuple[str, ...]) -> Kernel:
        for point in self.placement.points:
            self.values[point] = _RULES[point.kind](self, point)
        inputs = tuple(Buffer(self.names[n], n.dtype, _span(n)) for n in self.body.inputs if not isinstance(n.type, ScalarType))
        outputs, stores = [], []
        for k, out in enumerate(self.placement.outputs):
            buffer = Buffer(self.names[k], out.node.dtype, out.node.tensor.numel)
            outputs.append(buffer)
            stores.append(Store(buffer.name, self.index(out.offset), _stored(self.values[out.point], buffer.dtype)))
        axes = tuple(Axis(a.name, dim(expression(a.extent)), a.inner) for a in self.axes)
        stores = shared(stores)
        faults = tuple(n.op.name for n in self.readers) if any(map(_reported, scalars(stores))) else ()
        return Kernel(
            name, axes, inputs, tuple(outputs), stores, sizes_of(axes, stores, (*inputs, *outputs)), label, sources, faults=faults
        )

    def index(self, p: Poly) -> sympy.Expr:
        return expression(self.final[p])

    def operands(self, point: Point) -> list[Scalar]:
        return [self.values[p] for p in point.operands]

    def integer(self, point: Point) -> Scalar:
        """The point's index as an i64 scalar, computed positions included."""
        computed = {n: cast(self.values[p], torch.int64) for n, p in zip(point.names, point.operands)}
        return arithmetic(self.final[point.index], computed)


def arithmetic(p: Poly, computed: Mapping[str, Scalar]) -> Scalar:
    """An index expression as a scalar: one Position, except around computed positions."""
    if not p.names() & computed.keys():
        return Position(torch.int64, expression(p))
    plain = Poly({m: c for m, c in p.terms.items() if not Poly({m: 1}).names() & computed.keys()})
    terms = [] if plain == ZERO else [arithmetic(plain, {})]
    for m, c in p.terms.items():
        factors = [a for a in m if Poly({(a,): 1}).names() & computed.keys()]
        if factors:
            rest = Poly({tuple(a for a in m if a not in factors): c})
            values = [_atom(a, computed) for a in factors]
            terms.append(functools.reduce(operator.mul, values if rest == ONE else [*values, arithmetic(rest, {})]))
    return functools.reduce(operator.add, terms)


def _atom(atom: str | Quotient, computed: Mapping[str, Scalar]) -> Scalar:
    if isinstance(atom, str):
        return computed[atom]
    divisor = atom.args[1].constant
    if divisor is None or atom.op not in ("//", "%"):
        raise Refusal(Reason.NOT_EXPRESSIBLE, None, f"{atom} of a computed position")
    return apply("floordiv" if atom.op == "//" else "mod", arithmetic(atom.args[0], computed), divisor)


def _load(low: _Lowering, point: Point) -> Scalar:
    assert point.node is not None
    values = low.operands(point)
    indirect = tuple((n, cast(v, torch.int64)) for n, v in zip(point.names, values))
    mask = values[-1] if point.masked else None
    return Load(compute_dtype(point.dtype), low.names[point.node], low.index(point.index), indirect, mask)


def _const(low: _Lowering, point: Point) -> Scalar:
    return lift(point.value, compute_dtype(point.dtype))


def _position(low: _Lowering, point: Point) -> Scalar:
    return low.integer(point)


def _apply(low: _Lowering, point: Point) -> Scalar:
    node = point.node
    assert node is not None
    values = low.operands(point)
    if node.op.name == "cast":
        return converted(values[0], node.attrs["dtype"])
    promoted = ops.operand_dtype(node.op, tuple(i.type for i in node.inputs))  # type: ignore[arg-type]
    wide = compute_dtype(promoted)
    fold = rounded(promoted) if ops.PROMOTION[node.op.name] is ops.Promotion.BOOL else folded(wide)
    head = [values.pop(0)] if node.op.name == "where" else []
    result = node.op.scalar(*head, *(cast(v, wide) for v in map(fold, values)), **node.attrs)  # type: ignore[misc]
    return cast(result, compute_dtype(point.dtype))


def folded(dtype: torch.dtype) -> Callable[[Scalar], Scalar]:
    """Converts a literal now; leaves the rest to a cast."""
    return lambda value: lift(value.value, dtype) if isinstance(value, Const) and _lossless(value, dtype) else value


def rounded(dtype: torch.dtype) -> Callable[[Scalar], Scalar]:
    """Comparisons see a literal as a tensor of `dtype` would hold it, as in torch: 0.1 beside a float16 tensor is float16's 0.1."""
    wide = compute_dtype(dtype)
    return lambda value: lift(ops.number_as(value.value, dtype), wide) if isinstance(value, Const) else value


def _lossless(value: Const, dtype: torch.dtype) -> bool:
    return dtype != torch.bool and (dtype.is_floating_point or not value.dtype.is_floating_point)


def converted(value: Scalar, dtype: torch.dtype) -> Scalar:
    """The value as a tensor of `dtype` holds it, in compute dtype: a 16-bit float is rounded to and widened again."""
    wide = compute_dtype(dtype)
    value = value if value.dtype == wide else cast(folded(wide)(value), wide)
    return value if wide == dtype else Apply(wide, "cast", (Apply(dtype, "cast", (value,)),))


def _stored(value: Scalar, dtype: torch.dtype) -> Scalar:
    """A store rounds to the buffer's dtype by itself."""
    if isinstance(value, Apply) and value.op == "cast" and value.args[0].dtype == dtype and compute_dtype(dtype) != dtype:
        rounded = value.args[0]
        return rounded.args[0] if isinstance(rounded, Apply) and rounded.op == "cast" else value
    return value


def _iota(low: _Lowering, point: Point) -> Scalar:
    """Float ranges are computed in f64, as by the op's meaning, then rounded once."""
    assert point.node is not None
    a = point.node.attrs
    wide = torch.float64 if point.dtype.is_floating_point else torch.int64
    value = cast(low.integer(point), wide) * lift(_number(a["step"]), wide) + lift(_number(a["start"]), wide)
    return converted(value, point.dtype)


def _number(value: object) -> bool | int | float:
    if isinstance(value, (bool, int, float)):
        return value
    raise Refusal(Reason.NOT_EXPRESSIBLE, None, f"a range from {value}")


def _inside(low: _Lowering, point: Point) -> Scalar:
    index = low.integer(point)
    below = index < arithmetic(point.bound, {})
    if point.value:
        return below
    return (index >= 0) & below


def _both(low: _Lowering, point: Point) -> Scalar:
    a, b = low.operands(point)
    return a & b


def _convert(low: _Lowering, point: Point) -> Scalar:
    return converted(low.operands(point)[0], point.dtype)


def _select(low: _Lowering, point: Point) -> Scalar:
    condition, a, b = low.operands(point)
    wide = compute_dtype(point.dtype)
    if isinstance(a, Load) and a.mask is condition and isinstance(b, Const) and a.dtype == wide:
        return replace(a, other=b.value)
    return where(condition, *(cast(folded(wide)(v), wide) for v in (a, b)))


def _wrap(low: _Lowering, point: Point) -> Scalar:
    value = cast(low.operands(point)[0], torch.int64)
    extent = arithmetic(point.bound, {})
    if point.value:
        value = where(value < 0, value + extent, value)
    mask = low.values[point.operands[-1]] if point.masked else None
    assert point.node is not None
    fault = low.readers.index(point.node) + 1 if point.node in low.readers else 0
    return inside(value, extent, fault, mask)


def _reported(value: Scalar) -> bool:
    """Whether a value may be a fault."""
    return isinstance(value, Apply) and value.op == INSIDE and isinstance(value.args[2], Const) and value.args[2].value != 0


def _reduce(low: _Lowering, point: Point) -> Scalar:
    assert point.node is not None
    name = point.node.op.name
    if name not in REDUCE_OPS:
        raise Refusal(Reason.NOT_EXPRESSIBLE, point.node, name)
    op, wide = REDUCE_OPS[name], compute_dtype(point.dtype)
    value = low.operands(point)[0]
    if op in ("max", "min") and wide == torch.bool:
        op = "any" if op == "max" else "all"
    if not op.startswith("arg"):
        value = cast(value, wide)
    return Reduce(wide, op, value, low.inner) if low.inner else _single(op, value, wide)


def _single(op: str, value: Scalar, dtype: torch.dtype) -> Scalar:
    """A reduction over one element."""
    return Const(dtype, 0) if op.startswith("arg") else value


def _scan(low: _Lowering, point: Point) -> Scalar:
    assert point.node is not None
    wide = compute_dtype(point.dtype)
    value = cast(low.operands(point)[0], wide)
    return value if point.value else Scan(wide, point.node.op.name, value, low.inner[0])


def _dot(low: _Lowering, point: Point) -> Scalar:
    left, right, *rest = low.operands(point)
    bias, within = (rest[:-3], tuple(cast(v, torch.int64) for v in rest[-3:])) if point.masked else (rest, ())
    wide = compute_dtype(point.dtype)
    axes = point.axes or low.inner
    total = Dot(wide, cast(left, wide), cast(right, wide), axes, within) if axes else left * right
    return total + cast(bias[0], wide) if bias else total


def _attend(low: _Lowering, point: Point) -> Scalar:
    wide = compute_dtype(point.dtype)
    score, value = (cast(v, wide) for v in low.operands(point))
    (axis,) = point.axes
    return Attend(wide, score, value, axis, point.dtype, "given" if point.value else "softmax")


def _window(low: _Lowering, point: Point) -> Scalar:
    assert point.node is not None
    name, wide = point.node.op.name, compute_dtype(point.dtype)
    values = [cast(v, wide) for v in low.operands(point)]
    if name == "max_pool":
        return Reduce(wide, "max", values[0], low.inner) if low.inner else values[0]
    element = values[0] * values[1] if name == "conv" else values[0]
    total = Reduce(wide, "sum", element, low.inner) if low.inner else element
    if name == "conv":
        return total + values[2] if len(values) > 2 else total
    return total / values[1]


_RULES: dict[Kind, Callable[[_Lowering, Point], Scalar]] = {
    Kind.LOAD: _load, Kind.CONST: _const, Kind.POSITION: _position, Kind.APPLY: _apply, Kind.IOTA: _iota, Kind.INSIDE: _inside,
    Kind.BOTH: _both, Kind.CONVERT: _convert, Kind.SELECT: _select, Kind.WRAP: _wrap, Kind.REDUCE: _reduce, Kind.SCAN: _scan,
    Kind.DOT: _dot, Kind.ATTEND: _attend, Kind.WINDOW: _window,
}  # fmt: skip


def _span(node: Node) -> Dim:
    """Elements from the first to the last of a region input in memory."""
    strides = node.attrs.get("strides")
    if strides is None or any(d == ZERO for d in dims_of(node)):
        return node.tensor.numel
    return dim(1 + sum((d - 1) * s for d, s in zip(node.shape, strides)))


def _buffer_names(body: Graph, taken: set[str]) -> dict[Node | int, str]:
    """A readable unique name for every input node and, by position, every output."""
    used = set(taken) | RESERVED
    names: dict[Node | int, str] = {}
    for k, node in enumerate(body.inputs):
        if node not in names:
            names[node] = unique(node.hint or f"in{k}", used)
    for k, node in enumerate(body.outputs):
        names[k] = unique(node.hint or "out", used)
    return names
