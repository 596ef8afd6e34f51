"""Labels of the axis analysis, judged by numbers: what changes in a node's result when its operands change at one index of the axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tilewright.ir.analysis.axes import Along, Axis, How, Label, Places
from tilewright.ir.graph import Graph, Node, graph_input, is_scalar, make_graph
from tilewright.ir.interpret import interpret

NOISE = 1e-9
"""Relative differences up to here, in float64, are how products of other sizes are summed."""


def values_of(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[Node, Any]:
    """Every value of the graph on these inputs, in float64."""
    found: dict[Node, Any] = dict(zip(graph.inputs, inputs, strict=True))
    interpret(graph, inputs, torch.float64, watch=found.__setitem__)
    return found


def indices(along: Along, extent: int, size: int) -> torch.Tensor:
    """Which index of the axis each position of a dimension belongs to."""
    length = along.length(size)
    return along.start + (torch.arange(extent) // along.inner % length) * along.stride


def belongs(places: Places, shape: Sequence[int], size: int, chosen: torch.Tensor) -> torch.Tensor:
    """True at the elements of a value that belong to one of the chosen indices, by any of its dimensions."""
    found = torch.zeros(tuple(shape), dtype=torch.bool)
    for d, along in enumerate(places):
        if along is not None:
            here = torch.isin(indices(along, shape[d], size), chosen)
            found |= here.reshape([-1 if i == d else 1 for i in range(len(shape))])
    return found


def allowed(label: Label, i: int, size: int) -> torch.Tensor:
    """The indices of the result that may change with index i of the operands."""
    every = torch.arange(-size, 2 * size)
    if label.how is How.MIXING:
        return every
    if label.how is How.PREFIX:
        return every[(every >= i) & (every <= i + label.before if label.before else every >= i)]
    return every[(every >= i - label.after) & (every <= i + label.before)]


def judged(axis: Axis, first: dict[Node, Any], second: dict[Node, Any]) -> Iterator[tuple[Node, str]]:
    """Nodes whose label is wrong, or MIXING where it need not be, with what was seen.

    first, second: two runs of the graph. In turn, the entries of one index in all operands are those of the second run.
    """
    for node, label in axis.labels.items():
        if isinstance(node.type, tuple) or node not in first:
            continue
        made_by = node.inputs[0] if node.op.name == "item" else node
        label = label.and_also(axis.labels.get(made_by, label))
        operands = [x for x in dict.fromkeys(made_by.inputs) if not is_scalar(x)]
        places = [(x in axis.labels or x in axis.sources) and axis.everywhere(x) for x in operands]
        if any(isinstance(x.type, tuple) for x in operands) or any(
            along.order for p in (*places, axis.everywhere(node)) for along in p or () if along
        ):
            continue
        spread = {}
        for i, reached in _reached(node, made_by, operands, places, axis, first, second).items():
            spread[i] = reached
            may = set(allowed(label, i, axis.size).tolist())
            wrong = [at for at in reached if may.isdisjoint(at) and label.how is not How.MIXING]
            if wrong:
                yield node, f"index {i} reaches {sorted(wrong)}: {label}"
        if label.how is How.MIXING and any(spread.values()) and all(i in at for i, reached in spread.items() for at in reached):
            yield node, f"each index reaches only itself: {label}"


def _reached(
    node: Node, made_by: Node, operands: Sequence[Node], places: Sequence[Any], axis: Axis, first: Any, second: Any
) -> dict[int, set[tuple[int, ...]]]:
    """Index of the operands -> indices of the result that change with it: () where the axis is not in it, pairs where it is twice."""
    inputs = {x: graph_input(f"x{k}", x.type) for k, x in enumerate(operands)}
    alone = made_by.with_inputs(tuple(inputs.get(x, x) for x in made_by.inputs))
    alone = alone if node is made_by else node.with_inputs((alone,))
    graph = make_graph("one", list(inputs.values()), [alone])
    found = {}
    for i in range(0, axis.size, -(-axis.size // 16)):
        chosen = [p and belongs(p, first[x].shape, axis.size, torch.tensor([i])) for x, p in zip(operands, places)]
        if not any(torch.is_tensor(c) and c.any() for c in chosen):
            continue
        mixed = [torch.where(c, second[x], first[x]) if torch.is_tensor(c) else first[x] for x, c in zip(operands, chosen)]
        (result,) = interpret(graph, mixed, torch.float64)
        wide = torch.complex128 if result.is_complex() else torch.float64
        differs = ~torch.isclose(result.to(wide), first[node].to(wide), rtol=NOISE, atol=NOISE, equal_nan=True)
        found[i] = _at(differs, axis.everywhere(node) or (), axis.size)
    return found


def _at(differs: torch.Tensor, places: Places, size: int) -> set[tuple[int, ...]]:
    held = [(d, indices(along, differs.shape[d], size)) for d, along in enumerate(places) if along]
    if not held:
        return {()} if differs.any() else set()
    others = [d for d in range(differs.dim()) if d not in dict(held)]
    at_axis = differs.any(dim=others) if others else differs
    return {tuple(int(index[i]) for i, (_, index) in zip(at, held)) for at in at_axis.nonzero().tolist()}
