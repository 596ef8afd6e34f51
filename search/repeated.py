"""Calling a model many times to time it: what counts its calls starts again with each, or a cache of 8 tokens is full after 8 of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ir.graph import Graph
from .tuner import Run


def updated(graph: Graph, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Those of the inputs that the graph writes."""
    targets = {target for target, _ in graph.writes}
    return [x for node, x in zip(graph.inputs, inputs) if node in targets and isinstance(x, torch.Tensor)]


def from_the_start(run: Run, values: Sequence[torch.Tensor]) -> Run:
    """The same calls, before each of which the integers among these values are what they are now.

    Integers count and index: what a call leaves in them may be out of bounds for the next one. What else is updated (a cache, running
    statistics) may grow, which takes the same time; restoring it would take time of its own.
    """
    kept = [(x, x.clone()) for x in values if not x.is_floating_point() and not x.is_complex()]

    def again() -> Any:
        for value, before in kept:
            value.copy_(before)
        return run()

    return again if kept else run
