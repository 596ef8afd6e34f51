"""How long a fused graph takes on a GPU that is not here: kernels by the cost model, what the library computes by its bytes and operations.

linear              library    2 * 1024 * 1024 * 4096 operations, at most of the peak
dequantize+linear   kernel     cost.py, under the schedule that it starts from, or the best of all
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..codegen.kernel import Kernel
from ..codegen.regions import cost, lowered_regions
from ..codegen.triton.legalize import UnsupportedByTriton
from ..codegen.triton.templates import build
from ..ir.dims import SymbolRange, hint, symbol
from ..ir.graph import Graph, Node, order
from ..ir.op import Category
from ..ir.types import TensorType
from .candidates import candidates
from .cost import predicted_seconds
from .gpus import Gpu
from .schedules import region_name

LIBRARY_SHARE = 0.75
"""Of the peak of matrix units, and of bandwidth, what the vendors' libraries reach."""

LEAST = 5e-6
"""A call of torch's takes no less: Python is not faster."""


class Foretold:
    """foretold(graph): seconds of a call of a fused graph, of which what has no kernel runs op by op.

    searched: kernels will have the best of their schedules, by the same model; else those that they start from. sizes: of symbols.
    """

    def __init__(self, gpu: Gpu, searched: bool, sizes: Mapping[str, int] = {}, device: str = "cuda") -> None:
        self._gpu, self._searched, self._device = gpu, searched, device
        self._symbols = {name: SymbolRange(size, size) for name, size in sizes.items()}
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, graph: Graph) -> float:
        graph = replace(graph, symbols={**graph.symbols, **self._symbols})
        alone = math.fsum(_by_torch(graph, node, self._gpu) for node in order(graph) if node.op.name != "region")
        return alone + math.fsum(self._of(kernel, nodes, graph) for kernel, nodes in lowered_regions(graph, (self._device,)))

    def _of(self, kernel: Kernel | str, regions: Sequence[Node], graph: Graph) -> float:
        """Of all calls of a kernel, or of regions that have none."""
        sizes = {name: hint(symbol(name), graph.symbols) for name in graph.symbols}
        place = region_name(regions[0]), str(sorted(sizes.items()))
        if place not in self._known:
            try:
                if isinstance(kernel, str):
                    raise UnsupportedByTriton(what="region", reason=kernel)
                self._known[place] = self._by_kernel(kernel, sizes)
            except UnsupportedByTriton:
                body: Graph = regions[0].attrs["body"]
                self._known[place] = math.fsum(_by_torch(body, node, self._gpu) for node in order(body))
        return len(regions) * self._known[place]

    def _by_kernel(self, kernel: Kernel, sizes: dict[str, int]) -> float:
        start = predicted_seconds(kernel, build(kernel).schedule, self._gpu, sizes=sizes)
        ranked = candidates(kernel, self._gpu, sizes).ranked if self._searched else ()
        return min(start, *(c.seconds for c in ranked[:1])) if ranked else start


def _by_torch(graph: Graph, node: Node, gpu: Gpu) -> float:
    """Of a node that torch or its library computes."""
    if node.op.category in (Category.VIEW, Category.CONSTANT) or node.op.name in ("item", "input"):
        return 0.0
    flops, moved = cost(graph, node)
    if not moved:
        return 0.0
    rate = gpu.rates.get(_name(node.inputs or (node,)), gpu.plain)
    return max(LEAST, gpu.launch + max(flops / rate, moved / gpu.bandwidth) / LIBRARY_SHARE)


def _name(values: Sequence[Node]) -> str:
    """Of the dtype that is multiplied: the widest of the operands."""
    dtypes: list[torch.dtype] = [n.type.dtype for n in values if isinstance(n.type, TensorType)]
    return str(max(dtypes, key=lambda d: d.itemsize, default=torch.float32)).removeprefix("torch.")
