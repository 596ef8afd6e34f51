"""shard-linears: the part of a graph that one of several processes computes, tensor-parallel (Megatron-LM, Shoeybi et al., 2019).

    h = linear(x, w1)       h' = linear(x, rows of w1)             columns of the result, each process its own
    a = gelu(h)        -->  a' = gelu(h')
    y = linear(a, w2)       y  = all_reduce(linear(a', columns of w2))

Which linears go in pairs follows from the graph: every linear is taken to be sharded by the columns of its result, that is carried through
what keeps it apart (pointwise ops, views, attention by heads), and where it ends in the last dimension of another linear's operand, partial
sums are added up over the processes. A linear whose result is wanted whole anywhere else stays whole, on every process. Weights may be in
any format whose rows and columns are those of its parts (`shard_weights.py`): a process holds its share of the integers, and their scales.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..ir.graph import Graph, Node, Stage, is_scalar, order, users
from ..ir.ops import OPS
from ..ir.ops.structure import Ref
from ..ir.reasons import Reason
from ..ir.rewrite import remap, rewrite
from .base import Notes, Pass, describe
from .shard_rules import carried
from .shard_weights import Stretch, in_constant, in_shares, is_weight, run, share, stretched
from .weights import ConstantMaker, is_constant, source_name

WORLD = "0"
"""How torch names the group of all processes."""

_PRODUCTS = frozenset({"linear", "int_linear"})


@dataclass(frozen=True)
class ShardLinears(Pass):
    """The graph of process `rank` of `count`: the same function of the same inputs, if all of them run theirs. group: as torch names it.

    only: names of weights; linears by others stay whole. () is all.
    """

    rank: int = 0
    count: int = 2
    group: str = WORLD
    only: tuple[str, ...] = ()

    name: ClassVar[str] = "shard-linears"
    needs: ClassVar[Stage] = Stage.CANONICAL

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        return self.shared_out(graph, notes or Notes()).graph

    def shared_out(self, graph: Graph, notes: Notes) -> Shared:
        whole = apart(graph)
        found = sharding(whole, self.count, notes, self._barred(whole))
        if not found.columns:
            return Shared(graph)
        local = _Local(whole, found, self)
        return Shared(local.made(notes), local.cut)

    def _barred(self, graph: Graph) -> frozenset[Node]:
        if not self.only:
            return frozenset()
        products = (n for n in order(graph) if n.op.name in _PRODUCTS)
        return frozenset(n for n in products if not any(made_from(source_name(n.inputs[1]), name) for name in self.only))


def made_from(name: str, weight: str) -> bool:
    """Whether a constant of that name is a weight, or was made from it."""
    return name == weight or name.startswith(f"{weight}.")


@dataclass(frozen=True)
class Shared:
    """The graph of one process. cut: the constants of which it has a stretch as long as everyone else's, and the dimension, as DTensor's
    `Shard` has it. Of a constant that was taken apart, each part: "qkv.weight[0:64]". None where it is no such stretch (scales of groups
    that processes share)."""

    graph: Graph
    cut: Mapping[str, int | None] = field(default_factory=dict)


@dataclass
class Sharding:
    """columns: linears of which each process has columns of the result; rows: those that read such, and whose results are added up.
    dims: of each value that is sharded, the dimension."""

    columns: set[Node] = field(default_factory=set)
    rows: set[Node] = field(default_factory=set)
    dims: dict[Node, int] = field(default_factory=dict)


def apart(graph: Graph) -> Graph:
    """Slices of a linear's result, of which each is read on its own, as linears of their own: q, k and v have heads of their own."""
    readers, roots = users(graph), set(graph.roots)

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node | None:
        source = node.inputs[0] if node.op.name == "slice" else node
        if source is node or not _shardable(source) or source in roots or not all(_is_columns(r) for r in readers[source]):
            return None
        start, stop = node.attrs["start"], node.attrs["stop"]
        x, *weights = inputs[0].inputs
        parts = [OPS["slice"](w, dim=0, start=start, stop=stop, prov=w.prov) for w in weights]
        return source.op(x, *parts, hint=node.hint, prov=source.prov.union(node.prov))

    return rewrite(graph, rule)


def _shardable(node: Node) -> bool:
    return node.op.name in _PRODUCTS and all(is_weight(w) for w in node.inputs[1:])


def _is_columns(node: Node) -> bool:
    return node.op.name == "slice" and node.attrs["dim"] == node.tensor.rank - 1 and node.attrs["step"] == 1


def sharding(graph: Graph, count: int, notes: Notes, barred: Collection[Node] = ()) -> Sharding:
    """The largest set of linears that can be shared out: all, less those of which a shard cannot be carried to a linear that ends it."""
    whole: set[Node] = set(barred)
    while True:
        found, conflict = _carried_on(graph, count, whole, barred)
        if conflict is None:
            return found
        for source in (n for n in order(graph) if n in conflict.blamed):
            notes.decline("shard-linears", describe(source), Reason.SHARED, source, conflict.value)
        whole |= conflict.blamed


@dataclass(frozen=True)
class _Conflict:
    """Where shards do not go on, in words, and which linears are to blame."""

    blamed: set[Node]
    value: str


def _carried_on(graph: Graph, count: int, whole: Collection[Node], barred: Collection[Node]) -> tuple[Sharding, _Conflict | None]:
    """Every linear not in `whole` by columns, as far as it goes: to the first conflict, for others may follow from it. Those that are
    `barred` are not to end shards, either."""
    found, sources = Sharding(), dict[Node, set[Node]]()
    for node in order(graph):
        sharded = [i for i in node.inputs if i in found.dims]
        blamed = set().union(*(sources[i] for i in sharded))
        if not sharded:
            if _shardable(node) and node not in whole and all(in_shares(w, 0, count) for w in node.inputs[1:]):
                found.columns.add(node)
                found.dims[node], sources[node] = node.tensor.rank - 1, {node}
        elif node not in barred and _ends(node, found.dims, count):
            found.rows.add(node)
        else:
            dim = carried(node, found.dims, count)
            if dim is None:
                return found, _Conflict(_blamed(node, sharded, found.dims, sources, count) or blamed, describe(node))
            found.dims[node], sources[node] = dim, blamed
    returned = next((root for root in graph.roots if root in found.dims), None)
    return found, None if returned is None else _Conflict(sources[returned], "the result")


def _blamed(node: Node, sharded: Sequence[Node], dims: Mapping[Node, int], sources: Mapping[Node, set[Node]], count: int) -> set[Node]:
    """Where one of the operands alone would go on, what the others come from: queries, say, if keys have one head for all."""
    for kept in sharded:
        others = set().union(*(sources[i] for i in sharded)) - sources[kept]
        if others and carried(node, {kept: dims[kept]}, count) is not None:
            return others
    return set()


def _ends(node: Node, dims: Mapping[Node, int], count: int) -> bool:
    """Whether a linear adds up over the shards of its operand."""
    if node.op.name != "linear" or not _shardable(node):
        return False
    return dims.get(node.inputs[0]) == node.inputs[0].tensor.rank - 1 and in_shares(node.inputs[1], 1, count)


class _Local:
    """The graph of one process. local: whole value -> what this process has of it."""

    def __init__(self, graph: Graph, found: Sharding, item: ShardLinears) -> None:
        self.graph, self.found, self.item = graph, found, item
        self.maker = ConstantMaker(graph)
        self.local: dict[Node, Node] = {}
        self.held: dict[tuple[Node, Stretch], Node] = {}
        self.cut: dict[str, int | None] = {}
        self.step = 1 + max((n.attrs["sequence"] for n in order(graph) if n.attrs.get("sequence") is not None), default=-1)

    def made(self, notes: Notes) -> Graph:
        for node in order(self.graph):
            self.local[node] = self._node(node)
        paired = f"{len(self.found.columns)} linears by columns, {len(self.found.rows)} by rows"
        notes.apply("shard-linears", f"process {self.item.rank + 1} of {self.item.count}: {paired}")
        return remap(self.graph, self.local)

    def _node(self, node: Node) -> Node:
        if node in self.found.columns:
            x, *weights = node.inputs
            return node.op(self.local[x], *(self._weight(w, 0) for w in weights), hint=node.hint, prov=node.prov)
        if node in self.found.rows:
            return self._row(node)
        if node in self.found.dims:
            return self._carried(node)
        inputs = tuple(self.local[i] for i in node.inputs)
        return node if inputs == node.inputs else replace(node, inputs=inputs)

    def _row(self, node: Node) -> Node:
        """The bias is added once, after the sum."""
        x, w, *bias = node.inputs
        total = self._sum(OPS["linear"](self.local[x], self._weight(w, 1), hint=node.hint, prov=node.prov))
        return OPS["add"](total, self.local[bias[0]], prov=node.prov) if bias else total

    def _sum(self, value: Node) -> Node:
        """Over all processes. Every one of them sums in the same order, which the numbers keep."""
        self.step += 2
        begun = collective("all_reduce", value, value.type, ("sum", self.item.group), self.step - 2)
        return collective("wait_tensor", begun, value.type, (), self.step - 1)

    def _weight(self, weight: Node, dim: int) -> Node:
        return stretched(weight, share(weight, dim, self.item.rank, self.item.count), self._held)

    def _held(self, constant: Node, part: Stretch) -> Node:
        if (constant, part) not in self.held:
            self.held[constant, part] = self.maker.derived([constant], f"shard{self.item.rank}", part.of, constant.prov)
            self._record(constant, part)
        return self.held[constant, part]

    def _record(self, view: Node, part: Stretch) -> None:
        whole = in_constant(view, run(part.dim, 0, int(view.shape[part.dim])))  # type: ignore[arg-type]
        if whole is None or part != share(view, part.dim, self.item.rank, self.item.count):
            self.cut[source_name(view)] = None
            return
        (constant, there) = whole
        start, stop = there.indices[0], there.indices[-1] + 1
        taken_apart = "" if stop - start == constant.shape[there.dim] else f"[{start}:{stop}]"
        self.cut[constant.attrs["data"].name + taken_apart] = there.dim

    def _carried(self, node: Node) -> Node:
        """The node on shards; operands that every process has whole are cut to what goes with its own."""
        dim = self.found.dims[node]
        inputs = tuple(self._operand(node, i, x, dim) for i, x in enumerate(node.inputs))
        attrs = dict(node.attrs)
        if "shape" in attrs:
            attrs["shape"] = tuple(self._share(d) if i == dim else d for i, d in enumerate(node.shape))
        return node.op(*inputs, hint=node.hint, prov=node.prov, **attrs)

    def _operand(self, node: Node, number: int, operand: Node, dim: int) -> Node:
        value = self.local[operand]
        if operand in self.found.dims or is_scalar(operand):
            return value
        place = whole_operand_dim(node, number, dim)
        if place is None or operand.shape[place] == 1:
            return value
        if is_constant(operand):
            return self._weight(operand, place)
        size = self._share(operand.shape[place])
        return OPS["slice"](value, dim=place, start=self.item.rank * size, stop=(self.item.rank + 1) * size, prov=operand.prov)

    def _share(self, size: Any) -> int:
        return int(size) // self.item.count


def whole_operand_dim(node: Node, number: int, dim: int) -> int | None:
    """The dimension of an operand that goes with dimension `dim` of the result; None where it has none."""
    place = dim - (node.tensor.rank - node.inputs[number].tensor.rank)
    return place if place >= 0 and node.op.name not in ("rms_norm", "layer_norm") else None


def collective(name: str, value: Node, kind: Any, rest: Sequence[Any], sequence: int) -> Node:
    """A step of all processes, by torch.distributed's functional collectives."""
    target = f"_c10d_functional.{name}.default"
    return OPS["extern"](value, target=target, args=(Ref(0), *rest), types=(kind,), sequence=sequence, prov=value.prov)
