"""Where a model within a budget will run, and its times there: measured on this machine, or by the cost model for a GPU elsewhere."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.capture import CapturedModule
from ..ir.dims import SymbolRange
from ..ir.graph import Graph
from ..ir.interpret import bind_sizes, interpret
from ..ir.retarget import retarget
from ..passes.base import Notes, Pass
from ..passes.layers import Layer
from ..search.database import Database
from ..search.gpus import of_target
from ..search.layer_times import foretold_times, layer_times
from ..search.sensitivity import Progress
from .activations import Finishing, unlimited
from .artifact import Optimized
from .calling import CallingConvention
from .compile import Options, compile_graph, rewritten
from .loading import Model
from .measure import apart, flat_example, timed, with_speed
from .memory import constant_bytes
from .packing import with_packing
from .padding import WithoutPadding
from .pipeline import FINISHING, PREPARING
from .targets import compile_for, retargeted

Run = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Made:
    """A candidate. nbytes: of its constants; run: of flat inputs, as near to its kernels as this machine can; seconds: of a call, and
    those of the exact model beside it, with the noise of the comparison; finished: what is returned of it. unpadded: what runs calls with
    padding, if something does.
    """

    nbytes: int
    run: Run
    seconds: float
    exact_seconds: float
    noise: float
    finished: Callable[[], Optimized]
    unpadded: WithoutPadding | None = None


class Place(ABC):
    """measured: whether times are."""

    measured: bool

    @abstractmethod
    def layer_times(
        self, graph: Graph, layers: Sequence[Layer], formats: Sequence[str], database: Database, progress: Progress
    ) -> dict[tuple[str, str], float]:
        """(layer, format) -> seconds. graph: canonical, with the layers in it."""

    @abstractmethod
    def exact_times(self) -> tuple[float, float]:
        """Seconds of a call of the exact model as `optimize` makes it, and of what a share of latency is of."""

    @abstractmethod
    def made(self, quantized: Graph, notes: Notes, seconds: Mapping[str, float]) -> Made:
        """A canonical graph in its formats, built. seconds: of each pass so far. Raises TooManyActivations."""

    @abstractmethod
    def exact(self) -> Optimized:
        """The model without formats."""


class Here(Place):
    """This machine. exact: the model as `optimize` makes it without a budget. finishing: the passes behind formats. remove_padding: there
    is to be a program beside a candidate that leaves padding out.
    """

    measured = True

    def __init__(
        self, model: Model, captured: CapturedModule, exact: Optimized, finishing: Finishing = unlimited, remove_padding: bool = False
    ) -> None:
        self._model, self._captured, self._exact = model, captured, exact
        self._finishing, self._remove_padding = finishing, remove_padding
        inputs = flat_example(model, captured, exact.convention)
        self._sizes = bind_sizes(captured.graph, inputs)
        self._share = 1.0 if exact.unpadded is None else exact.unpadded.share(inputs)

    def layer_times(
        self, graph: Graph, layers: Sequence[Layer], formats: Sequence[str], database: Database, progress: Progress
    ) -> dict[tuple[str, str], float]:
        sizes = {name: SymbolRange(n, n) for name, n in self._sizes.items()}
        found = layer_times(layers, formats, _runner, database, progress, sizes)
        return {which: self._share * seconds for which, seconds in found.items()}  # of the tokens that a call computes

    def exact_times(self) -> tuple[float, float]:
        timings = timed(apart(self._model, self._captured), ours=self._exact).timings
        return timings["ours"].seconds, timings["eager"].seconds

    def made(self, quantized: Graph, notes: Notes, seconds: Mapping[str, float]) -> Made:
        compiled = compile_graph(quantized, Options(), notes, self._finishing(quantized), before=seconds)
        made = Optimized(compiled.graph, self._exact.convention, compiled.program, compiled.receipt, self._captured.state)
        if self._remove_padding:
            made = with_packing(self._model, self._captured, made, True, quantized)
        verdict = timed(apart(self._model, self._captured), ours=made, exact=self._exact)
        ours, exact = verdict.timings["ours"].seconds, verdict.timings["exact"]
        nbytes = constant_bytes(made.graph)
        if made.unpadded is not None:
            nbytes += constant_bytes(made.unpadded.plan.graph, beside=made.graph)
        finished = functools.partial(with_speed, made, verdict, "ours")
        return Made(nbytes, compiled.program.run, ours, exact.seconds, exact.noise, finished, made.unpadded)

    def exact(self) -> Optimized:
        return self._exact


def _runner(graph: Graph) -> Callable[[list[Any]], Any]:
    return compile_graph(graph, Options(), Notes(), FINISHING).program.run


class Elsewhere(Place):
    """A GPU of a target. tuning_seconds: for compiling kernels of what is returned under other schedules."""

    measured = False

    def __init__(self, target: str, model: Model, captured: CapturedModule, convention: CallingConvention, tuning_seconds: float) -> None:
        self._target, self._captured, self._convention, self._tuning_seconds = target, captured, convention, tuning_seconds
        sizes = bind_sizes(captured.graph, flat_example(model, captured, convention))
        self._foretold = _foretold(target, tuning_seconds > 0, sizes)
        self._exact_seconds = 0.0

    def layer_times(
        self, graph: Graph, layers: Sequence[Layer], formats: Sequence[str], database: Database, progress: Progress
    ) -> dict[tuple[str, str], float]:
        return foretold_times(graph, layers, formats, lambda graph: self._foretold(self._fused(graph)), progress)

    def exact_times(self) -> tuple[float, float]:
        self._exact_seconds = self._foretold(self._fused(self._captured.graph, PREPARING))
        return self._exact_seconds, self._exact_seconds

    def made(self, quantized: Graph, notes: Notes, seconds: Mapping[str, float]) -> Made:
        graph = self._fused(quantized)
        here = retarget(graph, "cpu")

        def run(flat: list[Any]) -> list[Any]:
            with torch.no_grad():
                return interpret(here, flat)

        finished = functools.partial(self._compiled, quantized, FINISHING, notes)
        return Made(constant_bytes(graph), run, self._foretold(graph), self._exact_seconds, 0.0, finished)

    def exact(self) -> Optimized:
        return self._compiled(self._captured.graph, (*PREPARING, *FINISHING), Notes())

    def _fused(self, graph: Graph, before: Sequence[Pass] = ()) -> Graph:
        return rewritten(graph, Options(), retargeted((*before, *FINISHING)), Notes(), {})

    def _compiled(self, graph: Graph, passes: Sequence[Pass], notes: Notes) -> Optimized:
        made = compile_for(graph, self._target, passes, self._tuning_seconds, notes)
        return Optimized(made.graph, self._convention, made.program, made.receipt, self._captured.state, made.code)


def _foretold(target: str, searched: bool, sizes: Mapping[str, int]) -> Callable[[Graph], float]:
    from ..search.foretold import Foretold  # Triton need not be there where no target is

    return Foretold(of_target(target), searched, sizes)
