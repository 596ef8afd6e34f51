"""How ops read and make values whose channels lie last: [n, c, *space] becomes [n, *space, c], op by op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..ir.dims import same
from ..ir.graph import Node, is_scalar
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.types import TensorType
from .group_norms import group_norm_last

RULE = "choose-layouts"

CONV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the library convolves with channels last without turning it around."""


def last_dims(rank: int) -> tuple[int, ...]:
    """[n, c, h, w] -> [n, h, w, c] as the dims of a permute."""
    return (0, *range(2, rank), 1)


def first_dims(rank: int) -> tuple[int, ...]:
    """[n, h, w, c] -> [n, c, h, w] as the dims of a permute."""
    return (0, rank - 1, *range(1, rank - 1))


def moved(d: int, rank: int) -> int:
    """Where dimension d of [n, c, h, w] is in [n, h, w, c]."""
    return last_dims(rank).index(d % rank)


def turned(x: Node, dims: tuple[int, ...]) -> Node:
    """permute(x, dims), composed with the permute that x may be."""
    if x.op.name == "permute":
        x, dims = x.inputs[0], tuple(x.attrs["dims"][d] for d in dims)
    return x if dims == tuple(range(len(dims))) else OPS["permute"](x, dims=dims, hint=x.hint, prov=x.prov.with_rule(RULE))


class Layouts:
    """Both forms of each value, made when first asked for."""

    def __init__(self) -> None:
        self.first: dict[Node, Node] = {}
        self.last: dict[Node, Node] = {}

    def channels_first(self, node: Node) -> Node:
        """The value as the graph had it."""
        if node not in self.first:
            self.first[node] = turned(self.last[node], first_dims(node.tensor.rank))
        return self.first[node]

    def channels_last(self, node: Node) -> Node:
        """The value with dimension 1 moved to the end."""
        if node not in self.last:
            self.last[node] = turned(self.first[node], last_dims(node.tensor.rank))
        return self.last[node]

    def broadcast(self, node: Node, rank: int) -> Node:
        """An operand of a pointwise op whose result has `rank` dimensions."""
        if is_scalar(node) or node.tensor.rank == 0:
            return self.channels_first(node)
        if node in self.last:
            return self.last[node]
        shape = (*(1,) * (rank - node.tensor.rank), *node.shape)
        if all(same(d, 1) for i, d in enumerate(shape) if i != 1):  # one entry per channel
            return _reshaped(self.channels_first(node), (shape[1],))
        if node.tensor.rank == rank:
            return self.channels_last(node)
        return turned(_reshaped(self.channels_first(node), shape), last_dims(rank))


def _reshaped(x: Node, shape: tuple[Any, ...]) -> Node:
    x = x.inputs[0] if x.op.name == "reshape" else x
    if len(x.shape) == len(shape) and all(same(a, b) for a, b in zip(x.shape, shape)):
        return x
    return OPS["reshape"](x, shape=shape, hint=x.hint, prov=x.prov.with_rule(RULE))


# -- ops that yield channels last


Turn = Callable[[Node, Layouts], Node]


def _like(node: Node, *operands: Node, **changes: Any) -> Node:
    return node.op(*operands, **{**node.attrs, **changes}, hint=node.hint, prov=node.prov.with_rule(RULE))


def _pointwise(node: Node, layouts: Layouts) -> Node:
    return _like(node, *(layouts.broadcast(i, node.tensor.rank) for i in node.inputs))


def _window(node: Node, layouts: Layouts) -> Node:
    x, *weights = node.inputs
    return _like(node, layouts.channels_last(x), *(layouts.channels_first(w) for w in weights), channels_last=True)


def _along_dim(node: Node, layouts: Layouts) -> Node:
    return _like(node, *(layouts.channels_last(i) for i in node.inputs), dim=moved(node.attrs["dim"], node.tensor.rank))


def _along_dims(node: Node, layouts: Layouts) -> Node:
    x = node.inputs[0]
    return _like(node, layouts.channels_last(x), dims=_moved_dims(x, node.attrs["dims"]))


def _moved_dims(x: Node, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(moved(d, x.tensor.rank) for d in dims))


def _pad(node: Node, layouts: Layouts) -> Node:
    low, high = (tuple(node.attrs[k][d] for d in last_dims(node.tensor.rank)) for k in ("low", "high"))
    return _like(node, layouts.channels_last(node.inputs[0]), low=low, high=high)


def _shaped(node: Node, layouts: Layouts) -> Node:
    return _like(node, layouts.channels_last(node.inputs[0]), shape=tuple(node.shape[d] for d in last_dims(node.tensor.rank)))


def _index(node: Node, layouts: Layouts) -> Node:
    x, *indices = node.inputs
    return _like(node, layouts.channels_last(x), *(layouts.channels_first(i) for i in indices), dims=_moved_dims(x, node.attrs["dims"]))


def _group_norm(node: Node, layouts: Layouts) -> Node:
    x, *parameters = node.inputs
    w, b, *_ = (*map(layouts.channels_first, parameters), None, None)
    return replace(group_norm_last(node, layouts.channels_last(x), w, b, RULE), hint=node.hint)


_BY_NAME: dict[str, tuple[Callable[[Node], bool], Turn]] = {
    **dict.fromkeys(("conv", "max_pool", "avg_pool"), (lambda n: _is_window(n), _window)),
    "pad": (lambda n: True, _pad),
    "index": (lambda n: n.attrs["dims"] == tuple(range(2, n.tensor.rank)) == tuple(range(2, n.inputs[0].tensor.rank)), _index),
    "expand": (lambda n: n.inputs[0].tensor.rank == n.tensor.rank, _shaped),
    "reshape": (lambda n: _keeps_channels(n), _shaped),
    "flip": (lambda n: True, _along_dims),
    "group_norm": (lambda n: True, _group_norm),
    **dict.fromkeys(("cat", "slice", "softmax", "log_softmax", "cumsum", "cumprod"), (lambda n: True, _along_dim)),
}
"""Op name -> whether a node of it can yield channels last, and how."""


def _is_window(node: Node) -> bool:
    """Two-dimensional, with a batch dimension, and not turned already."""
    if node.op.name == "conv":
        return node.tensor.rank == 4 and node.dtype in CONV_DTYPES and not node.attrs["channels_last"]
    return node.tensor.rank == 4 and len(node.attrs["kernel"]) == 2 and not node.attrs["channels_last"]


def _keeps_channels(node: Node) -> bool:
    old, new = node.inputs[0].shape, node.shape
    return len(old) > 2 and len(new) > 2 and same(old[0], new[0]) and same(old[1], new[1])


def turn_rule(node: Node) -> Turn | None:
    """How the node yields channels last; None where it cannot."""
    if not isinstance(node.type, TensorType) or node.type.rank < 3 or node.attrs.get("sequence") is not None:
        return None
    if node.op.category is Category.POINTWISE:
        return _pointwise
    if node.op.category is Category.REDUCTION:
        return _along_dims if node.attrs["keepdim"] and _any_order(node) else None
    fits, turn = _BY_NAME.get(node.op.name, (None, None))
    return turn if fits is not None and fits(node) else None


def turned_operands(node: Node) -> tuple[Node, ...]:
    """The operands that such a node reads with their channels last; weights and indices are read as they are."""
    return node.inputs[:1] if node.op.name in ("conv", "index", "group_norm") else node.inputs


# -- ops that read channels last, and yield what they did


def _any_order(node: Node) -> bool:
    """Whether the reduction does not depend on the order of its elements; argmax and argmin do, over several dimensions."""
    return len(node.attrs["dims"]) == 1 or bool(node.attrs["dims"]) and node.op.name not in ("argmax", "argmin")


def reads_either(node: Node) -> bool:
    """Whether the node reads channels last as well as first: reductions, and permutes."""
    if node.op.category is Category.REDUCTION:
        return not node.attrs["keepdim"] and _any_order(node)
    return node.op.name == "permute"


def read_last(node: Node, layouts: Layouts) -> Node:
    """The value of such a node (in its own order of dimensions), from its operand with channels last."""
    x = node.inputs[0]
    rank = x.tensor.rank
    if node.op.name == "permute":
        return turned(layouts.channels_last(x), tuple(moved(d, rank) for d in node.attrs["dims"]))
    dropped = {d % rank for d in node.attrs["dims"]}
    made = _along_dims(node, layouts)
    have = [d for d in last_dims(rank) if d not in dropped]
    return turned(made, tuple(have.index(d) for d in sorted(have)))
