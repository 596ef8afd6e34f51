"""`fold-norms`: what scales and shifts a product by constants moves into the weights of the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ir.dims import same_shape
from ..ir.graph import Graph, Node, use_counts, users
from ..ir.ops import OPS
from ..ir.patterns import Refusal
from ..ir.rewrite import rewrite
from ..ir.rules import Outcome, Site
from .base import Notes, Pass, Reason, describe
from .facts import is_float
from .rules import rules_at, settle
from .weights import ConstantMaker, computed, is_constant, value_of

_PRODUCTS = ("conv", "linear")
_WIDE = (torch.float32, torch.float64)

BLOCK = 1 << 18
"""So many elements of a weight are in float64 at a time."""


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Batch norm joins the convolution or linear before it; scale and shift of layer and RMS norm join the linears behind it.

        c = conv(x, w, b, stride=[1, 1], padding=[1, 1], dilation=[1, 1])
        y = batch_norm(c, mean, var, g, h)      -->    y = conv(x, w', b', stride=[1, 1], padding=[1, 1], dilation=[1, 1])

        n = layer_norm(x, g, h)                        n = layer_norm(x)
        q = linear(n, wq, bq)                   -->    q = linear(n, wq * g, wq @ h + bq)
        k = linear(n, wk)                              k = linear(n, wk * g, wk @ h)

    New weights are computed in float64 and rounded once. Refused: operands that are no constants, values or weights with other
    readers (both versions would be kept), weights that would overflow, norms in front of 16-bit weights, norms in training.
    After Unified Normalization (Yang et al., 2022) and the usual Conv+BN folding.
    """

    name: ClassVar[str] = "fold-norms"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes or Notes()
        into = _IntoProduct(ConstantMaker(graph))
        table = {
            "batch_norm": (into.batch_norm,),
            "mul": (into.scale,),
            "add": (into.shift,),
            "sub": (into.shift,),
            "item": (in_training,),
        }
        graph = settle(graph, rules_at(self.name, table), notes)
        return fold_affine(graph, notes)


def in_training(node: Node, site: Site) -> Outcome:
    """A batch norm that updates its statistics cannot be folded."""
    source = node.inputs[0]
    if source.op.name != "extern" or "batch_norm" not in source.attrs["target"] or node.attrs["index"]:
        return None
    return Refusal(Reason.STATE, source.attrs["target"]) if source.inputs[0].op.name in _PRODUCTS else None


class _IntoProduct:
    """Rules at what follows a product."""

    def __init__(self, maker: ConstantMaker) -> None:
        self.maker = maker

    def batch_norm(self, node: Node, site: Site) -> Outcome:
        """batch_norm(conv(x, w, b), mean, var, g, h) --> conv(x, w', b')"""
        product, *parameters = node.inputs
        if product.op.name not in _PRODUCTS or product.op.name == "linear" and product.tensor.rank != 2:
            return None
        if product.attrs.get("channels_last"):  # the norm's channels are its rows
            return None
        values = [value_of(p) for p in parameters]
        if any(v is None for v in values):
            return Refusal(Reason.NOT_CONSTANT, "statistics or scale of the norm")
        mean, var, *affine = (v.double() for v in values if v is not None)
        scale = torch.rsqrt(var + node.attrs["eps"])
        scale = scale * affine[0] if affine else scale
        shift = -mean * scale
        return self._product(product, scale, shift + affine[1] if len(affine) > 1 else shift, site)

    def scale(self, node: Node, site: Site) -> Outcome:
        """conv(x, w, b) * g --> conv(x, w * g, b * g) for one constant per channel; linear likewise"""
        for product, other in (node.inputs, node.inputs[::-1]):
            factor = _per_channel(node, product, other)
            if factor is not None:
                return self._product(product, factor, None, site)
        return None

    def shift(self, node: Node, site: Site) -> Outcome:
        """conv(x, w, b) + h --> conv(x, w, b + h) for one constant per channel; linear and subtraction likewise"""
        pairs = (node.inputs, node.inputs[::-1]) if node.op.name == "add" else (node.inputs,)
        for product, other in pairs:
            offset = _per_channel(node, product, other)
            if offset is not None:
                return self._product(product, None, -offset if node.op.name == "sub" else offset, site)
        return None

    def _product(self, node: Node, scale: torch.Tensor | None, shift: torch.Tensor | None, site: Site) -> Outcome:
        """The product with its weights scaled and its bias shifted, per channel."""
        refusal = _fixed(node, site)
        if refusal is not None or not site.single(node):
            return refusal
        x, w, *bias = node.inputs
        offset = _offset(value_of(bias[0]) if bias else None, scale, shift)
        new_bias = None if offset is None else offset.to(w.dtype)
        factor = None if scale is None else _factor(node, scale)
        if factor is not None and _overflows(w, factor) or new_bias is not None and not _finite(new_bias):
            return Refusal(Reason.NOT_FINITE, w.hint or "weight")
        made_w = w
        if factor is not None:
            made_w = self.maker.later([w], "scaled", lambda out, v: _scale(out, v, factor), w.shape, node.prov)
        made_b = [self.maker.derived([bias[0] if bias else w], "shifted", lambda _: new_bias, node.prov)] if new_bias is not None else []
        return OPS[node.op.name](x, made_w, *made_b, **node.attrs)


def _fixed(node: Node, site: Site) -> Refusal | None:
    """Why the weights of a product must stay as they are."""
    if site.shared(node):
        return Refusal(Reason.SHARED, node.hint or node.op.name)
    for weight in node.inputs[1:]:
        if not is_constant(weight):
            return Refusal(Reason.NOT_CONSTANT, weight.hint or weight.op.name)
    return Refusal(Reason.SHARED, node.inputs[1].hint) if _weight_shared(node.inputs[1], site) else None


def _weight_shared(weight: Node, site: Site) -> bool:
    while not site.shared(weight) and weight.inputs:
        weight = weight.inputs[0]
    return site.shared(weight)


def _overflows(w: Node, factor: torch.Tensor) -> bool:
    """Whether a finite weight times `factor` is not finite any more: told by the largest of the elements that are multiplied alike, as
    rounding keeps order."""
    weight = value_of(w)
    assert weight is not None
    if not weight.numel():
        return False
    alike = [d for d in range(1, weight.dim()) if factor.shape[d] == 1]
    largest = torch.maximum(weight.amax(alike, keepdim=True), -weight.amin(alike, keepdim=True))
    return bool(largest.isfinite().all()) and not bool((largest.double() * factor).to(weight.dtype).isfinite().all())


def _finite(x: torch.Tensor) -> bool:
    """No infinity and no NaN: either would be left in the sum, which is exact enough in float64 not to overflow by itself."""
    return bool(torch.isfinite(x.sum(dtype=torch.float64)))


def _per_channel(node: Node, product: Node, other: Node) -> torch.Tensor | None:
    """`other` as one float64 number per output channel of `product`, if it is a constant of that form."""
    if product.op.name not in _PRODUCTS or not is_float(node) or node.dtype != product.dtype or not same_shape(node.shape, product.shape):
        return None
    value = value_of(other)
    axis = 1 if product.op.name == "conv" and not product.attrs["channels_last"] else product.tensor.rank - 1
    if value is None or value.dim() == 0:
        return None
    shape = (1,) * (product.tensor.rank - value.dim()) + tuple(value.shape)
    if shape[axis] != product.shape[axis] or value.numel() != shape[axis]:
        return None
    return value.double().reshape(-1)


def _factor(node: Node, scale: torch.Tensor) -> torch.Tensor:
    """One number per output channel as what the weight of a product is multiplied by."""
    weight = node.inputs[1]
    if not node.attrs.get("transposed"):
        return scale.reshape(-1, *(1,) * (weight.tensor.rank - 1))
    (channels, out), groups = weight.shape[:2], node.attrs["groups"]
    rows = scale.reshape(groups, 1, out).expand(groups, channels // groups, out)
    return rows.reshape(channels, out, *(1,) * (weight.tensor.rank - 2))


def _scale(out: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor) -> None:
    """weight * factor in float64, rounded once."""
    for part, rows, factors in zip(*(_blocks(t, weight) for t in (out, weight, factor))):
        part.copy_(rows.double() * factors)


def _times(weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """weight @ vector in float64."""
    wide = vector.double()
    return torch.cat([rows.double() @ wide for rows in _blocks(weight, weight)])


def _blocks(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x, a few rows of the weight at a time: in float64 the whole would take twice the weight's memory."""
    return x.split(max(1, BLOCK * weight.shape[0] // max(1, weight.numel())))


def _offset(base: torch.Tensor | None, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor | None:
    """The new bias in float64, None where there is none."""
    if base is None:
        return shift
    moved = base.double() if scale is None else base.double() * scale
    return moved if shift is None else moved + shift


def fold_affine(graph: Graph, notes: Notes) -> Graph:
    """Scale and shift of layer_norm and rms_norm into the linears that read them, where all readers are such linears."""
    site, readers = Site(use_counts(graph)), users(graph)
    bare: set[Node] = set()
    for norm in readers:
        if norm.op.name not in ("layer_norm", "rms_norm") or len(norm.inputs) == 1:
            continue
        refusal = _unfoldable(norm, readers[norm], graph, site)
        if refusal is not None:
            notes.decline("fold-norms.affine", describe(norm), refusal.reason, norm, str(refusal.value or ""))
        elif notes.may("fold-norms.affine", norm):
            bare.add(norm)
            notes.apply("fold-norms.affine", f"{describe(norm)} into {len(readers[norm])} linear(s)", norm)
    maker = ConstantMaker(graph)

    def move(node: Node, inputs: tuple[Node, ...]) -> Node | None:
        if node in bare:
            return OPS[node.op.name](inputs[0], **node.attrs, hint=node.hint, prov=node.prov.with_rule("fold-norms"))
        if node.op.name == "linear" and node.inputs[0] in bare:
            return _absorbed(node, inputs[0], maker)
        return None

    return rewrite(graph, move) if bare else graph


def _unfoldable(norm: Node, readers: list[Node], graph: Graph, site: Site) -> Refusal | None:
    """Why the affine part of a norm must stay."""
    if not all(map(is_constant, norm.inputs[1:])):
        return Refusal(Reason.NOT_CONSTANT, "scale or shift of the norm")
    outside = next((r for r in readers if r.op.name != "linear" or r.inputs[0] is not norm or norm in r.inputs[1:]), None)
    if outside is not None or norm in graph.roots:
        return Refusal(Reason.SHARED, describe(outside) if outside else "an output")
    if norm.attrs["axes"] != 1:
        return Refusal(Reason.SHAPE_MISMATCH, f"{norm.attrs['axes']} normalized dimensions")
    if norm.dtype not in _WIDE:
        return Refusal(Reason.ROUNDING, str(norm.dtype).removeprefix("torch."))
    for reader in readers:
        if not all(map(is_constant, reader.inputs[1:])):
            return Refusal(Reason.NOT_CONSTANT, describe(reader))
        if _weight_shared(reader.inputs[1], site):
            return Refusal(Reason.SHARED, reader.inputs[1].hint or "weight")
    return None


def _absorbed(linear: Node, bare: Node, maker: ConstantMaker) -> Node:
    """linear(norm(x) * g + h, w, b) as linear(norm(x), w * g, w @ h + b)."""
    norm, w, *bias = linear.inputs
    gain, *shift = norm.inputs[1:]  # the product with the gain is rounded once, as in float64
    made = [maker.later([w, gain], "scaled", lambda out, v, g: torch.mul(v, g, out=out), w.shape, linear.prov)]
    offset = computed([w, shift[0]], _times) if shift else None
    base = value_of(bias[0]) if bias else None
    total = offset if base is None else base.double() if offset is None else base.double() + offset
    if total is not None:
        made.append(maker.derived([bias[0] if bias else w], "shifted", lambda _: total.to(w.dtype), linear.prov))
    return OPS["linear"](bare, *made, hint=linear.hint, prov=linear.prov.with_rule("fold-norms"))
