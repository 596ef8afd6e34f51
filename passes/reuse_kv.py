"""reuse-kv: a step of decoding, from a model that knows no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import sympy
import torch

from ..ir.analysis.axes import Along, Axis, How, Label, Places, axis_of
from ..ir.analysis.axis_resize import ATTRIBUTES
from ..ir.dims import Dim, dim, same
from ..ir.errors import TilewrightError, TypeInferenceError
from ..ir.graph import Graph, Node, graph_input, is_scalar, order
from ..ir.interpret import interpret
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import cleaned
from ..ir.sizes import settled
from ..ir.types import TensorType
from .base import Notes, Pass, describe
from .kv_formats import KV_FORMATS
from .kv_masks import Mask, mask_of
from .token_rows import Table, Target, Uneven, rows_at
from .weights import ConstantMaker


class CannotDerive(TilewrightError):
    """A model of which no step can be made."""

    template = "no step of decoding follows from {model!r}: {reason}"


@dataclass(frozen=True)
class Kept:
    """A part of the keys or values of a layer: the input of the step that holds it, and the dimension of its tokens."""

    node: Node
    dim: int


@dataclass(frozen=True)
class Derived:
    """step: (tokens [b, size], position i64[b], given..., kept...) -> the results of the model for these tokens; it writes what is kept.

    start: what the step is given: values that depend on other inputs of the model only; None where there are none.
    """

    step: Graph
    start: Graph | None
    kept: tuple[Kept, ...]


@dataclass(frozen=True)
class ReuseKV(Pass):
    """A model of whole sequences becomes a step over the next tokens of each row, with the keys and values of earlier ones as state.

        tokens: i64[b, S]                              tokens: i64[b, size], position: i64[b], keys, values: f32[b, h, S, d]
        q, k, v = ...                                  q, k, v = ... of these tokens
        r = rope(k, cos, sin)                          r = rope(k, index(cos, at), index(sin, at))       at = position + 0, 1, ...
                                              -->      keys' = cache_update(keys, r, position), values' = ...
        y = attention(q, r, v, causal=true)            y = attention(q, keys', values', key <= at)
        return head(y)                                 write keys = keys', values = values'
                                                       return head(y)

    With size 1 it decodes, with the size of a chunk it reads a prompt, with another it verifies drafts. Rows of a batch stand at positions
    of their own. What is kept is what attention reads: after RoPE, without repeats of heads. Refused, by CannotDerive: what mixes tokens
    otherwise.

    size: of the tokens of a step. kv: one of KV_FORMATS. tokens: the name of the input, where there are several of [b, S]. scattered: the
    tokens of a step do not stand side by side, and position is i64[b, size].
    """

    size: int = 1
    kv: str = "same"
    tokens: str = ""
    scattered: bool = False

    name: ClassVar[str] = "reuse-kv"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        """Raises CannotDerive."""
        return self.derive(graph, notes).step

    def derive(self, graph: Graph, notes: Notes | None = None) -> Derived:
        """Raises CannotDerive."""
        if self.kv not in KV_FORMATS:
            raise CannotDerive(model=graph.name, reason=f"keys and values are kept as {', '.join(KV_FORMATS)}, not as {self.kv!r}")
        return _Deriver(self, graph, notes if notes is not None else Notes()).run()


def tokens_of(graph: Graph, name: str = "") -> Node:
    """The input [b, S] of integers that are the tokens: of that name, or the last such. Raises CannotDerive."""
    found = [n for n in graph.inputs if _is_tokens(n) and name in ("", n.hint)]
    if not found:
        raise CannotDerive(model=graph.name, reason=f"it has no input {name or 'of tokens'}: integers [batch, length], of one length")
    return found[-1]


def _is_tokens(node: Node) -> bool:
    kind = node.type
    return isinstance(kind, TensorType) and kind.rank == 2 and kind.dtype in (torch.int64, torch.int32) and isinstance(kind.shape[1], int)


_WITH_STATE = frozenset({"attention", "matmul", "softmax"})
"""Ops that may read earlier tokens: those are keys and values, which are kept."""


class _Deriver:
    """new: values of the step. whole: keys and values of all tokens, from state."""

    def __init__(self, options: ReuseKV, graph: Graph, notes: Notes) -> None:
        self.options, self.graph, self.notes = options, graph, notes
        self.tokens = tokens_of(graph, options.tokens)
        self.batch, self.length = self.tokens.shape
        if graph.writes:
            raise CannotDerive(model=graph.name, reason=f"it writes to its input {graph.writes[0][0].hint}")
        if same(self.batch, 1):
            raise CannotDerive(model=graph.name, reason="a batch of one cannot be told from what broadcasts: capture it for any batch")
        self.twin, self.along, self.rows = _analysed(graph, self.tokens)
        self.dependent = _depending(graph, {self.tokens})
        self.on_others = _depending(graph, {n for n in graph.inputs if n is not self.tokens})
        kind = self.tokens.tensor
        self.new: dict[Node, Node] = {self.tokens: graph_input(self.tokens.hint, kind.with_shape((self.batch, options.size)))}
        where = (self.batch, options.size) if options.scattered else (self.batch,)
        self.position = graph_input("position", TensorType(torch.int64, where, kind.device))
        self.maker = ConstantMaker(graph)
        self.items = {(n.inputs[0], n.attrs["index"]): n for n in order(graph) if n.op.name == "item"}
        self.given: dict[Node, tuple[Node, Node]] = {}
        self.kept: dict[Node, tuple[Kept, ...]] = {}
        self.writes: list[tuple[Node, Node]] = []
        self.whole: dict[Node, Node] = {}
        self.tables: dict[tuple[Node, Target], Node] = {}
        self.masks: dict[tuple[Node, Target], Mask] = {}
        self._at: Node | None = None

    def run(self) -> Derived:
        for node in order(self.graph):
            if node in self.dependent and node is not self.tokens:
                self._check(node)
                self.new[node] = _REMADE.get(node.op.name, _Deriver.remade)(self, node)
        if not self.kept:
            raise self._error("it has no causal attention", self.graph.outputs[0])
        for node in self.graph.outputs:
            if not is_scalar(node) and not any(self.places(node)):
                raise self._error(f"its result {describe(node)} has no dimension of tokens", node)
        return self._result()

    def _result(self) -> Derived:
        kept = tuple(k for parts in self.kept.values() for k in parts)
        inputs = (self.new[self.tokens], self.position, *(n for _, n in self.given.values()), *(k.node for k in kept))
        outputs = tuple(self.new[n] for n in self.graph.outputs)
        fields = {"symbols": self.graph.symbols, "stage": self.graph.stage}
        step = cleaned(Graph(f"{self.graph.name}.step", inputs, outputs, writes=tuple(self.writes), **fields))
        others = tuple(n for n in self.graph.inputs if n is not self.tokens)
        start = Graph(f"{self.graph.name}.start", others, tuple(n for n, _ in self.given.values()), **fields) if self.given else None
        return Derived(step, start, kept)

    # -- what is known

    def places(self, node: Node) -> Places:
        """For each dimension, whether it holds tokens as rows."""
        found = self.along.places.get(self.twin[node])
        return found if found is not None else (None,) * node.tensor.rank

    def keys(self, node: Node) -> Places:
        found = self.along.keys.get(self.twin[node])
        return found if found is not None else (None,) * node.tensor.rank

    def batch_of(self, node: Node) -> tuple[int, Along] | None:
        """The dimension that holds the batch."""
        found = self.rows.places.get(self.twin[node], ())
        return next(((d, along) for d, along in enumerate(found) if along is not None), None)

    def _batch_of(self, node: Node) -> tuple[int, Along]:
        found = self.batch_of(node)
        if found is None:
            raise self._error(f"{describe(node)} holds some rows of the batch only", node)
        return found

    def _check(self, node: Node) -> None:
        label = self.along.labels.get(self.twin[node], Label(How.PARALLEL))
        if label.how is How.MIXING:
            raise CannotDerive(model=self.graph.name, reason=self.along.why(self.twin[node]))
        if label.how is not How.PARALLEL and node.op.name not in _WITH_STATE:
            raise self._error(f"{describe(node)} reads earlier tokens by other means than attention", node)

    def _error(self, reason: str, node: Node) -> CannotDerive:
        return CannotDerive(node.prov.source, model=self.graph.name, reason=reason)

    # -- values of the step

    def remade(self, node: Node, inputs: tuple[Node, ...] | None = None) -> Node:
        """The node on the tokens of the step."""
        inputs = tuple(self.operand(node, x) for x in node.inputs) if inputs is None else inputs
        change = ATTRIBUTES.get(node.op.name)
        if change is None:
            return node.with_inputs(inputs)
        attrs = MappingProxyType({**node.attrs, **change(node, inputs, self._shapes(node))})
        try:
            return replace(node, attrs=attrs).with_inputs(inputs)
        except TypeInferenceError as error:
            raise self._error(f"{describe(node)} has no form for some of the tokens", node) from error

    def _shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        """Of the results, on the tokens of the step."""
        if not isinstance(node.type, tuple):
            return [self._resized(node, node.tensor)]
        return [self._resized(self.items.get((node, i)), kind) for i, kind in enumerate(node.type)]

    def _resized(self, node: Node | None, kind: TensorType) -> tuple[Dim, ...]:
        places = self.places(node) if node is not None else (None,) * kind.rank  # a result that nobody reads
        if node is not None and any(along is not None and (along.extra, along.stride, along.start) != (0, 1, 0) for along in places):
            raise self._error(f"{describe(node)} holds some of the tokens only", node)
        return tuple(self._of_step(d) if along else d for d, along in zip(kind.shape, places))

    def _of_step(self, extent: Dim) -> Dim:
        """A dimension that holds the tokens, for those of the step."""
        return dim(sympy.cancel(sympy.sympify(extent) * self.options.size / self.length))

    def operand(self, node: Node, x: Node) -> Node:
        """What stands for an operand of a node that depends on the tokens."""
        if x in self.new:
            return self.new[x]
        if x in self.on_others:
            return self._given(node, x)
        if is_scalar(x) or not any(self.places(x)):
            return x
        return self.remade(x, ()) if x.op.name == "full" or self._numbers(x) else self.table(node, x)

    def _numbers(self, x: Node) -> bool:
        """Whether it numbers the tokens of all rows, one after the other, as routing to experts does; it is no position."""
        batch = self.batch_of(x)
        return x.op.name == "iota" and batch is not None and self.places(x)[batch[0]] is not None

    def _given(self, node: Node, x: Node) -> Node:
        """An input of the step, for a value that depends on other inputs of the model only. It is the same for all tokens."""
        if x not in self.given:
            value: Node | None = x
            for d in (d for d, along in enumerate(self.places(x)) if along is not None):
                value = value and self._one_row(value, d)
            if value is None:
                raise self._error(f"{describe(node)} meets {describe(x)}, another input along the tokens", node)
            self.given[x] = value, graph_input(x.hint or x.op.name, value.tensor, prov=x.prov)
        return self.given[x][1]

    def _one_row(self, x: Node, d: int) -> Node | None:
        """The value with one row in dimension d, if all rows are alike."""
        if same(x.shape[d], 1):
            return x
        if x in self.twin and x not in self.on_others:
            value = self.value(x)
            alike = bool((value == value.narrow(d, 0, 1)).all())
            return OPS["slice"](x, dim=d, start=0, stop=1, prov=x.prov) if alike else None
        if x.op.category is not Category.POINTWISE and x.op.name != "expand":
            return None
        inputs: list[Node | None] = [x.inputs[0], *x.inputs[1:]]
        for k, operand in enumerate(x.inputs):
            at = -1 if is_scalar(operand) else d - (x.tensor.rank - operand.tensor.rank)
            inputs[k] = operand if at < 0 else self._one_row(operand, at)
        if None in inputs:
            return None
        attrs = {**x.attrs, "shape": (*x.shape[:d], 1, *x.shape[d + 1 :])} if x.op.name == "expand" else x.attrs
        return replace(x, attrs=MappingProxyType(dict(attrs))).with_inputs(tuple(n for n in inputs if n is not None))

    @property
    def at(self) -> Node:
        """The position of each token of the step, i64[b, size]; behind the last position, the last."""
        if self.options.scattered:
            return self.position
        if self._at is None:
            own = OPS["reshape"](self.position, shape=(self.batch, 1))
            if self.options.size > 1:
                own = OPS["minimum"](OPS["add"](own, OPS["iota"](length=self.options.size, device=own.tensor.device)), self.length - 1)
            self._at = own
        return self._at

    def table(self, node: Node, x: Node) -> Node:
        """Rows at the positions of the step, of a value that no input decides and that `node` reads."""
        batch = self._batch_of(node)
        target = Target(node.tensor.rank, batch[0])
        if (x, target) not in self.tables:
            self.tables[x, target] = self._rows(node, x, target)
        return self.tables[x, target]

    def _rows(self, node: Node, x: Node, target: Target) -> Node:
        places = [(d, along) for d, along in enumerate(self.places(x)) if along is not None]
        try:
            table = Table(self.value(x), *places[0], self.batch_of(x)) if len(places) == 1 else None
            if table is None:
                raise Uneven
            return rows_at(table, self.at, target, self.maker, x.hint or x.op.name, x.prov)
        except Uneven:
            raise self._error(f"{describe(x)}, which {describe(node)} reads, is no table of positions", x) from None

    def value(self, x: Node) -> torch.Tensor:
        """What a value is that no input decides, for a batch of two."""
        with torch.no_grad():
            (found,) = interpret(Graph("value", (), (self.twin[x],)), ())
        return found

    # -- keys and values

    def all_tokens(self, x: Node) -> Node:
        """A value of the step, for all tokens so far: what is kept, with that of these tokens written into it."""
        if x not in self.whole:
            chain = _views(x)
            point = self._point(x, chain)
            if point not in self.whole:
                self.whole[point] = self._kept(point)
            value = self.whole[point]
            for view in reversed(chain[: chain.index(point)]):
                value = view.with_inputs((value,))
                self.whole[view] = value
        return self.whole[x]

    def _point(self, x: Node, chain: list[Node]) -> Node:
        """Where in a chain of views to keep the value: where it is smallest, best with the columns of a token side by side."""
        able = [n for n in chain if self._can_keep(n)]
        if not able:
            raise self._error(f"{describe(x)} cannot be kept: the batch is not its first dimension, or the tokens are in none", x)
        least = min(int(self.twin[n].tensor.numel) for n in able)
        small = [n for n in able if int(self.twin[n].tensor.numel) == least]
        return next((n for n in small if n.tensor.rank == 4 and self._token_dim(n) == 2), small[0])

    def _can_keep(self, node: Node) -> bool:
        batch = self.batch_of(node)
        return batch is not None and batch[0] == 0 and batch[1].plain and self._token_dim(node) > 0

    def _token_dim(self, node: Node) -> int:
        return next((d for d, along in enumerate(self.places(node)) if along is not None and along.plain), -1)

    def _kept(self, point: Node) -> Node:
        kind, d = KV_FORMATS[self.options.kv], self._token_dim(point)
        columns = 1 if d == point.tensor.rank - 1 else point.shape[-1]
        if self.options.kv == "int4" and columns % 2 or self.options.kv == "int8" and columns == 1:
            raise self._error(f"{describe(point)} has {columns} columns of a token, which {self.options.kv} does not serve", point)
        parts = kind.encode(self.new[point])
        kept, updated = [], []
        for i, part in enumerate(parts):
            shape = list(part.shape)
            shape[d] = self.length
            state = graph_input(f"kept_{len(self.kept)}" + (f"_{i}" if i else ""), part.tensor.with_shape(tuple(shape)), prov=point.prov)
            updated.append(self._written(state, part, d))
            self.writes.append((state, updated[-1]))
            kept.append(Kept(state, d))
        self.kept[point] = tuple(kept)
        self.notes.apply(ReuseKV.name, f"{describe(point)} kept as {' and '.join(str(k.node.type) for k in kept)}", point)
        return kind.decode(tuple(updated), point.dtype)

    def _written(self, state: Node, part: Node, d: int) -> Node:
        """The state with what is computed of the tokens of the step, along dimension d."""
        names = {"hint": f"{state.hint}_new", "prov": state.prov}
        if not self.options.scattered:
            return OPS["cache_update"](state, part, self.position, dim=d, **names)
        shape = tuple(n if i in (0, d) else 1 for i, n in enumerate(part.shape))
        index = OPS["expand"](OPS["reshape"](self.position, shape=shape), shape=part.shape)
        return OPS["scatter"](state, index, part, dim=d, **names)

    # -- nodes that read them

    def attention(self, node: Node) -> Node:
        q, k, v, *masks = node.inputs
        if not (k in self.dependent and self.places(k)[-2] is not None):
            return self.remade(node)
        if v not in self.dependent or self.places(v)[-2] is None:
            raise self._error(f"{describe(node)} has keys along the tokens, and values that are not", node)
        whole = [self.all_tokens(x) for x in (k, v)]
        keys, values = (self._without_repeats(x) for x in (k, v))
        if not same(keys.shape[-3], values.shape[-3]):
            keys, values = whole
        mask = self._mask(node, masks[0] if masks else None)
        attrs = {**node.attrs, "causal": False}
        return OPS["attention"](self.operand(node, q), keys, values, mask, **attrs, hint=node.hint, prov=node.prov)

    def _without_repeats(self, x: Node) -> Node:
        """Attention shares heads of keys by itself."""
        chain = _views(x)
        known = [n for n in reversed(chain) if n in self.whole and n is not x]
        return self.whole[next((n for n in known if _repeats_heads(n, chain[: chain.index(n)], self.graph)), x)]

    def _mask(self, node: Node, given: Node | None) -> Node:
        """Which keys a token of the step may see: those up to its own, and of those what the mask of the model says."""
        batch = self._batch_of(node)
        rank, (d, along) = node.tensor.rank, batch
        size, device = self.options.size, self.position.tensor.device
        queries = size if self.options.scattered else 1
        own = self.position
        if not along.plain:
            own = OPS["reshape"](own, shape=(1, self.batch, 1, queries))
            own = OPS["expand"](own, shape=(along.outer, self.batch, along.inner, queries))
        own = OPS["reshape"](own, shape=(*(1,) * d, along.extent(self.batch), *(1,) * (rank - 3 - d), queries, 1))
        if queries < size:
            own = OPS["add"](own, OPS["reshape"](OPS["iota"](length=size, device=device), shape=(size, 1)))
        key = OPS["iota"](length=self.length, device=device)
        keep = OPS["ge"](own, key)
        if given is None:
            return keep
        if given in self.dependent:
            raise self._error(f"the mask of {describe(node)} depends on the tokens", node)
        if given in self.on_others or not any(self.places(given)):
            return _both(keep, self.operand(node, given))
        known = mask_of(self.value(given), self.length)
        if known is None or node.attrs["causal"]:
            return _both(keep, self.table(node, given))
        return keep if known.window is None else OPS["logical_and"](keep, OPS["lt"](OPS["sub"](own, key), known.window))

    def matmul(self, node: Node) -> Node:
        """Scores, and sums of values by weights."""
        left, right = node.inputs
        weighs = left.tensor.rank > 1 and left in self.dependent and self.keys(left)[-1] is not None
        if not (weighs or self._meets_keys(node, right)):
            return self.remade(node)
        if right not in self.dependent:
            return self.remade(node)
        return self.remade(node, (self.operand(node, left), self.all_tokens(right)))

    def _meets_keys(self, node: Node, right: Node) -> bool:
        """Whether the columns of the right operand are tokens, and so keys of the result."""
        return right in self.dependent and self.places(right)[-1] is not None and self.keys(node)[-1] is not None


_REMADE: dict[str, Callable[[_Deriver, Node], Node]] = {"attention": _Deriver.attention, "matmul": _Deriver.matmul}


def _analysed(graph: Graph, tokens: Node) -> tuple[Mapping[Node, Node], Axis, Axis]:
    """The graph for a batch of two, node for node, and in it the axes of the tokens and of the batch."""
    symbols = {name: 2 for name in graph.symbols}
    concrete, twin = settled(graph, symbols) if symbols else (graph, {n: n for n in (*graph.inputs, *order(graph))})
    return twin, axis_of(concrete, twin[tokens], 1), axis_of(concrete, twin[tokens], 0)


def _depending(graph: Graph, on: Iterable[Node]) -> set[Node]:
    found = set(on)
    for node in order(graph):
        if not found.isdisjoint(node.inputs):
            found.add(node)
    return found


def _views(x: Node) -> list[Node]:
    """The value and what it is a view of, in turn."""
    chain = [x]
    while chain[-1].op.name in ("reshape", "expand", "permute") and chain[-1].op.category is Category.VIEW:
        chain.append(chain[-1].inputs[0])
    return chain


def _repeats_heads(inner: Node, views: list[Node], graph: Graph) -> bool:
    """Whether the views do nothing but repeat each head (dimension -3) some times in a row."""
    twin: dict[Node, Node]
    _, twin = settled(Graph("views", (), (views[0],), symbols=graph.symbols), {name: 2 for name in graph.symbols})
    shape = [int(d) for d in twin[inner].shape]
    if len(shape) != views[0].tensor.rank or len(shape) < 3:
        return False
    x = value = torch.arange(int(twin[inner].tensor.numel)).reshape(shape)
    for view in reversed(views):
        value = twin[view].op.eager(value, **twin[view].attrs)
    times, rest = divmod(value.shape[-3], shape[-3])
    return not rest and torch.equal(value, x.repeat_interleave(times, -3))


def _both(keep: Node, mask: Node) -> Node:
    """A mask of which only those keys count that are kept."""
    if mask.dtype == torch.bool:
        return OPS["logical_and"](keep, mask)
    return OPS["where"](keep, mask, float("-inf"))
