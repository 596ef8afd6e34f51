"""reuse-blocks: pieces run in order are the graph, to the bit; each branch is a piece of its own; constants are everybody's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pass_checks import body
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.reuse_blocks import pieces

UNIT = ["a{i} = linear({x}, w)", "b{i} = relu(a{i})", "c{i} = linear(b{i}, v)   # m.py:1 unit.{i}", "{y} = add({x}, c{i})"]
BRANCHED = ["s = sin(x)", "t = linear(x, w)", "u = mul(t, s)", "y = add(x, u)", "r = cos(u)", "z = mul(y, s)"]


def _unit(i: int, x: str, y: str) -> list[str]:
    return [line.format(i=i, x=x, y=y) for line in UNIT]


GRAPHS = {
    "units in a row": ([*_unit(0, "x", "y"), *_unit(1, "y", "z")], "z"),
    "something around": (["p = sin(x)", *_unit(0, "p", "y"), "q = cos(y)", *_unit(1, "q", "z"), "r = softmax(z, dim=1)"], "r"),
    "no unit": (["y = linear(x, w)"], "y"),
    "an input is returned": (_unit(0, "x", "y"), "x, y"),
    "a constant is returned": (_unit(0, "x", "y"), "w, y"),
    "what is inside is read elsewhere": (BRANCHED, "z, r, u"),
    "skip over several": ([*_unit(0, "x", "y"), *_unit(1, "y", "z"), "q = mul(z, x)", "k = add(q, b0)"], "k"),
    "another input": ([*_unit(0, "x", "y"), "q = mul(y, e)", *_unit(1, "q", "z")], "z"),
    "branches side by side": (["a = linear(x, w)", "b = linear(x, v)", "y = add(x, a)", "z = add(y, b)"], "z"),
}


def _graph(case: str) -> Graph:
    torch.manual_seed(0)
    lines, result = GRAPHS[case]
    text = body("x: f32[3, 8], e: f32[8]", 'w = constant "w"', 'v = constant "v"', *lines, result)
    return parse(text, {"w": torch.randn(8, 8), "v": torch.randn(8, 8)})


@pytest.mark.parametrize("case", GRAPHS)
def test_pieces_are_the_graph(case: str) -> None:
    graph = _graph(case)
    inputs = [torch.randn(3, 8), torch.randn(8)]
    values = dict(zip(graph.inputs, inputs, strict=True))
    for piece in pieces(graph):
        verify(piece.graph)
        results = interpret(piece.graph, [values[n] for n in piece.takes])
        assert not set(piece.gives) & set(values)
        values.update(zip(piece.gives, results, strict=True))
    for node, expected in zip(graph.outputs, interpret(graph, inputs), strict=True):
        assert torch.equal(values[node], expected)


def test_every_node_is_computed_once() -> None:
    graph = _graph("something around")
    counted = [n.op.name for piece in pieces(graph) for n in order(piece.graph) if n.op.name not in ("input", "constant")]
    assert sorted(counted) == sorted(n.op.name for n in order(graph) if n.op.name not in ("input", "constant"))


def test_branches_are_pieces_of_their_own() -> None:
    found = pieces(_graph("something around"))
    assert [p.unit.name if p.unit else "" for p in found] == ["", "unit.0", "", "unit.1", ""]
    assert [p.unit.name for p in pieces(_graph("units in a row")) if p.unit] == ["unit.0", "unit.1"]
    branch = found[1]
    assert [n.op.name for n in order(branch.graph)] == ["input", "constant", "linear", "relu", "constant", "linear", "add"]
    assert branch.unit is not None and branch.takes == (branch.unit.kept,)


def test_names_of_pieces_differ() -> None:
    graph = replace(_graph("units in a row"), name="model")
    names = [p.graph.name for p in pieces(graph)]
    assert len(set(names)) == len(names) == 2 and all(n.startswith("model_") for n in names)
