"""Who computes a contraction: a kernel of ours, or the vendor's library. Each is timed alone, with what is fused to it, on its shapes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..codegen.program import Program, compile_program
from ..codegen.regions import region_key
from ..ir.graph import Data, Graph, Node, Stage, graph_input, is_scalar, order
from ..ir.op import Category
from ..ir.ops import OPS
from ..ir.rewrite import inline, rewrite
from ..passes.base import Notes, Pass
from ..passes.contractions import PRODUCTS, WINDOW_PANELS, is_packed
from ..passes.fuse_regions import FuseRegions
from ..passes.manager import run_passes
from ..passes.plan_memory import PlanMemory
from ..passes.split_bias import SplitBias
from ..passes.weights import is_constant, value_of
from .database import Database, Key
from .examples import example_inputs, with_sizes
from .tuner import Run, Verdict, remembered

NATIVE, VENDOR = "native", "vendor"


@dataclass(frozen=True)
class Provided:
    """A kernel with contractions by packed weights, in all places where it stands, and what measuring it alone said.

    weights: names of the panels, of all places.
    """

    label: str
    weights: tuple[str, ...]
    verdict: Verdict


def providers(graph: Graph, database: Database, deadline: float) -> list[Provided]:
    """A verdict for each distinct kernel of a fused graph that holds contractions, until the deadline (of time.perf_counter)."""
    places: dict[object, list[Node]] = {}
    for node in order(graph):
        if node.op.name == "region" and any(True for _ in _packed(node)):
            places.setdefault(region_key(node.attrs["body"]), []).append(node)
    found: list[Provided] = []
    for nodes in places.values():
        if time.perf_counter() > deadline:
            break
        weights = tuple(constant.attrs["data"].name for node in nodes for constant in _packed(node))
        found.append(Provided(nodes[0].attrs["label"], weights, _verdict(alone(nodes[0], graph), database, deadline)))
    return found


def _packed(region: Node) -> Iterator[Node]:
    """The constants that contractions of a region read as panels."""
    body = region.attrs["body"]
    outside = dict(zip(body.inputs, region.inputs))
    for node in order(body):
        if node.op.name in PRODUCTS:
            inner = _viewed(node.inputs[1])
            constant = _viewed(outside.get(inner, inner))
            if constant.op.name == "constant" and constant.tensor.rank > 2 and constant.shape[-1] in WINDOW_PANELS:
                yield constant


def _viewed(node: Node) -> Node:
    """What a chain of views looks at."""
    while node.op.category is Category.VIEW:
        node = node.inputs[0]
    return node


def alone(region: Node, graph: Graph) -> Graph:
    """What a region computes, as a graph: its constants stay, everything else that it reads becomes an input."""
    body: Graph = region.attrs["body"]
    inputs: list[Node] = []
    operands: list[Node] = []
    for inner, outer in zip(body.inputs, region.inputs):
        if is_scalar(outer) or is_constant(outer, generated=True):
            operands.append(outer)
            continue
        operands.append(graph_input(inner.hint, inner.type, inner.attrs["strides"]))
        inputs.append(operands[-1])
    results = inline(body, operands)
    return with_sizes(Graph(graph.name, tuple(inputs), results, symbols=graph.symbols, stage=Stage.CANONICAL))


def unpacked(graph: Graph) -> Graph:
    """The graph with its packed weights as they were before."""

    def unpack(node: Node, inputs: tuple[Node, ...]) -> Node | None:
        if node.op.name not in PRODUCTS or not is_packed(inputs[1]):
            return None
        weight, value = inputs[1], value_of(inputs[1])
        assert value is not None, "panels are constants"
        name = _viewed(weight).attrs["data"].name
        plain = OPS["constant"](data=Data(f"{name}.plain", value.contiguous()), hint=weight.hint, prov=weight.prov)
        return node.with_inputs((inputs[0], plain, *inputs[2:]))

    return rewrite(graph, unpack)


_NATIVE_PASSES: tuple[Pass, ...] = (FuseRegions(), PlanMemory())
_VENDOR_PASSES: tuple[Pass, ...] = (SplitBias(), FuseRegions(), PlanMemory())


def _verdict(graph: Graph, database: Database, deadline: float) -> Verdict:
    native = _program(graph, _NATIVE_PASSES)

    def candidates() -> dict[str, Run]:
        inputs = example_inputs(graph)
        vendor = _program(unpacked(graph), _VENDOR_PASSES)
        return {NATIVE: _runner(native, inputs), VENDOR: _runner(vendor, inputs)}

    shapes = ", ".join(str(n.type) for n in graph.inputs)
    key = Key.here(hashlib.sha256(native.source.encode()).hexdigest(), shapes)
    return remembered(key, database, candidates, NATIVE, (NATIVE, VENDOR), min(0.5, max(0.05, deadline - time.perf_counter())))


def _program(graph: Graph, passes: Sequence[Pass]) -> Program:
    return compile_program(run_passes(graph, passes, Notes()))


def _runner(program: Program, inputs: Sequence[object]) -> Callable[[], object]:
    return lambda: program.run(list(inputs))
