"""Where an axis of an input lives in other values, and how nodes treat it: the types of the axis analysis (`axes.py`)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..dims import Dim, dim
from ..graph import Node


class How(enum.Enum):
    """How a node treats the indices of an axis, from the gentlest to the hardest."""

    PARALLEL = "each index alone"
    WINDOW = "each index and its neighbours"
    PREFIX = "each index and those before it"
    MIXING = "all indices together"


@dataclass(frozen=True)
class Along:
    """A dimension of size outer * length * inner: element (o * length + i) * inner + k belongs to index i of the axis.

    The length is that of the axis: plain where outer and inner are 1. order: the rows stand in the order this node says (routing).
    """

    outer: Dim = 1
    inner: Dim = 1
    order: Node | None = None

    def extent(self, size: Dim) -> Dim:
        """The size of such a dimension where the axis has this size."""
        return dim(self.outer * size * self.inner)

    @property
    def plain(self) -> bool:
        """Whether element i is index i."""
        return self.outer == 1 and self.inner == 1 and self.order is None


Places = tuple[Along | None, ...]
"""For each dimension of a value: where the axis is in it."""


@dataclass(frozen=True)
class Label:
    """before, after: how far a WINDOW reaches; of a PREFIX, `before` is its limit (0: none). reason: why MIXING."""

    how: How
    before: int = 0
    after: int = 0
    reason: str = ""

    @property
    def _rank(self) -> tuple[int, int]:
        return list(How).index(self.how), self.before + self.after

    def or_worse(self, other: Label) -> Label:
        return max(self, other, key=lambda label: label._rank)


PARALLEL = Label(How.PARALLEL)


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
