"""`merge-linears`: sibling linears on one input become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.dims import hint
from ..ir.graph import Graph, Node, users
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import rewrite
from .base import Notes, Pass, Reason, describe
from .weights import ConstantMaker, is_constant, value_of

_CALL_BYTES = 50_000
"""What starting one more product costs, as bytes that could be moved meanwhile (5 us at 10 GB/s)."""


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Sibling linears on one input become one linear and slices of it.

        q = linear(x, wq, bq)              qk = linear(x, cat(wq, wk), cat(bq, 0))
        k = linear(x, wk)          -->     q  = slice(qk, dim=1, start=0, stop=384)
                                           k  = slice(qk, dim=1, start=384, stop=768)

    The input is read once and one product is started instead of several. The slices are views with the stride of the merged row:
    kernels and vendor products read them in place, outputs and ATen fallbacks copy them. A linear of our own whose one reader is
    pointwise would have taken it in as its epilogue: merged, its result is written and read once more (gate and up of an MLP). Where
    that costs more than is saved the linears stay apart (NO_GAIN). Refused too: weights that are no constants, or shared ones.

    max_columns: a merged product has at most that many columns; further siblings start another one.
    """

    max_columns: int = 16384

    name: ClassVar[str] = "merge-linears"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes or Notes()
        readers = users(graph)
        place: dict[Node, tuple[_Group, int]] = {}
        for x, nodes in readers.items():
            siblings = [n for n in nodes if n.op.name == "linear" and n.inputs[0] is x and x not in n.inputs[1:]]
            if len(siblings) < 2:
                continue
            for members in self._groups(_mergeable(siblings, readers, notes), notes):
                group = _Group(tuple(members))
                saved = _saved(group, graph, readers)
                if saved <= 0:
                    notes.decline(self.name, group.label, Reason.NO_GAIN, members[0], f"{-saved} bytes copied")
                    continue
                if notes.may(self.name, members[0], group.label):
                    notes.apply(self.name, group.label, members[0], saved)
                    place.update({node: (group, i) for i, node in enumerate(members)})
        return _merged(graph, place) if place else graph

    def _groups(self, siblings: list[Node], notes: Notes) -> list[list[Node]]:
        """Runs of siblings that fit `max_columns`; lone ones are left out."""
        groups: list[list[Node]] = [[]]
        for node in siblings:
            if _columns([*groups[-1], node]) > self.max_columns and groups[-1]:
                notes.decline(self.name, describe(node), Reason.TOO_LARGE, node, f"{_columns([*groups[-1], node])} columns")
                groups.append([])
            groups[-1].append(node)
        return [g for g in groups if len(g) > 1]


@dataclass(frozen=True, eq=False)
class _Group:
    """Linears that become one."""

    members: tuple[Node, ...]

    @property
    def label(self) -> str:
        return ", ".join(describe(m) for m in self.members)


def _columns(nodes: list[Node]) -> int:
    return sum(int(n.shape[-1]) for n in nodes)


def _mergeable(siblings: list[Node], readers: Mapping[Node, list[Node]], notes: Notes) -> list[Node]:
    """Those with constant weights and bias that nobody else reads."""
    kept: list[Node] = []
    for node in siblings:
        unknown = next((p for p in node.inputs[1:] if not is_constant(p)), None)
        shared = next((p for p in _chain(node.inputs[1]) if len(readers[p]) > 1), None)
        if unknown is not None:
            notes.decline("merge-linears", describe(node), Reason.NOT_CONSTANT, node, unknown.hint)
        elif shared is not None:
            notes.decline("merge-linears", describe(node), Reason.SHARED, node, shared.hint)
        else:
            kept.append(node)
    return kept


def _chain(node: Node) -> list[Node]:
    """A weight and what it is a view of."""
    chain = [node]
    while chain[-1].inputs:
        chain.append(chain[-1].inputs[0])
    return chain


def _saved(group: _Group, graph: Graph, readers: Mapping[Node, list[Node]]) -> int:
    """Bytes saved by reading the input once and starting one product, less those of the copies that the slices cause."""
    x = group.members[0].inputs[0]
    once = (hint(x.tensor.nbytes, graph.symbols) + _CALL_BYTES) * (len(group.members) - 1)
    roots = set(graph.roots)
    lost = [m for m in group.members if _copied(m, readers, roots) or _has_epilogue(m, readers, roots)]
    return once - sum(2 * hint(m.tensor.nbytes, graph.symbols) for m in lost)


def _has_epilogue(node: Node, readers: Mapping[Node, list[Node]], roots: set[Node]) -> bool:
    """The value has one reader, a pointwise op, and the linear can be a kernel of ours together with it."""
    if node in roots or node.dtype != torch.float32 or node.tensor.device != "cpu":
        return False
    return len(readers[node]) == 1 and readers[node][0].op.category is Category.POINTWISE


def _copied(node: Node, readers: Mapping[Node, list[Node]], roots: set[Node]) -> bool:
    """The value, directly or through views, leaves the graph or is read by ATen, which wants it in one piece."""
    stack = [node]
    while stack:
        value = stack.pop()
        if value in roots:
            return True
        for reader in readers[value]:
            if reader.op.category is Category.EXTERN:
                return True
            if reader.op.category is Category.VIEW:
                stack.append(reader)
    return False


def _merged(graph: Graph, place: Mapping[Node, tuple[_Group, int]]) -> Graph:
    maker = ConstantMaker(graph)
    products: dict[_Group, Node] = {}

    def merge(node: Node, inputs: tuple[Node, ...]) -> Node | None:
        if node not in place:
            return None
        group, i = place[node]
        if group not in products:
            products[group] = _product(group, inputs[0], maker)
        start = _columns(list(group.members[:i]))
        attrs = {"dim": node.tensor.rank - 1, "start": start, "stop": start + _columns([node])}
        return OPS["slice"](products[group], **attrs, hint=node.hint, prov=node.prov.with_rule("merge-linears"))

    return rewrite(graph, merge)


def _product(group: _Group, x: Node, maker: ConstantMaker) -> Node:
    """One linear for all members; a missing bias is zero."""
    first = group.members[0]
    prov = first.prov.union(*(m.prov for m in group.members[1:])).with_rule("merge-linears")
    weights = [m.inputs[1] for m in group.members]
    shape = (sum(int(w.shape[0]) for w in weights), *weights[0].shape[1:])
    operands = [maker.later(weights, "merged", lambda out, *ws: torch.cat(ws, out=out), shape, prov)]
    if any(len(m.inputs) > 2 for m in group.members):
        source = next(m.inputs[2] for m in group.members if len(m.inputs) > 2)
        operands.append(maker.derived([source], "merged", lambda _: torch.cat([_bias(m) for m in group.members]), prov))
    return OPS["linear"](x, *operands, hint="_".join(m.hint for m in group.members if m.hint), prov=prov)


def _bias(node: Node) -> torch.Tensor:
    _, weight, *bias = node.inputs
    found = value_of(bias[0]) if bias else torch.zeros(int(weight.shape[0]), dtype=weight.dtype, device=weight.tensor.device)
    assert found is not None, "only linears with constant bias are merged"
    return found
