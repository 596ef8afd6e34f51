"""`split`: a model in, the artifacts of its stages out: for a pipeline of machines, or a head on a small one and a tail on a large one.

    model  -->  segments, with what each takes  -->  cuts (search/stages.py)  -->  a program for each stage  -->  measured, checked

Run one after the other the stages are the model: that is checked against float64, as `optimize` checks its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..codegen.cpp.levels import LEVELS
from ..ir.analysis.segments import Segments, segments
from ..ir.capture import CapturedModule
from ..ir.dims import hint
from ..ir.graph import Graph, Node, constants
from ..ir.types import TensorType
from ..passes.base import Notes
from ..passes.manager import run_passes
from ..passes.split_layers import Part, rounded, rounded_nbytes
from ..passes.split_layers import split as split_graph
from ..search.database import Database
from ..search.device import this_device
from ..search.segment_loads import by_rates, load_of, measured, timed
from ..search.simulate import Decision, micro_batches
from ..search.stages import Machine, Staged, stages
from .accuracy import ErrorCheck
from .artifact import Optimized
from .calling import CallingConvention
from .compile import Options, compile_graph
from .errors import CannotOptimize
from .goal import Goal
from .inputs import Example
from .loading import Model, captured_of, evaluating, export_module
from .measure import apart, convention_for, error_check
from .pipeline import DEFAULT_PASSES
from .words import duration, scaled

_OWN = next(i for i, item in enumerate(DEFAULT_PASSES) if item.name == "merge-linears")
BEFORE, AFTER = DEFAULT_PASSES[:_OWN], DEFAULT_PASSES[_OWN:]
"""What runs before the model is cut, and what for each stage on its own: layers that merge would hold stages together."""

Steps = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Split:
    """stages: to call one after the other, each with what the one before returns. staged: what was foretold of them; seconds: of a call of
    each, measured here; crosses: what passes between them, in words; nbytes: of that. error: of all together."""

    name: str
    stages: tuple[Optimized, ...]
    staged: Staged
    seconds: tuple[float, ...]
    crosses: tuple[str, ...]
    nbytes: tuple[int, ...]
    error: ErrorCheck

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return in_sequence(self.stages, args, kwargs)

    @property
    def weights(self) -> tuple[int, ...]:
        """Bytes that each stage holds."""
        return tuple(sum(d.value.nbytes for d in constants(s.graph).values() if d.value is not None) for s in self.stages)

    def micro_batches(self) -> Decision:
        """Into how many parts a batch like the example is best cut on its way through the stages, as simulated: one computes a part while
        the next one has another. Every part reads a stage's weights again. For such a pipeline split the model on the rows of one part.
        """
        again = max(self.weights) / this_device().read
        first = self.stages[0].graph.inputs[0].type
        rows = first.shape[0] if isinstance(first, TensorType) and first.rank else 1
        seconds = [max(s - again, 0.0) for s in self.staged.seconds]
        return micro_batches(seconds, self.staged.link_seconds, rows if isinstance(rows, int) else 1, again)

    def render(self, console: Console | None = None) -> None:
        """Prints what was chosen, and what it comes to."""
        out = console or Console()
        table = Table(box=None, header_style="dim")
        for heading in ("stage", "weights", "foretold", "measured here", "passes on", "bytes"):
            table.add_column(heading, justify="left" if heading in ("stage", "passes on") else "right")
        passed = [*zip(self.crosses, self.nbytes), ("", 0)]
        for i, (held, told, took, (words, nbytes)) in enumerate(zip(self.weights, self.staged.seconds, self.seconds, passed)):
            table.add_row(str(i + 1), f"{scaled(held)}B", duration(told), duration(took), words, f"{nbytes:,}" if words else "")
        out.print(table)
        error = f"error {self.error.ours:.0e} (eager {self.error.eager:.0e}, allowed {self.error.allowed:.0e})"
        out.print(f"a pipeline passes on every {duration(self.staged.bottleneck)}, one call takes {duration(self.staged.latency)}; {error}")
        parts = self.micro_batches()
        gain = f"{len(parts.parts)} micro-batches would take {parts.seconds / parts.whole:.2f} of the time" if parts.pays else parts.reason
        out.print(f"such a batch in parts: {gain}")

    def save(self, path: str | Path, levels: Collection[str] = tuple(LEVELS)) -> tuple[Path, ...]:
        """Writes an artifact for each stage: `model.tw` makes `model.1.tw`, `model.2.tw`. levels: as of one. Raises CannotWrite."""
        paths = stage_paths(path, len(self.stages))
        for stage, where in zip(self.stages, paths):
            stage.save(where, levels)
        return paths


def stage_paths(path: str | Path, count: int) -> tuple[Path, ...]:
    path = Path(path)
    return tuple(path.with_name(f"{path.stem}.{i + 1}{path.suffix or '.tw'}") for i in range(count))


def in_sequence(parts: Sequence[Callable[..., Any]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of the last of several stages, each called with what the one before returns."""
    values: Any = parts[0](*args, **kwargs)
    for part in parts[1:]:
        values = part(*values)
    return values


@evaluating
def split(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    stages: int = 2,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    **goal: Any,
) -> Split:
    """Cuts a module, called with example arguments, into stages. goal: the fields of `Goal`, all of which may be left out.

    For a pipeline the example is one micro-batch. Raises CannotSplit, which names the limit that stands in the way, and CannotOptimize
    where the model cannot be exported or captured.
    """
    asked = Goal(**{"machines": (Machine(),) * stages, **goal})
    example = Example(tuple(args), dict(kwargs or {}), {k: dict(v) for k, v in (dynamic or {}).items()})
    return split_model(export_module(type(model).__name__, model, example), asked)


def split_model(model: Model, goal: Goal, step: Steps = lambda name: nullcontext()) -> Split:
    with step("capturing the graph"):
        captured = captured_of(model)
        convention = convention_for(model, captured)
        _require_own_state(model, captured)
        notes = Notes()
        with torch.no_grad():
            graph = run_passes(captured.graph, BEFORE, notes)
    found = segments(graph, least=len(goal.machines) - 1)
    staged = _staged(found, goal, step)
    parts = split_graph(found, staged.cuts)
    if goal.round_cut:
        parts = _rounded(parts)
    with step("building the stages"):
        made = tuple(_made(p, notes, captured, c) for p, c in zip(parts, _conventions(parts, convention, captured.graph)))
    with step("checking against float64"):
        error = _checked(model, captured, convention, made, goal)
    made = tuple(replace(m, receipt=replace(m.receipt, error=error)) for m in made)
    with step("measuring the stages"):
        seconds = tuple(timed(m.graph, m.program.run).seconds for m in made)
    crossing = [part.graph.outputs for part in parts[:-1]]
    words = tuple(", ".join(str(n.type) for n in nodes) for nodes in crossing)
    nbytes = tuple(sum(_bytes(n, p.graph) for n in p.graph.outputs) for p in parts[:-1])
    return Split(model.name, made, staged, seconds, words, nbytes, error)


def _require_own_state(model: Model, captured: CapturedModule) -> None:
    """What a model writes to must be buffers of its own, which stay with a stage; an argument would have to come back."""
    own = set(captured.graph.inputs[len(captured.graph.inputs) - len(captured.signature.state) :])
    other = next((target for target, _ in captured.graph.writes if target not in own), None)
    if other is not None:
        raise CannotOptimize(path=model.name, reason=f"it writes to its argument {other.hint}, which a stage could not hand back")


def _staged(found: Segments, goal: Goal, step: Steps) -> Staged:
    def seconds(graphs: Sequence[Graph]) -> list[float]:
        if not goal.measure:
            return by_rates(graphs, this_device())
        with step("measuring what segments take") as progress:
            return measured(graphs, _runner, Database(), progress or (lambda done, total: None))

    load = load_of(found, seconds, rounded_nbytes if goal.round_cut else lambda node: node.tensor.nbytes)
    whole = sum(load.seconds)
    machines = [
        replace(machine, seconds=min(machine.seconds, share * whole * machine.slowness))
        for machine, share in zip(goal.machines, goal.shares or (math.inf,) * len(goal.machines))
    ]
    return stages(load, machines, goal.links, goal.objective)


def _runner(graph: Graph) -> Callable[[list[Any]], Any]:
    return compile_graph(graph, Options(), Notes(), AFTER).program.run


def _rounded(parts: Sequence[Part]) -> list[Part]:
    found = list(parts)
    for i in range(len(found) - 1):
        found[i], found[i + 1] = rounded(found[i], found[i + 1])
    return found


def _made(part: Part, notes: Notes, captured: CapturedModule, convention: CallingConvention) -> Optimized:
    """A program of its own. The notes of what was done before the cut stand on the receipt of every stage."""
    own = Notes(list(notes.applied), list(notes.declined))
    compiled = compile_graph(part.graph, Options(), own, AFTER)
    state = {name: captured.state[name] for name in convention.state}
    return Optimized(compiled.graph, convention, compiled.program, compiled.receipt, state)


def _conventions(parts: Sequence[Part], whole: CallingConvention, graph: Graph) -> list[CallingConvention]:
    """The first stage is called as the model is, the last one returns what it does; between them are tuples of tensors."""
    named = dict(zip(graph.inputs[len(graph.inputs) - len(whole.state) :], whole.state))
    found: list[CallingConvention] = []
    for i, part in enumerate(parts):
        state = tuple(named[n] for n in part.state)
        names = tuple(n.hint for n in part.takes)
        takes = {"names": names, "arguments": ("leaf",) * len(names), "tensors": tuple(range(len(names)))} if i else {}
        count = len(part.graph.outputs)
        tree = {"kind": "tuple", "items": ["leaf"] * count}
        gives = {"result": tree, "outputs": tuple(range(count)), "constants": {}, "checks": ()} if i < len(parts) - 1 else {}
        found.append(replace(whole, state=state, **takes, **gives))
    return found


def _checked(model: Model, captured: CapturedModule, convention: CallingConvention, made: Sequence[Optimized], goal: Goal) -> ErrorCheck:
    """Of all stages together, by the rule for exact results, or by what rounding may cost."""
    own = [m.with_own_state() for m in made]
    found = error_check(
        apart(model, captured), captured, convention, lambda *a, **k: in_sequence(own, a, k), math.inf if goal.round_cut else None
    )
    if not goal.round_cut:
        return found
    if not found.ours <= goal.max_error:
        reason = f"with 8 bits for what crosses, results are off by {found.ours:.1e}, and {goal.max_error:.1e} is allowed"
        raise CannotOptimize(path=model.name, reason=reason)
    return replace(found, allowed=goal.max_error)


def _bytes(node: Node, graph: Graph) -> int:
    return hint(node.tensor.nbytes, graph.symbols)
