"""A stretch of a weight, made of stretches of the constants under it: what one process holds of a weight in any form.

    w = dequantize(unpack(p, bits=4), scale)        columns 16 .. 32 of w    -->    bytes 8 .. 16 of p, the scales of the groups there

A stretch that ends within a group has a scale for each piece of a group: w' is w there, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..ir.graph import Node, is_scalar
from ..ir.op import Category
from .weights import is_constant


@dataclass(frozen=True)
class Stretch:
    """Indices of dimension `dim`, in order; one that stands for several stretches of something finer may be there more than once."""

    dim: int
    indices: tuple[int, ...]

    @property
    def together(self) -> bool:
        """Whether it is one index after the other."""
        start = self.indices[0]
        return self.indices == tuple(range(start, start + len(self.indices)))

    def of(self, value: torch.Tensor) -> torch.Tensor:
        if self.together:
            return value.narrow(self.dim, self.indices[0], len(self.indices)).clone()
        return value.index_select(self.dim, torch.tensor(self.indices, device=value.device))


Under = tuple["Stretch | None", ...]
"""Of each operand what a stretch of the result is made of; None is all of it."""


def run(dim: int, start: int, length: int) -> Stretch:
    return Stretch(dim, tuple(range(start, start + length)))


def share(weight: Node, dim: int, rank: int, count: int) -> Stretch:
    """The part that process `rank` of `count` has of a dimension that they have equal parts of."""
    size = int(weight.shape[dim]) // count  # type: ignore[arg-type]
    return run(dim, rank * size, size)


def is_weight(node: Node) -> bool:
    """Whether a value is a constant, or computed from constants by ops that rows of it can be traced through."""
    return is_constant(node) or _of_constants(node) and bool(node.tensor.rank) and _fits(node, run(0, 0, 1))


def in_shares(weight: Node, dim: int, count: int) -> bool:
    """Whether each of `count` processes can have its part of a weight."""
    size = weight.shape[dim]
    return isinstance(size, int) and size > 0 == size % count and all(_fits(weight, share(weight, dim, r, count)) for r in range(count))


def _of_constants(node: Node) -> bool:
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.op.name == "constant":
            continue
        if node.op.name == "input" or node.op.category is Category.EXTERN:
            return False
        stack += set(node.inputs) - seen
        seen.update(node.inputs)
    return True


def _fits(node: Node, wanted: Stretch) -> bool:
    under = () if is_constant(node) else _under(node, wanted)
    return under is not None and all(s is None or _fits(i, s) for i, s in zip(node.inputs, under))


def stretched(node: Node, wanted: Stretch, leaf: Callable[[Node, Stretch], Node]) -> Node:
    """The stretch of a weight. leaf: makes one of a constant, or a view of one."""
    if is_constant(node):
        return leaf(node, wanted)
    under = _under(node, wanted)
    assert under is not None, "asked of weights that have such stretches"
    inputs = tuple(i if s is None else stretched(i, s, leaf) for i, s in zip(node.inputs, under))
    attrs = dict(node.attrs)
    if node.op.name == "slice" and attrs["dim"] == wanted.dim:
        return inputs[0]
    return node.op(*inputs, hint=node.hint, prov=node.prov, **attrs)


def in_constant(node: Node, wanted: Stretch) -> tuple[Node, Stretch] | None:
    """The constant under a view, and the stretch of it that the view's is; None where it is no stretch there."""
    while node.op.name != "constant":
        under = _under(node, wanted)
        if under is None or under[0] is None:
            return None
        node, wanted = node.inputs[0], under[0]
    return node, wanted


# -- through ops


def _under(node: Node, wanted: Stretch) -> Under | None:
    """What a stretch of a node is made of; None where it is not of stretches."""
    rule = _RULES.get(node.op.name, _pointwise if node.op.category is Category.POINTWISE else None)
    return rule(node, wanted) if rule is not None else None


def _pointwise(node: Node, wanted: Stretch) -> Under:
    return tuple(_beside(node, i, wanted) for i in node.inputs)


def _beside(node: Node, operand: Node, wanted: Stretch) -> Stretch | None:
    """Of an operand that is broadcast to the result."""
    dim = -1 if is_scalar(operand) else wanted.dim - node.tensor.rank + operand.tensor.rank
    return None if dim < 0 or operand.shape[dim] == 1 else Stretch(dim, wanted.indices)


def _dequantize(node: Node, wanted: Stretch) -> Under | None:
    """Scales and zeros may be for groups along the last dimension: those that the stretch lies in, in pieces of equal length."""
    groups, size = node.inputs[1].shape[-1], node.shape[-1]
    if wanted.dim < node.tensor.rank - 1 or groups in (1, size):
        return _pointwise(node, wanted)
    if not wanted.together:
        return None
    start, length, each = wanted.indices[0], len(wanted.indices), int(size) // int(groups)  # type: ignore[arg-type]
    piece = math.gcd(each, start, length)
    found = Stretch(wanted.dim, tuple(i // each for i in range(start, start + length, piece)))
    return (wanted, *(found,) * (len(node.inputs) - 1))


def _unpack(node: Node, wanted: Stretch) -> Under | None:
    """Whole bytes."""
    if wanted.dim < node.tensor.rank - 1:
        return (wanted,)
    each, (start, length) = 8 // node.attrs["bits"], (wanted.indices[0], len(wanted.indices))
    whole = wanted.together and start % each == length % each == 0
    return (run(wanted.dim, start // each, length // each),) if whole else None


def _slice(node: Node, wanted: Stretch) -> Under | None:
    start, step = node.attrs["start"], node.attrs["step"]
    if node.attrs["dim"] != wanted.dim:
        return (wanted,)
    return (Stretch(wanted.dim, tuple(start + i * step for i in wanted.indices)),) if isinstance(start, int) else None


def _permute(node: Node, wanted: Stretch) -> Under:
    return (Stretch(node.attrs["dims"][wanted.dim], wanted.indices),)


_RULES: Mapping[str, Callable[[Node, Stretch], Under | None]] = {
    "dequantize": _dequantize,
    "unpack": _unpack,
    "slice": _slice,
    "permute": _permute,
}
