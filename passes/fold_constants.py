"""`fold-constants`: computes at compile time what depends on constants only, as long as that costs no memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir.graph import Data, Graph, Node, constants, is_scalar
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import rewrite
from .base import Notes, Pass, Reason, describe
from .facts import literal
from .weights import ConstantMaker, is_constant, source_name, static, value_of

FORMATS = frozenset({"unpack", "dequantize"})
"""What makes numbers of weights of few bits: these were chosen to be small."""

_FOLDED = frozenset({Category.POINTWISE, Category.REDUCTION, Category.SCAN, Category.GATHER, Category.CONTRACTION, Category.COMPOSITE})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Nodes whose operands are all constants become constants; constants of equal content become one.

        a = constant "a" : f32[2]
        b = constant "b" : f32[2]
        c = add(a, b)               -->    c = constant "a.add" : f32[2]
        y = mul(x, c)                      y = mul(x, c)

    Memory never grows: a result larger than its operands by more than `allowance` bytes stays computed. Fills and ranges count
    nothing, so that masks and positions made of them fold while they are small; beyond that a kernel makes them faster than it reads them.
    Views of constants stay views: the products that read them take any strides.
    """

    allowance: int = 65536

    name: ClassVar[str] = "fold-constants"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes or Notes()
        graph = share_equal(graph, notes)
        maker = ConstantMaker(graph)

        def fold(node: Node, inputs: tuple[Node, ...]) -> Node | None:
            current = node if inputs == node.inputs else node.with_inputs(inputs)
            return self._uniform(current, notes) or self._folded(current, maker, notes) or current

        return rewrite(graph, fold)

    def _uniform(self, node: Node, notes: Notes) -> Node | None:
        """A pointwise op on fills is a fill, whatever its size."""
        uniform = node.op.category is Category.POINTWISE and all(is_scalar(i) or i.op.name == "full" for i in node.inputs)
        values = [literal(i) for i in node.inputs] if uniform else [None]
        if any(v is None for v in values) or not notes.may("fold-constants.uniform", node):
            return None
        result = node.op.eager(*(_one(i, v) for i, v in zip(node.inputs, values)), **node.attrs)
        notes.apply("fold-constants.uniform", describe(node), node)
        t = node.tensor
        attrs: dict[str, Any] = {"shape": t.shape, "value": result.item(), "dtype": t.dtype, "device": t.device}
        return OPS["full"](**attrs, hint=node.hint, prov=node.prov.with_rule("fold-constants"))

    def _folded(self, node: Node, maker: ConstantMaker, notes: Notes) -> Node | None:
        if node.op.category not in _FOLDED or not node.inputs or not static(node):
            return None
        if not all(literal(i) is not None if is_scalar(i) else is_constant(i, generated=True) for i in node.inputs):
            return None
        reason = self._refused(node)
        if reason is not None:
            notes.decline(self.name, describe(node), reason, node, str(node.type))
            return None
        if not notes.may(self.name, node):
            return None
        with torch.no_grad():
            value = node.op.eager(*map(_value, node.inputs), **node.attrs)
        notes.apply(self.name, describe(node), node)
        return maker.make(f"{_name(node)}.{node.op.name}", value, node.prov.with_rule(self.name), node.hint)

    def _refused(self, node: Node) -> Reason | None:
        """Why the result must not be stored."""
        size, allowance = int(node.tensor.nbytes), 0 if node.op.name in FORMATS else self.allowance
        stored = [i for i in node.inputs if not is_scalar(i) and is_constant(i)]
        return Reason.MEMORY if size > sum(int(i.tensor.nbytes) for i in stored) + allowance else None


def _value(node: Node) -> Any:
    """What is at hand now: a number, or the tensor of a constant, fill, range or view of one; else None."""
    return literal(node) if is_scalar(node) else value_of(node, generated=True)


def _one(node: Node, value: Any) -> Any:
    """One element of a fill, with a dimension where the fill has some (0-d tensors promote differently)."""
    return value if is_scalar(node) else torch.full((1,) if node.tensor.rank else (), value, dtype=node.dtype)


def _name(node: Node) -> str:
    first = next((i for i in node.inputs if is_constant(i)), None)
    return source_name(first) if first else node.hint or "folded"


def share_equal(graph: Graph, notes: Notes) -> Graph:
    """Constants with the same dtype, shape, device and bits become one."""
    groups: dict[Any, list[Data]] = defaultdict(list)
    for data in constants(graph).values():
        if data.value is not None:
            groups[data.value.dtype, data.value.shape, data.value.device].append(data)
    same: dict[Data, Data] = {}
    for group in groups.values():
        same.update(_duplicates(group) if len(group) > 1 else {})
    words = {data: f"{data.name} is {kept.name}" for data, kept in same.items()}
    same = {data: kept for data, kept in same.items() if notes.may("fold-constants.share", what=words[data])}
    for data in same:
        notes.apply("fold-constants.share", words[data])
    return rewrite(graph, lambda node, inputs: _shared(node, same)) if same else graph


def _shared(node: Node, same: dict[Data, Data]) -> Node | None:
    data = node.attrs.get("data")
    return OPS["constant"](data=same[data], hint=node.hint, prov=node.prov) if data in same else None


def _duplicates(group: list[Data]) -> dict[Data, Data]:
    """Later constants -> the first with the same bits. A sample decides most pairs, so weights are rarely read whole."""
    kept: dict[Any, list[Data]] = defaultdict(list)
    same: dict[Data, Data] = {}
    for data in group:
        bucket = kept[_sample(data.value)]
        first = next((other for other in bucket if _same_bits(other.value, data.value)), None)
        if first is None:
            bucket.append(data)
        else:
            same[data] = first
    return same


def _sample(value: Any) -> bytes:
    """A few dozen elements as bytes."""
    flat = value.detach().as_strided((value.numel(),), (1,)) if value.is_contiguous() else value.detach().reshape(-1)
    picked = flat[:: max(1, value.numel() // 32)]
    return picked.contiguous().cpu().view(torch.uint8).numpy().tobytes() if picked.numel() else b""


def _same_bits(a: Any, b: Any) -> bool:
    a, b = a.detach(), b.detach()
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else _same_bits(a[None], b[None])
