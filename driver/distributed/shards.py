"""A model shared out over processes, each of which holds a part of the weights of every layer (`passes/shard_linears.py`).

torchrun --nproc-per-node 2 serve.py        both processes:    model = shard(module, args); model(*args)

Where sums over processes take long enough, they are hidden behind computing: the graph in two parts (`passes/split_batch.py`), if the
simulator foretells a gain (`search/simulate.py`). What it found is on the receipt, either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ...ir.graph import Graph
from ...ir.reasons import Reason
from ...passes.base import Notes
from ...passes.canonicalize import Canonicalize
from ...passes.manager import run_passes
from ...passes.quantize import Plan as Formats
from ...passes.quantize import Quantize
from ...passes.scatter_norms import ScatterNorms
from ...passes.shard_linears import ShardLinears, Shared
from ...search.simulate import LEAST_GAIN, Cluster, in_two
from ..artifact import Optimized
from ..compile import Compiled, Options, compile_graph
from ..errors import CannotOptimize
from ..goal import ROUNDED_ERROR
from ..inputs import Example
from ..loading import captured_of, evaluating, export_module
from ..measure import apart, convention_for, error_check
from ..split import AFTER, BEFORE
from .placements import Plan, placements_of, whole
from .rates import call_seconds, cluster_of, may_pay


@dataclass(frozen=True)
class Sharded(Optimized):
    """placements: of each weight, in the words of `torch.distributed.tensor`: `Shard(0)` is a stretch of its rows for each process. By the
    module's names for them; where a weight became several (integers and scales; q, k and v), each has a name of its own."""

    placements: Mapping[str, Placement] = field(default_factory=dict)


@evaluating
def shard(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    scatter: bool = True,
    *,
    plan: Mapping[str, ParallelStyle] | None = None,
    formats: str = "",
    max_error: float = ROUNDED_ERROR,
    cluster: Cluster | None = None,
) -> Sharded:
    """This process's part of a module, called with example arguments. All processes of the group make it, and call it, at the same time,
    with the same arguments; each has the whole result. Its weights may be DTensors, which are made whole first.

    scatter: norms of sums are computed by one process for each token (`passes/scatter_norms.py`). plan: which linears are shared out, and
    how, as `parallelize_module` takes it; without one all are that can be. formats: of weights, as the pass quantize takes them ("*:int8"),
    within `max_error` of the result. cluster: how fast processes and links are, to tell whether two parts gain; None is measured where
    that could matter. Checked against float64; raises CannotShard and CannotOptimize.
    """
    name, asked = type(module).__name__, Plan(module, plan) if plan else None
    model = export_module(name, whole(module), Example(tuple(args), dict(kwargs or {})))
    captured, notes = captured_of(model), Notes()
    convention = convention_for(model, captured)
    processes = _Processes(group, scatter)
    with torch.no_grad():
        graph = run_passes(captured.graph, BEFORE, notes)
        if formats:
            graph = run_passes(graph, (Quantize(Formats.parse(formats)), Canonicalize()), notes)
        shared = processes.shared(graph, asked, notes)
        placements = placements_of(graph, shared.cut, model.program.state_dict)
        if asked is not None:
            asked.require(placements, [f"{d.what} is read whole by {d.value}" for d in notes.declined if d.rule == ShardLinears.name])
        mine = processes.finished(shared.graph, cluster, notes)
    compiled = _compiled(mine, notes)
    made = Sharded(compiled.graph, convention, compiled.program, compiled.receipt, captured.state, placements=placements)
    error = error_check(apart(model, captured), captured, convention, made.with_own_state(), math.inf if formats else None)
    if formats and not error.ours <= max_error:
        reason = f"with weights in {formats}, results are off by {error.ours:.1e}, and {max_error:.1e} is allowed"
        raise CannotOptimize(path=name, reason=reason)
    allowed = replace(error, allowed=max_error) if formats else error
    return replace(made, receipt=replace(made.receipt, error=allowed))


def _compiled(graph: Graph, notes: Notes) -> Compiled:
    return compile_graph(graph, Options(), notes, AFTER)


class _Processes:
    """Those of a group, of which this is one."""

    def __init__(self, group: dist.ProcessGroup | None, scatter: bool) -> None:
        self.group, self.scatter = group, scatter
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.name: str = (group or dist.group.WORLD).group_name  # type: ignore[union-attr]

    def shared(self, graph: Graph, asked: Plan | None, notes: Notes) -> Shared:
        if self.count < 2:
            notes.decline(ShardLinears.name, graph.name, Reason.NO_GAIN, value="one process has it all")
            return Shared(graph)
        return ShardLinears(self.rank, self.count, self.name, () if asked is None else asked.weights).shared_out(graph, notes)

    def finished(self, graph: Graph, cluster: Cluster | None, notes: Notes) -> Graph:
        """In two parts whose sums are under way while the other one is computed; or with norms scattered; or as it is."""
        split = self._in_two(graph, cluster, notes)
        if split is not None:
            return split
        return run_passes(graph, (ScatterNorms(self.rank, self.count, self.name),), notes) if self.scatter else graph

    def _in_two(self, graph: Graph, cluster: Cluster | None, notes: Notes) -> Graph | None:
        known = cluster is not None or not may_pay(graph, self.count)
        seconds = math.inf if known else self._seconds(graph)
        rates = cluster or Cluster(self.count, 1.0) if known else cluster_of(graph, seconds, self.group)
        for item, foretold in in_two(graph, replace(rates, devices=self.count), notes):
            own = Notes()
            split = item.run(graph, own)
            notes.declined += own.declined
            if split is graph:
                continue
            took = 0.0 if known else self._seconds(split)
            if took < seconds * (1 - LEAST_GAIN):
                notes.applied += own.applied
                notes.apply(item.name, f"two parts are foretold to take {foretold.seconds / foretold.whole:.2f} of the time")
                return split
            notes.decline(item.name, graph.name, Reason.NO_GAIN, value=f"measured, two parts take {took / seconds:.2f} of the time")
        return None

    def _seconds(self, graph: Graph) -> float:
        return call_seconds(graph, _compiled(graph, Notes()).program.run, self.group)
