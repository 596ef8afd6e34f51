"""Kernels over sizes that are known at the launch: few binaries serve all of them, and which one is chosen by the sizes of a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import NATIVE

pytest.importorskip("triton")

import test_triton_attention as attention
import test_triton_contractions as contractions
from fake_driver import FakeGpu
from test_program import S, assert_same, fused, t
from test_triton_cross import crossed, run_from
from tilewright.codegen.kernel import Kernel
from tilewright.codegen.lower import lower
from tilewright.codegen.program import compile_program
from tilewright.codegen.triton import native, offline, templates
from tilewright.codegen.triton.runtime import load, run
from tilewright.codegen.triton.schedule import reach
from tilewright.codegen.triton.templates import build, is_large, widened
from tilewright.codegen.triton.tiles import Tiles
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, evaluate, symbol
from tilewright.ir.graph import Graph, graph_input
from tilewright.ir.ops import OPS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

ROWS, COLUMNS = symbol("m"), symbol("n")


def softmax_kernel(rows: SymbolRange, columns: SymbolRange | int) -> Kernel:
    x = graph_input("x", t(ROWS, columns if isinstance(columns, int) else COLUMNS))
    symbols = {"m": rows} | ({} if isinstance(columns, int) else {"n": columns})
    return lower(Graph("g", (x,), (OPS["softmax"](x, dim=-1),), symbols=symbols), "k_softmax")


# ---- 32 or 64 bits


@pytest.mark.parametrize(("rows", "columns", "wide", "may_be"), [
    (SymbolRange(), SymbolRange(), False, True),
    (SymbolRange(0, 1000), SymbolRange(0, 1000), False, False),
    (SymbolRange(0, 1000), 1 << 20, False, False),
    (SymbolRange(0, 4000), 1 << 20, False, True),
    (SymbolRange(2048), 1 << 20, True, False),
    (SymbolRange(0, 65_536), SymbolRange(0, 65_536), False, True),
])  # fmt: skip
def test_what_ranges_prove(rows: SymbolRange, columns: SymbolRange | int, wide: bool, may_be: bool) -> None:
    program = build(softmax_kernel(rows, columns))
    assert program.schedule.wide == wide and (widened(program) is not None) == may_be
    other = widened(program)
    if other is not None:
        assert "tl.int64" in other.source and "tl.int64" not in program.source
        assert other.launches[0].function == "k_softmax_wide" and other.launches[0].grid == program.launches[0].grid


def test_what_offsets_reach() -> None:
    kernel = softmax_kernel(SymbolRange(), SymbolRange())
    assert evaluate(reach(kernel), {"m": 30, "n": 50}) == 1500
    program = build(kernel)
    assert not is_large(program, {"m": 1 << 10, "n": 1 << 20}) and is_large(program, {"m": 1 << 11, "n": 1 << 20})
    assert not is_large(program, {"m": 0, "n": 1 << 20})


def test_positions_count_too() -> None:
    """Nothing in memory is large, but what a position is computed from may be, on either side of 0."""
    x = graph_input("x", t(S))
    far = OPS["mul"](OPS["iota"](length=S, dtype=torch.int64), 1 << 20)
    kernel = lower(Graph("g", (x,), (OPS["add"](x, OPS["cast"](far, dtype=torch.float32)),), symbols={"s": SymbolRange(0, 10_000)}), "k")
    values = torch.randn(5000)
    (out,) = run(build(kernel), {kernel.inputs[0].name: values}, {"s": 5000}).values()
    assert torch.equal(out, values + (torch.arange(5000) * (1 << 20)).float())


def test_memory_between_launches_counts() -> None:
    """The parts of a product's depth take more memory than its result."""
    x, w = graph_input("x", t(1 << 14, 1 << 10)), graph_input("w", t(1 << 14, 1 << 10))
    kernel = lower(Graph("g", (x, w), (ops.relu(ops.linear(x, w)),)), "k")
    tiles = Tiles(64, 64, 16)
    assert not build(kernel, tiles).schedule.wide and build(kernel, replace(tiles, split_k=16)).schedule.wide


@pytest.mark.parametrize("name", ["sizes", "some_rows"])
@pytest.mark.parametrize("tiles", [None, Tiles(16, 16, 16), Tiles(16, 16, 16, programs=2), Tiles(16, 16, 16, descriptors=True)])
def test_large_contractions(name: str, tiles: Tiles | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles is not None and not contractions.applies(contractions.KERNELS[name], tiles):
        pytest.skip("these tiles are not legal")
    monkeypatch.setattr(templates, "NARROW", 0)
    contractions.check(contractions.CASES[name], tiles)


@pytest.mark.parametrize("name", [n for n, case in attention.EVERY.items() if case.symbols])
def test_large_attentions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "NARROW", 0)
    attention.check(attention.EVERY[name])


# ---- launches


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    made = FakeGpu("sm_90")
    made.watch(monkeypatch)
    return made


def softmax(columns: object, **known: SymbolRange):
    x = graph_input("x", t(8, columns))
    return fused([x], [OPS["softmax"](x, dim=-1)], symbols=known or {"s": SymbolRange()})


@NATIVE
def test_few_binaries_serve_all_sizes(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, made = offline.compile_launch, list[str]()
    monkeypatch.setattr(offline, "compile_launch", lambda *parts: (made.append(parts[1].function), compiled(*parts))[1])
    graph = softmax(S)
    program = compile_program(graph, gpu.targets)
    assert sorted(made) == ["k0_softmax", "k0_softmax", "k0_softmax_wide"]
    for n in range(1, 51):
        assert_same(program, graph, [torch.randn(8, n)])
    assert len(made) == 3 and len(gpu.launches) == 50
    by_multiple = {one.function: one.words[2] % 16 == 0 for one in gpu.launches}
    assert len(by_multiple) == 2 and all((one.words[2] % 16 == 0) == by_multiple[one.function] for one in gpu.launches)


@NATIVE
def test_sizes_choose_the_width(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (native, templates):
        monkeypatch.setattr(module, "NARROW", 200)
    graph = softmax(S)
    program = compile_program(graph, gpu.targets)
    assert "((k0_softmax_at if s % 16 else k0_softmax_16_at) if 8*s < 200 else k0_softmax_wide_at)" in program.source
    for n in (3, 16, 24, 25, 32, 100):
        gpu.launches.clear()
        assert_same(program, graph, [torch.randn(8, n)])
        assert gpu.launches[0].name == ("k0_softmax_wide" if 8 * n >= 200 else "k0_softmax")


@NATIVE
def test_ranges_leave_one_binary(gpu: FakeGpu) -> None:
    program = compile_program(softmax(S, s=SymbolRange(0, 10_000, 32)), gpu.targets)
    assert "k0_softmax_at)" in program.source and "_16_at" not in program.source and "wide" not in program.source
    assert "ld.global.v4" in vectors(SymbolRange(0, 10_000, 32)) and "ld.global.v4" not in vectors(SymbolRange(0, 10_000, 2))


def vectors(columns: SymbolRange) -> str:
    (compiled,) = offline.compile_program(build(softmax_kernel(SymbolRange(0, 100), columns)), "sm_90")
    return compiled.stages["ptx"]


@NATIVE
def test_both_widths_are_compiled_for_a_gpu_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (native, templates):
        monkeypatch.setattr(module, "NARROW", 200)
    graph = softmax(S)
    _, code = crossed(graph)
    assert sorted(b.function for b in code.binaries.values()) == ["k0_softmax", "k0_softmax", "k0_softmax_wide"]
    gpu = FakeGpu("sm_90")
    gpu.watch(monkeypatch)
    program = run_from(graph, code, gpu)
    for n in (3, 100):
        assert_same(program, graph, [torch.randn(8, n)])
    assert [one.name for one in gpu.launches] == ["k0_softmax", "k0_softmax_wide"]
    without = {key: b for key, b in code.binaries.items() if not b.function.endswith("wide")}
    assert run_from(graph, replace(code, binaries=without), gpu).fallbacks[0].reason.startswith("there is no code for it")


KERNELS = {
    "softmax": softmax_kernel(SymbolRange(), SymbolRange()),
    "contraction": contractions.KERNELS["sizes"],
    "attention": lower(attention.graph(attention.EVERY["sizes known at run time"]), "k_attention"),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_a_size_of_one_may_be_a_constant(name: str, wide: bool) -> None:
    """Where Triton launches by itself, it compiles sizes of 1 in."""
    program = build(KERNELS[name])
    program = (widened(program) or program) if wide else program
    one = program.launches[0]
    function = load(program.source)[one.function]
    pointers = [offline._POINTERS[program.buffer(b).dtype] for b in one.buffers]
    names = [*program.kernel.sizes, *one.constants]
    signature = dict(zip(function.arg_names, [*pointers, *("constexpr" for _ in names)]))
    source = ASTSource(function, signature, dict.fromkeys(program.kernel.sizes, 1) | dict(one.constants), {})
    made = compile_source(source, target=GPUTarget("cuda", 90, 32), options=one.options(program.kernel))
    assert made.asm["cubin"]
