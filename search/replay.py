"""`Replay`: a graph run once on some inputs, so that variants of it are run only where they differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ir.graph import Graph, Node
from ..ir.interpret import interpret
from ..ir.op import Category

KEPT_BYTES = 2 << 30
"""Of all values that are kept; what is beyond is run again where it is needed."""


class Replay:
    """inputs: a value for each input of the graph; what the graph would write to is left alone. outputs: of the graph itself.

    seconds: that running it took. whole: whether all values were kept.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any], kept_bytes: int = KEPT_BYTES) -> None:
        self.graph = graph
        self._inputs = list(inputs)
        self._written = {i for i, node in enumerate(graph.inputs) if any(node is target for target, _ in graph.writes)}
        self._known: dict[Node, Any] = {}
        self._left, self.whole = kept_bytes, True
        start = time.perf_counter()
        with torch.no_grad():
            self.outputs = interpret(graph, self.inputs(), watch=self._keep)
        self.seconds = time.perf_counter() - start

    def inputs(self) -> list[Any]:
        return [v.clone() if i in self._written else v for i, v in enumerate(self._inputs)]

    def run(self, variant: Graph) -> list[Any]:
        """The outputs of a graph with the same inputs, which shares nodes with the first one."""
        with torch.no_grad():
            return interpret(variant, self.inputs(), known=self._known)

    def value(self, node: Node) -> Any:
        """What a node of the graph is."""
        return self.run(replace(self.graph, outputs=(node,), writes=()))[0]

    def _keep(self, node: Node, value: Any) -> None:
        size = value.nbytes if isinstance(value, torch.Tensor) and node.op.category not in (Category.VIEW, Category.CONSTANT) else 0
        if size <= self._left:
            self._left -= size
            self._known[node] = value
        else:
            self.whole = False
