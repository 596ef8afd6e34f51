"""A model shared out over processes, each of which holds a part of the weights of every layer (`passes/shard_linears.py`).

torchrun --nproc-per-node 2 serve.py        both processes:    model = shard(module, args); model(*args)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ...passes.base import Notes
from ...passes.manager import run_passes
from ...passes.scatter_norms import ScatterNorms
from ...passes.shard_linears import ShardLinears
from ..artifact import Optimized
from ..compile import Options, compile_graph
from ..inputs import Example
from ..loading import captured_of, export_module
from ..measure import apart, convention_for, error_check
from ..split import AFTER, BEFORE


def shard(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    scatter: bool = True,
) -> Optimized:
    """This process's part of a module, called with example arguments. All processes of the group make it, and call it, at the same time,
    with the same arguments; each has the whole result. scatter: norms of sums are computed by one process for each token
    (`passes/scatter_norms.py`). Checked against float64; raises CannotOptimize.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    model = export_module(type(module).__name__, module, Example(tuple(args), dict(kwargs or {})))
    captured, notes = captured_of(model), Notes()
    convention = convention_for(model, captured)
    with torch.no_grad():
        whole = run_passes(captured.graph, BEFORE, notes)
        place = rank, count, (group or dist.group.WORLD).group_name  # type: ignore[union-attr]
        mine = run_passes(whole, (ShardLinears(*place), *((ScatterNorms(*place),) if scatter else ())), notes)
    compiled = compile_graph(mine, Options(), notes, AFTER)
    made = Optimized(compiled.graph, convention, compiled.program, compiled.receipt, captured.state)
    error = error_check(apart(model, captured), captured, convention, made.with_own_state())
    return replace(made, receipt=replace(made.receipt, error=error))
