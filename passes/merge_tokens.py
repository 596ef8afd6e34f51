"""`merge-tokens`: tokens that are alike become one, between an attention and the MLP behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.analysis.axes import Axis, How, axis_of
from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, graph_input, order, users, visit
from ..ir.patterns import Refusal
from ..ir.reasons import Reason
from ..ir.rewrite import inline, rewrite
from .base import Exactness, Notes, Pass, describe
from .token_maps import Builder, apart, merged, most_merged, places_after, rows_of, share_of

_SIZED = ("reshape", "expand")
"""Ops that are told the sizes of their result."""

_WHOLE = ("extern", "layout", "as_strided")
"""Ops that are for one size only."""


@dataclass(frozen=True, eq=False)
class MergeSite:
    """A place where tokens can be merged: `x`, the sum of what an attention adds and what it was added to. keys: [b, h, t, d].

    name: the module of the attention.
    """

    name: str
    attention: Node
    keys: Node
    x: Node


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where the tokens of a graph live. stem: what the first attention's result is added to, an input of `graph`; the tokens are its
    dimension `dim`, `count` of them. axis: of the stem. outside: what the inputs of `graph` are in the graph it was made of."""

    graph: Graph
    outside: tuple[Node, ...]
    axis: Axis
    stem: Node
    dim: int
    attentions: tuple[Node, ...]
    sites: tuple[MergeSite, ...] = ()

    @property
    def count(self) -> int:
        return int(self.axis.size)


@dataclass(frozen=True)
class MergeTokens(Pass):
    """The tokens most alike become their mean, so that what follows has fewer of them; a token then counts as often as it has parts.

        a = attention(q, k, v)               a = attention(q, k, v)
        x = add(h, proj(a))                  x = add(h, proj(a))               [b, t, c]
        y = add(x, mlp(x))                   m = scatter x by places(k)        [b, t - r, c], means; s: how many parts each has
        b = attention(q', k', v')    -->     y = add(m, mlp(m))
                                             b = attention(q', k', v', log s)
        z = head(y)                          z = head(y read by places)

    What does not treat each token alone reads them apart again, every one with what it became part of: a mean over tokens, the choice of
    one, an output, an attention with a mask. With several tokens that are alike all of this is exact, as long as nothing tells them by
    their place. Refused: attentions that are causal, have a mask, or whose result is not added to [batch, tokens, channels].

    counts: how many tokens go, by the name of the attention. protected: so many first tokens stay as they are (a class token).
    Source: "Token Merging: Your ViT But Faster" (Bolya et al., 2022); counts by layer as in "DiffRate" (Chen et al., 2023).
    """

    counts: tuple[tuple[str, int], ...] = ()
    protected: int = 0

    name: ClassVar[str] = "merge-tokens"
    exactness: ClassVar[Exactness] = Exactness.BOUNDED

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        if not any(count for _, count in self.counts):
            return graph
        found = tokens_of(graph, notes)
        if found is None:
            return graph
        known = {site.name for site in found.sites}
        for name in (name for name, _ in self.counts if name not in known):
            notes.decline(self.name, name, Reason.SHAPE_MISMATCH, value="there is no attention of this name to merge behind")
        merging = _Merging(found, self, notes)
        roots = merging.roots()
        return _put_back(graph, found, roots) if merging.done else graph


# -- where tokens are


def tokens_of(graph: Graph, notes: Notes | None = None) -> Tokens | None:
    """Where tokens can be merged; None where nowhere, with the reasons in the notes."""
    notes = notes if notes is not None else Notes()
    attentions = [n for n in order(graph) if n.op.name == "attention"]
    readers = users(graph)
    below = _below(graph)
    for attention in attentions:
        x = _residual(attention, readers, below)
        if isinstance(x, Refusal):
            notes.decline(MergeTokens.name, describe(attention), x.reason, attention, str(x.value))
            continue
        found = _from_stem(graph, attention, next(i for i in x.inputs if attention not in below[i]))
        if isinstance(found, Refusal):
            notes.decline(MergeTokens.name, describe(attention), found.reason, attention, str(found.value))
            continue
        return _with_sites(found, notes)
    return None


def _below(graph: Graph) -> dict[Node, frozenset[Node]]:
    """Node -> the attentions that it depends on, itself included."""
    found: dict[Node, frozenset[Node]] = {}
    for node in order(graph):
        mine = frozenset((node,)) if node.op.name == "attention" else frozenset()
        found[node] = mine.union(*(found[i] for i in node.inputs))
    return found


def _residual(attention: Node, readers: Mapping[Node, list[Node]], below: Mapping[Node, frozenset[Node]]) -> Node | Refusal:
    """The sum of what comes of an attention and of something it read itself, or why there is none."""
    before: set[Node] = set()
    visit(attention, before, [])
    node = attention
    while len(readers[node]) == 1:
        node = readers[node][0]
        others = [i for i in node.inputs if attention not in below[i]]
        if node.op.name == "add" and any(o in before and o.op.name != "constant" for o in others):
            return node if node.tensor.rank == 3 else Refusal(Reason.SHAPE_MISMATCH, f"what it is added to is {node.type}")
    return Refusal(Reason.SHAPE_MISMATCH, "its result is not added to what it was computed from")


def _from_stem(graph: Graph, attention: Node, stem: Node) -> Tokens | Refusal:
    """The axis of tokens, looked for from what the first attention's result is added to."""
    if stem.tensor.rank != 3:
        return Refusal(Reason.SHAPE_MISMATCH, f"what it is added to is {stem.type}")
    if not all(isinstance(d, int) for d in (*stem.shape, *attention.shape)):
        return Refusal(Reason.VARYING_SIZE, f"{stem.type}")
    cut, inside, outside = _cut(graph, stem)
    for dim in (1, 0):
        axis = axis_of(cut, inside, dim)
        queries = [n for n in order(cut) if n.op.name == "attention" and _lives(axis, n.inputs[0], -2)]
        if queries:
            return Tokens(cut, outside, axis, inside, dim, tuple(queries))
    return Refusal(Reason.SHAPE_MISMATCH, "its queries are not the tokens it is added to")


def _cut(graph: Graph, stem: Node) -> tuple[Graph, Node, tuple[Node, ...]]:
    """The graph from `stem` on, which becomes an input of it."""
    if stem.op.name == "input":
        return graph, stem, graph.inputs
    inside = graph_input(stem.hint or "stem", stem.type, prov=stem.prov)
    cut = rewrite(graph, lambda node, inputs: inside if node is stem else None)
    return replace(cut, inputs=(*graph.inputs, inside)), inside, (*graph.inputs, stem)


def _with_sites(found: Tokens, notes: Notes) -> Tokens | None:
    """With those of the attentions behind which tokens can be merged."""
    readers, below = users(found.graph), _below(found.graph)
    sites: dict[str, MergeSite] = {}
    for attention in found.attentions:
        refused = _refusal(found, attention)
        x = _residual(attention, readers, below) if refused is None else refused
        if isinstance(x, Node) and not _like_stem(found, x):
            x = Refusal(Reason.SHAPE_MISMATCH, f"its result is added to {x.type}")
        if isinstance(x, Refusal):
            notes.decline(MergeTokens.name, describe(attention), x.reason, attention, str(x.value))
        else:
            name = next(iter(attention.prov.modules), "") or f"attention_{len(sites)}"
            name = f"{name}#{len(sites)}" if name in sites else name
            sites[name] = MergeSite(name, attention, attention.inputs[1], x)
    return replace(found, sites=tuple(sites.values())) if sites else None


def _refusal(found: Tokens, attention: Node) -> Refusal | None:
    """Why an attention cannot be one over tokens that are several."""
    if attention.attrs["causal"]:
        return Refusal(Reason.MIXED, "it is causal: a token would see later ones")
    if len(attention.inputs) > 3:
        return Refusal(Reason.MIXED, "its mask tells tokens by their place")
    if attention.attrs["weights"] != "softmax":
        return Refusal(Reason.MIXED, "its weights are no softmax")
    if not all(_lives(found.axis, i, -2) for i in attention.inputs):
        return Refusal(Reason.SHAPE_MISMATCH, "its keys are not the tokens of its queries")
    if attention.tensor.rank != 4 or attention.shape[0] != found.stem.shape[1 - found.dim]:
        return Refusal(Reason.SHAPE_MISMATCH, f"{attention.type} has no dimension for the batch")
    return None


def _lives(axis: Axis, node: Node, dim: int) -> bool:
    """Whether the axis is that dimension of the node, and no other."""
    places = axis.everywhere(node)
    if places is None:
        return False
    at = places[dim % len(places)]
    return at is not None and at.plain and sum(p is not None for p in places) == 1


def _like_stem(found: Tokens, node: Node) -> bool:
    """Whether tokens of a value can be taken apart again, as those of the stem."""
    return node.tensor.rank == 3 and node.shape == found.stem.shape and _lives(found.axis, node, found.dim)


# -- fewer tokens


@dataclass(frozen=True, eq=False)
class _Level:
    """After some merges: `count` tokens, how many parts each has [b, count], and in which each of the first tokens is [b, t]."""

    count: int
    sizes: Node | None = None
    places: Node | None = None


class _Merging:
    """Rebuilds a graph. Every value has a level: that of the tokens in it, the first for what has none."""

    def __init__(self, found: Tokens, asked: MergeTokens, notes: Notes) -> None:
        self.found, self.counts, self.protected, self.notes = found, dict(asked.counts), asked.protected, notes
        self.levels = [_Level(found.count)]
        self.sites = {site.x: site for site in found.sites}
        self.attentions = {site.attention for site in found.sites}
        self.new: dict[Node, tuple[Node, int]] = {}
        self.whole: dict[Node, Node] = {}  # with all tokens apart

    def roots(self) -> list[Node]:
        for node in order(self.found.graph):
            self.new[node] = self._node(node)
            if node in self.sites and self._may(self.sites[node]):
                self.new[node] = self._merged(self.sites[node])
        return [self._apart(root) for root in self.found.graph.roots]

    def _node(self, node: Node) -> tuple[Node, int]:
        levels = {self.new[i][1] for i in node.inputs if self._along(i)}
        level = max(levels, default=0)
        if level == 0:
            return _on(node, [self.new[i][0] for i in node.inputs]), 0
        made = self._at(node, level) if levels == {level} else None
        return (self._whole(node), 0) if made is None else (made, level)

    def _along(self, node: Node) -> bool:
        return self.found.axis.everywhere(node) is not None

    def _at(self, node: Node, level: int) -> Node | None:
        """The node on fewer tokens, None where it needs them apart."""
        inputs, here = [self.new[i][0] for i in node.inputs], self.levels[level]
        if node in self.attentions:
            assert here.sizes is not None, "tokens of a level above the first have sizes"
            return node.op(*inputs, share_of(here.sizes, self._builder(node)), hint=node.hint, prov=node.prov, **node.attrs)
        label, places = self.found.axis.labels.get(node), self.found.axis.everywhere(node)
        if label is None or label.how is not How.PARALLEL or places is None or node.op.name in _WHOLE:
            return None
        shape = tuple(d if p is None else p.extent(here.count) for d, p in zip(node.shape, places))
        sized = {"shape": shape} if node.op.name in _SIZED else {}
        try:
            made = node.op(*inputs, hint=node.hint, prov=node.prov, **{**node.attrs, **sized})
        except TilewrightError:  # sizes that something else has, too
            return None
        return made if made.shape == shape else None

    def _may(self, site: MergeSite) -> bool:
        """Whether tokens go here; says so."""
        level, count = self.new[site.x][1], self.counts.get(site.name, 0)
        here = self.levels[level].count
        most = most_merged(here, self.protected) if self.new[site.keys][1] == level else 0
        if count > most:
            self.notes.decline(MergeTokens.name, site.name, Reason.SHAPE_MISMATCH, site.x, f"{count} of {here} tokens, {most} can go")
        if not 0 < count <= most or not self.notes.may(MergeTokens.name, site.x, site.name):
            return False
        self.notes.apply(MergeTokens.name, f"{site.name}: {here} -> {here - count} tokens", site.x)
        return True

    def _merged(self, site: MergeSite) -> tuple[Node, int]:
        x, level = self.new[site.x]
        count, here, make = self.counts[site.name], self.levels[level], self._builder(site.x)
        left = here.count - count
        places = places_after(make("mean", self.new[site.keys][0], dims=(1,)), count, self.protected, make)
        value, sizes = merged(self._batch_first(x, make), here.sizes, rows_of(places, left, make), left, make)
        whole = places if here.places is None else make("gather", places, here.places, dim=1)
        self.levels.append(_Level(left, sizes, whole))
        return self._batch_first(value, make), len(self.levels) - 1

    @property
    def done(self) -> bool:
        """Whether anything was merged."""
        return len(self.levels) > 1

    def _batch_first(self, x: Node, make: Builder) -> Node:
        """[b, t, c] of a value laid out as the stem, and back."""
        return x if self.found.dim == 1 else make("permute", x, dims=(1, 0, 2))

    def _apart(self, node: Node) -> Node:
        """A value with every token in its place."""
        value, level = self.new[node]
        if level == 0:
            return value
        if not _like_stem(self.found, node):
            return self._whole(node)
        if node not in self.whole:
            places, make = self.levels[level].places, self._builder(node)
            assert places is not None, "tokens of a level above the first have places"
            self.whole[node] = self._batch_first(apart(self._batch_first(value, make), places, make), make)
        return self.whole[node]

    def _whole(self, node: Node) -> Node:
        """A node computed from values with every token in its place."""
        if node not in self.whole:
            self.whole[node] = _on(node, [self._apart(i) for i in node.inputs])
        return self.whole[node]

    def _builder(self, node: Node) -> Builder:
        return Builder(node.prov.with_rule(MergeTokens.name))


def _on(node: Node, inputs: Sequence[Node]) -> Node:
    return node if tuple(inputs) == node.inputs else node.with_inputs(tuple(inputs))


def _put_back(graph: Graph, found: Tokens, roots: Sequence[Node]) -> Graph:
    """The graph with what it was cut at in place of the input."""
    outside = dict(zip(found.graph.inputs, found.outside, strict=True))
    made = replace(found.graph, outputs=tuple(roots), writes=())
    new = inline(made, [outside[i] for i in made.inputs])
    count = len(graph.outputs)
    writes = tuple((target, value) for (target, _), value in zip(graph.writes, new[count:], strict=True))
    return rewrite(replace(graph, outputs=new[:count], writes=writes, arena={}, inplace={}), lambda node, inputs: None)
