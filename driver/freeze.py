"""Freezing, in the torch.compile door: parameters and buffers that a graph only reads become its constants.

    graph(weight, x)                        graph(x)
      y = linear(x, weight)       -->         weight = constant "weight"      the module's own memory, not a copy
                                              y = linear(x, weight)

Dynamo passes parameters as inputs and checks their types only, so that equal layers share compiled code: what was frozen is compared
with what comes in on every call, and other tensors, or the same ones changed in place, are frozen anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch

from ..ir.analysis.memory import owners, views
from ..ir.capture.aot import CompiledGraph, Held
from ..ir.graph import Data, Graph, Node, is_scalar, order
from ..ir.ops import OPS
from ..ir.rewrite import rewrite
from ..ir.types import TensorType
from ..passes.base import Notes, Reason

MODELS = 64
"""So many modules share one compiled graph; for more, each would cost memory, and they run with their parameters as inputs."""
CHANGES = 4
"""So often are parameters that changed in place frozen anew; what changes all the time is no constant."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_version, _address = attrgetter("_version"), methodcaller("data_ptr")

CompileFrozen = Callable[[Graph, Notes, Held], CompiledGraph]


def freeze(graph: Graph, held: Held, compile_graph: CompileFrozen) -> CompiledGraph:
    """A function of the inputs of `graph` that runs it with those inputs in `held` that it only reads as constants.

    compile_graph gets the graph without those inputs, the notes that say what was frozen and what was not, and what is behind the
    inputs that are left.
    """
    kept = _kept(graph, held)
    places = tuple(i for i in held if i not in kept)
    if not places:
        return compile_graph(graph, _notes(graph, held, kept), held)
    return _Freezer(graph, places, compile_graph, kept).first(held)


def declined(graph: Graph, held: Held, reason: Reason) -> Notes:
    """Notes that say that nothing was frozen, and why."""
    notes = Notes()
    if held:
        notes.decline("freeze", f"{len(held)} parameters and buffers", reason, None, graph.name)
    return notes


def _kept(graph: Graph, held: Held) -> dict[int, Reason]:
    """Inputs that stay inputs, and why."""
    written = {target for target, _ in graph.writes}
    owned = owners(order(graph), views)
    returned = {owner.node for n in graph.roots if not is_scalar(n) for owner in owned[n]}
    reasons: dict[int, Reason] = {}
    for i, value in held.items():
        node = graph.inputs[i]
        if node in written:
            reasons[i] = Reason.WRITTEN
        elif node in returned:
            reasons[i] = Reason.RETURNED
        elif type(value) not in _PLAIN or not _same_shape(node, value):
            reasons[i] = Reason.SHAPE_MISMATCH
    return reasons


def _same_shape(node: Node, value: torch.Tensor) -> bool:
    return isinstance(node.type, TensorType) and node.shape == tuple(value.shape) and node.dtype == value.dtype


def _notes(graph: Graph, places: Sequence[int] | Mapping[int, Any], kept: Mapping[int, Reason]) -> Notes:
    notes = Notes()
    frozen = [i for i in places if i not in kept]
    if frozen:
        count = sum(int(graph.inputs[i].tensor.nbytes) for i in frozen)
        notes.apply("freeze", f"{len(frozen)} parameters and buffers ({count / 1e6:.1f} MB) are constants")
    for i, reason in kept.items():
        notes.decline("freeze", graph.inputs[i].hint, reason, graph.inputs[i])
    return notes


def with_constants(graph: Graph, values: Mapping[int, torch.Tensor]) -> Graph:
    """The graph with these inputs, by number, as constants that share the tensors' memory."""
    names: set[str] = set()
    constants: dict[Node, Node] = {}
    for i, value in values.items():
        node = graph.inputs[i]
        name = node.hint if node.hint not in names else f"{node.hint}.{i}"
        names.add(name)
        constants[node] = OPS["constant"](data=Data(name, value), type=node.type, hint=node.hint, prov=node.prov)

    def bind(node: Node, inputs: tuple[Node, ...]) -> Node | None:
        operands = tuple(constants.get(i, i) for i in inputs)
        return node.with_inputs(operands) if operands != inputs else None

    rest = tuple(n for n in graph.inputs if n not in constants)
    return replace(rewrite(graph, bind), inputs=rest)


@dataclass(frozen=True)
class _Frozen:
    """A compiled graph, the tensors that are its constants, and their contents then."""

    run: CompiledGraph
    tensors: tuple[torch.Tensor, ...]
    contents: tuple[int, ...]

    def holds(self, tensors: tuple[Any, ...]) -> bool:
        return all(map(is_, tensors, self.tensors)) and contents(tensors) == self.contents


def contents(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Where each has its memory and how often it was written in place (tensors of inference mode do not say): other numbers, other
    contents. What is written through `.data` or by numpy goes unseen."""
    try:
        return (*map(_address, tensors), *map(_version, tensors))
    except RuntimeError:
        return (*map(_address, tensors), *(-1 if t.is_inference() else t._version for t in tensors))


class _Freezer:
    """One captured graph, frozen for each set of tensors that comes in its inputs `places`."""

    def __init__(self, graph: Graph, places: tuple[int, ...], compile_graph: CompileFrozen, kept: Mapping[int, Reason]) -> None:
        self._graph, self._places, self._compile, self._kept = graph, places, compile_graph, kept
        self._frozen: list[_Frozen] = []
        self._changes = 0
        self._open: CompiledGraph | None = None  # with parameters as inputs
        self._lock = threading.Lock()
        rest = tuple(i for i in range(len(graph.inputs)) if i not in places)
        self._constants, self._live = _getter(places), _getter(rest)

    def first(self, held: Held) -> CompiledGraph:
        made = self._made(tuple(held[i] for i in self._places))
        self._frozen.append(made)
        return self._run

    def _run(self, inputs: list[Any]) -> Sequence[Any]:
        tensors = self._constants(inputs)
        found = next((f for f in self._frozen if f.holds(tensors)), None) or self._other(tensors)
        if found is None:
            assert self._open is not None
            return self._open(inputs)
        live = list(self._live(inputs))
        inputs.clear()
        return found.run(live)

    def _other(self, tensors: tuple[torch.Tensor, ...]) -> _Frozen | None:
        """Frozen for tensors that were not seen before, or None: run with all inputs."""
        with self._lock:
            found = next((f for f in self._frozen if f.holds(tensors)), None)
            if found is not None or self._open is not None:
                return found
            stale = [f for f in self._frozen if all(map(is_, tensors, f.tensors))]
            self._changes += len(stale)
            if self._changes > CHANGES or len(self._frozen) >= MODELS:
                reason = Reason.CHANGES if self._changes > CHANGES else Reason.MEMORY
                self._open = self._compile(
                    self._graph, declined(self._graph, dict(enumerate(tensors)), reason), dict(zip(self._places, tensors))
                )
                self._frozen = [f for f in self._frozen if f not in stale]
                return None
            made = self._made(tensors)
            self._frozen = [*(f for f in self._frozen if f not in stale), made]
            return made

    def _made(self, tensors: tuple[torch.Tensor, ...]) -> _Frozen:
        seen = contents(tensors)
        graph = with_constants(self._graph, dict(zip(self._places, tensors)))
        run = self._compile(graph, _notes(self._graph, self._places, self._kept), {})
        addresses = contents(tensors)[: len(tensors)]  # offloading moves them
        return _Frozen(run, tensors, addresses + seen[len(tensors) :])


def _getter(places: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """The items at these places, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda items: tuple(items[i] for i in places)
