"""Models that torch has placed on a mesh, and plans for it: what `torch.distributed.tensor` says of weights, and `shard` takes or gives.

parallelize_module(model, mesh, plan)     model.up.weight: DTensor, Shard(0)      whole(model).up.weight: all of it, on every process
shard(model, args, plan=plan)             made.placements: {"up.weight": Shard(0), "down.weight": Shard(1), ...}
"""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from ...ir.graph import Graph, constants
from ...passes.shard_linears import made_from
from ..errors import UserError

DIMENSIONS: Mapping[type[ParallelStyle], int] = {ColwiseParallel: 0, RowwiseParallel: 1}
"""Style -> the dimension that a linear's weight is cut in."""

TORCHS = "torch.distributed."
"""Where the hooks are defined that torch gives to modules it has placed."""


class CannotShard(UserError):
    template = "cannot share out {name}: {reason}"


def whole(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights as they were before torch placed them on a mesh: all of them on every process, and no hooks of torch's.

    To be called by all processes of the mesh. A module that was not placed is returned itself. Raises CannotShard.
    """
    fully = next((name for name, m in module.named_modules() if isinstance(m, FSDPModule)), None)
    if fully is not None:
        reason = "fully_shard has taken it over; give the module as it was before"
        raise CannotShard(name=fully or type(module).__name__, reason=reason)
    placed = {name: t for name, t in chain(module.named_parameters(), module.named_buffers()) if isinstance(t, DTensor)}
    if not placed:
        return module
    gathered = {id(t): _gathered(t) for t in placed.values()}
    made = copy.deepcopy(module, {**{id(p): p for p in module.parameters()}, **gathered})
    for part in made.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith(TORCHS)]:
                del hooks[key]
    return made


def _gathered(value: DTensor) -> torch.Tensor:
    with torch.no_grad():
        found = value.full_tensor()
    return torch.nn.Parameter(found, requires_grad=False) if isinstance(value, torch.nn.Parameter) else found


def placements_of(graph: Graph, cut: Mapping[str, int | None], weights: Collection[str]) -> dict[str, Placement]:
    """Where the constants of a graph lie, by their cuts. weights: the module's names, which stand for what was made from them."""
    parts = {name.split("[")[0] for name in cut}
    stretches = {name: Shard(dim) for name, dim in cut.items() if dim is not None}
    found = {name: Replicate() for name in constants(graph) if name not in parts} | stretches
    origins = {name: max((w for w in weights if made_from(name.split("[")[0], w)), key=len, default=name) for name in found}
    several = Counter(origins.values())
    return {origins[name] if several[origins[name]] == 1 else name: placement for name, placement in found.items()}


class Plan:
    """Which linears of a module are to be shared out, and how, in the words of `parallelize_module`: "layers.*.up" -> ColwiseParallel().

    Layouts that a style asks for are not heeded: between two linears values stay in shards, and elsewhere they are whole.
    """

    def __init__(self, module: torch.nn.Module, styles: Mapping[str, ParallelStyle]) -> None:
        self.dims: dict[str, int] = {}
        """Name of a weight -> the dimension that it is to be cut in."""
        modules = dict(module.named_modules())
        for pattern, style in styles.items():
            found = [name for name in modules if _matches(name, pattern)]
            if not found:
                raise CannotShard(name=pattern, reason="the model has no such module")
            for name in found:
                self.dims[f"{name}.weight"] = _dimension(name, modules[name], style)

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(self.dims)

    def require(self, placements: Mapping[str, Placement], why: Sequence[str]) -> None:
        """Raises CannotShard where something lies elsewhere than it was asked to. why: what stays whole, in words."""
        for weight, dim in self.dims.items():
            found = {p for name, p in placements.items() if made_from(name.split("[")[0], weight)}
            if Shard(dim) not in found:
                reason = "; ".join(why) or "no linear goes with it whose result needs no shards"
                raise CannotShard(name=weight, reason=f"it cannot be {Shard(dim)!r}: {reason}")


def _matches(name: str, pattern: str) -> bool:
    """As torch has it: a star stands for something between two dots."""
    atoms, wanted = name.split("."), pattern.split(".")
    return len(atoms) == len(wanted) and all(map(fnmatch.fnmatchcase, atoms, wanted))


def _dimension(name: str, module: torch.nn.Module, style: ParallelStyle) -> int:
    if not isinstance(module, torch.nn.Linear):
        raise CannotShard(name=name, reason=f"it is a {type(module).__name__}, and linears are shared out")
    if type(style) not in DIMENSIONS:
        known = " and ".join(kind.__name__ for kind in DIMENSIONS)
        raise CannotShard(name=name, reason=f"{type(style).__name__} is none of the styles that linears have here, {known}")
    return DIMENSIONS[type(style)]
