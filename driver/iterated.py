"""`reuse_blocks`: a model that is called step after step, as in a diffusion loop, and computes again only the blocks whose input changed.

    model = tilewright.reuse_blocks(denoiser, (x, t), threshold=0.05)
    for t in steps:
        x = x - model(x, t)          branches: 24 computed, 16 reused
    model.reset()                    before the next loop

A branch - what an attention or an MLP adds - is left out where what it is added to changed by less than `threshold` since the branch was
computed: sum |h - h'| < threshold * sum |h'|. Then it adds what it added then. Nothing drifts: changes are measured from when a branch was
computed, not from step to step. With threshold 0 it is the model as `optimize` makes it, to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.program import Program
from ..ir.analysis.residuals import Unit
from ..ir.graph import Graph, Node, order
from ..passes.base import Notes
from ..passes.manager import run_passes
from ..passes.reuse_blocks import Piece, added, pieces
from .calling import CallingConvention
from .compile import Options, compile_graph
from .errors import BadOption, CannotOptimize
from .inputs import Example
from .loading import captured_of, evaluating, export_module
from .measure import convention_for
from .pipeline import FINISHING, PREPARING


@evaluating
def reuse_blocks(
    model: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, threshold: float
) -> Iterated:
    """A module for inference, compiled for calls like the example, that reuses branches. threshold: a relative change, from 0 on.

    Raises CannotOptimize for a model that cannot be captured, has no such branch, updates its buffers, or draws random numbers; BadOption.
    """
    if not (isinstance(threshold, (int, float)) and threshold >= 0):
        raise BadOption(option="threshold", reason=f"it is a relative change, a number from 0 on, not {threshold!r}")
    loaded = export_module(type(model).__name__, model, Example(tuple(args), dict(kwargs or {}), {}))
    captured = captured_of(loaded)
    why = _unfit(captured.graph)
    if why:
        raise CannotOptimize(path=loaded.name, reason=why)
    with torch.no_grad():
        graph = run_passes(captured.graph, PREPARING, Notes())
    found = _pieces(graph, threshold)
    if threshold > 0 and not any(p.unit for p in found):
        raise CannotOptimize(path=loaded.name, reason="it has no branch to reuse: no attention or MLP is added to what it reads")
    parts = [_Part(p, compile_graph(p.graph, Options(), Notes(), FINISHING).program) for p in found]
    return Iterated(graph, convention_for(loaded, captured), parts, threshold)


def _pieces(graph: Graph, threshold: float) -> list[Piece]:
    """The whole graph, where everything is computed anyway: pieces take longer than one program."""
    return pieces(graph) if threshold > 0 else [Piece(graph, graph.inputs, graph.outputs)]


def _unfit(graph: Graph) -> str:
    if graph.writes:
        return f"it updates {graph.writes[0][0].hint}, which a step that is left out would not do"
    drawing = next((n for n in order(graph) if n.attrs.get("sequence") is not None), None)
    return "" if drawing is None else f"it draws random numbers ({drawing.prov.source}), in an order that reuse would change"


@dataclass(frozen=True)
class _Part:
    """A piece of the graph, compiled."""

    piece: Piece
    program: Program

    def run(self, values: Mapping[Node, Any]) -> list[Any]:
        return self.program.run([values[n] for n in self.piece.takes])


@dataclass
class Reuse:
    """How often a branch was computed, and how often reused, since the beginning or `reset`."""

    name: str
    computed: int = 0
    reused: int = 0


class _Branch:
    """Of a unit: its part, what it was added to when it was computed (None: not yet), and what it gave."""

    def __init__(self, part: _Part, unit: Unit) -> None:
        self.part, self.unit = part, unit
        self.before: torch.Tensor | None = None
        self.gave: list[Any] = []
        self.count = Reuse(unit.name)

    def run(self, values: Mapping[Node, Any], threshold: float) -> list[Any]:
        now, gives = values[self.unit.kept], self.part.piece.gives
        if self.before is not None and changed(now, self.before) < threshold:
            self.count.reused += 1
            total = now + self.gave[gives.index(added(self.unit))]
            return [total if n is self.unit.result else value for n, value in zip(gives, self.gave, strict=True)]
        self.count.computed += 1
        self.before, self.gave = now.clone(), self.part.run(values)  # a copy: the caller may write to what is his, and views show it
        return self.gave


def changed(now: torch.Tensor, before: torch.Tensor) -> float:
    """sum |now - before| / sum |before|; NaN, which is below nothing, where that says nothing."""
    wide = torch.float64 if now.dtype == torch.float64 else torch.float32
    return float((now.to(wide) - before.to(wide)).abs().sum() / before.to(wide).abs().sum())


class Iterated:
    """A model that remembers the branches of its last calls: for one loop at a time, in one thread."""

    def __init__(self, graph: Graph, convention: CallingConvention, parts: Sequence[_Part], threshold: float) -> None:
        self.graph, self.convention, self.threshold = graph, convention, threshold
        self._parts = parts
        self._branches: list[_Branch] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all branches and counts: before a loop over something else."""
        self._steps = [part if part.piece.unit is None else _Branch(part, part.piece.unit) for part in self._parts]
        self._branches = [step for step in self._steps if isinstance(step, _Branch)]

    @property
    def statistics(self) -> tuple[Reuse, ...]:
        """For each branch, in order; none with threshold 0."""
        return tuple(branch.count for branch in self._branches)

    @property
    def computed(self) -> int:
        return sum(line.computed for line in self.statistics)

    @property
    def reused(self) -> int:
        return sum(line.reused for line in self.statistics)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.convention.checked(self.convention.bind(args, kwargs), self.graph)
        values: dict[Node, Any] = dict(zip(self.graph.inputs, flat, strict=True))
        for step in self._steps:
            part = step if isinstance(step, _Part) else step.part
            given = step.run(values) if isinstance(step, _Part) else step.run(values, self.threshold)
            values.update(zip(part.piece.gives, given))  # an output that is listed twice is one value
        held = {t.untyped_storage().data_ptr() for b in self._branches for t in b.gave if isinstance(t, torch.Tensor)}
        return self.convention.pack([_own(values[n], held) for n in self.graph.outputs])


def _own(value: Any, held: Collection[int]) -> Any:
    """A result that shares no memory with what is remembered: the caller may write to it."""
    return value.clone() if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in held else value
