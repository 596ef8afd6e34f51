"""blend-kv: what reuse of chunks anywhere in a text takes, from a model that knows no cache.

    step: tokens [b, n] at positions [b, n]
        raw    a key before RoPE, or a value               read:    tokens, positions -> raw...           (a chunk on its own)
        part = rope(raw, cos, sin)                 -->     encode:  positions, raw... -> keys', values'   (the same chunk elsewhere)
        keys' = scatter(keys, positions, part)             probe:   tokens, positions -> values of the layer that is checked
        y = attention(q, keys', values', ...)              anew:    tokens, positions -> keys', values'   (the tokens chosen for it)

A chunk's keys and values depend on what stood before it; where that is new, they are off, most of them a little and some a lot. The probe
computes the first layers anew, and says which: those whose values deviate most are computed once more, among the stored ones of the rest.
Source: CacheBlend (arXiv:2405.16444); a token sees keys up to its own position, however many others are computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, graph_input, order
from ..ir.op import Category
from ..ir.rewrite import cleaned
from .base import describe
from .reuse_kv import ReuseKV

CHECKED = 1
"""The layer whose values are compared: the first that sees other tokens by what it is given."""


class CannotBlend(TilewrightError):
    """A model whose keys and values are tied to where a token stands by more than RoPE."""

    template = "chunks of {model!r} cannot stand elsewhere: {reason}"


@dataclass(frozen=True)
class Blending:
    """Graphs over tokens [b, n] at positions i64[b, n], with the states in the order of `Derived.kept`; each writes states.

    read gives raw values, of which raw [i] holds its tokens in dimension dims[i]; keys says which of them RoPE turns. encode takes them.
    probe gives the values of one layer, which state `checked` holds.
    """

    read: Graph
    encode: Graph
    probe: Graph
    anew: Graph
    dims: tuple[int, ...]
    keys: tuple[bool, ...]
    checked: int


def blending(graph: Graph, size: int, tokens: str = "") -> Blending:
    """Of a canonical graph tokens [b, S] -> logits, for `size` tokens at a time. Raises CannotDerive, CannotBlend."""
    derived = ReuseKV(size, tokens=tokens, scattered=True).derive(graph)
    step = derived.step
    position = step.inputs[1]
    _require_rope(graph.name, step, position)
    parts = {state: value.inputs[2] for state, value in step.writes}
    states = [k.node for k in derived.kept]
    raw: list[Node] = []
    dims: list[int] = []
    for kept in derived.kept:
        found = _before_positions(parts[kept.node])
        if any(x.tensor.rank != kept.node.tensor.rank or x.shape[kept.dim] != size for x in found):
            raise CannotBlend(found[0].prov.source, model=graph.name, reason=f"{describe(found[0])} is turned into another shape with RoPE")
        raw += found
        dims += [kept.dim] * len(found)
    whole = set(parts.values())
    checked = _values_of_layer(step, CHECKED)
    above = set(_above(parts[checked]))
    needed = tuple((state, value) for state, value in step.writes if value in above)
    return Blending(
        read=cleaned(replace(step, name=f"{graph.name}.read", outputs=tuple(raw))),
        encode=_encode(step, raw),
        probe=cleaned(replace(step, name=f"{graph.name}.probe", outputs=(parts[checked],), writes=needed)),
        anew=cleaned(replace(step, name=f"{graph.name}.anew", outputs=())),
        dims=tuple(dims),
        keys=tuple(x not in whole for x in raw),
        checked=states.index(checked),
    )


def _require_rope(name: str, step: Graph, position: Node) -> None:
    """Positions enter by RoPE, and by what is added to scores or masks them; nothing else ties a token to its place."""
    written = {value for _, value in step.writes}
    on_tokens, on_position, scores = {step.inputs[0], *(i for i, _ in step.writes)}, {position}, set[Node]()
    for node in order(step):
        of_tokens = not on_tokens.isdisjoint(node.inputs)
        of_position = not on_position.isdisjoint(node.inputs)
        if _are_scores(node, written, scores):
            scores.add(node)
        elif of_tokens and of_position and node.op.name not in ("rope", "attention", "scatter"):
            raise CannotBlend(node.prov.source, model=name, reason=f"{describe(node)} puts positions into tokens before any attention")
        if of_tokens:
            on_tokens.add(node)
        elif of_position:
            on_position.add(node)


def _are_scores(node: Node, written: set[Node], scores: set[Node]) -> bool:
    """Of queries and keys that were kept, or weights made of them: a product, and what is pointwise or a softmax of such."""
    if node.op.name == "matmul":
        return scores.isdisjoint(node.inputs) and _below_views(node.inputs[1]) in written
    alike = node.op.category in (Category.POINTWISE, Category.VIEW) or node.op.name == "softmax"
    return alike and not scores.isdisjoint(node.inputs)


def _before_positions(part: Node) -> tuple[Node, ...]:
    """What the part is made of where RoPE has not yet been; itself where there is none."""
    if part.op.name == "rope":
        return part.inputs[:1]
    if part.op.category is not Category.VIEW and part.op.name != "cat":
        return (part,)
    found = tuple(x for operand in part.inputs for x in _before_positions(operand))
    return (part,) if found == part.inputs else found


def _encode(step: Graph, raw: list[Node]) -> Graph:
    """The step below the raw values, which come in instead of tokens."""
    given = tuple(graph_input(f"raw_{i}", x.type, prov=x.prov) for i, x in enumerate(raw))
    inputs = (step.inputs[1], *given, *step.inputs[2:])
    new = {**{n: n for n in step.inputs}, **dict(zip(raw, given))}
    for node in order(step):
        if node not in new:
            new[node] = node.with_inputs(tuple(new[x] for x in node.inputs))
    writes = tuple((state, new[value]) for state, value in step.writes)
    return cleaned(replace(step, name=f"{step.name}.encode", inputs=inputs, outputs=(), writes=writes))


_VALUES = {"attention": 2, "matmul": 1}
"""Which operand is weighed."""


def _below_views(x: Node) -> Node:
    while x.op.category is Category.VIEW:
        x = x.inputs[0]
    return x


def _values_of_layer(step: Graph, layer: int) -> Node:
    """The state that holds the values of a layer, or of the last one: what an attention weighs."""
    state = {value: at for at, value in step.writes}
    scores: set[Node] = set()
    found: list[Node] = []
    for node in order(step):
        if _are_scores(node, set(state), scores):
            scores.add(node)
        values = node.inputs[_VALUES[node.op.name]] if node.op.name in _VALUES and node not in scores else None
        if values is not None and _below_views(values) in state:
            found.append(state[_below_views(values)])
    return found[min(layer, len(found) - 1)]


def _above(node: Node) -> tuple[Node, ...]:
    return tuple(order(Graph("above", (), (node,))))
