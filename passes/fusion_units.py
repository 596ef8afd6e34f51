"""The graph as fusion sees it: units that compute, with views and cheap values between them looked through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.analysis.indices import poly
from ..ir.analysis.inplace import in_place
from ..ir.analysis.points import VIEW_INDEX, Refusal, dense_order
from ..ir.analysis.pull import FUSIBLE_CATEGORIES, FUSIBLE_NAMES, NATIVE_DTYPES, check_native
from ..ir.dims import hint
from ..ir.graph import Graph, Node, is_scalar, order, scalar_value, users
from ..ir.op import Category
from ..ir.reasons import Reason
from ..ir.types import FLOAT8
from .attentions import ATTENTIONS, attention_refusal, is_native_attention, merging_reshapes
from .contractions import can_be_offered, is_native, needs_follower, signature
from .facts import readers_through
from .windows import is_native_window

INLINE_FLOPS = 8
"""Values that cost at most this many flops per element, read almost nothing and have several readers are recomputed by each."""

MASK_FLOPS = 32
"""The same for what attentions alone read, a mask or bias: an element of it costs them four flops for each column of their heads."""

LONG = 1024
"""What a size that is known at run time only is taken for where it matters most that a value reads almost nothing: where it is large."""

FILLS = frozenset({"full", "iota"})


@dataclass
class Units:
    """nodes: in topological order. barriers: units that run as they are, with the refusal where fusion was possible by kind.

    transparent: views, fills and cheap values, which belong to whoever reads them. sources: unit -> the units it reads.
    """

    graph: Graph
    nodes: list[Node]
    readers: dict[Node, list[Node]]
    transparent: set[Node] = field(default_factory=set)
    barriers: dict[Node, Refusal | None] = field(default_factory=dict)
    sources: dict[Node, tuple[Node, ...]] = field(default_factory=dict)

    def computes(self, node: Node) -> bool:
        """Whether the node can be part of a region."""
        return node not in self.transparent and node not in self.barriers

    def seen_through(self, operands: Iterable[Node]) -> tuple[Node, ...]:
        """The units that `operands` are or read, looking through transparent nodes."""
        found: dict[Node, None] = {}
        stack = list(operands)[::-1]
        while stack:
            node = stack.pop()
            if node in self.transparent:
                stack.extend(reversed(node.inputs))
            else:
                found[node] = None
        return tuple(found)


def find_units(graph: Graph, library: Sequence[str] = (), offered: Sequence[str] = ()) -> Units:
    """Classifies every node of an expanded graph. library: signatures of contractions and attentions that are not ours. offered: of those
    that are, though by default they would not be."""
    units = Units(graph, order(graph), users(graph))
    updates = in_place(graph, units.nodes).target
    given = {n for n in units.nodes if signature(n) in library} if library else set[Node]()
    taken = {n for n in units.nodes if can_be_offered(n) and signature(n) in offered} if offered else set[Node]()
    merging = merging_reshapes([n for n in units.nodes if n not in given], units.readers, set(graph.roots))
    for node in units.nodes:
        if node in updates or node in given:  # a kernel would copy all of what is updated
            units.barriers[node] = None
        elif _is_transparent(node) and node not in merging:
            units.transparent.add(node)
        else:
            computes = node in taken or _computes(node)
            refusal = _refusal(node, computes)
            if refusal is not None or not computes and node not in merging:
                units.barriers[node] = refusal
    for node in units.nodes:
        if node not in taken and is_native(node) and units.computes(node) and needs_follower(node) and not _is_followed(node, units):
            units.barriers[node] = None
    _inline_cheap(units)
    for node in units.nodes:
        if node not in units.transparent:
            units.sources[node] = units.seen_through(node.inputs)
    return units


def _is_transparent(node: Node) -> bool:
    if is_scalar(node):
        return scalar_value(node) is not None
    if node.op.name == "as_strided":
        x = node.inputs[0]
        return dense_order([poly(d) for d in x.shape], [poly(s) for s in node.attrs["of"]]) is not None
    if node.op.name == "flip":
        return False
    return node.op.name in VIEW_INDEX or (node.op.name in FILLS and node.dtype in NATIVE_DTYPES)


def _computes(node: Node) -> bool:
    if node.op.category in FUSIBLE_CATEGORIES or node.op.name in FUSIBLE_NAMES or node.op.name == "flip":
        return True
    return is_native(node) or is_native_window(node) or is_native_attention(node)


def _refusal(node: Node, computes: bool) -> Refusal | None:
    """Why a node that could be fused by its kind, as `computes` says, cannot by its types or layout."""
    if node.op.name == "as_strided":
        return Refusal(Reason.LAYOUT, node, f"strides {list(node.attrs['of'])} of {node.inputs[0].type}")
    if node.op.name in ATTENTIONS:
        return attention_refusal(node)
    if not computes:
        return None
    try:
        check_native(node)
    except Refusal as refusal:
        return refusal.with_traceback(None)  # its frames hold the graph
    tensors = [i for i in node.inputs if not is_scalar(i)]
    for x in tensors:
        if isinstance(x.type, tuple) or x.dtype not in NATIVE_DTYPES and not (node.op.name == "cast" and x.dtype in FLOAT8):
            return Refusal(Reason.UNSUPPORTED_DTYPE, node, str(x.type))
        if x.tensor.device != node.tensor.device:
            return Refusal(Reason.DIFFERENT_DEVICE, node, f"{x.type} and {node.type}")
    return None


def _is_followed(node: Node, units: Units) -> bool:
    """Whether a pointwise value reads the node, as it is or through views, and can be in its kernel."""
    readers = readers_through(node, units.readers, set(units.graph.roots), lambda n: n.op.name in VIEW_INDEX)
    return any(r is not None and r.op.category is Category.POINTWISE and units.computes(r) for r in readers)


def _inline_cheap(units: Units) -> None:
    """Cheap values that read almost nothing (masks from ranges) become transparent where all their readers can recompute them.

    `flops`, `leaves`: of each node, if it is computed from values in memory by whoever reads it. `chains`: what such a value is computed
    from that has no reader but it.
    """
    symbols = units.graph.symbols
    flops: dict[Node, int] = {}
    leaves: dict[Node, int] = {}
    chains: dict[Node, tuple[Node, ...]] = {}
    for node in units.nodes:
        if node in units.transparent:
            flops[node] = sum(flops.get(i, 0) for i in node.inputs)
            leaves[node] = sum(leaves.get(i, 0) for i in node.inputs)
            chains[node] = _joined(chains, node)
            continue
        size = 0 if is_scalar(node) or isinstance(node.type, tuple) else hint(node.tensor.nbytes, symbols, LONG)
        flops[node], leaves[node] = 0, size
        if node.op.category is not Category.POINTWISE or not units.computes(node):
            continue
        price = flops_per_element(node, units.graph) + sum(flops[i] for i in node.inputs)
        read = sum(leaves[i] for i in node.inputs)
        readers = _fusing_readers(node, units)
        if not readers or 16 * read > size or price > (MASK_FLOPS if all(map(is_native_attention, readers)) else INLINE_FLOPS):
            continue
        flops[node], leaves[node] = price, read
        chain = (node, *_joined(chains, node))
        if len(readers) > 1:
            units.transparent.update(chain)
        else:
            chains[node] = chain


def _joined(chains: Mapping[Node, tuple[Node, ...]], node: Node) -> tuple[Node, ...]:
    return tuple(n for i in node.inputs for n in chains.get(i, ()))


def _fusing_readers(node: Node, units: Units) -> list[Node]:
    """The readers, through views, if every one is able to fuse."""
    readers = readers_through(node, units.readers, set(units.graph.roots), lambda n: n.op.name in VIEW_INDEX)
    found = [r for r in readers if r is not None and (units.computes(r) or r in units.transparent)]
    return found if len(found) == len(readers) else []


def flops_per_element(node: Node, graph: Graph) -> int:
    """Arithmetic operations for one element of the node's space, by its op's cost."""
    if isinstance(node.type, tuple) or is_scalar(node):
        return 0
    space = node.inputs[0].tensor if node.op.category is Category.REDUCTION else node.tensor
    total = node.op.cost(tuple(i.type for i in node.inputs), node.type, node.attrs).flops
    return hint(total, graph.symbols) // max(1, hint(space.numel, graph.symbols))
