"""`Outline`: a graph as much as it takes to draw it: its ops, the modules they are of, who reads whom. And `Machine`, what it ran on.

The receipt keeps an outline of the graph as captured and one of the graph as it runs. The graph before is nowhere else, and a receipt
alone, without the artifact, can be drawn. Views, constants and sizes are left out: they compute nothing, and are more than half of all
nodes. What is left takes about 25 bytes a node, 50 KB for a model of 2000.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from ..codegen.program import devices_of
from ..codegen.steps import is_library_call
from ..ir.graph import Graph, Node, is_scalar, order
from ..ir.op import Category
from ..ir.text.printer import type_source
from ..search.bench import bench_of
from ..search.device import this_device
from ..search.gpus import of_target
from .memory import constant_bytes

KINDS = {"i": "input", "o": "op", "k": "kernel", "l": "library", "e": "eager"}
"""What begins a row -> what the node is: an op of a graph that was only captured; of one that runs: by what it runs."""


@dataclass(frozen=True)
class Row:
    """A node, decoded: `operands` are positions of earlier rows."""

    kind: str
    op: str
    module: str
    type: str
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """words: distinct ops, module paths and types. rows: a text for each node, operands first: its kind, then numbers of the op's, the
    module's and the type's word, then of the rows that it reads: "k4 0 2 17 31". results: rows that are returned or written back.
    weights: bytes of the constants. Raises ValueError for rows that `outline` does not write.
    """

    words: tuple[str, ...]
    rows: tuple[str, ...]
    results: tuple[int, ...] = ()
    weights: int = 0

    def __post_init__(self) -> None:
        self.decoded()

    def decoded(self) -> list[Row]:
        found: list[Row] = []
        for text in self.rows:
            kind, numbers = text[:1], [int(x) for x in text[1:].split()]
            operands = tuple(numbers[3:])
            known = kind in KINDS and len(numbers) >= 3 and all(0 <= n < len(self.words) for n in numbers[:3])
            if not known or not all(0 <= n < len(found) for n in operands):
                raise ValueError(f"{text[:40]!r} is no row of a graph's outline")
            op, module, kind_of_value = (self.words[n] for n in numbers[:3])
            found.append(Row(KINDS[kind], op, module, kind_of_value, operands))
        if not all(0 <= n < len(found) for n in self.results):
            raise ValueError("an outline returns what it does not have")
        return found


@dataclass(frozen=True)
class Machine:
    """name: what it was measured on. bandwidth: bytes per second; rate: operations per second in float32. measured: or of a data sheet."""

    name: str
    bandwidth: float
    rate: float
    measured: bool = True


def outline(graph: Graph, fallbacks: Collection[str] | None = None) -> Outline:
    """fallbacks: of a graph that runs, the regions that could not be generated, by label; None for one that was only captured."""
    words: dict[str, int] = {}
    places: dict[Node, tuple[int, ...]] = {}  # node -> rows that hold its value, or what it is a view of
    rows: list[str] = []
    for node in order(graph):
        operands = tuple(dict.fromkeys(row for x in node.inputs for row in places[x]))
        if _passes_on(node):
            places[node] = operands
            continue
        places[node] = (len(rows),)
        texts = (_op(node), _module(node.prov.modules), type_source(node.type))
        numbers = [words.setdefault(text, len(words)) for text in texts]
        rows.append(_kind(node, fallbacks) + " ".join(map(str, (*numbers, *operands))))
    results = tuple(dict.fromkeys(row for node in graph.roots for row in places[node]))
    return Outline(tuple(words), tuple(rows), results, constant_bytes(graph))


def _passes_on(node: Node) -> bool:
    """Whether a node is not drawn: what it reads is read by its readers."""
    return is_scalar(node) or (node.op.name != "input" and node.op.category in (Category.VIEW, Category.CONSTANT)) or node.op.name == "item"


def _op(node: Node) -> str:
    if node.op.name == "region":
        return node.attrs["label"] or "region"
    if node.op.name == "input":
        return node.hint or "input"
    return node.attrs["target"] if node.op.name == "extern" else node.op.name


def _module(paths: Sequence[str]) -> str:
    """What all module paths begin with."""
    return ".".join(commonprefix([path.split(".") for path in paths])) if paths else ""


def _kind(node: Node, fallbacks: Collection[str] | None) -> str:
    if node.op.name == "input":
        return "i"
    if fallbacks is None:
        return "o"
    if node.op.name == "region":
        return "e" if node.attrs["label"] in fallbacks else "k"
    return "l" if is_library_call(node) else "e"


def machine_of(graph: Graph, target: str = "") -> Machine | None:
    """What the graph runs on: measured, where it is at hand (once: about two seconds); None where it is not known."""
    if target:
        gpu = of_target(target)
        return Machine(gpu.name, gpu.bandwidth, gpu.plain, measured=False)
    if devices_of(graph) in ([], ["cpu"]):
        device = this_device()
        return Machine(device.name, max(device.read, device.copy), device.gemm["float32"])
    bench = bench_of(graph)
    return None if bench is None else Machine(bench.gpu.name, bench.gpu.bandwidth, bench.gpu.plain)
