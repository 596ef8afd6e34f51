"""The smallest graph on which a wrong step shows: neighbourhoods of its node are cut out of the graph, and tried, the smallest first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir.analysis.primitives import expanded
from ..ir.graph import Data, Graph, Node, graph_input, is_scalar, order, users
from ..ir.interpret import interpret
from ..ir.op import Category
from ..ir.rewrite import attr_key
from ..passes.base import Notes, Pass, Steps, describe
from ..passes.manager import pass_text, run_passes
from .inputs import copied
from .ladder import HOST, Ladder
from .reproduce import Case, case_of, interpreted

LARGEST = 1 << 28  # bytes of tensors that a reproducer may need
RADII = (0, 1, 2, 3, 4, 6, 9)
PLACES = 4  # of one kernel, at which it is tried
_LOOSE = (Category.VIEW, Category.CONSTANT)


@dataclass(frozen=True)
class _Trial:
    """How a fault is looked for on a part of a graph. fails: it raises, else results are wrong."""

    passes: Sequence[Pass]
    program: bool
    allowed: float
    fails: bool

    def case(self, graph: Graph, inputs: Sequence[Any]) -> Case | None:
        """The one step of the passes that is wrong there, found by halving; with all before it where it is not wrong alone."""
        text = ",".join(map(pass_text, self.passes))
        case = case_of(graph, inputs, passes=text, after=self._count(graph), program=self.program, allowed=self.allowed)
        if sum(v.nbytes for v in case.tensors.values()) > LARGEST or not _shows(case, self.fails):
            return None
        good, bad = 0, case.after
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if _shows(replace(case, after=middle), self.fails) else (middle, bad)
        alone = replace(case, before=max(bad - 1, 0), after=bad)
        return self._seeded(alone if _shows(alone, self.fails) else replace(case, after=bad))

    def _count(self, graph: Graph) -> int:
        steps = Steps()
        with contextlib.suppress(Exception):  # what it did until then is looked at
            run_passes(graph, self.passes, Notes(steps=steps))
        return len(steps.taken)

    def _seeded(self, case: Case) -> Case:
        """With seeded numbers where these show it too."""
        bare = replace(case, values={})
        return bare if _finite(bare) and _shows(bare, self.fails) else case


def smallest_case(ladder: Ladder, state: int, inputs: Sequence[Any], allowed: float, fails: bool) -> Case | None:
    """What reproduces the step to `state`, which makes results wrong, or `fails`; None where only tensors too large to keep show it."""
    sources = list(_sources(ladder, state, allowed, fails))
    wholes = [(trial, graph, [order(graph)]) for trial, graph, _ in sources]
    captured = (_Trial((*ladder.rewriting, *ladder.planning), state > ladder.rewrites, allowed, fails), ladder.graph, [order(ladder.graph)])
    for trial, graph, places in (*sources, *wholes, captured):
        for part, values in _parts(graph, places, inputs):
            found = trial.case(part, values)
            if found is not None:
                return found
    return None


def _sources(ladder: Ladder, state: int, allowed: float, fails: bool) -> Iterator[tuple[_Trial, Graph, list[list[Node]]]]:
    """How the step is looked for, in which graph, around which nodes: each list of them stands for one place."""
    step = ladder.steps[state - 1]
    if state > ladder.plan_from:
        graph, node = ladder.planned(state - 1)
        yield _Trial(ladder.planning, True, allowed, fails), ladder.fused, _around(graph, node)
    elif step is HOST:
        calls = [n for n in order(ladder.fused) if n.op.category not in _LOOSE and n.op.name not in ("region", "item", "input")]
        yield _Trial((), True, allowed, fails), ladder.fused, [[n] for n in calls]
    elif state > ladder.rewrites:
        _, places = ladder.kernels[state - ladder.rewrites - 2]
        yield _Trial((), True, allowed, fails), ladder.fused, [[n] for n in places[:PLACES]]
    else:
        entry = ladder.entry(state)
        item = ladder.rewriting[sum(not s.rule for s in ladder.steps[:state]) - 1]
        trial = _Trial((item,), False, allowed, fails)
        graph, node = ladder.rewritten(state - 1)
        if state - 1 > entry:
            yield trial, graph, _around(graph, node)
        before, _ = ladder.rewritten(entry)
        for source in (before, expanded(before)):
            yield trial, source, _around(source, node)


def _around(graph: Graph, node: Node | None) -> list[list[Node]]:
    """Growing neighbourhoods of the node in the graph: what it is computed from, so deep; then also what reads that."""
    node = _equal(graph, node) if node is not None else None
    if node is None:
        return []
    readers = users(graph)
    found = [_neighbours(node, radius, lambda n: n.inputs) for radius in RADII]
    found += [_neighbours(node, radius, lambda n: (*n.inputs, *readers[n])) for radius in RADII[1:]]
    return sorted({frozenset(nodes): nodes for nodes in found}.values(), key=len)


def _neighbours(node: Node, radius: int, near: Any) -> list[Node]:
    seen, edge = {node: None}, [node]
    for _ in range(radius):
        edge = [n for m in edge for n in near(m) if n not in seen and not is_scalar(n) and n.op.category is not Category.CONSTANT]
        seen.update(dict.fromkeys(edge))
    return list(seen)


def _equal(graph: Graph, node: Node) -> Node | None:
    """The node of the graph that computes the same: it is another object where a later sweep made it anew.

    Else the one that is called the same and came from the same: on other operands, where these were rewritten.
    """
    numbers: dict[Any, int] = {}
    here = {_number(n, numbers): n for n in order(graph)}
    equal = here.get(_number(node, numbers))
    alike = [n for n in here.values() if (n.op, n.hint, n.prov, str(n.type)) == (node.op, node.hint, node.prov, str(node.type))]
    return equal or (alike[0] if len(alike) == 1 else None)


def _number(root: Node, numbers: dict[Any, int]) -> int:
    """A number for what is computed: the same op on equal operands."""
    for node in order(Graph("", (), (root,))):
        if node not in numbers:
            attrs = tuple((k, v.name if isinstance(v, Data) else attr_key(v)) for k, v in node.attrs.items())  # constants are made anew
            attrs = id(node) if node.op.name == "input" else attrs
            key = (node.op.name, attrs, str(node.type), tuple(numbers[i] for i in node.inputs))
            numbers[node] = numbers.setdefault(key, len(numbers))
    return numbers[root]


# -- cutting


def _parts(graph: Graph, places: Sequence[Sequence[Node]], inputs: Sequence[Any]) -> Iterator[tuple[Graph, list[Any]]]:
    """The graph cut down to each of the places, with what its inputs are when the whole graph runs."""
    if not places:
        return
    readers = users(graph)
    cuts = [_cut(graph, set(nodes), readers) for nodes in places]
    wanted = {n for _, edge in cuts for n in edge}
    values: dict[Node, Any] = dict(zip(graph.inputs, inputs))

    def watch(node: Node, value: Any) -> None:
        if node in wanted:
            values[node] = value.clone() if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        interpret(graph, copied(list(inputs)), watch=watch)
    for part, edge in cuts:
        yield part, [values[n] for n in edge]


def _cut(graph: Graph, keep: set[Node], readers: Mapping[Node, list[Node]]) -> tuple[Graph, list[Node]]:
    """The nodes of `keep` as a graph of their own, and the values that are its inputs.

    Results are all values that something else reads: a rewrite meets as many readers as it did.
    """
    keep = _closed(keep, readers)
    new: dict[Node, Node] = {}
    edge: dict[Node, Node] = {}

    def operand(node: Node) -> Node:
        if node in new or node.op.name == "scalar" or (node.op.category is Category.CONSTANT and node.op.name != "input"):
            return new.get(node, node)
        if node.op.name == "input":
            return edge.setdefault(node, node)
        return edge.setdefault(node, graph_input(node.hint or node.op.name, node.type))

    for node in order(graph):
        if node in keep and node.op.category is not Category.CONSTANT and node.op.name != "input":
            new[node] = replace(node, inputs=tuple(operand(i) for i in node.inputs))
    roots = set(graph.roots)
    outputs = [new[n] for n in new if not isinstance(n.type, tuple) and (n in roots or any(r not in new for r in readers[n]))]
    return replace(graph, inputs=tuple(edge.values()), outputs=tuple(outputs), writes=(), arena={}, inplace={}), list(edge)


def _closed(keep: set[Node], readers: Mapping[Node, list[Node]]) -> set[Node]:
    """Together with the results of what has several, and with what they are results of."""
    sources = {n.inputs[0] for n in keep if n.op.name == "item"} | {n for n in keep if isinstance(n.type, tuple)}
    return keep | sources | {r for n in sources for r in readers[n]}


def departing(graph: Graph, inputs: Sequence[Any]) -> str:
    """The first kernel or library call of a program whose result is wrong for right operands, in words; "" if there is none."""
    places = [[n] for n in order(graph) if n.op.category not in _LOOSE and n.op.name not in ("item", "input")]
    for (node,), (part, values) in zip(places, _parts(graph, places, inputs)):
        if _shows(case_of(part, values, program=True)):
            source = f" ({node.prov.source})" if node.prov.source else ""
            return f"{node.attrs['label'] or 'a kernel' if node.op.name == 'region' else describe(node)}{source}"
    return ""


# -- trying


def _shows(case: Case, fails: bool = False) -> bool:
    """Whether results are wrong or, where the fault `fails`, the step does that. What cannot be read or run before it shows nothing."""
    try:
        case.graph(case.before)
        interpreted(case.graph(case.before), case.inputs())
    except Exception:  # a part that stands for no graph: one that lacks a size, for example
        return False
    try:
        return not case.check().ok
    except Exception:  # the fault itself, or a part that makes no program
        return fails


def _finite(case: Case) -> bool:
    """Whether seeded numbers are fit for the graph: not so where they are variances, for example."""
    try:
        results = interpreted(case.graph(case.before), case.inputs(), torch.float64)
    except Exception:  # indices out of range, for example
        return False
    return all(bool(r.isfinite().all()) for r in results if isinstance(r, torch.Tensor))
