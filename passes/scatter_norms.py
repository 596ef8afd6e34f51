"""scatter-norms: sum over processes, residual and norm, each token by one process (TokenWeave; Korthikanti's sequence parallelism).

    s = all_reduce(p)                      s' = reduce_scatter(p)      a share of the tokens for each process
    h = add(x, s)              -->         h' = add(x', s')
    n = rms_norm(h)                        n' = rms_norm(h')           computed once, not by every process
    ... reads n                            ... reads all_gather(n')

A sum over all processes is a scatter and a gather, so no more is sent; the residual stream stays scattered from layer to layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..ir.graph import Graph, Node, Stage, is_scalar, order, users
from ..ir.ops import OPS
from ..ir.reasons import Reason
from ..ir.rewrite import remap
from ..ir.types import TensorType
from .base import Notes, Pass
from .shard_linears import WORLD, collective

_SUM = "_c10d_functional.all_reduce.default"
_WAIT = "_c10d_functional.wait_tensor.default"
_NORMS = frozenset({"rms_norm", "layer_norm"})


@dataclass(frozen=True)
class ScatterNorms(Pass):
    """On the graph of one process, as shard-linears leaves it."""

    rank: int = 0
    count: int = 2
    group: str = WORLD

    name: ClassVar[str] = "scatter-norms"
    needs: ClassVar[Stage] = Stage.CANONICAL

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes or Notes()
        scattered = _scattered(graph, self.count)
        sums = [n for n in scattered if n.op.name == "extern"]
        norms = [n for n in scattered if n.op.name in _NORMS]
        readers = users(graph)
        gathered = [n for n in scattered if n in graph.roots or any(r not in scattered for r in readers[n])]
        if not norms:
            return graph
        if len(gathered) > len(sums):
            more = f"{len(gathered)} values to gather for {len(sums)} sums"
            notes.decline(self.name, "norms of sums", Reason.NO_GAIN, norms[0], more)
            return graph
        notes.apply(self.name, f"{len(sums)} sums, {len(norms)} norms of a share of the tokens, {len(gathered)} gathered", norms[0])
        return _Rewriter(graph, self, frozenset(scattered)).made()


def _scattered(graph: Graph, count: int) -> dict[Node, None]:
    """What is computed on a share of the tokens: sums over processes, what adds to them, and norms of these."""
    found: dict[Node, None] = {}
    for node in order(graph):
        if _is_sum(node) and _tokens(node, count) or _follows(node, found):
            found[node] = None
    return found


def _follows(node: Node, found: Mapping[Node, None]) -> bool:
    if node.op.name in _NORMS:
        return node.inputs[0] in found and node.attrs["axes"] == 1
    return node.op.name == "add" and any(i in found for i in node.inputs) and all(_goes_along(i, node) for i in node.inputs)


def _is_sum(node: Node) -> bool:
    if node.op.name != "extern" or node.attrs["target"] != _WAIT:
        return False
    begun = node.inputs[0]
    return begun.op.name == "extern" and begun.attrs["target"] == _SUM and begun.attrs["args"][1] == "sum"


def _tokens(node: Node, count: int) -> bool:
    """Whether it has tokens, in its dimensions but the last, that all processes can take as many of."""
    if not isinstance(node.type, TensorType) or node.tensor.rank < 2 or not all(isinstance(d, int) for d in node.shape):
        return False
    return _rows(node) % count == 0 and _rows(node) > 0


def _rows(node: Node) -> int:
    return int(node.tensor.numel) // int(node.shape[-1]) if node.shape[-1] else 0


def _goes_along(operand: Node, node: Node) -> bool:
    """Whether the operand has a row for each token, or one for all."""
    return is_scalar(operand) or operand.shape == node.shape or operand.tensor.rank <= 1


@dataclass
class _Rewriter:
    """whole, share: a value as all processes have it, and the tokens of this one: [tokens / count, size]."""

    graph: Graph
    item: ScatterNorms
    scattered: frozenset[Node]
    whole: dict[Node, Node] = field(default_factory=dict)
    share: dict[Node, Node] = field(default_factory=dict)
    step: int = 0

    def made(self) -> Graph:
        begun = {n.inputs[0] for n in self.scattered if n.op.name == "extern"}  # sums that are no more
        for node in order(self.graph):
            if node in self.scattered:
                self.share[node] = self._share(node)
            elif node not in begun:
                self.whole[node] = self._whole(node)
        return remap(self.graph, {**self.whole, **{n: self._gathered(n) for n in self.graph.roots if n in self.scattered}})

    def _whole(self, node: Node) -> Node:
        inputs = tuple(self._gathered(i) for i in node.inputs)
        attrs = dict(node.attrs)
        if attrs.get("sequence") is not None:
            attrs["sequence"] = self._next()
        return node if inputs == node.inputs and attrs == node.attrs else node.op(*inputs, hint=node.hint, prov=node.prov, **attrs)

    def _next(self) -> int:
        self.step += 1
        return self.step - 1

    def _gathered(self, node: Node) -> Node:
        if node not in self.whole:
            share = self.share[node]
            kind = TensorType(share.dtype, (_rows(node), node.shape[-1]), share.tensor.device)
            together = self._collective("all_gather_into_tensor", share, kind, (self.item.count, self.item.group))
            self.whole[node] = OPS["reshape"](together, shape=node.shape, hint=node.hint, prov=node.prov)
        return self.whole[node]

    def _share(self, node: Node) -> Node:
        if node.op.name == "extern":
            partial = self._flat(self._gathered(node.inputs[0].inputs[0]), node)
            kind = TensorType(node.dtype, (_rows(node) // self.item.count, node.shape[-1]), node.tensor.device)
            return self._collective("reduce_scatter_tensor", partial, kind, ("sum", self.item.count, self.item.group))
        inputs = tuple(self._operand(i, node) for i in node.inputs)
        return node.op(*inputs, hint=node.hint, prov=node.prov, **node.attrs)

    def _operand(self, operand: Node, node: Node) -> Node:
        if operand in self.share:
            return self.share[operand]
        whole = self._gathered(operand)
        if is_scalar(operand) or operand.shape != node.shape:
            return whole
        size = _rows(node) // self.item.count
        start = self.item.rank * size
        return OPS["slice"](self._flat(whole, node), dim=0, start=start, stop=start + size, prov=operand.prov)

    def _flat(self, value: Node, like: Node) -> Node:
        return OPS["reshape"](value, shape=(_rows(like), like.shape[-1]), prov=value.prov)

    def _collective(self, name: str, value: Node, kind: TensorType, rest: Sequence[Any]) -> Node:
        return collective("wait_tensor", collective(name, value, kind, rest, self._next()), kind, (), self._next())
