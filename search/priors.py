"""Priors: which layers matter, told by one run or by the weights alone. They only prune, and only where nothing better is known.

    LIM(block)  = -mean over tokens of cos(x_in, x_out)       large: the block changes what it reads; all its layers matter
    ZD(weight)  = share of weights with |z| > 1               small: few weights carry it; it matters       N(0, 1): 0.3173

z is how many standard deviations a weight is from the mean of its matrix, on either side. After "Layer-Wise Quantization: A Pragmatic and
Effective Method for Quantizing LLMs Beyond Integer Bit-Levels" (Dumitru et al., 2024), whose ZD counts one side: 0.1587.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from ..ir.analysis.blocks import Block, blocks
from ..ir.graph import Graph, Node
from ..ir.types import TensorType, same_type
from ..passes.layers import Layer
from ..passes.weights import is_constant
from .replay import Replay

Key = TypeVar("Key")

SHARE = 0.25
"""Of the blocks, and of the weights, that count as the most important."""

LEAST_BITS = 4.0
"""In those, no format of fewer bits for a weight is tried."""


def layer_input_modification(graph: Graph, replays: Sequence[Replay]) -> dict[Block, float]:
    """LIM of each repeated block with a result like one of its operands, on average over all tokens of all runs."""
    found: dict[Block, float] = {}
    for block in (block for blocks_alike in blocks(graph) for block in blocks_alike):
        ends = _stream(block)
        if ends is not None:
            cosines = [_cosines(replay.value(ends[0]), replay.value(ends[1])) for replay in replays]
            found[block] = -torch.cat(cosines).mean().item()
    return found


def _stream(block: Block) -> tuple[Node, Node] | None:
    """What enters a block and what it makes of that."""
    for result in block.results[::-1]:
        if isinstance(result.type, TensorType) and result.type.dtype.is_floating_point and result.type.rank:
            into = next((x for x in block.operands if not is_constant(x) and same_type(x.type, result.type)), None)
            if into is not None:
                return into, result
    return None


def _cosines(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).flatten()


def z_share(weight: torch.Tensor) -> float:
    """ZD of a weight, on both sides."""
    wide = weight.double()
    return ((wide - wide.mean()).abs() > wide.std(correction=0)).double().mean().item()


def important(graph: Graph, layers: Sequence[Layer], replays: Sequence[Replay]) -> dict[str, str]:
    """Name of a layer -> the prior by which it is among the most important."""
    by_share = {layer.name: z_share(layer.matrix()) for layer in layers}
    found = dict.fromkeys(_first(by_share), "ZD")
    modification = layer_input_modification(graph, replays)
    chosen = {node for block in _first({block: -m for block, m in modification.items()}) for node in block.nodes}
    return found | {layer.name: "LIM" for layer in layers if any(reader in chosen for reader in layer.readers)}


def _first(measures: Mapping[Key, float]) -> list[Key]:
    """The quarter with the least."""
    return sorted(measures, key=lambda key: measures[key])[: int(SHARE * len(measures))]
