"""Where an axis of an input lives in other values, and how nodes treat it: the types of the axis analysis (`axes.py`)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..dims import Dim, dim, floordiv
from ..graph import Node


class How(enum.Enum):
    """How a node treats the indices of an axis, from the gentlest to the hardest."""

    PARALLEL = "each index alone"
    WINDOW = "each index and its neighbours"
    PREFIX = "each index and those before it"
    MIXING = "all indices together"


@dataclass(frozen=True)
class Along:
    """A dimension of size outer * length * inner: element (o * length + j) * inner + k belongs to index start + j * stride of the axis.

    The length is (size + extra) // stride, so that it is known for other sizes of the axis, too: a dimension that was padded by one in
    front has start -1 and extra 1, what a convolution of stride 2 yields has stride 2. order: rows stand in the order this node says
    (routing). By default element i is index i, and the length is the size.
    """

    outer: Dim = 1
    inner: Dim = 1
    order: Node | None = None
    start: int = 0
    stride: int = 1
    extra: Dim = 0

    def length(self, size: Dim) -> Dim:
        return floordiv(dim(size + self.extra), self.stride)

    def extent(self, size: Dim) -> Dim:
        """The size of such a dimension where the axis has this size."""
        return dim(self.outer * self.length(size) * self.inner)

    @property
    def whole(self) -> bool:
        """Whether it holds the indices of the axis, all of them and no others, in their order."""
        return self.order is None and self.start == 0 and self.stride == 1 and self.extra == 0

    @property
    def single(self) -> bool:
        """Whether the dimension is that of the axis alone, not merged with others."""
        return self.outer == 1 and self.inner == 1

    @property
    def plain(self) -> bool:
        """Whether element i is index i."""
        return self.single and self.whole


Places = tuple[Along | None, ...]
"""For each dimension of a value: where the axis is in it."""


@dataclass(frozen=True)
class Label:
    """before, after: how far a WINDOW reaches, in indices of the axis; of a PREFIX, `before` is its limit (0: none). reason: why MIXING.

    A node whose result holds the axis moved, cut or thinned (a slice, a stride) is a WINDOW, of reach 0 if it reads no neighbours.
    """

    how: How
    before: int = 0
    after: int = 0
    reason: str = ""

    def and_also(self, other: Label) -> Label:
        """How a node treats an axis that meets it in both ways."""
        hows = list(How)
        mild, hard = sorted((self, other), key=lambda label: hows.index(label.how))
        if mild.how is hard.how is How.WINDOW:
            return Label(How.WINDOW, max(mild.before, hard.before), max(mild.after, hard.after), hard.reason or mild.reason)
        if mild.how is hard.how is How.PREFIX:
            return Label(How.PREFIX, max(mild.before, hard.before) if mild.before and hard.before else 0)
        if mild.how is How.WINDOW and hard.how is How.PREFIX:
            limit = max(mild.before, hard.before) if hard.before else 0
            return Label(How.PREFIX, limit) if not mild.after else mixing("it reads all before, and some behind")
        return hard


def mixing(reason: str) -> Label:
    return Label(How.MIXING, reason=reason)


PARALLEL = Label(How.PARALLEL)

End = tuple[int, int]
"""(operand, dimension) of a node; result number r is operand ~r, so that the only result is operand -1."""

OUT = -1


@dataclass(frozen=True)
class Step:
    """How positions of a result follow from those of an operand: result j reads those from first + j * by on, and `reach` more.

    The result has (length + pad) // by positions. It stands for one of the indices it reads: for the axis' own first one, if it can.
    """

    by: int = 1
    first: int = 0
    pad: Dim = 0
    reach: int = 0

    def forward(self, along: Along) -> Along | None:
        if not along.single or along.order is not None:
            return None
        at = min(max(-along.start // along.stride, self.first), self.first + self.reach)
        extra = dim(along.extra + self.pad * along.stride)
        return replace(along, start=along.start + at * along.stride, stride=along.stride * self.by, extra=extra)

    def label(self, along: Along, result: Along, reason: str) -> Label:
        """How far a result reads from the index it stands for."""
        before = result.start - along.start - self.first * along.stride
        return Label(How.WINDOW, before, self.reach * along.stride - before, reason)


@dataclass(frozen=True)
class Reorder:
    """A step to rows in the order of a sort; with `by` None, of rows back into their place."""

    by: Node | None

    def forward(self, along: Along) -> Along | None:
        return replace(along, order=self.by) if self.by is None or along.whole else None


@dataclass(frozen=True)
class Link:
    """Dimensions of a node's operands and results that hold the same axis, and how the node treats it; `step`: from operands to results.

    What is known of a result with a step tells nothing of its operands: rows that stand beside an axis are none of it.
    """

    ends: tuple[End, ...]
    label: Label = PARALLEL
    step: Step | Reorder | None = None


@dataclass(frozen=True)
class Axis:
    """One axis of a graph: dimension `dim` of `input`, of `size`, and of what is aligned with it.

    sources: the inputs it lives in: `input`, and inputs whose values meet it element by element (masks, positions).
    places: values the axis lives in -> where, per dimension. Constants that meet it are among them.
    keys: values in which it lives as keys, too: scores and masks [..., size, size], and biases and masks [..., 1, size] over keys.
    labels: how each node that depends on a source treats it. A node behind one that mixes is labelled by what it does itself.
    """

    input: Node
    dim: int
    size: Dim
    places: Mapping[Node, Places] = field(repr=False)
    keys: Mapping[Node, Places] = field(repr=False)
    labels: Mapping[Node, Label] = field(repr=False)
    sources: Mapping[Node, int] = field(default_factory=dict, repr=False)

    def first(self, *hows: How) -> Node | None:
        """The first node that treats it in one of these ways, in topological order."""
        return next((node for node, label in self.labels.items() if label.how in hows), None)

    def everywhere(self, node: Node) -> Places | None:
        """Where the axis lives in a value, in either role; None for a value it does not live in."""
        rows, keys = self.places.get(node), self.keys.get(node)
        if rows is None or keys is None:
            return rows or keys
        return tuple(a or b for a, b in zip(rows, keys))

    def why(self, node: Node) -> str:
        """The label of a node as a sentence that names it and the user's source line."""
        label = self.labels[node]
        name = f"{node.op.name} {node.hint}" if node.hint and node.hint != node.op.name else node.op.name
        at = f" (at {node.prov.source})" if node.prov.source else ""
        return f"{name} reads {label.how.value}: {label.reason}{at}" if label.reason else f"{name} reads {label.how.value}{at}"
