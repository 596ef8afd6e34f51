"""Padding removal: what is done to each token alone is done to those that are no padding, one after the other in `n` rows.

    graph(ids: i64[b, s], mask: i64[b, s])            graph(ids, mask, rows: i64[n], positions, first, last, places: i64[b, s])
    x = embedding(table, ids)     : [b, s, d]         x = embedding(table, index(ids, rows))          : [1, n, d]
    a = attention(q, k, v, keep)  : [b, h, s, d]  --> a = attention(q, k, v, first <= key < last)     : [1, h, n, d]
    return linear(a, w)           : [b, s, d]         return where(places >= 0, index(linear(a, w), places), 0)

A row computes what its token computed: a batch of one sequence of n tokens, but for the mask and for positions, which are read where the
tokens stood. Exact for tokens that are no padding; where padding stood there are zeros. After ByteTransformer (Zhai et al., 2023).

What reads several tokens may do so where padding is the same whatever it was before: sums of what the mask made 0 (mean pooling), maxima
of what it made -inf. The first token (CLS) may be read if it is never padding, which is the caller's to see to. All else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..ir.analysis.axes import Axis, How, axis_of
from ..ir.analysis.axis_links import OUT
from ..ir.analysis.axis_resize import ATTRIBUTES
from ..ir.analysis.axis_spread import Conflict
from ..ir.analysis.axis_spread import spread as spread_ends
from ..ir.analysis.padding import Tokens, hides, key_mask
from ..ir.analysis.places import PARALLEL, Along
from ..ir.analysis.primitives import expanded
from ..ir.dims import Dim, SymbolRange, dim, same, same_shape, symbol
from ..ir.errors import TypeInferenceError
from ..ir.graph import Graph, Node, graph_input, is_scalar, order, use_counts
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.reasons import Reason
from ..ir.types import TensorType
from .base import Notes, Pass, describe
from .packed_masks import CannotPack, Layout, packed_mask

NAME = "remove-padding"
FIRST, LAST = 0, -1
"""Positions of tokens that a graph may read by themselves."""

_ONE_VALUE = OPS.keys() - {"quantize_rows", "item"}
"""Rows hold one value a node: the codes and scales of inputs in 8 bits are computed apart, and fusion, for which they would be that anyway,
joins them again."""


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Tokens that are padding are not computed. The graph takes where packed rows come from as further inputs (`Layout`), so it is none of
    the passes that `--passes` lists: `driver.padding` runs it, and computes those inputs."""

    name = NAME

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        found = without_padding(graph, notes)
        return graph if found is None else found.graph


@dataclass(frozen=True)
class Packed:
    """A graph without padding, and what it takes for granted of its inputs.

    mask: which input tells padding. padding: what it holds there. present: positions (FIRST, LAST) at which no sequence has padding.
    spread: for each output that has zeros where padding stood, its dimensions that are batch and tokens, the same one where they are
    merged; None for others.
    """

    graph: Graph
    mask: int
    padding: int
    present: frozenset[int] = frozenset()
    spread: tuple[tuple[int, int] | None, ...] = ()


def without_padding(graph: Graph, notes: Notes | None = None) -> Packed | None:
    """The graph over packed rows; None, with the reason in the notes, where it has no such form."""
    notes = notes or Notes()
    graph = expanded(graph, keep=_ONE_VALUE)
    attentions = [n for n in order(graph) if n.op.name == "attention"]
    padding = next(filter(None, map(key_mask, attentions)), None)
    if padding is None:
        at = attentions[0] if attentions else None
        notes.decline(NAME, describe(at) if at else graph.name, Reason.NO_KEY_MASK, at, "" if at else "there is no attention")
        return None
    try:
        found = _found(graph, padding, attentions)
    except CannotPack as error:
        notes.decline(NAME, describe(error.node), Reason.PADDED_ROWS, error.node, error.why)
        return None
    if not notes.may(NAME, attentions[0]):
        return None
    mask = found.graph.inputs[found.mask]
    notes.apply(NAME, f"rows of padding ({mask.hint}) are left out of {len(attentions)} attentions and all between", attentions[0])
    return found


def _found(graph: Graph, padding: Tokens, attentions: list[Node]) -> Packed:
    batch, length = padding.mask.shape
    refused: CannotPack | None = None
    for source in graph.inputs:
        if is_scalar(source) or source is padding.mask or not same_shape(source.shape[:2], (batch, length)):
            continue
        tokens, sequences = axis_of(graph, source, 1), axis_of(graph, source, 0)
        if not any(n in tokens.labels for n in attentions):
            continue
        try:
            return _Packer(graph, tokens, sequences, padding).run()
        except CannotPack as error:
            refused = refused or error
    raise refused or CannotPack(attentions[0], "no input has the tokens that its mask is of")


@dataclass(frozen=True)
class _Place:
    """The dimensions of a value that are its tokens and its batch; the same one where they are merged. along: how it holds the batch,
    which heads may be beside."""

    tokens: int
    batch: int
    along: Along = Along()

    @property
    def merged(self) -> bool:
        return self.tokens == self.batch


@dataclass
class _Packer:
    """Walks the graph once: each value stays whole, or becomes packed rows. packed: values over rows, with their dimensions there."""

    graph: Graph
    tokens: Axis
    sequences: Axis
    padding: Tokens
    packed: dict[Node, Node] = field(default_factory=dict)
    places: dict[Node, _Place] = field(default_factory=dict)
    whole: dict[Node, Node] = field(default_factory=dict)
    present: set[int] = field(default_factory=set)
    readers: Mapping[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch, self.length = self.sequences.size, self.tokens.size
        self.readers = use_counts(self.graph)
        device = self.padding.mask.tensor.device
        self.count = _fresh_symbol(self.graph)
        kinds = {name: (self.count,) for name in ("rows", "positions", "first", "last")} | {"places": (self.batch, self.length)}
        self.layout = Layout(*(graph_input(name, TensorType(torch.int64, shape, device)) for name, shape in kinds.items()))
        self.valid = Tokens(self.padding.mask, 1 - self.padding.held, everywhere=True)

    def run(self) -> Packed:
        graph = self.graph
        for node in order(graph):
            if node.op.name != "input" and self._becomes_rows(node):
                self.packed[node] = self._packed(node)
            else:
                self.whole[node] = self._kept(node)
        written = next((value for _, value in graph.writes if value in self.packed), None)
        if written is not None:
            raise CannotPack(written, "it is written back into an input")
        if not any(n.op.name == "attention" for n in self.packed):
            raise CannotPack(graph.outputs[0], "no attention reads rows of tokens")
        most = dim(self.batch * self.length)
        made = replace(
            graph,
            inputs=(*graph.inputs, *self.layout.inputs),
            outputs=tuple(self._spread_out(n, 0) if n in self.packed else self.whole[n] for n in graph.outputs),
            writes=tuple((target, self.whole[value]) for target, value in graph.writes),
            symbols={**graph.symbols, str(self.count): SymbolRange(1, most if isinstance(most, int) else None)},
        )
        spread = tuple((place.batch, place.tokens) if (place := self.places.get(n)) else None for n in graph.outputs)
        return Packed(made, graph.inputs.index(self.padding.mask), self.padding.held, frozenset(self.present), spread)

    # -- which values become rows

    def _becomes_rows(self, node: Node) -> bool:
        place = self._place(node) if node.op.name != "layout" else None  # how a result lies in memory: put on when padding is back
        if place is None:
            return False
        if not any(x in self.packed for x in node.inputs) and not self._begins(node):
            return False
        if node.op.name == "attention":
            return self._is_over_own_tokens(node)
        alone = self.tokens.labels.get(node) == PARALLEL and self.sequences.labels.get(node) == PARALLEL
        if not alone:
            return False
        self.places[node] = place
        return True

    def _begins(self, node: Node) -> bool:
        """Where rows begin: with the first work on vectors. Token ids, masks and positions are cheaper whole."""
        heavy = node.op.category in (Category.CONTRACTION, Category.COMPOSITE) or node.op.name == "embedding"
        return heavy and node.dtype.is_floating_point

    def _place(self, node: Node) -> _Place | None:
        """Where a value holds tokens and batch, if each is one whole dimension, or both are one."""
        if is_scalar(node) or isinstance(node.type, tuple) or node in self.tokens.keys:
            return None
        t, b = (_single(axis.places.get(node)) for axis in (self.tokens, self.sequences))
        if t is None or b is None:
            return None
        merged = t[0] == b[0] and same(t[1].outer, self.batch) and same(b[1].inner, self.length) and t[1].inner == b[1].outer == 1
        if merged:
            return _Place(t[0], b[0])
        return _Place(t[0], b[0], b[1]) if t[0] != b[0] and t[1].plain else None

    def _is_over_own_tokens(self, node: Node) -> bool:
        rank = node.tensor.rank
        own = _Place(rank - 2, 0)
        for x in node.inputs[:3]:
            if self.places.get(x) != own:
                raise CannotPack(node, "its queries and keys are not those of the same tokens")
        if not hides(node, self.padding):
            raise CannotPack(node, "its keys are not provably without padding")
        self.places[node] = own
        return True

    # -- rows

    def _packed(self, node: Node) -> Node:
        if node.op.name == "attention":
            q, k, v = (self.packed[x] for x in node.inputs[:3])
            mask = packed_mask(node, self.layout, self.valid)
            return OPS["attention"](q, k, v, mask, hint=node.hint, prov=node.prov.with_rule(NAME), **node.attrs)
        return self._remade(node, self.places[node])

    def _remade(self, node: Node, place: _Place) -> Node:
        """The same node on rows of its operands."""
        below = self._places_below(node, place)
        operands = tuple(self._rows_of(x, at, node) if at else self._whole_of(x, node) for x, at in zip(node.inputs, below))
        shape = self._shape(node, place)
        change = ATTRIBUTES.get(node.op.name)
        attrs = {**node.attrs, **(change(node, operands, [shape]) if change else {})}
        try:
            made = OPS[node.op.name](*operands, hint=node.hint, prov=node.prov.with_rule(NAME), **attrs)
        except TypeInferenceError as error:
            raise CannotPack(node, str(error.fields["reason"])) from error
        if not same_shape(made.shape, shape):
            raise CannotPack(node, f"of rows it would be {list(made.shape)}, not {list(shape)}")
        return made

    def _places_below(self, node: Node, place: _Place) -> list[tuple[int | None, int | None] | None]:
        """Of each operand, which dimensions are tokens and batch; None where it has neither."""
        found: list[dict[int, int]] = []
        for axis, d in ((self.tokens, place.tokens), (self.sequences, place.batch)):
            along = (axis.places[node][d] if node in axis.places else None) or Along()
            try:
                ends = spread_ends(node, {(OUT, d): along}, axis.size)
            except Conflict as conflict:
                raise CannotPack(node, str(conflict)) from conflict
            found.append({k: at for (k, at), _ in ends.items() if k != OUT})
        both = [(found[0].get(k), found[1].get(k)) for k in range(len(node.inputs))]
        return [at if at != (None, None) else None for at in both]

    def _shape(self, node: Node, place: _Place) -> tuple[Dim, ...]:
        sizes = {place.tokens: self.count} if place.merged else {place.tokens: self.count, place.batch: place.along.extent(1)}
        return tuple(sizes.get(d, n) for d, n in enumerate(node.shape))

    def _rows_of(self, x: Node, at: tuple[int | None, int | None], reader: Node) -> Node:
        """An operand over rows: packed already, or read where the rows stood."""
        t, b = at
        if x in self.packed:
            if (self.places[x].tokens, self.places[x].batch) != (t, b):
                raise CannotPack(reader, "its operands hold the tokens in different places")
            return self.packed[x]
        if t is not None and b is not None and t != b and (x.op.category is Category.POINTWISE or x.op.name in ("embedding", "expand")):
            return self._remade(x, _Place(t, b))
        return self._read(self.whole[x], t, b, reader)

    def _read(self, x: Node, t: int | None, b: int | None, reader: Node) -> Node:
        """Rows of a value that stays whole."""
        rows = self.layout.rows
        if b is not None and b != t and not same(x.shape[b], self.batch):
            raise CannotPack(reader, "it reads a value in which sequences are merged with something else")
        if b is None:
            assert t is not None
            return OPS["index"](x, self.layout.positions, dims=(t,), prov=x.prov)
        if t is None:
            raise CannotPack(reader, "it reads a value of each sequence")
        if t == b:
            return OPS["index"](x, rows, dims=(t,), prov=x.prov)
        rest = [d for d in range(x.tensor.rank) if d not in (b, t)]
        shape = tuple(x.shape[d] for d in rest)
        front = OPS["reshape"](_permuted(x, (b, t, *rest)), shape=(dim(self.batch * self.length), *shape))
        read = OPS["reshape"](OPS["index"](front, rows, dims=(0,), prov=x.prov), shape=(1, self.count, *shape))
        return _permuted(read, _inverse((b, t, *rest)))

    # -- whole values

    def _kept(self, node: Node) -> Node:
        if node.op.name == "input" or not node.inputs:
            return node
        operands = tuple(self._whole_of(x, node) for x in node.inputs)
        return node if operands == node.inputs else node.with_inputs(operands)

    def _whole_of(self, x: Node, reader: Node) -> Node:
        """A value as its reader, which looks at several tokens, may see it: what padding holds must not matter."""
        if x not in self.packed:
            return self.whole[x]
        place = self.places[x]
        if reader.op.name == "layout" and reader in self.graph.outputs and self.readers[reader] == 1:
            self.places[reader] = place
            return self._spread_out(x, 0)
        spots = ((place.tokens, Along()), (place.batch, place.along))
        held = replace(self.padding, finite=True).range(x, spots) if not place.merged else None
        if held is not None and held.known:
            return self._spread_out(x, held.lo)
        if not place.merged and self._reads_present(x, reader, place):
            return self._spread_out(x, 0)
        how = self.tokens.labels[reader].how if reader in self.tokens.labels else How.MIXING
        alone = how is How.PARALLEL
        raise CannotPack(reader, "its tokens are not one dimension" if alone else f"it reads {how.value}, padding among them")

    def _reads_present(self, x: Node, reader: Node, place: _Place) -> bool:
        """Whether only the first or the last token is read, which then must not be padding."""
        attrs = reader.attrs
        if reader.op.name not in ("select", "slice") or attrs["dim"] % x.tensor.rank != place.tokens:
            return False
        start = attrs["index"] if reader.op.name == "select" else attrs["start"]
        if reader.op.name == "slice" and not same(dim(attrs["stop"] - start), 1):
            return False
        found = FIRST if same(start, 0) else LAST if same(start, dim(self.length - 1)) else None
        self.present |= set() if found is None else {found}
        return found is not None

    def _spread_out(self, x: Node, fill: float) -> Node:
        """Packed rows where their tokens stood, `fill` elsewhere."""
        place, rows = self.places[x], self.packed[x]
        if not place.along.plain:
            raise CannotPack(x, "its sequences are merged with something else")
        if not place.merged:
            rows = OPS["select"](rows, dim=place.batch, index=0)
        at = place.tokens - (place.batch < place.tokens)
        places = OPS["reshape"](self.layout.places, shape=(dim(self.batch * self.length),)) if place.merged else self.layout.places
        read = OPS["index"](rows, OPS["maximum"](places, 0), dims=(at,), prov=x.prov)
        rank, wide = read.tensor.rank, places.tensor.rank
        there = OPS["reshape"](OPS["ge"](places, 0), shape=(*places.shape, *(1,) * (rank - at - wide)))
        value: Any = fill if x.dtype.is_floating_point else bool(fill) if x.dtype == torch.bool else int(fill)
        made = OPS["where"](there, read, OPS["full"](shape=(), value=value, dtype=x.dtype, device=x.tensor.device), prov=x.prov)
        if place.merged:
            return made
        rest = [d for d in range(rank) if d not in (at, at + 1)]
        others = [d for d in range(rank) if d not in (place.batch, place.tokens)]
        dims: Mapping[int, int] = {place.batch: at, place.tokens: at + 1, **dict(zip(others, rest))}
        return _permuted(made, tuple(dims[d] for d in range(rank)))


def _single(places: tuple[Along | None, ...] | None) -> tuple[int, Along] | None:
    found = [(d, along) for d, along in enumerate(places or ()) if along is not None and along.order is None]
    return found[0] if len(found) == 1 else None


def _permuted(x: Node, dims: tuple[int, ...]) -> Node:
    return x if dims == tuple(range(len(dims))) else OPS["permute"](x, dims=dims)


def _inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dims.index(d) for d in range(len(dims)))


def _fresh_symbol(graph: Graph) -> Any:
    name = next(n for n in ("n", "rows", *(f"n{i}" for i in range(1, len(graph.symbols) + 2))) if n not in graph.symbols)
    return symbol(name)
