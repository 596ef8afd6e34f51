"""`Call`: one ATen call as a converter sees it. A converter takes (call, *arguments in schema order), returns nodes, or None to decline."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
import torch.fx

from ..dims import Dim
from ..graph import Node
from ..ops import OPS
from ..types import TensorType
from .sizes import Sizes

Result = Union[Node, "tuple[Node | None, ...]", None]
Converter = Callable[..., Result]


@dataclass(frozen=True)
class Call:
    """An ATen call: the fx node, its arguments in schema order (fx values in `raw`), and the types of its results (tensors only).

    lookup: the node that an earlier fx node became.
    """

    node: torch.fx.Node
    raw: tuple[Any, ...]
    types: tuple[TensorType, ...]
    sizes: Sizes
    lookup: Callable[[torch.fx.Node], Node]

    @property
    def type(self) -> TensorType:
        return self.types[0]

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.types[0].shape

    def fake(self, argument: int) -> torch.Tensor:
        """The fake tensor passed as that argument."""
        return self.raw[argument].meta["val"]

    def used(self, item: int) -> bool:
        """Whether result number `item` of a tuple is read."""
        return any(u.target is operator.getitem and u.args[1] == item for u in self.node.users)

    def only(self, item: int) -> bool:
        """Whether that is the one result read."""
        return all(u.target is operator.getitem and u.args[1] == item for u in self.node.users)


def make(name: str, *operands: Any, **attrs: Any) -> Node:
    """A node of the op of that name."""
    return OPS[name](*operands, **attrs)


def cast(x: Node, dtype: torch.dtype) -> Node:
    return x if x.dtype == dtype else make("cast", x, dtype=dtype)


def reshape(x: Node, shape: tuple[Dim, ...]) -> Node:
    return x if x.shape == tuple(shape) else make("reshape", x, shape=tuple(shape))


def full(type: TensorType, value: Any) -> Node:
    return make("full", shape=type.shape, value=value, dtype=type.dtype, device=type.device)
