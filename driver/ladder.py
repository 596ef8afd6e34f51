"""All states between a captured graph and what runs, one step apart: what `bisect` searches.

0  the captured graph, op by op       + 1 for each step of the passes (entering one, and every rewrite)
then the program around the kernels   + 1 for each kernel, in place of its ops
then all kernels                      + 1 for each value that plan-memory puts in the arena
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..codegen.kernel import Kernel
from ..codegen.program import compile_program
from ..codegen.regions import lowered_regions
from ..codegen.target import TARGETS, Compiled, Failed, Target
from ..ir.graph import Graph, Node
from ..passes.base import Notes, Pass, Step, Steps
from ..passes.manager import StageError, run_passes
from ..passes.plan_memory import PlanMemory
from .compile import kept_apart
from .reproduce import interpreted, observed

CODEGEN = "code generation"
HOST = Step(CODEGEN, "", "what is called around the kernels")


class Ladder:
    """The states of a graph under some passes. `steps[i]` leads from state i to state i + 1.

    Where a pass raises, the steps end there; `failure` says why. Raises StageError.
    """

    def __init__(self, graph: Graph, passes: Sequence[Pass]) -> None:
        self.graph = graph
        self.failure: Exception | None = None
        planning = bool(passes) and isinstance(passes[-1], PlanMemory)  # it moves no number, only where they lie
        self.rewriting, self.planning = (passes[:-1], passes[-1:]) if planning else (passes, ())
        rewrites, self.fused = self._run(graph, self.rewriting)
        self.kernels: list[tuple[Kernel, list[Node]]] = []
        kernels, plan = list[Step](), list[Step]()
        if self.failure is None:
            self.kernels = [(k, nodes) for k, nodes in lowered_regions(self.fused, TARGETS) if isinstance(k, Kernel)]
            kernels = [HOST, *(Step(CODEGEN, k.name, k.label or "a kernel", nodes[0].prov.source) for k, nodes in self.kernels)]
            plan, _ = self._run(self.fused, self.planning)
        self.steps = (*rewrites, *kernels, *plan)
        self.rewrites, self.plan_from = len(rewrites), len(rewrites) + len(kernels)

    def _run(self, graph: Graph, passes: Sequence[Pass]) -> tuple[list[Step], Graph]:
        """The steps, and the graph behind them; or what has been done when it failed."""
        steps = Steps()
        try:
            return steps.taken, run_passes(graph, passes, Notes(steps=steps))
        except StageError:  # the user's order of passes
            raise
        except Exception as error:  # whatever a wrong rewrite leads to: the search finds which it was
            self.failure = error
            return steps.taken, graph

    def rewritten(self, state: int) -> tuple[Graph, Node | None]:
        """The graph in a state before code generation, and where the next step would be taken."""
        steps = Steps(state)
        return run_passes(self.graph, self.rewriting, Notes(steps=steps)), steps.node

    def planned(self, state: int) -> tuple[Graph, Node | None]:
        """The same for a state behind the kernels."""
        steps = Steps(state - self.plan_from)
        return run_passes(self.fused, self.planning, Notes(steps=steps)), steps.node

    def entry(self, state: int) -> int:
        """The state from which the pass runs whose step leads to this one."""
        return max(i for i in range(state) if not self.steps[i].rule)

    def observed(self, state: int, inputs: Sequence[Any]) -> list[Any]:
        """What a call leaves behind in a state. Raises whatever goes wrong."""
        if state <= self.rewrites:
            return interpreted(self.rewritten(state)[0], inputs)
        if state < self.plan_from:
            names = {kernel.name for kernel, _ in self.kernels[: state - self.rewrites - 1]}
            program = compile_program(self.fused, {device: _limited(target, names) for device, target in TARGETS.items()})
        else:
            program = compile_program(kept_apart(self.graph, self.planned(state)[0]))
        return observed(self.graph, program, inputs)


def _limited(target: Target, names: set[str]) -> Target:
    """The target for kernels of these names only; what others compute is run op by op."""

    def compile(kernels: Sequence[Kernel], device: str) -> list[Compiled | Failed]:
        chosen = [k for k in kernels if k.name in names]
        made: Mapping[str, Compiled | Failed] = dict(zip([k.name for k in chosen], target.compile(chosen, device) if chosen else ()))
        return [made.get(k.name, Failed(k, "left out")) for k in kernels]

    return Target(target.name, compile)
