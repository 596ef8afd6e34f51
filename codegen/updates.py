"""Updates in place: values that the graph says are computed in the memory of the input they are written back to.

A call then reads like this:

    keys, = own_memory((keys,), (values, weight))     what lies over another input is worked on in a copy
    keys_new = index_put_(keys, row, position)        writes one row; the same tensor under the name of its new value
    if keys is not keys_given: ...                    and the copy is copied back

Rows of a cache at a position of each batch entry are written by a kernel (cpp/cache.h) that is part of the run of kernels around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.analysis.inplace import puts_back
from ..ir.analysis.memory import Owner, owners
from ..ir.dims import dim, product, to_source
from ..ir.graph import Graph, Node, is_scalar, order
from ..ir.ops.gathers import full_index, update_rows
from ..ir.types import TensorType
from .calls import KernelCall, Operand
from .host import Host, Scope, Value
from .regions import Built
from .strides import strides
from .target import Native

Given = Mapping[Node, Value]
"""Inputs that are updated in place -> the tensors that the caller gave."""


@dataclass(frozen=True)
class NativeRows:
    """The updates in place that the kernel does, and how it is called: its entry and the routine that makes runs."""

    nodes: frozenset[Node] = frozenset()
    native: Native | None = None


def native_rows(graph: Graph, built: Built) -> NativeRows:
    """Updates with a position for each batch entry, where the program has kernels on the CPU."""
    units = (u.compiled.native for u in built.units.values() if u.compiled is not None and u.compiled.native is not None)
    native = next((n for n in units if n.update is not None), None)
    if native is None:
        return NativeRows()
    chains: dict[Node, list[Node]] = {}
    for node, target in graph.inplace.items():
        chains.setdefault(target, []).append(node)
    ours = (nodes for nodes in chains.values() if all(map(_by_rows, nodes)))
    return NativeRows(frozenset(n for nodes in ours for n in nodes), native)


def _by_rows(node: Node) -> bool:
    if node.op.name != "cache_update" or node.tensor.device != "cpu":
        return False
    position = node.inputs[2].type
    return isinstance(position, TensorType) and position.rank == 1 and position.dtype == torch.int64


def emit_targets(host: Host, rows: NativeRows = NativeRows()) -> Given:
    """At the start of a call: makes sure that what is written in place shows in no other input that is read afterwards."""
    targets = list(dict.fromkeys(host.graph.inplace.values()))
    if not targets:
        return {}
    given = {t: host.values[t] for t in targets}
    others = [host.values[n] for n in _read_later(host.graph) if n not in given]
    by_rows = {t for node, t in host.graph.inplace.items() if node in rows.nodes}
    for target, value in given.items():
        dense = value.contiguous or target in by_rows
        host.values[target] = Value(host.name(f"{value.name}_own"), value.scope, dense, nbytes=value.nbytes)
    own = [host.values[t] for t in targets]
    names = [f"({''.join(f'{v.name}, ' for v in values)})" for values in (own, given.values(), others)]
    own_memory = host.bind("own_memory", OwnMemory(tuple(t in by_rows for t in targets)))
    host.line(f"{names[0]} = {own_memory}({names[1]}, {names[2]})", reads=[*given.values(), *others, *own])
    return given


def _read_later(graph: Graph) -> list[Node]:
    """The tensor inputs that are read after the first update, or shown as results."""
    steps = order(graph)
    owned = owners(steps)
    first = next(i for i, n in enumerate(steps) if n in graph.inplace)
    late = {owner for node in steps[first:] for operand in node.inputs for owner in owned[operand]}
    late |= {owner for root in graph.roots for owner in owned[root]}
    return [n for n in graph.inputs if not is_scalar(n) and Owner(n) in late]


def emit_update(host: Host, node: Node, rows: NativeRows = NativeRows()) -> None:
    """The update of the first operand's memory, and a new name for it."""
    base = host.values[node.inputs[0]]
    if node in rows.nodes and rows.native is not None:
        _emit_rows(host, node, base, rows.native)
        host.values[node] = base
        return
    if puts_back(node) is not None:
        host.define(node, base.name, Scope.CALL, [base], base.contiguous)
        return
    function = host.bind(f"{node.op.name}_", _UPDATES[node.op.name])
    parts = [host.operand(n) for n in node.inputs]
    parts += [f"{k}={host.literal(v)}" for k, v in node.attrs.items()]
    host.define(node, f"{function}({', '.join(parts)})", Scope.CALL, host.tensors(node.inputs), base.contiguous)


def _emit_rows(host: Host, node: Node, base: Value, native: Native) -> None:
    """A call of the kernel; what it writes may be a view whose columns lie side by side."""
    cache, new, position = node.inputs
    d, size = node.attrs["dim"] % cache.tensor.rank, cache.dtype.itemsize
    heads, tokens, row = product(new.shape[1:d]), new.shape[d], product(new.shape[d + 1 :])
    value, steps = host.values[new], strides(new) if new.tensor.rank == 4 and d == 2 else None
    if steps is None or (steps[-1] != 1 and row != 1):
        value, steps = host.dense(value), (heads * tokens * row, tokens * row, row)
    sizes = (new.shape[0], heads, tokens, cache.shape[d], row * size, *(s * size for s in steps[:3]))
    buffers = map(host.operand_of_kernel, (base, value, host.dense(host.values[position])))
    operands = (*buffers, *(Operand("", to_source(dim(n))) for n in sizes))
    asked = f"{host.bind(native.asking, native.asked)}()"
    assert native.update is not None
    host.call(KernelCall("update_cache", native.update, operands, (base.name,), asked), native.run)


def emit_finished(host: Host, target: Node, given: Given) -> None:
    """At the end: a tensor that was worked on in a copy gets its new value."""
    own, theirs = host.values[target], given[target]
    host.line(f"if {own.name} is not {theirs.name}: {theirs.name}.copy_({own.name})", reads=[own, theirs])


# -- at run time


_data_ptr, _nbytes, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.nbytes.__get__, torch.Tensor.is_contiguous  # type: ignore[attr-defined]


class OwnMemory:
    """(written, others) -> `written`, as copies if any of it lies over another of the tensors, or is not row-major and must be.

    dense: which of `written` must be. Calls mostly come with tensors at the same places as the one before, which is found out without
    looking at each.
    """

    def __init__(self, dense: tuple[bool, ...] = ()) -> None:
        self._dense = dense
        self._apart: object = None  # addresses and sizes of tensors that were found apart

    def __call__(self, written: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        tensors = written + others
        places = (tuple(map(_data_ptr, tensors)), tuple(map(_nbytes, tensors))) if all(map(_is_contiguous, tensors)) else None
        if places is not None and places == self._apart:
            return written
        if _overlap(written, others):
            return tuple(t.clone(memory_format=torch.contiguous_format) for t in written)
        if not all(map(_is_contiguous, itertools.compress(written, self._dense))):
            return tuple(t.contiguous() if dense else t for t, dense in zip(written, self._dense))
        self._apart = places
        return written


def _overlap(written: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    """Whether one of `written` shares bytes with another of all the tensors; ranges that interleave count as shared."""
    spans = sorted([(*_span(t), True) for t in written] + [(*_span(t), False) for t in others])
    reached = reached_written = 0
    for start, end, writes in spans:
        if start < (reached if writes else reached_written) and start < end:
            return True
        reached = max(reached, end)
        if writes:
            reached_written = max(reached_written, end)
    return False


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    return start, start + (sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1) * x.itemsize


def _index_put(x: torch.Tensor, value: torch.Tensor, *indices: torch.Tensor, dims: tuple[int, ...], accumulate: bool) -> torch.Tensor:
    return torch.ops.aten.index_put_.default(x, full_index(indices, dims), value, accumulate)


def _slice_scatter(x: torch.Tensor, src: torch.Tensor, *, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    torch.ops.aten.slice.Tensor(x, dim, start, stop, step).copy_(src)
    return x


def _scatter(x: torch.Tensor, index: torch.Tensor, src: Any, *, dim: int, reduce: str, include_self: bool) -> torch.Tensor:
    if reduce == "set":
        return x.scatter_(dim, index, src)
    if not isinstance(src, torch.Tensor):
        src = torch.full(index.shape, src, dtype=x.dtype, device=x.device)
    return x.scatter_reduce_(dim, index, src, reduce, include_self=include_self)


def _cache_update(cache: torch.Tensor, new: torch.Tensor, position: Any, *, dim: int) -> torch.Tensor:
    if isinstance(position, torch.Tensor) and position.dim():
        return update_rows(cache, new, position, dim)
    return cache.index_copy_(dim, torch.arange(new.shape[dim], device=cache.device) + position, new)


_UPDATES: dict[str, Callable[..., torch.Tensor]] = {
    "index_put": _index_put, "slice_scatter": _slice_scatter, "scatter": _scatter, "cache_update": _cache_update,
}  # fmt: skip
