"""How a view of memory that a kernel has filled lies, where its sizes are known: what torch would find out in the call is known before."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.dims import contiguous_strides
from ..ir.graph import Node

Steps = tuple[int, ...]


def strides(node: Node) -> Steps | None:
    """In elements; None where they are not known: sizes are symbolic, or it is no view of a kernel's result."""
    if not all(isinstance(d, int) for d in node.shape):
        return None
    if (node.inputs[0] if node.op.name == "item" else node).op.name == "region":
        return contiguous_strides(node.shape)  # type: ignore[return-value]
    rule = _RULES.get(node.op.name)
    base = strides(node.inputs[0]) if rule is not None else None
    return None if rule is None or base is None else rule(node, base)


def reshaped(shape: Sequence[int], steps: Steps, wanted: Sequence[int]) -> Steps | None:
    """The strides of `x.view(wanted)`; None where no view has that shape."""
    if 0 in wanted:
        return contiguous_strides(tuple(wanted))  # type: ignore[return-value]
    blocks = _blocks(shape, steps)
    found: list[int] = []
    size, step = blocks.pop() if blocks else (1, 1)
    for d in reversed(wanted):
        if size == 1 and d != 1:
            size, step = blocks.pop()
        if size % d:
            return None
        found.append(step)
        size, step = size // d, step * d
    return tuple(reversed(found))


def _blocks(shape: Sequence[int], steps: Steps) -> list[tuple[int, int]]:
    """(size, stride) of the runs of dimensions that lie row-major, those of size 1 left out."""
    found: list[tuple[int, int]] = []
    for d, step in zip(shape, steps):
        if d == 1:
            continue
        if found and found[-1][1] == d * step:
            found[-1] = (found[-1][0] * d, step)
        else:
            found.append((d, step))
    return found


def _reshape(node: Node, base: Steps) -> Steps | None:
    return reshaped(node.inputs[0].shape, base, node.shape)


def _permute(node: Node, base: Steps) -> Steps:
    return tuple(base[d] for d in node.attrs["dims"])


def _slice(node: Node, base: Steps) -> Steps:
    d = node.attrs["dim"] % len(base)
    return (*base[:d], base[d] * node.attrs["step"], *base[d + 1 :])


def _select(node: Node, base: Steps) -> Steps:
    d = node.attrs["dim"] % len(base)
    return (*base[:d], *base[d + 1 :])


_RULES = {"reshape": _reshape, "permute": _permute, "slice": _slice, "select": _select}
