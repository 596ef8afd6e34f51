"""Structure: `extern` (an ATen op without a definition here), `region` (nodes that become one kernel), `item` (one of several results)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..dims import dim
from ..graph import Graph
from ..op import Category, Cost, Op, no_cost, streaming_cost
from ..types import ScalarType, TensorType, Type, same_type


@dataclass(frozen=True)
class Ref:
    """In the argument template of an extern: operand number `index`. Written `$0`."""

    index: int

    def __repr__(self) -> str:
        return f"${self.index}"


def _infer_extern(
    *operands: Any, target: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...] = (), types: tuple[TensorType, ...],
    strides: tuple[Any, ...] = (), sequence: int | None = None,
) -> Type:  # fmt: skip
    """target: "aten.topk.default". args, kwargs: its arguments with Ref(i) in place of operand i. types: what it returns.

    strides: where the op's meaning depends on its operands' layout, one tuple of strides per operand (None: any layout).
    sequence: numbers effectful ops (random draws) in program order; None for pure ones.
    """
    return types[0] if len(types) == 1 else types


def resolve(target: str) -> Any:
    """The torch operator overload that an extern names, "namespace.op.overload"; raises AttributeError if it is not registered."""
    namespace, name, overload = target.split(".", 2)
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def fill(template: Any, operands: tuple[Any, ...]) -> Any:
    """The argument template with operands in place of their references."""
    if isinstance(template, Ref):
        return operands[template.index]
    if isinstance(template, tuple):
        return [fill(t, operands) for t in template]
    return template


def _extern(*operands: Any, target: str, args: Any, kwargs: Any, types: Any, strides: Any, sequence: Any) -> Any:
    from .views import laid_out

    if strides:
        operands = tuple(x if s is None else laid_out(x, s) for x, s in zip(operands, strides))
    result = resolve(target)(*(fill(a, operands) for a in args), **{k: fill(v, operands) for k, v in kwargs})
    found = tensor_leaves(result)
    return found if len(types) > 1 else found[0]


def tensor_leaves(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that an operator returned, in order: what `types` of an extern lists (None and numbers are left out)."""
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(leaf for r in result for leaf in tensor_leaves(r)) if isinstance(result, (tuple, list)) else ()


def _infer_region(*operands: Any, body: Graph, label: str = "", schedule: str = "") -> Type:
    """body: the fused nodes as a graph of their own, its inputs bound to the operands. label: what it computes, in a few words.

    schedule: how code generation walks it, e.g. "block_m=128 num_warps=8"; "" leaves that to it.
    """
    if len(operands) != len(body.inputs):
        raise ValueError(f"the body takes {len(body.inputs)} operands")
    for operand, inside in zip(operands, body.inputs):
        if not (same_type(operand, inside.type) or (isinstance(operand, ScalarType) and operand.dtype == inside.dtype)):
            raise ValueError(f"operand {operand} is bound to {inside.hint}: {inside.type}")
    types = tuple(n.tensor for n in body.outputs)
    return types[0] if len(types) == 1 else types


def _region(*operands: Any, body: Graph, label: str, schedule: str) -> Any:
    from ..interpret import interpret

    results = interpret(body, operands)
    return results[0] if len(results) == 1 else tuple(results)


def _cost_region(types: tuple[Type, ...], out: Type, attrs: Any) -> Cost:
    from ..graph import order

    body = attrs["body"]
    costs = (n.op.cost(tuple(i.type for i in n.inputs), n.type, n.attrs) for n in order(body))
    return Cost(dim(sum((c.flops for c in costs), start=0)), streaming_cost(types, out).bytes)


def _infer_item(x: tuple[TensorType, ...], *, index: int) -> Type:
    """One of the results of an op with several."""
    if not isinstance(x, tuple):
        raise ValueError("it takes a value with several results")
    if not 0 <= index < len(x):
        raise ValueError(f"there is no result {index} among {len(x)}")
    return x[index]


STRUCTURE: tuple[Op, ...] = (
    Op("extern", Category.EXTERN, _infer_extern, _extern),
    Op("region", Category.STRUCTURE, _infer_region, _region, _cost_region),
    Op("item", Category.STRUCTURE, _infer_item, lambda x, *, index: x[index], no_cost),
)
