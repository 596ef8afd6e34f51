"""Halo: which part of an image a node must read for a part of its result, along each axis of space, and where that ends.

    along an axis:   c = conv(x, w, stride=2, padding=1), a window of 3
    c[a, b)    <--   x[2*a - 1, 2*b), what lies outside of x being zeros
    max_pool         the same, with -inf outside
    add(x, y)        x[a, b) and y[a, b)

A stage is what can be computed for a part of an image alone: convolutions, pooling, pointwise ops, norms over channels. Global pooling,
group norms, squeeze-and-excitation and flattening need the whole image: they are outside, and so is what reads them.
Axes are independent, and what several nodes read of a value is one interval, which holds all that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..graph import Graph, Node, is_scalar, order
from ..op import Category
from ..ops.contractions import kernel_of
from ..types import TensorType, normalize_dim


@dataclass(frozen=True)
class Span:
    """Indices start .. stop - 1 along one axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def union(self, other: Span | None) -> Span:
        """The smallest span that holds both."""
        return self if other is None else Span(min(self.start, other.start), max(self.stop, other.stop))

    def within(self, size: int) -> Span:
        """What of it is inside of a tensor; no elements if it lies beside it."""
        return Span(max(self.start, 0), min(self.stop, size))


@dataclass(frozen=True)
class Reach:
    """Along one axis, element i of a result reads i*stride - low .. i*stride - low + extent - 1 of dimension `dim` of an operand."""

    dim: int
    stride: int = 1
    low: int = 0
    extent: int = 1

    def of(self, span: Span) -> Span:
        """What the elements of a span read together; it may reach beyond the operand."""
        return Span(span.start * self.stride - self.low, (span.stop - 1) * self.stride - self.low + self.extent)


@dataclass(frozen=True)
class Reading:
    """How a node of a stage reads its operands.

    dims: the dimension of the result along which each axis lies. reaches: for each operand the reach along each axis, None where the
    operand is read whole (weights, or one element for all).
    """

    dims: tuple[int, ...]
    reaches: tuple[tuple[Reach | None, ...], ...]


@dataclass(frozen=True)
class Stage:
    """The nodes that can be computed part by part of `source`, an image with its axes of space in `dims`.

    readings: of the nodes inside, operands first. refused: the nodes that read one of those, or the source, and are not inside: why.
    """

    source: Node
    dims: tuple[int, ...]
    readings: Mapping[Node, Reading]
    refused: Mapping[Node, str]

    def dims_of(self, node: Node) -> tuple[int, ...]:
        return self.dims if node is self.source else self.readings[node].dims

    def sizes(self, node: Node) -> tuple[int, ...]:
        """The extent of the node's image along each axis."""
        return tuple(node.shape[d] for d in self.dims_of(node))

    def under(self, end: Node) -> list[Node]:
        """The nodes inside that `end` is computed of, itself included, operands first."""
        found, stack = {end}, [end]
        while stack:
            for operand in stack.pop().inputs:
                if operand in self.readings and operand not in found:
                    found.add(operand)
                    stack.append(operand)
        return [n for n in self.readings if n in found]


def stage_of(graph: Graph, source: Node, dims: Sequence[int]) -> Stage:
    """The stage that starts at a value whose axes of space are `dims`. Never raises: what is not understood is refused, and ends it."""
    places: dict[Node, tuple[int, ...]] = {source: tuple(dims)}
    readings: dict[Node, Reading] = {}
    refused: dict[Node, str] = {}
    behind: set[Node] = set()
    for node in order(graph):
        if node is source or not any(i in places or i in behind for i in node.inputs):
            continue
        found = _reading(node, places) if not any(i in behind for i in node.inputs) else ""
        if isinstance(found, Reading):
            readings[node], places[node] = found, found.dims
            continue
        behind.add(node)
        if any(i in places for i in node.inputs):
            refused[node] = found or _late(node, behind)
    return Stage(source, tuple(dims), readings, refused)


def _late(node: Node, behind: set[Node]) -> str:
    late = next(i for i in node.inputs if i in behind)
    return f"it reads {late.op.name} {late.hint}".rstrip() + ", which needs the whole image"


Places = Mapping[Node, tuple[int, ...]]


def _reading(node: Node, places: Places) -> Reading | str:
    if not isinstance(node.type, TensorType) or node.attrs.get("sequence") is not None:
        return "it is not known what of the image it reads"
    rule = _RULES.get(node.op.name) or (_BY_CATEGORY.get(node.op.category))
    if rule is None:
        return _WHOLE.get(node.op.name, "it is not known what of the image it reads")
    found = rule(node, places)
    if isinstance(found, Reading) and not all(isinstance(node.shape[d], int) and node.shape[d] > 0 for d in found.dims):
        return "the size of the image varies"
    return found


# -- rules: how each op reads


def _pointwise(node: Node, places: Places) -> Reading | str:
    rank = node.tensor.rank
    (dims, *others) = {tuple(d + rank - i.tensor.rank for d in places[i]) for i in node.inputs if i in places}
    if others:
        return "its operands have the image in different dimensions"
    reaches = tuple(_broadcast(i, node, dims) for i in node.inputs)
    if any(i in places and None in reach for i, reach in zip(node.inputs, reaches)):
        return "one image is spread over another"
    return Reading(dims, reaches)


def _broadcast(operand: Node, node: Node, dims: Sequence[int]) -> tuple[Reach | None, ...]:
    lead = node.tensor.rank - (0 if is_scalar(operand) else operand.tensor.rank)
    spread = [d < lead or operand.shape[d - lead] == 1 != node.shape[d] for d in dims] if not is_scalar(operand) else [True] * len(dims)
    return tuple(None if s else Reach(d - lead) for d, s in zip(dims, spread))


def _like_first(node: Node, places: Places) -> Reading | str:
    """The result has the image where the first operand has it; nothing else is an image."""
    return _of_first(node, places, places.get(node.inputs[0], ()), lambda axis, d: Reach(d))


def _of_first(node: Node, places: Places, dims: tuple[int, ...], reach: Callable[[int, int], Reach]) -> Reading | str:
    """reach: of the first operand, by axis and its dimension there."""
    x, *rest = node.inputs
    if x not in places or any(i in places for i in rest):
        return "its weights depend on the image"
    nothing = (None,) * len(dims)
    return Reading(dims, (tuple(reach(k, d) for k, d in enumerate(places[x])), *(nothing for _ in rest)))


def _apart_from(mixed: Callable[[Node], Sequence[int]], why: str) -> Rule:
    """The rule of an op that mixes the elements along some dimensions of its first operand, none of which may be of the image."""

    def rule(node: Node, places: Places) -> Reading | str:
        rank = node.inputs[0].tensor.rank
        if {normalize_dim(d, rank) for d in mixed(node)} & {*places.get(node.inputs[0], ())}:
            return why
        return _like_first(node, places)

    return rule


def _reduction(node: Node, places: Places) -> Reading | str:
    x = node.inputs[0]
    dropped = {normalize_dim(d, x.tensor.rank) for d in node.attrs["dims"]} or set(range(x.tensor.rank))
    if dropped & {*places[x]}:
        return f"it takes the {node.op.name} of the whole image"
    moved = tuple(d if node.attrs["keepdim"] else d - sum(o < d for o in dropped) for d in places[x])
    return _of_first(node, places, moved, lambda axis, d: Reach(d))


def _permute(node: Node, places: Places) -> Reading | str:
    return _of_first(node, places, tuple(node.attrs["dims"].index(d) for d in places[node.inputs[0]]), lambda axis, d: Reach(d))


def _cat(node: Node, places: Places) -> Reading | str:
    (dims, *others) = {places[i] for i in node.inputs if i in places}
    if others or normalize_dim(node.attrs["dim"], node.tensor.rank) in dims:
        return "it joins images along an axis of theirs"
    return Reading(dims, tuple(tuple(Reach(d) for d in dims) for _ in node.inputs))


def _pad(node: Node, places: Places) -> Reading | str:
    low = node.attrs["low"]
    dims = places[node.inputs[0]]
    if not all(isinstance(low[d], int) for d in dims):
        return "the size of the image varies"
    return _of_first(node, places, dims, lambda axis, d: Reach(d, low=low[d]))


def _slice(node: Node, places: Places) -> Reading | str:
    start, step, dims = node.attrs["start"], node.attrs["step"], places[node.inputs[0]]
    cut = normalize_dim(node.attrs["dim"], node.tensor.rank)
    if cut in dims and not isinstance(start, int):
        return "the size of the image varies"
    return _of_first(node, places, dims, lambda axis, d: Reach(d, stride=step, low=-start) if d == cut else Reach(d))


def _window(node: Node, places: Places) -> Reading | str:
    """Convolutions and pooling: windows along axes of space."""
    x, a = node.inputs[0], node.attrs
    first, kernel = 1 if a["channels_last"] else x.tensor.rank - len(a["padding"]), kernel_of(node)
    dims = places.get(x, ())
    if a.get("transposed"):
        return "a transposed convolution is not taken apart"
    if not all(first <= d < first + len(kernel) and isinstance(kernel[d - first], int) for d in dims):
        return "it mixes dimensions of the image with others"
    if node.op.name == "avg_pool" and not _counts_alike(node, first, dims):
        return "means at the border are over fewer elements"

    def reach(axis: int, d: int) -> Reach:
        k = d - first
        return Reach(d, a["stride"][k], a["padding"][k], window_extent(node, k))

    return _of_first(node, places, dims, reach)


def window_extent(node: Node, k: int) -> int:
    """How far a window reaches along axis k of its own, the gaps of a dilated one included."""
    dilation, size = node.attrs.get("dilation"), kernel_of(node)[k]
    assert isinstance(size, int)
    return (size - 1) * (dilation[k] if dilation else 1) + 1


def _counts_alike(node: Node, first: int, dims: Sequence[int]) -> bool:
    """Whether all windows of an average along the axes are over the same number of elements."""
    if node.attrs["divisor"] is not None:
        return True
    for d in dims:
        k, s, p = (node.attrs[name][d - first] for name in ("kernel", "stride", "padding"))
        size, count = node.inputs[0].shape[d], node.shape[d]
        if p and not node.attrs["count_padding"] or node.attrs["ceil"] and (count - 1) * s - p + k > size + p:
            return False
    return True


Rule = Callable[[Node, Places], "Reading | str"]

_LAST = _apart_from(lambda n: (-1,), "it multiplies along an axis of the image")
_OWN_DIM = _apart_from(lambda n: (n.attrs["dim"],), "it runs along an axis of the image")
_NORM = _apart_from(lambda n: range(-n.attrs["axes"], 0), "it normalizes over the whole image")
_CHANNELS = _apart_from(lambda n: (1,), "it normalizes over an axis of the image")

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv", "max_pool", "avg_pool"), _window),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod"), _OWN_DIM),
    **dict.fromkeys(("layer_norm", "rms_norm"), _NORM),
    "linear": _LAST, "batch_norm": _CHANNELS, "permute": _permute, "cat": _cat, "pad": _pad, "slice": _slice, "gelu": _pointwise,
}  # fmt: skip

_BY_CATEGORY: dict[Category, Rule] = {Category.POINTWISE: _pointwise, Category.REDUCTION: _reduction}

_WHOLE = {
    "group_norm": "it normalizes over the whole image",
    "reshape": "it flattens the image, or divides it otherwise",
    "attention": "every point attends to the whole image",
}
"""Why well-known ops end a stage."""


# -- what a part of a result needs


def needs(stage: Stage, end: Node, axis: int, span: Span) -> dict[Node, Span] | None:
    """What of each node under `end`, and of the source, is needed along an axis for `span` of `end`, inside of the tensors.

    None where a node would compute nothing, or read nothing but what is outside.
    """
    found: dict[Node, Span] = {end: span}
    for node in reversed(stage.under(end)):
        wanted = found[node]
        for operand, reaches in zip(node.inputs, stage.readings[node].reaches):
            reach = reaches[axis]
            if reach is None:
                continue
            inside = reach.of(wanted).within(operand.shape[reach.dim])
            if inside.size < 1:
                return None
            if operand in stage.readings or operand is stage.source:
                found[operand] = inside.union(found.get(operand))
    return found


def needs_of_parts(stage: Stage, end: Node, axis: int, parts: Sequence[Span]) -> list[dict[Node, Span]] | None:
    """`needs` of each part; None also where two parts need the same of a node, which is then no smaller for being divided."""
    found = [needs(stage, end, axis, span) for span in parts]
    taken = [f for f in found if f is not None]
    if len(taken) < len(found) or any(a[n] == b[n] for a, b in zip(taken, taken[1:]) for n in a if n is not stage.source):
        return None
    return taken
