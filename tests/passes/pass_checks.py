"""Helpers of the pass tests: text in, text out, equal by the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tilewright.ir.graph import Data, Graph, Node
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.types import same_type
from tilewright.passes.base import Notes, Pass, Reason


def run(item: Pass, text: str, constants: Mapping[str, torch.Tensor] = {}) -> tuple[Graph, Graph, Notes]:
    """The graph of `text`, the graph after the pass, and the notes."""
    graph, notes = parse(text, constants), Notes()
    return graph, item.run(graph, notes), notes


def body(signature: str, *lines: str) -> str:
    """A graph from its signature and its lines, the last one being what it returns."""
    return "\n".join([f"graph g({signature}) {{", *lines[:-1], f"return {lines[-1]}", "}"])


def assert_becomes(after: Graph, expected: str | Graph) -> None:
    """Same structure as the text: ops, operands, attributes, types; constants by name."""
    wanted = parse(expected) if isinstance(expected, str) else expected
    assert [str(n.type) for n in after.inputs] == [str(n.type) for n in wanted.inputs]
    pairs = dict(zip(after.inputs, wanted.inputs, strict=True))
    assert len(after.outputs) == len(wanted.outputs)
    fine = all(_equal(a, b, pairs) for a, b in zip(after.outputs, wanted.outputs))
    assert fine, f"got\n{after}\nwanted\n{wanted}"


def _equal(a: Node, b: Node, pairs: dict[Node, Node]) -> bool:
    if a in pairs:
        return pairs[a] is b
    same = a.op is b.op and same_type(a.type, b.type) and len(a.inputs) == len(b.inputs)
    same = same and all(_attr(a.attrs[k]) == _attr(b.attrs[k]) for k in a.attrs if k != "type")
    same = same and all(_equal(x, y, pairs) for x, y in zip(a.inputs, b.inputs))
    pairs[a] = b
    return same


def _attr(value: Any) -> Any:
    return value.name if isinstance(value, Data) else repr(value)


def assert_same_values(before: Graph, after: Graph, inputs: Sequence[Any], tolerance: float | None = 0.0) -> None:
    """Equal results; tolerance 0: to the bit, NaN and the sign of zero included, else relative to the largest element."""
    for x, y in zip(interpret(before, inputs), interpret(after, inputs), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if tolerance:
            torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(x.isnan(), y.isnan()) if x.is_floating_point() else True
            known = ~x.isnan() if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
            assert torch.equal(x[known], y[known]) and torch.equal(x[known].signbit(), y[known].signbit())


def refusals(notes: Notes) -> set[tuple[str, Reason]]:
    return {(d.rule, d.reason) for d in notes.declined}


def special(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values with NaN, infinities, both zeros and a denormal among them."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -3.25, float("inf"), float("-inf"), float("nan"), 1e-42, 1e30, -1e-30])
    count = int(torch.tensor(shape).prod()) if shape else 1
    return values.repeat(count // len(values) + 1)[:count].reshape(shape).to(dtype)
