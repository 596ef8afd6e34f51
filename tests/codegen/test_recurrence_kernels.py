"""Recurrences from lowering to machine code, against the interpreter and float64: every cell, size, order, width and thread count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import NATIVE
from tilewright.codegen.cpp.recurrence import print_recurrence
from tilewright.codegen.cpp.schedule import CpuTarget
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.kernel import Dot, Kernel, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.codegen.program import compile_program
from tilewright.codegen.reference import run as reference
from tilewright.codegen.target import Compiled
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Graph, Stage, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.plan_memory import PlanMemory

CELLS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "lstm": ("lstm_layer", 4, 2, {}), "gru": ("gru_layer", 3, 1, {}), "tanh": ("rnn_layer", 1, 1, {}),
    "relu": ("rnn_layer", 1, 1, {"activation": "relu"}),
}  # fmt: skip
LEVELS = {64: "native", 32: "x86-64-v3", 16: "x86-64-v2"}


def layer(
    cell: str, steps: int, batch: int, units: int, biased: bool = True, dynamic: bool = False, **attrs: Any
) -> tuple[Graph, list[torch.Tensor]]:
    """A graph of one recurrence and values for its inputs."""
    name, gates, states, own = CELLS[cell]
    torch.manual_seed(units)

    def shapes(steps: Any, batch: Any) -> list[tuple[Any, ...]]:
        lead = (batch, steps) if attrs.get("batch_first") else (steps, batch)
        return [(*lead, gates * units), *[(batch, units)] * states, (gates * units, units), *[(gates * units,)] * biased]

    values = [torch.randn(s) for s in shapes(steps, batch)]
    values[states + 1] /= units**0.5
    symbols = {"t": SymbolRange(0, 99), "b": SymbolRange(0, 99)} if dynamic else {}
    typed = shapes(symbol("t"), symbol("b")) if dynamic else shapes(steps, batch)
    inputs = [graph_input(f"x{i}", TensorType(torch.float32, s)) for i, s in enumerate(typed)]
    node = ops.op(name)(*inputs, **own, **attrs)
    return make_graph("g", inputs, [ops.item(node, index=i) for i in range(states + 1)], symbols=symbols), values


def check(
    graph: Graph, kernel: Kernel, values: list[torch.Tensor], target: CpuTarget | None = None, threads: tuple[int, ...] = (1, 2)
) -> None:
    """The compiled kernel by the error rule, and the same numbers whatever the number of threads."""
    (made,) = compile_kernels([kernel], target)
    assert isinstance(made, Compiled), made.reason
    eager, exact = interpret(graph, values), interpret(graph, values, torch.float64)
    sizes = {"t": eager[0].shape[0], "b": eager[0].shape[1]}
    found = []
    for count in threads:
        outs = [torch.full_like(e, torch.nan) for e in eager]
        made.launch(*(x.data_ptr() for x in (*values, *outs)), *(sizes[s] for s in kernel.sizes), count)
        found.append(outs)
        for ours, theirs, wide in zip(outs, eager, exact):
            assert_close(ours, theirs, wide)
    for outs in found:
        torch.testing.assert_close(outs, found[0], rtol=0, atol=0, equal_nan=True)


def assert_close(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """The largest error is at most twice eager's largest, up to a few ulp: sums are in another order."""
    special = ~torch.isfinite(eager)
    torch.testing.assert_close(ours[special], eager[special], rtol=0, atol=0, equal_nan=True)
    errors = [(x.double() - exact)[~special].abs().max().item() if not special.all() else 0.0 for x in (ours, eager)]
    scale = exact[~special].abs().max().item() if not special.all() else 0.0
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * (1 + scale), errors


@pytest.mark.parametrize("variant", [{}, {"biased": False}, {"batch_first": True, "reverse": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_reference(cell: str, variant: dict[str, Any]) -> None:
    graph, values = layer(cell, 3, 2, 5, **variant)
    found = reference(lower(graph, "k"), [x.reshape(-1) for x in values], {})
    for ours, theirs in zip(found, interpret(graph, values)):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)


@NATIVE
@pytest.mark.parametrize("variant", [{}, {"biased": False}, {"batch_first": True}, {"reverse": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, variant: dict[str, Any]) -> None:
    graph, values = layer(cell, 7, 3, 37, **variant)
    check(graph, lower(graph, "k"), values)


@NATIVE
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
def test_any_batch_and_length(cell: str) -> None:
    """One kernel for all sizes: no rows, no steps, one of each, more rows than a tile has."""
    kernel = None
    for steps, batch in [(0, 3), (3, 0), (1, 1), *((2, n) for n in range(1, 10)), (5, 19)]:
        graph, values = layer(cell, steps, batch, 24, dynamic=True)
        kernel = kernel or lower(graph, "k")
        check(graph, kernel, values)


@NATIVE
@pytest.mark.parametrize("cell", ["lstm", "gru", "relu"])
@pytest.mark.parametrize("units", [1, 15, 16, 100, 160])
def test_units(cell: str, units: int) -> None:
    graph, values = layer(cell, 4, 5, units)
    check(graph, lower(graph, "k"), values, threads=(1, 2, 3, 4))


@NATIVE
@pytest.mark.parametrize("cell, batch, units", [("lstm", 2, 256), ("lstm", 16, 128), ("gru", 1, 400), ("gru", 9, 200), ("tanh", 3, 512)])
def test_shared_by_threads(cell: str, batch: int, units: int) -> None:
    """Large enough that threads share the rows, the units, or both."""
    graph, values = layer(cell, 9, batch, units)
    check(graph, lower(graph, "k"), values, threads=(1, 2, 3, 4, 7))


@NATIVE
@pytest.mark.parametrize("width", LEVELS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize("batch", [10, 12, 21])
def test_rows_that_threads_group_otherwise(cell: str, width: int, batch: int) -> None:
    graph, values = layer(cell, 9, batch, 160)
    check(graph, lower(graph, "k"), values, CpuTarget(width, level=LEVELS[width]), threads=(1, 2, 3, 5))


@NATIVE
@pytest.mark.parametrize("width", LEVELS)
@pytest.mark.parametrize("cell", CELLS)
def test_vector_widths(cell: str, width: int) -> None:
    graph, values = layer(cell, 4, 7, 21)
    check(graph, lower(graph, "k"), values, CpuTarget(width, level=LEVELS[width]))


@NATIVE
def test_what_is_not_finite_stays_in_its_row() -> None:
    graph, values = layer("lstm", 3, 4, 20)
    values[0][1, 2, 5], values[1][0, 0] = torch.nan, torch.inf
    check(graph, lower(graph, "k"), values)


def test_printed() -> None:
    graph, _ = layer("gru", 4, 2, 32)
    kernel = lower(graph, "k_gru", "gru_layer")
    assert sum(isinstance(v, Dot) for v in scalars(kernel.stores)) == 3
    text = print_recurrence(kernel, CpuTarget(32))
    assert text.count("fetch(") == 3 and "inverse(1.0f + exp(" in text
    assert "recurrence<3, 1, 8, float>(2, 32, 4, false, threads, pack, start, next2, finish2);" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_refused_for_its_dtype(dtype: torch.dtype) -> None:
    types = [TensorType(dtype, s) for s in ((3, 2, 12), (2, 4), (12, 4))]
    inputs = [graph_input("x", t) for t in types]
    node = ops.gru_layer(*inputs)
    with pytest.raises(LoweringError, match="dtype"):
        lower(make_graph("g", inputs, [ops.item(node, index=i) for i in range(2)]), "k")


def test_refused_where_the_units_are_not_known() -> None:
    n = symbol("n")
    inputs = [graph_input("x", TensorType(torch.float32, s)) for s in ((3, 2, n), (2, n), (n, n))]
    node = ops.rnn_layer(*inputs)
    graph = make_graph("g", inputs, [ops.item(node, index=i) for i in range(2)], symbols={"n": SymbolRange(1, 9)})
    with pytest.raises(LoweringError, match="units"):
        lower(graph, "k")


@NATIVE
@pytest.mark.parametrize("targets", [None, {}], ids=["kernels", "eager"])
def test_columns_of_one_product_are_read_in_place(targets: Any) -> None:
    """Both directions from slices of one product, a state given as a slice: no copies."""
    x, w_in, w, h = (graph_input(n, TensorType(torch.float32, s)) for n, s in zip("xwuh", ((5, 3, 6), (96, 6), (48, 16), (2, 3, 16))))
    products = ops.linear(x, w_in)
    halves = [ops.slice(products, dim=2, start=48 * i, stop=48 * i + 48) for i in range(2)]
    states = [ops.select(h, dim=0, index=i) for i in range(2)]
    layers = [ops.gru_layer(g, s, w, reverse=bool(i)) for i, (g, s) in enumerate(zip(halves, states))]
    out = ops.cat(*(ops.item(n, index=0) for n in layers), dim=2)
    graph = make_graph("g", [x, w_in, w, h], [out, *(ops.item(n, index=1) for n in layers)], stage=Stage.CANONICAL)
    fused = PlanMemory().run(FuseRegions().run(graph))
    program = compile_program(fused) if targets is None else compile_program(fused, targets)
    values = [torch.randn(n.shape) for n in graph.inputs]
    for ours, theirs in zip(program(values), interpret(graph, values)):
        torch.testing.assert_close(ours, theirs)
    if targets is None:
        regions = [n for n in order(fused) if n.op.name == "region" and "gru" in n.attrs["label"]]
        assert [r.attrs["body"].inputs[0].attrs["strides"] for r in regions] == [(288, 96, 1)] * 2
        assert not program.fallbacks
    else:
        assert any("gru_layer" in f.node for f in program.fallbacks)
