"""plan-memory: one arena for the intermediate values, reused as they die."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.analysis.inplace import in_place
from ..ir.analysis.memory import Lifetime, Owner, lifetimes, owner_type, owners, takes_memory
from ..ir.analysis.overwrite import overwritable
from ..ir.dims import Dim, dim, floordiv
from ..ir.graph import Graph, Node, Slot, Stage, order
from .base import Notes, Pass, Reason, describe

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Gives every value that our kernels or an `out=` call can write a place in one arena; values that live at the same time never overlap.

        a = region(x)                      a @ [0, 4096)
        b = region(a)            -->       b @ [4096, 8192)
        c = region(b)                      c @ [0, 4096)        a is dead
        return region(c)                   outputs have memory of their own

        b = region(a)                      b where a is, if a dies here and the kernel reads each element of a just before it writes
                                           that of b

        c = index_put(cache, kv, i)  -->   c into cache
        write cache = c

    Static sizes: greedy, largest first, into the smallest gap that holds them. Symbolic sizes: behind the static part, one slot for
    all values of the same size expression whose lifetimes do not overlap. Execution order is `order(graph)`.
    """

    name: ClassVar[str] = "plan-memory"
    needs: ClassVar[Stage] = Stage.FUSED

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        steps = order(graph)
        planned = {node: found for node, found in plannable(graph, steps).items() if notes.may(self.name, node)}
        over = _overwritten(steps, planned)
        merged = _merged(planned, over)
        static = [(life, size) for life, size in merged if isinstance(size, int)]
        symbolic = [(life, size) for life, size in merged if not isinstance(size, int)]
        fixed, static_peak = place(static)
        varying, peak = _place_symbolic(symbolic, static_peak)
        offsets: dict[Owner, Dim] = {**fixed, **varying}
        first = {node: planned[over.get(node, node)][0].owner for node in planned}
        arena = {node: Slot(offsets[first[node]], size) for node, (_, size) in planned.items()}
        if arena:
            apart = dim(sum((size for _, size in planned.values()), start=0))
            notes.apply(self.name, f"{len(arena)} values in {_bytes(peak)}, {_bytes(apart)} if each had its own")
        return replace(graph, arena=arena, inplace=_in_place(graph, steps, notes))


def _in_place(graph: Graph, steps: Sequence[Node], notes: Notes) -> dict[Node, Node]:
    """The updates of inputs that are written where the inputs lie: a step of decoding writes one row of its cache, not all of it."""
    found = in_place(graph, steps)
    taken = {t for t in dict.fromkeys(found.target.values()) if notes.may(PlanMemory.name, t, f"updates of {t.hint} in place")}
    targets = {node: target for node, target in found.target.items() if target in taken}
    for node, target in targets.items():
        notes.apply(PlanMemory.name, f"{describe(node)} in place of {target.hint}", node, _saved(node))
    for node, hazard in found.refused:
        notes.decline(PlanMemory.name, describe(node), Reason.OVERWRITTEN, node, f"{describe(hazard.node)}: {hazard.why}")
    return targets


def _saved(node: Node) -> int:
    """Bytes of the copy to the result and of the copy back that are spared."""
    nbytes = node.tensor.nbytes
    return 4 * nbytes if isinstance(nbytes, int) else 0


def plannable(graph: Graph, steps: Sequence[Node]) -> dict[Node, tuple[Lifetime, Dim]]:
    """Value -> its lifetime and its size in bytes rounded up to the alignment, for every value that belongs in the arena."""
    owned = owners(steps)
    lives = lifetimes(graph, steps)
    kept = {owner for n in graph.outputs for owner in owned[n]}
    found: dict[Node, tuple[Lifetime, Dim]] = {}
    seen: set[Owner] = set(kept)
    device = ""
    for node in steps:
        owner = _own(node)
        if owner is None or owner in seen:
            continue
        device = device or owner_type(owner).device
        if owner_type(owner).device != device:  # one block of memory is on one device
            continue
        seen.add(owner)
        size = _aligned(owner_type(owner).nbytes)
        if size != 0:
            found[node] = (lives[owner], size)
    return found


def _overwritten(steps: Sequence[Node], planned: dict[Node, tuple[Lifetime, Dim]]) -> dict[Node, Node]:
    """Value -> the value in whose memory it is written; where that itself was written over another, the first of them."""
    owned = owners(steps)
    results: dict[Node, list[tuple[int, Node]]] = {}
    for node in planned:
        source, index = (node.inputs[0], node.attrs["index"]) if node.op.name == "item" else (node, 0)
        results.setdefault(source, []).append((index, node))
    found: dict[Node, Node] = {}
    for step, node in enumerate(steps):
        if node.op.name != "region" or node not in results:
            continue
        read = [owner for n in node.inputs for owner in owned[n]]
        dying = [(i, n) for i, n in enumerate(node.inputs) if n in planned and planned[n][0].end == step]
        dying = [(i, n) for i, n in dying if read.count(planned[n][0].owner) == 1]
        alike = [(k, i) for k, made in results[node] for i, n in dying if n.type == made.type]
        allowed = overwritable(node.attrs["body"]) if alike else frozenset()
        for k, made in results[node]:
            place = next((i for i, n in dying if (k, i) in allowed and n.type == made.type), None)
            if place is not None:
                taken = node.inputs[place]
                found[made] = found.get(taken, taken)
                dying = [(i, n) for i, n in dying if i != place]
    return found


def _merged(planned: dict[Node, tuple[Lifetime, Dim]], over: dict[Node, Node]) -> list[tuple[Lifetime, Dim]]:
    """The memory to place: each with the lifetime of all values written in it, one after the other."""
    lives = {node: life for node, (life, _) in planned.items() if node not in over}
    for node, first in over.items():
        lives[first] = replace(lives[first], end=max(lives[first].end, planned[node][0].end))
    return [(life, planned[node][1]) for node, life in lives.items()]


def _own(node: Node) -> Owner | None:
    """The owner that this value names, if the host can provide its memory."""
    if node.op.name == "item":
        source = node.inputs[0]
        return Owner(source, node.attrs["index"]) if takes_memory(source) else None
    return Owner(node) if takes_memory(node) and not isinstance(node.type, tuple) else None


def place(values: Iterable[tuple[Lifetime, int]]) -> tuple[dict[Owner, int], int]:
    """Offsets, and the size of the arena. Largest first, each into the smallest gap between values alive at the same time.

    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), greedy by size.
    """
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end, lifetime), by offset
    peak = 0
    for life, size in sorted(values, key=lambda v: (-v[1], v[0].start)):
        offset = _best_gap([(at, end) for at, end, other in placed if other.overlaps(life)], size)
        bisect.insort(placed, (offset, offset + size, life), key=lambda p: p[0])
        peak = max(peak, offset + size)
    return {life.owner: at for at, _, life in placed}, peak


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    """The offset of the smallest gap of at least `size` between the taken ranges (sorted by offset), else their end."""
    best: tuple[int, int] | None = None
    free = 0
    for at, end in taken:
        if at - free >= size and (best is None or at - free < best[0]):
            best = (at - free, free)
        free = max(free, end)
    return free if best is None else best[1]


def _place_symbolic(values: Iterable[tuple[Lifetime, Dim]], start: Dim) -> tuple[dict[Owner, Dim], Dim]:
    """Offsets behind `start`: a slot serves the values of one size expression, one after the other."""
    offsets: dict[Owner, Dim] = {}
    slots: list[tuple[Dim, Dim, int]] = []  # (size, offset, step after which it is free)
    peak = start
    for life, size in sorted(values, key=lambda v: v[0].start):
        free = next((i for i, (s, _, end) in enumerate(slots) if s == size and end < life.start), None)
        if free is None:
            slots.append((size, peak, life.end))
            offsets[life.owner], peak = peak, dim(peak + size)
            continue
        offsets[life.owner] = slots[free][1]
        slots[free] = (size, slots[free][1], life.end)
    return offsets, peak


def _aligned(size: Dim) -> Dim:
    if isinstance(size, int):
        return -(-size // ALIGNMENT) * ALIGNMENT
    return dim(ALIGNMENT * floordiv(dim(size + ALIGNMENT - 1), ALIGNMENT))


def _bytes(size: Dim) -> str:
    if not isinstance(size, int):
        return f"{size} bytes"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
