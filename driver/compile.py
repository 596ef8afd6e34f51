"""`compile_graph`: passes, then code generation: what every door does with a captured graph."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..codegen.program import Program, compile_program
from ..ir.analysis.inplace import in_place
from ..ir.analysis.memory import Owner, may_share, owners, views
from ..ir.dims import contiguous_strides
from ..ir.graph import Graph, Node, is_scalar, order
from ..ir.ops import OPS
from ..ir.verify import verify
from ..passes.base import Notes, Pass
from ..passes.manager import Callback, run_passes
from .memory import constant_bytes, return_free_memory
from .offload import offload
from .pipeline import passes_from
from .receipt import Receipt, make_receipt


@dataclass(frozen=True)
class Options:
    """passes: as on the command line, None for the default list. verify: check the graph after every pass.

    dump: a directory that gets the graph after every pass and the generated program, as text. freeze: parameters and buffers that a
    graph for inference only reads become constants of it (torch.compile; `optimize` always has them so). offload: those of them that the
    graph needs in another form only move to a file (`driver.offload`). max_autotune: measure the rewrites, and take back those that do
    not gain (`driver.tune`); a list of passes of the user's own is not questioned. tuning_seconds: how long that may take for one graph,
    the compilation of what is compared included. cuda_graphs: launches are recorded once and replayed (torch.compile; `driver.replay`).
    remove_padding: tokens that an attention mask says are padding are not computed, where that gains (`driver.padding`).
    """

    passes: str | None = None
    verify: bool = False
    freeze: bool = False
    offload: bool = False
    max_autotune: bool = False
    tuning_seconds: float = 30.0
    cuda_graphs: bool = False
    remove_padding: bool = False
    dump: str | None = None

    @property
    def tunes(self) -> bool:
        return self.max_autotune and self.passes is None


@dataclass(frozen=True)
class Compiled:
    """graph: after all passes; what `build_program` needs to make `program` again."""

    graph: Graph
    program: Program
    receipt: Receipt


def compile_graph(
    graph: Graph,
    options: Options = Options(),
    notes: Notes | None = None,
    passes: Sequence[Pass] | None = None,
    schedules: Mapping[str, str] = {},
    before: Mapping[str, float] = {},
) -> Compiled:
    """Runs the passes and compiles. Raises what a broken pass raises; a region that cannot be compiled is a fallback, never an error.

    notes, before: what was done to the graph already, and seconds of each pass of that, for the receipt. passes: instead of those of the
    options. schedules: of regions, as `search.schedules.with_schedules` takes them.
    """
    notes, seconds = notes or Notes(), dict(before)
    start = time.perf_counter() - sum(before.values())
    passes = passes_from(options.passes) if passes is None else passes
    fused = rewritten(graph, options, passes, notes, seconds)
    if schedules:
        from ..search.schedules import with_schedules

        fused = with_schedules(fused, schedules)
    if options.offload:
        offload(graph, fused)
    program = build_program(fused)
    return_free_memory(constant_bytes(fused))
    receipt = make_receipt(program, notes, {**seconds, "total": time.perf_counter() - start})
    if options.dump is not None:
        _write(options.dump, f"{graph.name}.program", program.source)
        _write(options.dump, f"{graph.name}.receipt.json", receipt.to_json())
    return Compiled(fused, program, receipt)


def rewritten(graph: Graph, options: Options, passes: Sequence[Pass], notes: Notes, seconds: dict[str, float]) -> Graph:
    """The graph after the passes; `notes` and `seconds` say what they did, and how long it took."""
    return kept_apart(graph, run_passes(graph, passes, notes, _between(options, seconds)))


def build_program(graph: Graph) -> Program:
    """The program of a graph that has been through the passes."""
    return compile_program(graph)


def kept_apart(before: Graph, after: Graph) -> Graph:
    """`after`, the rewritten `before`, with a copy where passes made outputs share memory that were apart: x + 0 became x, two equal
    values became one."""
    free, taken = _sharing(before, views), _sharing(after, may_share)
    if all(now <= then for now, then in zip(taken, free)):
        return after
    outputs = tuple(n if now <= then else _own(n) for n, now, then in zip(after.outputs, taken, free))
    apart = replace(after, outputs=outputs)
    return replace(apart, inplace=in_place(apart).target if after.inplace else {})  # a copy of an old value is one more reader


def _sharing(graph: Graph, shares: Callable[[Node], tuple[Node, ...]]) -> list[set[tuple[str, int]]]:
    """For each output the inputs and earlier outputs whose memory it shares."""
    owned = owners(order(graph), shares)
    seen: dict[Owner, set[tuple[str, int]]] = {Owner(n): {("input", i)} for i, n in enumerate(graph.inputs)}
    found: list[set[tuple[str, int]]] = []
    for i, node in enumerate(graph.outputs):
        mine = () if is_scalar(node) else owned[node]
        found.append({place for owner in mine for place in seen.get(owner, ())})
        for owner in mine:
            seen.setdefault(owner, set()).add(("output", i))
    return found


def _own(node: Node) -> Node:
    if node.op.name == "layout":
        return OPS["layout"](node.inputs[0], strides=node.attrs["strides"], own=True, hint=node.hint, prov=node.prov)
    return OPS["layout"](node, strides=contiguous_strides(node.shape), own=True, hint=node.hint, prov=node.prov)


def _between(options: Options, seconds: dict[str, float]) -> Callback:
    """Between passes: adds up the time of each into `seconds`, verifies and dumps."""
    count = itertools.count()

    def after(item: Pass, before: Graph, graph: Graph, took: float) -> None:
        seconds[item.name] = seconds.get(item.name, 0.0) + took
        if options.verify:
            verify(graph)
        if options.dump is not None:
            _write(options.dump, f"{graph.name}.{next(count):02}.{item.name}.txt", str(graph))

    return after


def _write(directory: str, name: str, text: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / name).write_text(text)
