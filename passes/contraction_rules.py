"""Rules on contractions for `canonicalize`: products with weights become `linear`, reshapes that only fold leading dimensions vanish.

Exact up to the order in which a product is summed; a bias joins its product, which rounds once less.
"""

from __future__ import annotations

from ..ir.dims import product, same, same_shape
from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.patterns import Refusal
from ..ir.reasons import Reason
from ..ir.rules import Outcome, Site
from .rules import Table

_MOVES = frozenset({"permute", "reshape", "cast", "slice"})


def _is_weight(node: Node) -> bool:
    """A constant or a graph input, perhaps viewed: what one prepares once and multiplies by often."""
    while node.op.name in _MOVES:
        node = node.inputs[0]
    return node.op.name in ("constant", "input")


def matmul_by_weight(node: Node, site: Site) -> Outcome:
    """matmul(x, permute(w, [1, 0])) --> linear(x, w);  matmul(x, w) --> linear(x, permute(w, [1, 0])) for a weight w"""
    x, w = node.inputs
    if w.tensor.rank != 2 or x.tensor.rank < 1:
        return None
    if w.op.name == "permute" and w.attrs["dims"] == (1, 0):
        return OPS["linear"](x, w.inputs[0])
    return OPS["linear"](x, OPS["permute"](w, dims=(1, 0))) if _is_weight(w) else None


def fold_leading_dims(node: Node, site: Site) -> Outcome:
    """linear(reshape(x: [b, s, k], [b * s, k]), w) --> reshape(linear(x, w), [b * s, n]);  matmul by a matrix likewise"""
    flat, w, *bias = node.inputs
    if flat.op.name != "reshape" or w.tensor.rank != 2:
        return None
    x = flat.inputs[0]
    if x.tensor.rank <= flat.tensor.rank or not same(x.shape[-1], flat.shape[-1]):
        return None
    return OPS["reshape"](OPS[node.op.name](x, w, *bias), shape=node.shape)


def unfold_leading_dims(node: Node, site: Site) -> Outcome:
    """reshape(linear(reshape(x, [b * s, k]), w), [b, s, n]) --> linear(reshape(x, [b, s, k]), w)"""
    (linear,) = node.inputs
    if linear.op.name != "linear" or linear.tensor.rank != 2 or linear.inputs[0].op.name != "reshape":
        return None
    if node.tensor.rank < 3 or not same(node.shape[-1], linear.shape[-1]) or not site.single(linear):
        return None
    flat, *weights = linear.inputs
    return OPS["linear"](OPS["reshape"](flat, shape=(*node.shape[:-1], flat.shape[-1])), *weights)


def fold_batch_dims(node: Node, site: Site) -> Outcome:
    """matmul(reshape(a: [b, h, m, k], [b * h, m, k]), reshape(b: [b, h, k, n], ...)) --> reshape(matmul(a, b), [b * h, m, n])"""
    if any(i.op.name != "reshape" or i.tensor.rank != 3 or not _keeps_matrix(i) for i in node.inputs):
        return None
    sources = [i.inputs[0] for i in node.inputs]
    lead = min((s.shape[:-2] for s in sources), key=len)  # the other one may be split further, by heads that share a key
    a, b = (s if same_shape(s.shape[:-2], lead) else OPS["reshape"](s, shape=(*lead, *s.shape[-2:])) for s in sources)
    return OPS["reshape"](OPS["matmul"](a, b), shape=node.shape)


def _keeps_matrix(flat: Node) -> bool:
    """A reshape that joins leading dimensions into one and leaves the last two alone."""
    source = flat.inputs[0]
    return source.tensor.rank > 3 and same_shape(source.shape[-2:], flat.shape[-2:])


def bias_into_linear(node: Node, site: Site) -> Outcome:
    """linear(x, w) + b: [n] --> linear(x, w, b), also through a reshape that keeps the last dimension"""
    for y, bias in (node.inputs, node.inputs[::-1]):
        made = _with_bias(node, y, bias, site)
        if made is not None:
            return made
    return None


def _with_bias(node: Node, y: Node, bias: Node, site: Site) -> Outcome:
    linear = y.inputs[0] if y.op.name == "reshape" else y
    if linear.op.name != "linear" or len(linear.inputs) != 2 or not _is_vector(bias, linear):
        return None
    if not same_shape(y.shape, node.shape) or not same(y.shape[-1], linear.shape[-1]):
        return None
    if site.shared(linear) or site.shared(y):
        return Refusal(Reason.SHARED, linear.hint or "linear")
    if not site.single(linear) or not site.single(y):
        return None  # made in this sweep; the next one knows its readers
    flat = bias if bias.tensor.rank == 1 else OPS["reshape"](bias, shape=(linear.shape[-1],))
    made = OPS["linear"](*linear.inputs, flat)
    return made if y is linear else OPS["reshape"](made, shape=y.shape)


def _is_vector(bias: Node, linear: Node) -> bool:
    """One number per column of the product, in its dtype."""
    t = bias.type
    shape = getattr(t, "shape", ())
    return bool(shape) and bias.dtype == linear.dtype and same(shape[-1], linear.shape[-1]) and same(product(shape), linear.shape[-1])


CONTRACTION_RULES: Table = {
    "matmul": (matmul_by_weight, fold_leading_dims, fold_batch_dims),
    "linear": (fold_leading_dims,),
    "add": (bias_into_linear,),
    "reshape": (unfold_leading_dims,),
}
