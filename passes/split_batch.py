"""`split-batch` and `split-halves`: the same graph in parts, so that what one part waits for takes place while another is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.analysis.axes import axis_of
from ..ir.graph import Graph, Node
from ..ir.reasons import Reason
from ..ir.rewrite import cleaned
from ..ir.types import TensorType
from .axis_parts import Parts
from .base import Notes, Pass, describe


@dataclass(frozen=True)
class SplitBatch(Pass):
    """Micro-batches: every part of the batch is computed by itself, and the results are joined.

        y = f(x)    -->    y = cat(f(x[:b/2]), f(x[b/2:]))

    Exact. What mixes the batch reads the parts joined; refused where nothing is left to compute in parts, and for sizes that vary. It is
    for those who have something to run beside a part, another device or a link: on its own it gains nothing, and nobody does it by default
    (`search/simulate.py` says where it gains). parts: how many, of sizes that differ by one at most. input: whose first dimension is the
    batch; "" is the first input. Source: "GPipe" (Huang et al., 2018).
    """

    parts: int = 2
    input: str = ""

    name: ClassVar[str] = "split-batch"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        source = _input(graph, self.input, 0)
        if source is None or self.parts < 2:
            return _refused(graph, notes, self.name, f"there is no input {self.input!r} to split in {self.parts}")
        size = source.shape[0]
        if not isinstance(size, int):
            notes.decline(self.name, describe(source), Reason.VARYING_SIZE, source, str(size))
            return graph
        if size < self.parts:
            return _refused(graph, notes, self.name, f"a batch of {size} has no {self.parts} parts")
        sizes = [size // self.parts + (i < size % self.parts) for i in range(self.parts)]
        return _in_parts(graph, source, 0, sizes, self.name, notes)


@dataclass(frozen=True)
class SplitHalves(Pass):
    """The first `at` tokens and the others, layer by layer: the others' attentions see the keys of the first, of the same layer.

        s = all_reduce(f(x))              s1 = all_reduce(f(x[:, :at]))
        y = g(s)                   -->    s2 = all_reduce(f(x[:, at:]))        while s1 is on its way
                                          y  = cat(g(s1), g(s2))               g(s1) while s2 is on its way

    Exact, for attentions that are causal (also by a constant mask); refused where one is not. Sums over processes are numbered so that each
    is waited for just before it is read. Where there are none, nothing is waited for, and nobody should (`search/simulate.py`).
    input: whose dimension `dim` has the tokens; "" is the first input. Source: "TokenWeave" (Gond et al., 2025).
    """

    at: int = 0
    input: str = ""
    dim: int = 1

    name: ClassVar[str] = "split-halves"

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        source = _input(graph, self.input, self.dim)
        if source is None:
            return _refused(graph, notes, self.name, f"there is no input {self.input!r} with a dimension {self.dim}")
        size = source.shape[self.dim]
        if not isinstance(size, int):
            notes.decline(self.name, describe(source), Reason.VARYING_SIZE, source, str(size))
            return graph
        if not 0 < self.at < size:
            return _refused(graph, notes, self.name, f"{self.at} is not between 0 and {size} tokens")
        return _in_parts(graph, source, self.dim, [self.at, size - self.at], self.name, notes)


def _input(graph: Graph, name: str, dim: int) -> Node | None:
    fits = (n for n in graph.inputs if isinstance(n.type, TensorType) and n.tensor.rank > dim)
    return next((n for n in fits if name in ("", n.hint)), None)


def _refused(graph: Graph, notes: Notes, rule: str, value: str) -> Graph:
    notes.decline(rule, graph.name, Reason.SHAPE_MISMATCH, value=value)
    return graph


def _in_parts(graph: Graph, source: Node, dim: int, sizes: Sequence[int], rule: str, notes: Notes) -> Graph:
    axis = axis_of(graph, source, dim)
    parts = Parts(graph, axis, sizes, rule)
    after = cleaned(parts.rewritten())
    mixed = next((n for n in parts.joined if n.op.name == "attention"), None)
    mixed = mixed if mixed is not None or parts.worked else next(iter(parts.joined), None)
    if mixed is not None:
        notes.decline(rule, describe(mixed), Reason.MIXED, mixed, axis.why(mixed) if mixed in axis.labels else "it reads all of them")
        return graph
    if not parts.worked:
        notes.decline(rule, describe(source), Reason.NO_GAIN, source, "nothing is multiplied part by part")
        return graph
    if not notes.may(rule, source):
        return graph
    notes.apply(rule, f"{describe(source)}: {' + '.join(map(str, sizes))}", source)
    return after
