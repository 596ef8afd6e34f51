"""A split model as a pipeline of processes: each holds one stage, micro-batches go through, on `torch.distributed.pipelining`.

    torchrun --nproc-per-node 2 serve.py          rank 0: model.1.tw          rank 1: model.2.tw

    time       0    1    2    3    4
    stage 1    m1   m2   m3   m4
    stage 2         m1   m2   m3   m4             GPipe (Huang et al., 2019); for inference 1F1B is the same order

torch's schedules take our stage as their module: it is called with what crosses into it. They send and receive contiguous tensors of sizes
known beforehand, which a graph has. gloo serves CPUs, NCCL GPUs. Gradients do not go through: a compiled stage records none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ...ir.graph import Graph, Node
from ...ir.types import TensorType
from ..artifact import Optimized, load
from ..errors import UserError

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class CannotPipeline(UserError):
    template = "cannot run {name} as a stage of a pipeline: {reason}"


class _Module(torch.nn.Module):
    """A stage as torch's pipelining calls it: tensors in, a tuple of contiguous tensors out."""

    def __init__(self, stage: Optimized) -> None:
        super().__init__()
        self._stage = stage
        self._state = list(stage.state.values())

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.contiguous() for x in self._stage.program.run([*values, *self._state]))  # type: ignore[attr-defined]


class Pipeline:
    """The stage of this process, among those of a process group: calling it on every process runs the model.

    stage: of `Split.stages`, or loaded from its artifact; the one whose number is the rank. micro_batches: in how many a call is cut,
    along the first dimension: the stages are for one of them. An argument that has the size of one goes to all of them.
    """

    def __init__(self, stage: Optimized, micro_batches: int, schedule: str = "gpipe", group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._stage, self._micro_batches = stage, micro_batches
        takes = stage.graph.inputs[: len(stage.graph.inputs) - len(stage.state)]
        self._takes = [_sized(n, stage.graph) for n in takes]
        gives = [_sized(n, stage.graph) for n in stage.graph.outputs]
        if self.rank == self.count - 1 and any(not kind.rank for kind in gives):
            raise CannotPipeline(name=stage.graph.name, reason="it returns a number, which micro-batches cannot be joined to")
        device = torch.device(self._takes[0].device) if self._takes else torch.device("cpu")
        module = _Module(stage)
        torch_stage = PipelineStage(module, self.rank, self.count, device, _empty(self._takes), _empty(gives), group=group)
        self._schedule = SCHEDULES[schedule](torch_stage, micro_batches)

    @classmethod
    def load(cls, paths: Sequence[str | Path], micro_batches: int, schedule: str = "gpipe") -> Pipeline:
        """This process's stage, of the artifacts of all. Raises BadArtifact and CannotPipeline."""
        if len(paths) != dist.get_world_size():
            reason = f"there are {len(paths)} stages and {dist.get_world_size()} processes"
            raise CannotPipeline(name=str(paths[0]), reason=reason)
        return cls(load(paths[dist.get_rank()]), micro_batches, schedule)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the model, on the last process; None on the others. Only the first one reads the arguments."""
        with torch.no_grad():
            if self.rank:
                outputs = self._schedule.step()
            else:
                outputs = self._schedule.step(*self._whole(self._stage.convention.bind(args, kwargs)))
        return self._stage.convention.pack(outputs) if self.rank == self.count - 1 else None

    def _whole(self, flat: Sequence[Any]) -> list[torch.Tensor]:
        """The arguments with as many rows as all micro-batches have."""
        found: list[torch.Tensor] = []
        for value, kind, node in zip(flat, self._takes, self._stage.graph.inputs):
            rows = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None
            size, *rest = _sizes(kind) or (0,)
            if rows is None or rows not in (size, size * self._micro_batches) or list(value.shape[1:]) != rest:
                shown = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                reason = f"{node.hint} is {shown}, and {self._micro_batches} micro-batches take {kind} each"
                raise CannotPipeline(name=self._stage.graph.name, reason=reason)
            found.append(value if rows == size * self._micro_batches else torch.cat([value] * self._micro_batches))
        return found


def _sized(node: Node, graph: Graph) -> TensorType:
    kind = node.type
    if not isinstance(kind, TensorType) or not all(isinstance(d, int) for d in kind.shape):
        raise CannotPipeline(
            name=graph.name, reason=f"{node.hint or node.op.name} is {kind}; split the model with the sizes of a micro-batch"
        )
    return kind


def _empty(kinds: Sequence[TensorType]) -> tuple[torch.Tensor, ...]:
    """As torch wants to be told of tensors."""
    return tuple(torch.empty(_sizes(k), dtype=k.dtype, device="meta") for k in kinds)


def _sizes(kind: TensorType) -> tuple[int, ...]:
    return tuple(int(d) for d in kind.shape)  # type: ignore[arg-type]
