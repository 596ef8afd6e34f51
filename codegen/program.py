"""`compile_program(graph) -> Program`: a fused graph made runnable: kernels for its regions, and the host program around them."""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..ir.analysis.memory import may_share
from ..ir.dims import Dim, dim, hint
from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, is_scalar, order
from ..ir.op import Category
from ..ir.ops.views import laid_out
from ..ir.types import ScalarType, TensorType
from .arena import Arena, finish, per_stream, slot
from .host import Host, Scope, Value
from .pool import empty
from .regions import Built, KernelInfo, build_regions, cost, covered, emit_region
from .steps import emit_call, emit_constant, emit_view, is_library_call
from .target import TARGETS, Target
from .updates import Given, NativeRows, emit_finished, emit_targets, emit_update, native_rows


@dataclass(frozen=True)
class Fallback:
    """Something that runs by torch's own ops, one by one: node, the user's source line, how many ops, and why."""

    node: str
    source: str
    reason: str
    nodes: int = 1
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class LibraryCall:
    """A product, convolution, pooling, attention or scatter that is scheduled onto torch's library."""

    node: str
    source: str
    flops: int = 0
    bytes: int = 0


class CompiledElsewhere(TilewrightError):
    """What was compiled for another machine was called on this one."""

    template = "{name} was compiled for another machine: save it, and load it there"


class Listing:
    """What a graph became, to read: a program for another machine.

    source: the kernels and the host program as text. copies: values that are laid out anew if they do not come row-major,
    or not where a GPU's kernels can read them.
    seconds: time spent in "lower" and "compile".
    """

    def __init__(self, graph: Graph, host: Host, source: str, built: Built) -> None:
        self.name = graph.name
        self.kernels: list[KernelInfo] = built.kernels
        self.source = "\n\n".join([*(k.text for k in built.kernels), source])
        self.fallbacks, self.library = _runs(graph, built)
        self.copies = tuple(host.copies)
        self.arena_bytes: Dim = arena_bytes(graph)
        self.seconds = dict(built.seconds)

    def run(self, inputs: list[Any]) -> list[Any]:
        """Raises CompiledElsewhere."""
        raise CompiledElsewhere(name=self.name)


class Program(Listing):
    """A compiled graph: `program(inputs)` returns the outputs, in the graph's order; written-back inputs hold their new value.

    Safe to call from several threads at once: each call takes an arena of its own. Runs without recording gradients.
    """

    def __init__(self, graph: Graph, host: Host, source: str, built: Built) -> None:
        super().__init__(graph, host, source, built)
        self._device = next((n.tensor.device for n in graph.arena), "cpu")
        self._arenas: list[Arena] = []
        self._arenas_of_streams = per_stream(devices_of(graph))
        names = host.names
        filename = f"<tilewright {graph.name} {id(self):x}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        weakref.finalize(self, linecache.cache.pop, filename, None)
        exec(compile(source, filename, "exec"), names)  # our own text; nothing of the user's is in it but sanitised names
        finish(devices_of(graph))
        # out of their globals: else they would hold each other, and weights would outlive the program until Python looks for cycles
        self._call: Callable[..., list[Any]] = names.pop("call")
        self._sizes: Callable[[Sequence[Any]], tuple[int, ...]] = names.pop("sizes")
        self._nbytes: Callable[..., int] = names.pop("nbytes")
        self._prepare: Callable[..., tuple[Any, ...]] = names.pop("prepare")

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs for `inputs` (tensors; ints for sizes), in the order of the graph's inputs."""
        return self.run(list(inputs))

    def run(self, inputs: list[Any]) -> list[Any]:
        """As calling, but empties `inputs`, so that each can be freed after its last use."""
        if torch._C._is_any_autocast_enabled():
            with torch._C._DisableAutocast():
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: list[Any]) -> list[Any]:
        recording = torch.is_grad_enabled()
        if recording:
            torch._C._set_grad_enabled(False)  # torch.no_grad() takes five times as long
        try:
            sizes = self._sizes(inputs)
            free = self._arenas if self._arenas_of_streams is None else self._arenas_of_streams()
            try:
                arena = free.pop()
            except IndexError:  # every arena is in use by another call
                arena = Arena(self._device)
            try:
                return self._call(inputs, arena.frame(sizes, self._nbytes, self._prepare), *sizes)
            finally:
                free.append(arena)
        finally:
            if recording:
                torch._C._set_grad_enabled(True)


def compile_program(graph: Graph, targets: Mapping[str, Target] = TARGETS) -> Program:
    """Makes a graph runnable. Regions of a device that has no target, and those that cannot be compiled, run op by op.

    The graph may be at any stage: what is in no region runs by the library or by `eager`.
    """
    return Program(graph, *_emitted(graph, targets))


def list_program(graph: Graph, targets: Mapping[str, Target]) -> Listing:
    """The same for a machine with other devices than this one: compiled, and not made runnable."""
    return Listing(graph, *_emitted(graph, targets))


def _emitted(graph: Graph, targets: Mapping[str, Target]) -> tuple[Host, str, Built]:
    built = build_regions(graph, targets)
    host = Host(graph)
    host.names.update(empty=empty, slot=slot, dense=dense, strided=strided, aligned=aligned, laid_out=laid_out)
    _emit_inputs(host)
    rows = native_rows(graph, built)
    given = emit_targets(host, rows)
    for node in order(graph):
        _emit(host, node, built, rows)
    results, kept = _emit_results(host, given)
    return host, host.source(arena_bytes(graph), results, kept), built


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where its memory can be read row by row as it is."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def strided(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """x itself where its memory can be read with these strides."""
    return laid_out(x.resolve_neg(), strides)


def aligned(x: torch.Tensor, alignment: int) -> torch.Tensor:
    """x itself where its address is a multiple of `alignment`, which new memory always is."""
    return laid_out(x, x.stride(), own=True) if x.data_ptr() % alignment else x


def arena_bytes(graph: Graph) -> Dim:
    """What the intermediate values of a graph that went through plan-memory take at a time."""
    ends = [dim(s.offset + s.size) for s in graph.arena.values()]
    if all(isinstance(e, int) for e in ends):
        return max(ends, default=0)  # type: ignore[type-var]
    return dim(sympy.Max(*ends))


def _emit_inputs(host: Host) -> None:
    """Names for the inputs; the sizes are read from them by a function of their own."""
    names: list[str] = []
    found: dict[str, str] = {}
    for i, node in enumerate(host.graph.inputs):
        name = host.name(node.hint or "x")
        names.append(name)
        size = hint(node.tensor.nbytes, host.graph.symbols) if isinstance(node.type, TensorType) else 0
        host.values[node] = Value(name, Scope.CALL, False, nbytes=size)
        for symbol, where in _bare_sizes(node):
            found.setdefault(symbol, f"inputs[{i}]{where}")
    missing = [s for s in host.symbols if s not in found]
    if missing:
        raise ValueError(f"size {missing[0]} cannot be read from the inputs")
    host.line("def sizes(inputs):", Scope.PROGRAM)
    host.line(f"    return ({''.join(f'{found[s]}, ' for s in host.symbols)})", Scope.PROGRAM)
    if names:
        host.line(f"{', '.join(names)}, = inputs", reads=[host.values[n] for n in host.graph.inputs])
    host.line("inputs.clear()")


def _bare_sizes(node: Node) -> list[tuple[str, str]]:
    """(symbol, how to read it from the input) for each size that the input tells."""
    if isinstance(node.type, ScalarType):
        return [(node.type.value.name, "")] if isinstance(node.type.value, sympy.Symbol) else []
    return [(d.name, f".size({i})") for i, d in enumerate(node.shape) if isinstance(d, sympy.Symbol)]


def _emit(host: Host, node: Node, built: Built, rows: NativeRows) -> None:
    if node in host.values or is_scalar(node):
        return
    if node.op.name == "region":
        emit_region(host, node, built.units[node])
    elif node in host.graph.inplace:
        emit_update(host, node, rows)
    elif node.op.category is Category.VIEW:
        emit_view(host, node)
    elif node.op.category is Category.CONSTANT:
        emit_constant(host, node)
    else:
        emit_call(host, node)


def _emit_results(host: Host, given: Given) -> tuple[list[str], set[str]]:
    """Writes values back into inputs; then what the call returns, as text, and the names among it."""
    graph = host.graph
    targets = {target for target, _ in graph.writes}
    pending: list[tuple[Value, Value]] = []
    for target, node in graph.writes:
        if graph.inplace.get(node) is target:
            emit_finished(host, target, given)
            continue
        value = host.values[node]
        if _reads_any(node, targets - {target}):  # a swap: every value is read before any input is written
            value = host.define(None, f"{value.name}.clone()", Scope.CALL, [value], hint=f"{value.name}_new")
        pending.append((host.values[target], value))
    for target, value in pending:
        host.line(f"{target.name}.copy_({value.name})", reads=[target, value])
    results: list[str] = []
    kept: set[str] = set()
    for node in graph.outputs:
        if is_scalar(node):
            results.append(host.operand(node))
            continue
        value = host.values[node]
        if node.op.name not in ("input", "layout"):  # what lies otherwise than row-major in eager has a `layout`
            value = host.dense(value)
        lasting = value.scope is not Scope.CALL
        host.line(f"{value.name}", reads=[value]) if lasting else None
        results.append(f"{value.name}.clone()" if lasting else value.name)
        kept.add(value.name)
    return results, kept


def _reads_any(node: Node, inputs: set[Node]) -> bool:
    """Whether the value may be a view of one of the inputs."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node in inputs:
            return True
        stack.extend(may_share(node))
    return False


def devices_of(graph: Graph) -> list[str]:
    """Where its values live, e.g. ["cpu", "cuda:0"]."""
    types = [t for node in order(graph) for t in (node.type if isinstance(node.type, tuple) else (node.type,))]
    return sorted({t.device for t in types if isinstance(t, TensorType)})


def _runs(graph: Graph, built: Built) -> tuple[list[Fallback], list[LibraryCall]]:
    """What runs by torch: op by op because it must, and by its library because it should."""
    fallbacks: list[Fallback] = []
    library: list[LibraryCall] = []
    ours = native_rows(graph, built).nodes
    for node in order(graph):
        if node.op.category in (Category.VIEW, Category.CONSTANT) or node.op.name == "item" or node in ours:
            continue
        flops, moved = cost(graph, node)
        if node.op.name == "region":
            unit = built.units[node]
            if unit.reason:
                count = len(covered(node.attrs["body"]))
                fallbacks.append(Fallback(node.attrs["label"] or "region", node.prov.source, unit.reason, count, flops, moved))
        elif is_library_call(node):
            library.append(LibraryCall(_label(node), node.prov.source, flops, moved))
        else:
            reason = "no native form" if node.op.name == "extern" else "in no kernel"
            fallbacks.append(Fallback(_label(node), node.prov.source, reason, 1, flops, moved))
    return fallbacks, library


def _label(node: Node) -> str:
    return node.attrs["target"] if node.op.name == "extern" else node.op.name
