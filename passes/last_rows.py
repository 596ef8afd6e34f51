"""last-rows: a step that reads a prompt computes the logits of one token of each row, not of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch

from ..ir.dims import product, same
from ..ir.graph import Graph, Node, graph_input, is_scalar, order
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import cleaned
from ..ir.types import TensorType
from .base import Notes, Pass, describe

LAST = "last"
"""The input that says of each row which of its tokens that is."""


@dataclass(frozen=True)
class LastRows(Pass):
    """Of the results of a step [b, n, ...] the tokens `last` [b, 1, ...] remain, and what only they needed is computed for them alone.

        x = add(r, m)          : f32[b, n, d]            one = gather(add(r, m), last, dim=1) : f32[b, 1, d]      last: i64[b]
        y = linear(norm(x), w) : f32[b, n, v]     -->    y   = linear(norm(one), w)           : f32[b, 1, v]
        write keys = cache_update(keys, linear(x, k), ...)                                                        as it was

    That is the head, and of the last layer all but keys and values. A token is picked out where what it is picked from is written to
    the state, or mixes tokens.
    """

    name: ClassVar[str] = "last-rows"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        outputs = [n for n in graph.outputs if not is_scalar(n)]
        if not outputs or any(n.tensor.rank < 2 for n in outputs):
            return graph
        picker = _Picker(graph)
        chosen = tuple(n if is_scalar(n) else picker.of(n, 1) for n in graph.outputs)
        if notes is not None:
            for node in picker.picked:
                notes.apply(self.name, f"one token of each row of {describe(node)}", node)
        return cleaned(replace(graph, inputs=(*graph.inputs, picker.last), outputs=chosen))


class _Picker:
    """Values for one token of each row; dimension 0 of all of them is the batch, or 1.

    kept: what the state needs of all tokens. picked: values that tokens were picked from.
    """

    def __init__(self, graph: Graph) -> None:
        logits = graph.outputs[0].tensor
        self.batch = logits.shape[0]
        self.last = graph_input(LAST, TensorType(torch.int64, (self.batch,), logits.device))
        self.kept = _needed(graph, (value for _, value in graph.writes))
        self.picked: list[Node] = []
        self._known: dict[tuple[Node, int], Node] = {}

    def of(self, node: Node, d: int) -> Node:
        """The node, whose tokens lie in dimension d, for one of them."""
        if (node, d) not in self._known:
            through = None if node in self.kept else _THROUGH.get(node.op.name, _pointwise)
            made = through(self, node, d) if through is not None else None
            self._known[node, d] = self.pick(node, d) if made is None else made
        return self._known[node, d]

    def pick(self, node: Node, d: int) -> Node:
        self.picked.append(node)
        shape = (self.batch, *node.shape[1:])
        whole = node if same(node.shape[0], self.batch) else OPS["expand"](node, shape=shape)
        index = OPS["reshape"](self.last, shape=(self.batch, *(1,) * (len(shape) - 1)))
        index = OPS["expand"](index, shape=(*shape[:d], 1, *shape[d + 1 :]))
        return OPS["gather"](whole, index, dim=d, hint=node.hint, prov=node.prov)

    def aligned(self, node: Node, x: Node, d: int) -> Node:
        """An operand that meets the result element by element, for one token; what is the same for all tokens stays."""
        missing = node.tensor.rank - (0 if is_scalar(x) else x.tensor.rank)
        if d < missing or same(x.shape[d - missing], 1):
            return x
        return self.of(OPS["reshape"](x, shape=(*(1,) * missing, *x.shape)) if missing else x, d)


def _needed(graph: Graph, roots: Iterable[Node]) -> set[Node]:
    needed = set(roots)
    for node in reversed(order(graph)):
        if node in needed:
            needed.update(node.inputs)
    return needed


# Each takes the picker, a node and the dimension of its tokens; None where tokens cannot be picked from the operands.


def _pointwise(picker: _Picker, node: Node, d: int) -> Node | None:
    if node.op.category is not Category.POINTWISE:
        return None
    return node.with_inputs(tuple(picker.aligned(node, x, d) for x in node.inputs))


def _rows(picker: _Picker, node: Node, d: int) -> Node | None:
    """Products and rotations of what lies along the last dimension."""
    x, *others = node.inputs
    return None if d == node.tensor.rank - 1 else node.with_inputs((picker.of(x, d), *others))


def _norm(picker: _Picker, node: Node, d: int) -> Node | None:
    x, *others = node.inputs
    return None if d >= node.tensor.rank - node.attrs["axes"] else node.with_inputs((picker.of(x, d), *others))


def _slice(picker: _Picker, node: Node, d: int) -> Node | None:
    return None if d == node.attrs["dim"] else node.with_inputs((picker.of(node.inputs[0], d),))


def _permute(picker: _Picker, node: Node, d: int) -> Node | None:
    dims = node.attrs["dims"]
    return None if dims[0] else node.with_inputs((picker.of(node.inputs[0], dims[d]),))


def _reshape(picker: _Picker, node: Node, d: int) -> Node | None:
    (x,) = node.inputs
    before = product(node.shape[:d])
    inner = next((i for i in range(1, x.tensor.rank) if same(product(x.shape[:i]), before) and same(x.shape[i], node.shape[d])), None)
    if inner is None or not same(x.shape[0], node.shape[0]):
        return None
    shape = tuple(1 if i == d else n for i, n in enumerate(node.shape))
    return replace(node, attrs=MappingProxyType({**node.attrs, "shape": shape})).with_inputs((picker.of(x, inner),))


def _attention(picker: _Picker, node: Node, d: int) -> Node | None:
    """One query of each row, where keys and values come from the state."""
    q, k, v, *masks = node.inputs
    if d != node.tensor.rank - 2 or node.attrs["causal"]:
        return None
    return node.with_inputs((picker.of(q, d), k, v, *(picker.aligned(node, mask, d) for mask in masks)))


def _rope(picker: _Picker, node: Node, d: int) -> Node | None:
    return None if d == node.tensor.rank - 1 else node.with_inputs(tuple(picker.aligned(node, x, d) for x in node.inputs))


_THROUGH: dict[str, Callable[[_Picker, Node, int], Node | None]] = {
    "attention": _attention, "layer_norm": _norm, "linear": _rows, "permute": _permute, "reshape": _reshape, "rms_norm": _norm,
    "rope": _rope, "slice": _slice,
}  # fmt: skip
