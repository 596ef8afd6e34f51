"""Recurrences through the Triton printer, in the interpreter (or on the GPU there is), against their meaning in float64; long scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowering import graph_of
from support import EVERYWHERE, NATIVE, on_gpu
from test_program import assert_same
from test_recurrence_kernels import CELLS, assert_close, layer

pytest.importorskip("triton")

from fake_driver import FakeGpu
from tilewright.codegen.kernel import Dot, Kernel, Last, Load, Previous, Reduce, Store, scalars
from tilewright.codegen.lower import lower
from tilewright.codegen.program import compile_program as compile_graph
from tilewright.codegen.triton.legalize import UnsupportedByTriton, rewritten
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.recurrence_tiles import RecurrenceTiles, find_layer, layer_tiles, refusal, space
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.templates import build
from tilewright.ir import ops
from tilewright.ir.dims import symbol
from tilewright.ir.graph import Graph, Stage, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.plan_memory import PlanMemory
from tilewright.search.tiles import schedules

DOT = RecurrenceTiles(16, 64, 64, num_stages=1)
SUM = RecurrenceTiles(2, 64, 64, 8, 1, "sum")
TILES = {
    "all in registers": DOT, "blocks of both": replace(DOT, block_n=16, block_k=16), "blocks of terms": replace(DOT, block_k=16),
    "blocks of units": replace(DOT, block_n=32), "wide": replace(DOT, block_n=16, block_k=32, wide=True),
    "sums in registers": SUM, "sums of blocks": replace(SUM, block_n=16, block_k=32), "sums, blocks of units": replace(SUM, block_n=4),
    "sums, wide": replace(SUM, block_m=1, block_k=16, wide=True),
}  # fmt: skip
VARIANTS = [{}, {"biased": False}, {"batch_first": True, "reverse": True}]


def check(graph: Graph, values: list[torch.Tensor], tiles: RecurrenceTiles | None = None, device: str = "cpu") -> None:
    """The kernel in the interpreter, or on a GPU, by the error rule."""
    kernel = lower(graph, "k_layer")
    eager, exact = interpret(graph, values), interpret(graph, values, torch.float64)
    sizes = {"t": eager[0].shape[0], "b": eager[0].shape[1]}
    buffers = {b.name: x.reshape(-1).to(device) for b, x in zip(kernel.inputs, values)}
    found = run(build(kernel, tiles), buffers, sizes, torch.device(device)).values()
    for ours, theirs, wide in zip(found, eager, exact, strict=True):
        if theirs.numel():
            assert_close(ours.cpu().view(theirs.shape), theirs, wide)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, variant: dict[str, Any]) -> None:
    check(*layer(cell, 4, 3, 21, **variant))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
def test_in_other_tiles(cell: str, tiles: str) -> None:
    """Sizes that no block divides, in both orders."""
    check(*layer(cell, 3, 5, 37, reverse=tiles.startswith("b")), TILES[tiles])


@on_gpu
@pytest.mark.parametrize("tiles", [None, *TILES])
@pytest.mark.parametrize("cell", CELLS)
def test_on_gpu(cell: str, tiles: str | None) -> None:
    for steps, rows in ((40, 33), (7, 1), (0, 3)):
        for reverse in (False, True):
            check(*layer(cell, steps, rows, 37, reverse=reverse), TILES.get(tiles or ""), "cuda")


@pytest.mark.parametrize("units", [1, 16, 64, 100])
@pytest.mark.parametrize("rows", [1, 17])
def test_units(rows: int, units: int) -> None:
    check(*layer("lstm", 2, rows, units))
    check(*layer("relu", 3, rows, units, reverse=True))


@EVERYWHERE
@pytest.mark.parametrize("tiles", [None, "blocks of both", "sums in registers", "sums of blocks", "wide"])
@pytest.mark.parametrize("reverse", [False, True])
def test_any_batch_and_length(tiles: str | None, reverse: bool, device: str) -> None:
    """One kernel for all sizes: no rows, no steps, odd and even numbers of them."""
    for steps, rows in [(0, 3), (3, 0), (1, 1), (2, 17)]:
        check(*layer("gru", steps, rows, 37, dynamic=True, reverse=reverse), TILES.get(tiles or ""), device)


def test_no_steps_and_no_batch() -> None:
    for steps, rows in [(0, 3), (0, 20)]:
        for reverse in (False, True):
            check(*layer("lstm", steps, rows, 37, reverse=reverse))
            check(*layer("lstm", steps, rows, 37, reverse=reverse), TILES["blocks of both"])


@EVERYWHERE
@pytest.mark.parametrize("tiles", ["all in registers", "blocks of both", "sums in registers", "sums of blocks"])
def test_what_is_not_finite_stays_in_its_row(tiles: str, device: str) -> None:
    graph, values = layer("lstm", 3, 4, 20)
    values[0][1, 2, 5], values[1][0, 0] = torch.nan, torch.inf
    check(graph, values, TILES[tiles], device)


NUMBERS = torch.randint(-9, 9, (2, 9001), generator=torch.Generator().manual_seed(0))
SCANS = {"cumsum": NUMBERS.float(), "cumprod": torch.where(NUMBERS < 0, -1.0, 1.0), "cumsum of integers": NUMBERS}


@EVERYWHERE
@pytest.mark.parametrize("name", SCANS)
def test_long_scans_carry_what_came_before(name: str, device: str) -> None:
    """Block by block: numbers whose sums and products are exact."""
    x = SCANS[name]
    kernel = lower(graph_of(lambda a: ops.op(name.split()[0])(a, dim=1), [x]), "k_scan")
    program = build(kernel)
    assert not program.schedule.persistent
    (found,) = run(program, {kernel.inputs[0].name: x.reshape(-1).to(device)}).values()
    assert torch.equal(found.cpu().view(x.shape), getattr(torch, name.split()[0])(x, 1))


# ---- what is printed


def source(cell: str, steps: int, rows: int, units: int, tiles: RecurrenceTiles | None = None, **attrs: Any) -> str:
    return build(lower(layer(cell, steps, rows, units, **attrs)[0], "k_layer"), tiles).source


def loops(text: str) -> list[int]:
    """How deep each loop of a function lies."""
    return [len(line) - len(line.lstrip()) for line in text.splitlines() if line.lstrip().startswith("for ")]


def test_small_layers_stay_in_registers() -> None:
    program = build(lower(layer("lstm", 9, 64, 32)[0], "k_layer"))
    assert loops(program.source) == [4] and "barrier" not in program.source and not program.scratch
    assert "mask" not in program.source and program.source.count("tl.dot(h, ") == 4


def test_large_layers_leave_their_states_in_memory() -> None:
    program = build(lower(layer("lstm", 9, 20, 256)[0], "k_layer"))
    assert loops(program.source) == [4, 4, 8, 12, 4] and program.source.count("tl.debug_barrier()") == 2
    assert [b.size for b in program.scratch] == [2 * 20 * 256] * 2 and program.launches[0].grid == (2,)


def test_weights_and_biases_of_few_rows_are_read_once() -> None:
    before, loop = source("lstm", 9, 1, 64).split("    for ")
    assert before.count("tl.load(") == 10 and loop.split("tl.store")[0].count("tl.load(") == 4


def test_backwards() -> None:
    assert "for turn in range(0, 9):\n        step = 8 - turn\n" in source("relu", 9, 20, 16, reverse=True)
    assert "    for step in range(0, t):\n" in source("relu", 9, 20, 16, replace(DOT, block_n=16, block_k=16), dynamic=True)


# ---- through the pipeline


def both_directions(device: str, rows: int, units: int) -> Graph:
    """Two layers on slices of one product, and what follows."""
    columns = 3 * units
    shapes = {"x": (4, rows, 6), "w": (2 * columns, 6), "u": (columns, units), "h": (2, rows, units)}
    x, w_in, w, h = (graph_input(name, TensorType(torch.float32, shape, device)) for name, shape in shapes.items())
    products = ops.linear(x, w_in)
    halves = [ops.slice(products, dim=2, start=columns * i, stop=columns * (i + 1)) for i in range(2)]
    states = [ops.select(h, dim=0, index=i) for i in range(2)]
    layers = [ops.gru_layer(g, s, w, reverse=bool(i)) for i, (g, s) in enumerate(zip(halves, states))]
    out = ops.cat(*(ops.item(n, index=0) for n in layers), dim=2)
    return make_graph("g", [x, w_in, w, h], [out, *(ops.item(n, index=1) for n in layers)], stage=Stage.CANONICAL)


def test_graphs_on_a_gpu_have_kernels_of_them() -> None:
    fused = FuseRegions().run(both_directions("cuda:0", 3, 16))
    regions = [n for n in order(fused) if n.op.name == "region" and "gru" in n.attrs["label"]]
    programs = [build(lower(r.attrs["body"], "k_layer")) for r in regions]
    assert len(programs) == 2 and ["turn" in p.source for p in programs] == [False, True]


@NATIVE
def test_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are read where they lie, and the host program has memory for states."""
    gpu = FakeGpu("sm_90")
    gpu.watch(monkeypatch)
    graph = PlanMemory().run(FuseRegions().run(both_directions("cpu", 5, 80)))
    program = compile_graph(graph, gpu.targets)
    assert not [f for f in program.fallbacks if "gru" in f.node]
    assert_same(program, graph, [torch.randn(n.shape) / 4 for n in graph.inputs])
    assert sum("gru" in launch.name for launch in gpu.launches) == 2


@NATIVE
def test_what_is_too_large_runs_by_eager_and_is_listed() -> None:
    graph, values = layer("tanh", 2, 5, 1025)
    fused = PlanMemory().run(FuseRegions().run(replace(graph, stage=Stage.CANONICAL)))
    program = compile_graph(fused, FakeGpu("sm_90").targets)
    (fallback,) = program.fallbacks
    assert "rnn_layer" in fallback.node and "a program computes all units of its rows: 1025 <= 1024" in fallback.reason
    assert_same(program, fused, values)


# ---- what is refused


def made(**changes: Any) -> Kernel:
    return replace(lower(layer("lstm", 4, 20, 32)[0], "k_layer"), **changes)


def following(change: Callable[[Dot], Any]) -> Kernel:
    """The kernel with other products."""
    kernel = made()
    assert kernel.recurrence is not None
    states = kernel.recurrence.states
    stores = [Store("", symbol("row"), s.following) for s in states]
    dots = {v: change(v) for v in scalars(stores) if isinstance(v, Dot)}
    new = [replace(s, following=n.value) for s, n in zip(states, rewritten(stores, dots))]
    known: dict[Any, Any] = {old.following: s.following for old, s in zip(states, new)}
    known |= {s.value: Last(s.value.dtype, new[states.index(s.value.state)]) for s in kernel.stores if isinstance(s.value, Last)}
    stores = tuple(replace(s, value=known[s.value]) for s in kernel.stores)
    return replace(kernel, stores=stores, recurrence=replace(kernel.recurrence, states=tuple(new)))


def by_row(dot: Dot) -> Dot:
    weights = dot.right
    assert isinstance(weights, Load)
    return replace(dot, right=replace(weights, index=weights.index + symbol("row")))


REFUSED: dict[str, Callable[[], Kernel]] = {
    "an output lies over an operand": lambda: made(inplace=(("out", "x0"),)),
    "not of the states before and weights of each unit": lambda: following(by_row),
    "no state is multiplied": lambda: following(lambda dot: Previous(dot.dtype, "h", "unit")),
    "something but products of states is summed up": lambda: following(lambda dot: Reduce(dot.dtype, "sum", dot.right, dot.axes)),
    "known at the launch only": lambda: made(axes=tuple(replace(a, extent=symbol("n")) for a in made().axes)),
    "a program computes all units of its rows: 1025 <= 1024": lambda: lower(layer("relu", 1, 20, 1025)[0], "k_layer"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(REFUSED[reason]())


@pytest.mark.parametrize(("tiles", "reason"), [
    (replace(DOT, walk="none"), "walk is one of dot, sum, not none"),
    (replace(DOT, block_m=8), "block_m is one of 16, 32, 64, 128, not 8"),
    (replace(DOT, block_m=128, block_n=128, num_warps=1), "sums and states fit half of the registers"),
    (replace(SUM, block_m=16, num_warps=1), "products fit half of the registers"),
])  # fmt: skip
def test_tiles_refused(tiles: RecurrenceTiles, reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(made(), tiles)


@pytest.mark.parametrize("walk", ["dot", "sum"])
def test_tiles_can_be_enumerated(walk: str) -> None:
    pytest.importorskip("ortools")
    found = find_layer(made())
    offered = schedules(space(found, walk, "sm_90"))
    assert len(offered) > 100 and all(refusal(found, RecurrenceTiles(walk=walk, **values), "sm_90") is None for values in offered)


@pytest.mark.parametrize(("rows", "units"), [(1, 16), (1, 64), (4, 64), (2, 1000), (20, 64), (20, 1024), (5000, 128)])
def test_default_tiles_are_legal(rows: int, units: int) -> None:
    for cell in ("lstm", "tanh"):
        kernel = lower(layer(cell, 1, rows, units)[0], "k_layer")
        for target in ("sm_80", "sm_90", "gfx942"):
            assert refusal(find_layer(kernel), layer_tiles(kernel), target) is None, (cell, target)


# ---- for GPUs that are not here


@pytest.mark.parametrize(("target", "cell", "rows", "units"), [
    ("sm_80", "lstm", 64, 32), ("sm_80", "lstm", 64, 256), ("sm_80", "lstm", 1, 64), ("sm_90", "gru", 64, 128), ("sm_90", "tanh", 64, 512),
    ("sm_90", "gru", 1, 512), ("gfx942", "lstm", 64, 256), ("gfx942", "gru", 64, 32), ("gfx942", "gru", 2, 32),
])  # fmt: skip
def test_default_tiles_do_not_spill(target: str, cell: str, rows: int, units: int) -> None:
    (compiled,) = compile_program(build(lower(layer(cell, 8, rows, units)[0], "k_layer")), target)
    assert compiled.spills == 0 and compiled.binary
