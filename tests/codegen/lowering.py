"""A kernel, evaluated by the reference, against the meaning of the body it was lowered from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tilewright.codegen.kernel import Kernel
from tilewright.codegen.lower import lower
from tilewright.codegen.reference import run
from tilewright.ir.dims import SymbolRange
from tilewright.ir.graph import Graph, Node, graph_input, make_graph
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.ir.types import TensorType

Build = Callable[..., "Node | tuple[Node, ...]"]


@dataclass(frozen=True)
class Case:
    """What `build` makes of inputs like `tensors`. shapes: those of its inputs, which may name sizes; symbols: what is known of these."""

    build: Build
    tensors: tuple[torch.Tensor, ...]
    shapes: tuple[Any, ...] | None = None
    symbols: dict[str, SymbolRange] | None = None


class Cases(dict[str, Case]):
    """Name -> case."""

    def add(self, name: str, build: Build, *tensors: torch.Tensor, shapes: Any = None, symbols: Any = None) -> None:
        self[name] = Case(build, tensors, shapes, symbols)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values, the same for equal shapes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def graph_of(build: Build, xs: Sequence[torch.Tensor], shapes: Sequence[Any] | None = None, symbols: Any = None) -> Graph:
    """The graph that `build` makes over inputs like `xs`; `shapes` may name sizes."""
    shapes = shapes or [tuple(x.shape) for x in xs]
    inputs = []
    for k, (x, shape) in enumerate(zip(xs, shapes)):
        strides = None if x.is_contiguous() else x.stride()
        inputs.append(graph_input(f"x{k}", TensorType(x.dtype, tuple(shape)), strides))
    outs = build(*inputs)
    return make_graph("g", inputs, outs if isinstance(outs, tuple) else (outs,), symbols=symbols or {})


def memory(x: torch.Tensor) -> torch.Tensor:
    """The elements a tensor spans, first to last in memory."""
    if x.numel() == 0:
        return x.reshape(-1)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return x.as_strided((span,), (1,))


def outputs(kernel: Kernel, graph: Graph, xs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
    flat = run(kernel, [memory(x) for x in xs], sizes)
    shapes = [x.shape for x in interpret(graph, xs)]
    return [x.reshape(s) for x, s in zip(flat, shapes)]


def check(build: Build, *xs: torch.Tensor, shapes: Any = None, symbols: Mapping[str, SymbolRange] | None = None) -> Kernel:
    """Lowers, runs, and compares by the error rule: no further from float64 than twice eager, up to a few ulp."""
    graph = graph_of(build, xs, shapes, symbols)
    kernel = lower(graph, "k")
    got = outputs(kernel, graph, xs, bind_sizes(graph, xs))
    for ours, eager, exact in zip(got, interpret(graph, xs), interpret(graph, xs, torch.float64)):
        assert ours.dtype == eager.dtype
        assert_close(ours, eager, exact)
    return kernel


def assert_close(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    if not eager.is_floating_point():
        assert torch.equal(ours, eager)
        return
    wide, theirs = ours.double(), eager.double()
    special = ~torch.isfinite(theirs)
    torch.testing.assert_close(wide[special], theirs[special], rtol=0, atol=0, equal_nan=True)
    tiny = 8 * torch.finfo(eager.dtype).eps * (1 + exact.double().abs())
    budget = 2 * (theirs - exact.double()).abs() + tiny
    assert ((wide - exact.double()).abs() <= budget)[~special].all(), f"{ours} is not {exact}"
