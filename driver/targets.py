"""`optimize --target sm_90`: a model compiled for a GPU that is not here.

capture, on the CPU  -->  passes that compute with weights  -->  the same graph on "cuda:0"  -->  the other passes  -->  binaries

What is compiled is the graph as it is read from the artifact: there every kernel is printed again, and found by its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..codegen.code import Code
from ..codegen.program import Listing, devices_of, list_program
from ..codegen.triton.binary import SHARED_BYTES, Binary
from ..codegen.triton.installed import needed, unusable
from ..ir.graph import Graph, Stage, constants
from ..ir.interpret import interpret
from ..ir.retarget import retarget
from ..ir.text import parse
from ..passes.base import Notes, Pass
from ..search.database import Database
from ..search.gpus import of_target
from .calling import CallingConvention
from .compile import Options, rewritten
from .errors import CannotOptimize, NoTriton, UnknownTarget
from .inputs import copied
from .native_code import remember
from .pipeline import DEFAULT_PASSES
from .receipt import Receipt, make_receipt
from .trust import all_nodes

DEVICE = "cuda:0"

COMPUTING = frozenset({"fold-constants", "recognize", "fold-norms", "merge-linears"})
"""Passes that read or compute values of weights, which are on the CPU."""

CPU_ONLY = re.compile(r"mkldnn|onednn|_cpu\b")
"""In names of operators: those that torch has for CPUs only, into which it decomposes what it captures on one."""

UNMEASURED = (
    "speed, and that it is not slower than eager: it was compiled without running it",
    "error of the kernels: that of the rewritten graph was measured, op by op on the CPU",
)

FORETOLD = "times that the budget was kept by: those of the cost model"


@dataclass(frozen=True)
class CompiledFor:
    """graph: after all passes, on DEVICE; program: to read; code: the binaries."""

    graph: Graph
    program: Listing
    receipt: Receipt
    code: Code[Binary]


def require_target(name: str) -> None:
    """Raises UnknownTarget, and NoTriton where what compiles for targets is missing or too old."""
    if name not in SHARED_BYTES:
        raise UnknownTarget(target=name, known=", ".join(SHARED_BYTES))
    if found := unusable():
        raise NoTriton(target=name, reason=needed(found))


def require_portable(model: str, graph: Graph, target: str) -> None:
    """The graph must have been captured on the CPU, and do nothing that only a CPU can. Raises CannotOptimize."""
    elsewhere = next((d for d in devices_of(graph) if d != "cpu"), None)
    if elsewhere is not None:
        raise CannotOptimize(path=f"{model} for {target}", reason=f"it is on {elsewhere}; with a target, models are read on the CPU")
    names = [node.attrs["target"] for node in all_nodes(graph) if node.op.name == "extern"]
    stays = next((name for name in names if CPU_ONLY.search(name)), None)
    if stays is not None:
        raise CannotOptimize(path=f"{model} for {target}", reason=f"torch runs {stays}, which is part of it, on CPUs only")


def compile_for(
    graph: Graph, target: str, passes: Sequence[Pass] = DEFAULT_PASSES, seconds: float = 0.0, notes: Notes | None = None
) -> CompiledFor:
    """Rewrites a graph that was captured on the CPU for a GPU, and compiles its kernels. notes: what was done to the graph before.

    A kernel that cannot be compiled is run by eager there. The receipt has no times: equal models give equal artifacts.
    seconds: for compiling kernels under other schedules than those that templates start from (`search.schedules.by_facts`).
    """
    from ..codegen.triton.cross import cross_target
    from ..search.schedules import by_facts, with_schedules

    notes, binaries = notes or Notes(), dict[str, Binary]()
    fused = rewritten(graph, Options(), retargeted(passes), notes, {})
    weights = {name: data.value for name, data in constants(fused).items() if data.value is not None}
    graph = parse(str(fused), weights)
    found = by_facts(graph, of_target(target), seconds, Database())
    graph = with_schedules(graph, found.schedules)
    program = list_program(graph, {torch.device(DEVICE).type: cross_target(target, binaries)})
    program.seconds.clear()
    code = Code(target, dict(sorted(binaries.items())))
    remember(code)
    receipt = replace(make_receipt(program, notes, {}), schedules=tuple(found.lines))
    return CompiledFor(graph, program, receipt, code)


def retargeted(passes: Sequence[Pass]) -> list[Pass]:
    """The passes, with the graph moved to the device behind the last that computes with weights: what follows decides for that device."""
    last = max((i for i, item in enumerate(passes, 1) if item.name in COMPUTING), default=0)
    return [*passes[:last], Retarget(), *passes[last:]]


@dataclass(frozen=True)
class Retarget(Pass):
    """The same graph on DEVICE. It is no pass of `--passes`: a target puts it where it belongs.

    y = relu(x) : f32[8]    -->    y = relu(x) : f32[8]@cuda:0
    """

    name: ClassVar[str] = "retarget"
    needs: ClassVar[Stage] = Stage.CAPTURED

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        return retarget(graph, DEVICE)


def interpreted(graph: Graph, convention: CallingConvention, state: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    """The rewritten graph, op by op on the CPU, called as the model is."""
    here = retarget(graph, "cpu")

    def run(*args: Any, **kwargs: Any) -> Any:
        flat = copied(convention.bind(args, kwargs)) + [state[name].clone() for name in convention.state]
        with torch.no_grad():
            return convention.pack(interpret(here, flat))

    return run
