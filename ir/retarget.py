"""`retarget(graph, device)`: the same graph on another device.

y = relu(x) : f32[8]    -->    y = relu(x) : f32[8]@cuda:0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from .graph import Data, Graph, Node, order
from .types import TensorType

Move = Callable[[torch.Tensor], torch.Tensor]


def retarget(graph: Graph, device: str, move: Move | None = None) -> Graph:
    """The graph with every tensor on `device`: types, attributes that name a device, and the bodies of regions. Its memory plan is kept.

    The data of constants stays where it is; `move` brings it to the device, for a graph that is to run there.
    """
    return _Retargeter(device, move).graph(graph)


class _Retargeter:
    def __init__(self, device: str, move: Move | None) -> None:
        self._device, self._move = device, move
        self._bodies: dict[Graph, Graph] = {}
        self._moved: dict[Data, Data] = {}

    def graph(self, graph: Graph) -> Graph:
        new: dict[Node, Node] = {}
        for node in order(graph):
            new[node] = self._node(node, tuple(new[n] for n in node.inputs))
        return replace(
            graph,
            inputs=tuple(new[n] for n in graph.inputs),
            outputs=tuple(new[n] for n in graph.outputs),
            writes=tuple((new[target], new[value]) for target, value in graph.writes),
            arena={new[n]: slot for n, slot in graph.arena.items()},
            inplace={new[n]: new[target] for n, target in graph.inplace.items()},
        )

    def _node(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        kind = self._value(node.type)
        attrs = {name: self._device if name == "device" else self._value(value) for name, value in node.attrs.items()}
        if node.op.name == "constant":
            attrs["type"] = kind  # its data may be elsewhere
        return replace(node, inputs=inputs, attrs=MappingProxyType(attrs), type=kind)

    def _value(self, value: Any) -> Any:
        """A type or an attribute."""
        if type(value) is tuple:
            return tuple(self._value(v) for v in value)
        if isinstance(value, TensorType):
            return replace(value, device=self._device)
        if isinstance(value, torch.device):
            return torch.device(self._device)
        if isinstance(value, Graph):
            return self._body(value)
        return self._data(value) if isinstance(value, Data) else value

    def _body(self, body: Graph) -> Graph:
        """Regions that share a body go on sharing it."""
        if body not in self._bodies:
            self._bodies[body] = self.graph(body)
        return self._bodies[body]

    def _data(self, data: Data) -> Data:
        if self._move is None or data.value is None:
            return data
        if data not in self._moved:
            self._moved[data] = Data(data.name, self._move(data.value))
        return self._moved[data]
