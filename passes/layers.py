"""Layers: the weights that can be kept in another format, with everything that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..ir.graph import Graph, Node, order, users
from ..ir.ops import OPS
from ..ir.reasons import Reason
from .weights import constant_under, is_constant, static, stray_reader, value_of

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_POSITION = {"linear": 1, "matmul": 1, "conv": 1, "embedding": 0}
"""Op -> which operand is its weight."""


@dataclass(frozen=True, eq=False)
class Layer:
    """name: of the constant. weight: it, or a view of it. readers: linears, products, convolutions and embeddings by it, nothing else."""

    name: str
    weight: Node
    readers: tuple[Node, ...]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(r.op.name for r in self.readers)

    @property
    def transposed(self) -> bool:
        """Whether outputs lie along the columns of the weight."""
        return "matmul" in self.kinds

    @property
    def nbytes(self) -> int:
        return int(self.weight.tensor.nbytes)  # type: ignore[arg-type]

    def matrix(self) -> torch.Tensor:
        """The weight as float32 [outputs, inputs]; those of a convolution are channels and window, flat."""
        value = value_of(self.weight)
        assert value is not None, "the weight of a layer is a constant"
        value = value.detach().float()
        return value.t().contiguous() if self.transposed else value.reshape(value.shape[0], -1)

    def from_matrix(self, matrix: Node) -> Node:
        """The weight as its readers take it, from a node that is like `matrix()`."""
        if self.transposed:
            return OPS["permute"](matrix, dims=(1, 0))
        return matrix if self.weight.tensor.rank == 2 else OPS["reshape"](matrix, shape=self.weight.shape)


def layers(graph: Graph, declined: Callable[[Node, Reason, str], object] = lambda node, reason, value: None) -> list[Layer]:
    """Every layer, in the order of the graph. declined: called with what reads a floating-point weight but makes no layer, and why."""
    readers, roots = users(graph), set(graph.roots)
    found: dict[Node, Layer] = {}
    for node in order(graph):
        position = _POSITION.get(node.op.name)
        if position is None or node.inputs[position] in found:
            continue
        weight = node.inputs[position]
        refusal = _refusal(weight, readers, roots)
        if refusal is None:
            found[weight] = Layer(constant_under(weight).attrs["data"].name, weight, tuple(readers[weight]))
        else:
            declined(node, *refusal)
    return list(found.values())


def _refusal(weight: Node, readers: Mapping[Node, list[Node]], roots: set[Node]) -> tuple[Reason, str] | None:
    """Why a weight is kept as it is."""
    if not is_constant(weight) or not static(weight):
        return Reason.NOT_CONSTANT, weight.hint
    if weight.dtype not in FLOATS:
        return Reason.UNSUPPORTED_DTYPE, str(weight.dtype)
    if weight.tensor.rank < 2 or not weight.tensor.numel:
        return Reason.SHAPE_MISMATCH, str(weight.type)
    other = _other_reader(weight, readers, roots)
    return (Reason.SHARED, other) if other else None


def _other_reader(weight: Node, readers: Mapping[Node, list[Node]], roots: set[Node]) -> str:
    """Who else reads the constant or a view of it: then it is kept as it is, for that. In words."""
    other = stray_reader(weight, readers, roots, lambda reader, value: value is weight and _reads_as_weight(reader, weight))
    kinds = {r.op.name for r in readers[weight]}
    return other or ("matmul" if "matmul" in kinds and len(kinds) > 1 else "")


def _reads_as_weight(reader: Node, weight: Node) -> bool:
    position = _POSITION.get(reader.op.name)
    if position is None or [i for i, x in enumerate(reader.inputs) if x is weight] != [position]:
        return False
    return reader.op.name != "matmul" or weight.tensor.rank == 2
