"""`Puller`: evaluates a node at an index, following operands through views, gathers, pieces of a cat, reductions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ..graph import Node, scalar_value
from ..op import Category
from ..ops import unprintable
from ..reasons import Reason
from ..types import FLOAT8, NATIVE_DTYPES, ScalarType, normalize_dim
from .attention import ATTENTION
from .indices import ONE, ZERO, Poly, Ranges, const, poly, variable
from .points import (
    VIEW_INDEX,
    Index,
    Kind,
    Point,
    Refusal,
    broadcast_index,
    dims_of,
    input_offset,
    reduced_dims,
    regroup,
)
from .products import OWN_NAMES, PRODUCTS
from .ragged import RAGGED
from .windows import POOLS

MAX_POINTS = 4000
"""A region with more values than this is refused: it would compile slowly and spill."""

MAX_DEPTH = 120
"""Operations from an output down to an input, views included: the evaluation recurses, and Python's stack is shared with the caller's."""

REDUCERS = frozenset({"sum", "prod", "amax", "amin", "any", "all", "argmax", "argmin"})
"""Reductions that a kernel has; the others are expanded into them first."""

Mask = tuple[Point, ...]


class Puller:
    """Memoised evaluation over fixed inner axes. `points` lists what was evaluated, operands first."""

    def __init__(self, ranges: Ranges, inner: Sequence[str], extents: Sequence[Poly]) -> None:
        self.ranges = ranges
        self.inner = tuple(inner)
        self.extents = tuple(extents)
        self.points: list[Point] = []
        self.own: list[tuple[str, Poly]] = []  # axes of the one contraction or window, and their extents
        self.whole: list[Poly] = []  # indices that are to be one axis
        self._walker: Node | None = None
        self._values: dict[tuple[Node, Index, Mask], Point] = {}
        self._shared: dict[object, Point] = {}
        self._computed: dict[str, Point] = {}
        self._depth = 0

    def at(self, node: Node, index: Index, mask: Mask = ()) -> Point:
        """The value of `node` at `index`; where the mask is false, any value and no memory is touched. Raises Refusal."""
        key = (node, index, mask)
        if key not in self._values:
            if self._depth >= MAX_DEPTH:
                raise Refusal(Reason.TOO_LARGE, node, f"a chain of more than {MAX_DEPTH} operations")
            self._depth += 1
            self._values[key] = self._evaluate(node, index, mask)
            self._depth -= 1
        return self._values[key]

    def _evaluate(self, node: Node, index: Index, mask: Mask) -> Point:
        if node.op.name in VIEW_INDEX:
            return self.at(node.inputs[0], VIEW_INDEX[node.op.name](node, index, self.ranges), mask)
        check_native(node)
        if node.op.category in _BY_CATEGORY:
            return _BY_CATEGORY[node.op.category](self, node, index, mask)
        if node.op.name not in _BY_NAME:
            raise Refusal(Reason.NOT_EXPRESSIBLE, node, node.op.name)
        return _BY_NAME[node.op.name](self, node, index, mask)

    def add(self, point: Point) -> Point:
        if len(self.points) >= MAX_POINTS:
            raise Refusal(Reason.TOO_LARGE, point.node, f"more than {MAX_POINTS} values")
        self.points.append(point)
        return point

    def share(self, key: object, make: Callable[[], Point]) -> Point:
        if key not in self._shared:
            self._shared[key] = self.add(make())
        return self._shared[key]

    def number(self, value: bool | int | float, dtype: torch.dtype) -> Point:
        return self.share(("const", repr(value), dtype), lambda: Point(Kind.CONST, value=value, dtype=dtype))

    def position(self, index: Poly) -> Point:
        return self.share(
            ("position", index), lambda: Point(Kind.POSITION, operands=self.computed(index), index=index, names=self.names(index))
        )

    def place(self, node: Node, index: Index, value: Point) -> None:
        """Sets the value of a node that stands for something evaluated already."""
        self._values[node, index, ()] = value

    def own_axes(self, node: Node, extents: Sequence[Poly]) -> Index:
        """New axes that `node` alone walks, as an index over `extents`. Raises Refusal where there is another such walk."""
        if self._walker is not None or self.inner:
            raise Refusal(Reason.SECOND_WALK, node, node.op.name)
        self._walker = node
        found: list[Poly] = []
        for extent, letter in zip(extents, OWN_NAMES):
            if extent == ONE:
                found.append(ZERO)
                continue
            taken = self.ranges.extents.keys() | self.ranges.symbols.keys()
            name = next(n for n in itertools.chain((letter,), (f"{letter}{k}" for k in itertools.count(1))) if n not in taken)
            self.own.append((name, extent))
            found.append(self.ranges.add(name, extent))
        return tuple(found)

    def names(self, index: Poly) -> tuple[str, ...]:
        """The computed positions that an index mentions."""
        return tuple(sorted(n for n in index.names() if n in self._computed))

    def computed(self, index: Poly) -> tuple[Point, ...]:
        return tuple(self._computed[n] for n in self.names(index))

    def indirect(self, node: Node, value: Point, extent: Poly, mask: Mask, wraps: bool) -> Poly:
        """A computed integer of a gather `node` as an index coordinate in 0 .. extent-1; outside of it is the user's error."""
        if extent == ZERO:
            raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} from an empty dimension")
        guard = (self.all_of(mask),) if mask else ()
        wrapped = self.share(
            ("wrap", value, extent, wraps, guard),
            lambda: Point(Kind.WRAP, node, (value, *guard), bound=extent, value=wraps, masked=bool(guard)),
        )
        name = next((n for n, p in self._computed.items() if p is wrapped), None) or self._fresh_name()
        self._computed[name] = wrapped
        return self.ranges.add(name, extent)

    def _fresh_name(self) -> str:
        taken = self.ranges.extents.keys() | self.ranges.symbols.keys()
        return next(n for n in (f"at{k}" for k in itertools.count()) if n not in taken)

    def inside(self, index: Poly, extent: Poly) -> Point | None:
        """The condition 0 <= index < extent, None where it always holds."""
        if self.ranges.inside(index, extent):
            return None
        return self.share(
            ("inside", index, extent),
            lambda: Point(
                Kind.INSIDE, operands=self.computed(index), index=index, names=self.names(index), bound=extent, dtype=torch.bool,
                value=self.ranges.at_least(index, ZERO),
            ),
        )  # fmt: skip

    def all_of(self, conditions: Sequence[Point]) -> Point:
        total = conditions[0]
        for c in conditions[1:]:
            total = self.share(("both", total, c), lambda a=total, b=c: Point(Kind.BOTH, operands=(a, b), dtype=torch.bool))
        return total

    def depends_on_inner(self, index: Index) -> bool:
        """Whether an index varies along an inner axis, through computed positions too."""
        seen: set[str] = set()
        stack = [n for p in index for n in p.names()]
        while stack:
            name = stack.pop()
            if name in self.inner:
                return True
            if name not in seen and name in self._computed:
                seen.add(name)
                stack.extend(_axes_under(self._computed[name]))
        return False


def _axes_under(point: Point) -> set[str]:
    """Names that a value's loads and positions mention, except under reductions."""
    found: set[str] = set()
    stack = [point]
    seen: set[Point] = set()
    while stack:
        p = stack.pop()
        if p not in seen and p.kind is not Kind.REDUCE:
            seen.add(p)
            found |= p.index.names()
            stack.extend(p.operands)
    return found


def check_native(node: Node) -> None:
    """Raises Refusal unless the op's element type and operands have a scalar form. 8-bit floats are only read."""
    if isinstance(node.type, (tuple, ScalarType)):
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} yields {node.type}")
    if node.dtype not in NATIVE_DTYPES and not (node.op.name == "input" and node.dtype in FLOAT8):
        raise Refusal(Reason.UNSUPPORTED_DTYPE, node, str(node.type))
    if node.op.category is Category.POINTWISE and unprintable(node.op, tuple(n.type for n in node.inputs)):  # type: ignore[arg-type]
        raise Refusal(Reason.RUNTIME_INTEGER_DIVISION, node, str(node.inputs[1].type))


def _pointwise(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    operands = tuple(_operand(puller, x, index, mask) for x in node.inputs)
    return puller.add(Point(Kind.APPLY, node, operands, dtype=node.dtype))


def _operand(puller: Puller, x: Node, index: Index, mask: Mask) -> Point:
    if isinstance(x.type, ScalarType):
        return _scalar(puller, x)
    return puller.at(x, broadcast_index(index, dims_of(x)), mask)


def _scalar(puller: Puller, x: Node) -> Point:
    value = scalar_value(x)
    if isinstance(value, (bool, int, float)):
        return puller.number(value, x.dtype)
    if value is None or isinstance(value, complex):
        raise Refusal(Reason.NOT_EXPRESSIBLE, x, str(x.type))
    return puller.position(poly(value))


def _reduction(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    x = node.inputs[0]
    dims = reduced_dims(node)
    shape = dims_of(x)
    if node.op.name not in REDUCERS:
        raise Refusal(Reason.NOT_EXPRESSIBLE, node, f"{node.op.name} of {x.type}")
    if puller.depends_on_inner(index):
        raise Refusal(Reason.TILED_AXIS, node, f"{node.op.name} over dimension {dims} of {x.type}")
    mask = _without_inner(puller, node, index, mask)
    kept = [i for d, i in enumerate(index) if d not in dims] if node.attrs["keepdim"] else list(index)
    walked = iter(_walk(puller, node, [shape[d] for d in dims]))
    remaining = iter(kept)
    at = tuple(next(walked) if d in dims else next(remaining) for d in range(len(shape)))
    value = puller.at(x, at, mask)
    return puller.add(Point(Kind.REDUCE, node, (value,), dtype=node.dtype))


def _without_inner(puller: Puller, node: Node, index: Index, mask: Mask) -> Mask:
    """The mask inside a reduction: conditions along inner axes no longer hold there, so the index must be safe without them."""
    outside = tuple(c for c in mask if not puller.depends_on_inner(tuple(variable(n) for n in _axes_under(c))))
    if len(outside) < len(mask) and not all(puller.ranges.inside(i, d) for i, d in zip(index, dims_of(node))):
        raise Refusal(Reason.TILED_AXIS, node, "a reduction inside one piece of a concatenation")
    return outside


def _walk(puller: Puller, node: Node, extents: list[Poly]) -> Index:
    """The inner axes as an index over the reduced dimensions."""
    wanted = [e for e in extents if e != ONE]
    variables = tuple(map(variable, puller.inner))
    if tuple(wanted) != puller.extents:
        whole = _product(wanted)
        if whole != _product(puller.extents) or not puller.inner:
            raise Refusal(Reason.DIFFERENT_SPACE, node, f"{node.op.name} over {extents}, the kernel's rows are {list(puller.extents)}")
        variables = regroup(variables, puller.extents, wanted, puller.ranges)
    found = iter(variables)
    return tuple(ZERO if e == ONE else next(found) for e in extents)


def _product(extents: Sequence[Poly]) -> Poly:
    total = ONE
    for e in extents:
        total = total * e
    return total


def _scan(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    dims = reduced_dims(node)
    value = puller.at(node.inputs[0], index, mask)
    if not dims or dims_of(node)[dims[0]] == ONE:
        return puller.add(Point(Kind.SCAN, node, (value,), dtype=node.dtype, value=True))
    rest = tuple(i for d, i in enumerate(index) if d != dims[0])
    if mask or len(puller.inner) != 1 or index[dims[0]] != variable(puller.inner[0]) or puller.depends_on_inner(rest):
        raise Refusal(Reason.TILED_AXIS, node, f"{node.op.name} along dimension {dims[0]} of {node.type}")
    if dims_of(node)[dims[0]] != puller.extents[0]:
        raise Refusal(Reason.DIFFERENT_SPACE, node, f"{node.op.name} along {node.shape[dims[0]]}")
    return puller.add(Point(Kind.SCAN, node, (value,), dtype=node.dtype))


def _input(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    offset = puller.ranges.recombine(input_offset(node, index))
    if all(puller.ranges.inside(i, d) for i, d in zip(index, dims_of(node))):
        mask = ()
    guard = (puller.all_of(mask),) if mask else ()
    names = puller.names(offset)
    key = ("load", node, offset, guard)
    return puller.share(
        key, lambda: Point(Kind.LOAD, node, (*puller.computed(offset), *guard), offset, names, dtype=node.dtype, masked=bool(guard))
    )


def _full(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    value = node.attrs["value"]
    if isinstance(value, complex):
        raise Refusal(Reason.UNSUPPORTED_DTYPE, node, str(node.type))
    if isinstance(value, (bool, int, float)):
        return puller.number(value, node.dtype)
    return puller.add(Point(Kind.CONVERT, node, (puller.position(poly(value)),), dtype=node.dtype))


def _iota(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    step, start = node.attrs["step"], node.attrs["start"]
    if isinstance(step, float) or isinstance(start, float):
        return puller.add(Point(Kind.IOTA, node, puller.computed(index[0]), index[0], puller.names(index[0]), dtype=node.dtype))
    position = puller.position(index[0] * poly(step) + poly(start))
    return position if node.dtype == torch.int64 else puller.add(Point(Kind.CONVERT, node, (position,), dtype=node.dtype))


def _cat(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    d = normalize_dim(node.attrs["dim"], len(index))
    pieces: list[tuple[Node, Poly]] = []
    start, ranges = ZERO, puller.ranges
    for x in node.inputs:
        stop = start + dims_of(x)[d]
        if stop != start and not ranges.below(index[d], start) and not ranges.at_least(index[d], stop):
            pieces.append((x, start))
        start = stop
    value: Point | None = None
    for x, offset in reversed(pieces or [(node.inputs[0], ZERO)]):
        at = (*index[:d], index[d] - offset, *index[d + 1 :])
        value = _piece(puller, node, x, at, d, mask, value)
    assert value is not None
    return value


def _piece(puller: Puller, node: Node, x: Node, at: Index, d: int, mask: Mask, otherwise: Point | None) -> Point:
    """`x` where its own coordinate is in range, else `otherwise`."""
    condition = puller.inside(at[d], dims_of(x)[d])
    if condition is None:
        return _converted(puller, node, puller.at(x, at, mask))
    value = puller.at(x, at, _and(mask, condition))
    if otherwise is None:
        return _converted(puller, node, value)
    return puller.add(Point(Kind.SELECT, node, (condition, value, otherwise), dtype=node.dtype))


def _converted(puller: Puller, node: Node, value: Point) -> Point:
    return value if value.dtype == node.dtype else puller.add(Point(Kind.CONVERT, node, (value,), dtype=node.dtype))


def _and(mask: Mask, *conditions: Point | None) -> Mask:
    return mask + tuple(c for c in conditions if c is not None and c not in mask)


def _pad(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    x = node.inputs[0]
    at = tuple(i - poly(lo) for i, lo in zip(index, node.attrs["low"]))
    conditions = [c for i, d in zip(at, dims_of(x)) if (c := puller.inside(i, d)) is not None]
    value = puller.at(x, at, _and(mask, *conditions))
    if not conditions:
        return value
    fill = puller.number(node.attrs["value"], node.dtype)
    return puller.add(Point(Kind.SELECT, node, (puller.all_of(conditions), value, fill), dtype=node.dtype))


def _slice_scatter(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    x, source = node.inputs
    a = node.attrs
    d = normalize_dim(a["dim"], len(index))
    moved = index[d] - poly(a["start"])
    step = const(a["step"])
    at = (*index[:d], puller.ranges.floordiv(moved, step), *index[d + 1 :])
    checks = [puller.inside(moved, poly(a["stop"]) - poly(a["start"])), puller.inside(puller.ranges.mod(moved, step), ONE)]
    conditions = [c for c in checks if c is not None]
    value = puller.at(source, at, _and(mask, *conditions))
    if not conditions:
        return _converted(puller, node, value)
    rest = puller.at(x, index, mask)
    return puller.add(Point(Kind.SELECT, node, (puller.all_of(conditions), value, rest), dtype=node.dtype))


def _gather(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    x, where = node.inputs
    d = normalize_dim(node.attrs["dim"], len(index))
    row = puller.indirect(node, puller.at(where, index, mask), dims_of(x)[d], mask, wraps=False) if index else ZERO
    return puller.at(x, (*index[:d], row, *index[d + 1 :]) if index else (), mask)


def _embedding(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    weight, ids = node.inputs
    rank = ids.tensor.rank
    row = puller.indirect(node, puller.at(ids, index[:rank], mask), dims_of(weight)[0], mask, wraps=False)
    return puller.at(weight, (row, *index[rank:]), mask)


def _index(puller: Puller, node: Node, index: Index, mask: Mask) -> Point:
    x, *indices = node.inputs
    dims = node.attrs["dims"]
    block = max(i.tensor.rank for i in indices)
    front = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    middle = index[front : front + block]
    rows = {}
    for d, i in zip(dims, indices):
        if i.dtype == torch.bool or i.dtype == torch.uint8:
            raise Refusal(Reason.NOT_EXPRESSIBLE, node, "indexing by a mask")
        at = broadcast_index(middle, dims_of(i))
        rows[d] = puller.indirect(node, puller.at(i, at, mask), dims_of(x)[d], mask, wraps=True)
    rest = iter((*index[:front], *index[front + block :]))
    return puller.at(x, tuple(rows[d] if d in rows else next(rest) for d in range(x.tensor.rank)), mask)


_Rule = Callable[[Puller, Node, Index, Mask], Point]

_BY_CATEGORY: dict[Category, _Rule] = {
    Category.POINTWISE: _pointwise,
    Category.REDUCTION: _reduction,
    Category.SCAN: _scan,
}

_BY_NAME: dict[str, _Rule] = {
    "input": _input,
    "full": _full,
    "iota": _iota,
    "cat": _cat,
    "pad": _pad,
    "slice_scatter": _slice_scatter,
    "gather": _gather,
    "embedding": _embedding,
    "index": _index,
    **PRODUCTS,
    **RAGGED,
    **ATTENTION,
    **POOLS,
}

FUSIBLE_NAMES = frozenset(_BY_NAME) - {"input"} - PRODUCTS.keys() - RAGGED.keys() - ATTENTION.keys() - POOLS.keys()
FUSIBLE_CATEGORIES = frozenset(_BY_CATEGORY)

__all__ = ["FUSIBLE_CATEGORIES", "FUSIBLE_NAMES", "MAX_POINTS", "Puller", "check_native"]
