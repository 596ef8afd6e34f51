"""Contractions through lowering and the Triton printer: every walk gives what torch gives, and is what a person would write."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from contractions import CASES, F32, HAND, HandCase, K, N, a, dot, i, j, load
from lowering import Case, assert_close, graph_of, memory
from support import EVERYWHERE, on_gpu

pytest.importorskip("triton")

from tilewright.codegen.kernel import Axis, Kernel, Reduce, Store
from tilewright.codegen.lower import lower
from tilewright.codegen.triton.legalize import UnsupportedByTriton
from tilewright.codegen.triton.offline import TARGETS, compile_program
from tilewright.codegen.triton.product import find_product, is_contraction, without_matrix
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import Tiles, default_tiles, refusal, space
from tilewright.ir import ops
from tilewright.ir.dims import symbol
from tilewright.ir.graph import Graph, graph_input
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.ir.types import TensorType

TILES: dict[str, Tiles | None] = {
    "default": None,
    "blocks": Tiles(16, 16, 16, group_m=2),
    "wide": Tiles(16, 32, 32, group_m=1, wide=True),
    "parts": Tiles(16, 16, 16, split_k=2),
    "sums": Tiles(4, 8, 32, walk="sum"),
    "row_sums": Tiles(1, 16, 16, split_k=2, walk="sum"),
}


def kernel_of(case: Case) -> Kernel:
    return lower(graph_of(case.build, case.tensors, case.shapes, case.symbols), "k")


def check(case: Case, tiles: Tiles | None, device: str = "cpu") -> None:
    graph = graph_of(case.build, case.tensors, case.shapes, case.symbols)
    kernel = lower(graph, "k")
    inputs = {b.name: memory(t).to(device) for b, t in zip(kernel.inputs, case.tensors)}
    outputs = run(build(kernel, tiles), inputs, bind_sizes(graph, case.tensors), torch.device(device)).values()
    for ours, eager, exact in zip(outputs, interpret(graph, case.tensors), interpret(graph, case.tensors, torch.float64), strict=True):
        assert ours.dtype == eager.dtype
        assert_close(ours.cpu().reshape(eager.shape), eager, exact)


def check_hand(case: HandCase, tiles: Tiles | None, device: str = "cpu") -> None:
    inputs = {k: v.reshape(-1).clone().to(device) for k, v in case.inputs.items()}
    outputs = run(build(case.kernel, tiles), inputs, {}, torch.device(device)).values()
    exact = case.expected(**{k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()})
    for ours, eager, wide in zip(outputs, case.expected(**case.inputs), exact, strict=True):
        error, usual = ((v.cpu().double().reshape(wide.shape) - wide).abs().max() for v in (ours, eager))
        assert error <= 2 * usual + 8 * torch.finfo(F32).eps * (1 + wide.abs().max())


def applies(kernel: Kernel, tiles: Tiles | None) -> bool:
    if tiles is None:
        return True
    return is_contraction(without_matrix(kernel)) and refusal(kernel, tiles) is None


KERNELS = {name: kernel_of(case) for name, case in CASES.items()}
GRAPHS = [(c, t) for c in CASES for t in TILES if applies(KERNELS[c], TILES[t])]
HANDS = [(c, t) for c in HAND for t in TILES if applies(HAND[c].kernel, TILES[t])]


@pytest.mark.parametrize(("name", "tiles"), GRAPHS)
def test_lowered(name: str, tiles: str) -> None:
    check(CASES[name], TILES[tiles])


@pytest.mark.parametrize(("name", "tiles"), HANDS)
def test_written_by_hand(name: str, tiles: str) -> None:
    check_hand(HAND[name], TILES[tiles])


@on_gpu
@pytest.mark.parametrize(("name", "tiles"), [*GRAPHS, *HANDS])
def test_on_gpu(name: str, tiles: str) -> None:
    if name in CASES:
        check(CASES[name], TILES[tiles], "cuda")
    else:
        check_hand(HAND[name], TILES[tiles], "cuda")


def test_every_walk_is_tried() -> None:
    assert {t for _, t in GRAPHS} == set(TILES)
    assert {c for c, t in HANDS if t == "blocks"} >= {"gate_and_up", "dequantized", "gathered", "update"}


@EVERYWHERE
def test_hostile_values_outside_the_depth_do_not_matter(device: str) -> None:
    """What lies behind the last column of a row is another row: NaN there must not reach a sum."""
    a, w = torch.ones(16, 20), torch.ones(16, 20)
    a[1:], w[1:] = float("nan"), float("inf")
    graph = graph_of(lambda a, w: ops.relu(ops.linear(a, w)), (a, w))
    for tiles in (Tiles(16, 16, 16), Tiles(16, 16, 32), Tiles(4, 4, 16, walk="sum")):
        (out,) = run(build(lower(graph, "k"), tiles), {"x0": a.reshape(-1).to(device), "x1": w.reshape(-1).to(device)}).values()
        assert out[0] == 20 and torch.isnan(out.reshape(16, 16)[1:]).all()


# ---- what is printed


def source(name: str, tiles: Tiles) -> str:
    kernel = HAND[name].kernel if name in HAND else KERNELS[name]
    return build(kernel, tiles).source


def test_blocks_that_tile_have_no_masks() -> None:
    assert "mask" not in source("whole", Tiles(16, 16, 16))
    assert re.findall(r"mask_\w+ =", source("layer_f32", Tiles(16, 16, 8 * 2))) == ["mask_m =", "mask_n_down =", "mask_k =", "mask_n ="]


def test_sizes_that_blocks_divide_have_no_masks() -> None:
    b = symbol("b")
    x, w = (graph_input(s, TensorType(F32, shape)) for s, shape in (("x", (b, 32, 64)), ("w", (32, 64))))
    kernel = lower(Graph("g", (x, w), (ops.relu(ops.linear(x, w)),)), "k")
    assert "mask" not in build(kernel, Tiles(32, 16, 16)).source and "mask_m = m < 32*b" in build(kernel, Tiles(64, 16, 16)).source


def test_narrow_operands_stay_narrow() -> None:
    text = source("layer_bf16", Tiles(16, 16, 16))
    assert "x0 = tl.load(x0_ptr + 40*m + k, mask_m & mask_k, other=0.0)\n" in text
    assert "tl.dot(x0, x1.T, acc, out_dtype=tl.float32)" in text
    assert 'tl.dot(x0, x1.T, acc, input_precision="ieee", out_dtype=tl.float32)' in source("layer_f32", Tiles(16, 16, 16))
    assert "x0.to(tl.bfloat16)" in source("rounded", Tiles(16, 16, 16)), "an operand that is rounded is multiplied as it is rounded"
    assert "tl.full([BLOCK_M, BLOCK_N], 0, tl.int32)" in source("bytes", Tiles(16, 16, 32))


def test_operands_are_loaded_along_memory() -> None:
    assert "tl.dot(x0, x1, acc" in source("matmul_20x5_by_5x18", Tiles(16, 16, 16))
    assert "tl.dot(x0.T, x1, acc" in source("turned", Tiles(16, 16, 16))
    assert "tl.dot(x0.T, x1.T, acc" in source("both_turned", Tiles(16, 16, 16))


def test_two_contractions_share_a_loop_and_an_operand() -> None:
    text = source("gate_and_up", Tiles(16, 16, 16))
    assert text.count("for ") == 1 and text.count("tl.load(x_ptr") == 1 and text.count("tl.dot(") == 2


def test_depth_that_is_one_block_has_no_loop() -> None:
    assert "for " not in source("whole", Tiles(16, 16, 32))


def test_few_rows_are_summed_without_matrix_units() -> None:
    kernel = KERNELS["one_row"]
    assert default_tiles(kernel).walk == "sum" and "tl.dot" not in build(kernel).source


def test_a_depthwise_convolution_is_a_reduction() -> None:
    kernel = KERNELS["conv_1_1_1_4"]
    assert not is_contraction(without_matrix(kernel)) and "XBLOCK" in build(kernel).source


def test_parts_of_the_depth_are_added_in_the_same_order() -> None:
    case, tiles = CASES["layer_f32"], Tiles(16, 16, 16, split_k=2)
    program = build(kernel_of(case), tiles)
    assert [launch.function for launch in program.launches] == ["k_parts", "k"] and program.launches[0].grid == (6, 2)
    assert [(b.name, b.size) for b in program.scratch] == [("sums", 2 * 33 * 21)] and "atomic" not in program.source


# ---- legality


def test_programs_fill_the_device() -> None:
    large, tall, dtype = (2048, 2048), (64, 8192), torch.bfloat16

    def tiles(m: int, n: int, k: int) -> Tiles:
        x, w = (graph_input(s, TensorType(dtype, shape)) for s, shape in (("x", (m, k)), ("w", (n, k))))
        return default_tiles(lower(Graph("g", (x, w), (ops.relu(ops.linear(x, w)),)), "k"))

    assert tiles(*large, 2048).block_m == 128 and tiles(*large, 2048).split_k == 1
    assert tiles(64, 512, tall[1]).split_k > 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_start_is_legal_everywhere(target: str) -> None:
    for kernel in (*(c.kernel for c in HAND.values()), *(kernel for kernel, _ in _compiled().values())):
        assert refusal(kernel, default_tiles(kernel), target) is None, kernel.name


REFUSED = {
    "block_m is one of 16, 32, 64, 128, 256, not 8": Tiles(8, 16, 16),
    "block_k is one of 16, 32, 64, 128, 256, not 24": Tiles(16, 16, 24),
    "num_warps is one of 1, 2, 4, 8, 16, not 64": Tiles(16, 16, 16, num_warps=64),
    "the sums fit half of the registers": Tiles(256, 256, 16, num_warps=2),
    "every program has a part of the depth": Tiles(16, 16, 16, split_k=8),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_illegal_tiles_are_refused(reason: str) -> None:
    kernel = KERNELS["layer_f32"]
    assert reason in (refusal(kernel, REFUSED[reason]) or "")
    with pytest.raises(UnsupportedByTriton, match="these tiles"):
        build(kernel, REFUSED[reason])


def test_shared_memory_depends_on_the_target() -> None:
    kernel, tiles = KERNELS["layer_bf16"], Tiles(128, 128, 64, num_warps=8, num_stages=5)
    assert refusal(kernel, tiles) is None and refusal(kernel, tiles, "sm_90") is None
    assert "shared memory" in (refusal(kernel, tiles, "gfx942") or "")


def test_registers_depend_on_the_target() -> None:
    kernel, tiles = KERNELS["layer_f32"], Tiles(128, 64, 64, num_stages=2)
    assert refusal(kernel, tiles) is None and refusal(kernel, tiles, "gfx942") is None
    assert "sums and operands" in (refusal(kernel, tiles, "sm_90") or "")


def test_columns_that_are_reduced_are_one_block() -> None:
    kernel = HAND["normed"].kernel
    assert "all columns that are reduced" in (refusal(kernel, Tiles(16, 16, 16)) or "")
    assert default_tiles(kernel).block_n == 32
    assert "not split" in (refusal(kernel, Tiles(16, 32, 16, split_k=2)) or "")
    assert "matrix units" in (refusal(kernel, Tiles(4, 32, 16, walk="sum")) or "")


def test_enumeration_is_quick_and_holds_the_default() -> None:
    pytest.importorskip("ortools")
    from tilewright.search.tiles import schedules

    kernel = KERNELS["layer_bf16"]
    legal = space(find_product(kernel), "dot", "sm_90")
    assert legal.broken({k: getattr(default_tiles(kernel), k) for k in legal.variables}) is None
    assert len(schedules(legal, most=500)) == 500


def _refused(kernel: Kernel, reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(kernel)


def test_what_is_no_product_of_blocks_is_refused() -> None:
    normed, update, twice = (HAND[k].kernel for k in ("normed", "update", "gate_and_up"))
    value = dot(load("x", K * i + a), load("w", K * j + a))
    inner = tuple(replace(x, inner=x.name != "j") for x in normed.axes)
    over_rows = replace(normed, axes=inner, stores=(Store("out", j, Reduce(F32, "sum", value, ("i",))),))
    build(over_rows)  # rows that are reduced become columns
    pairs = (Axis("i", 20), Axis("j", 9), Axis("c", 2, True), Axis("a", K, True))
    paired = dot(load("x", K * i + a), load("w", K * (2 * j + symbol("c")) + a))
    _refused(
        replace(normed, axes=pairs, stores=(Store("out", 9 * i + j, Reduce(F32, "sum", paired, ("c",))),)), "not over all of its columns"
    )
    both = replace(normed, axes=(*normed.axes, Axis("r", 3, True)), stores=(Store("out", i, Reduce(F32, "sum", value, ("j", "r"))),))
    _refused(both, "reduced over what is not its columns")
    _refused(replace(update, inplace=(("out", "tile"),)), "an output lies over an operand")
    nested = dot(load("x", K * i + a), dot(load("w", K * j + a), load("x", symbol("b")), ("b",)))
    axes = (*update.axes, Axis("b", K, True))
    _refused(replace(update, axes=axes, stores=(Store("out", N * i + j, nested),)), "an operand of its contraction is itself summed")
    uneven = tuple(replace(x, extent=8) if x.name == "b" else x for x in twice.axes)
    _refused(replace(twice, axes=uneven), "not equally deep")
    total = dot(load("x", K * i + a, torch.int32), load("w", K * j + a, torch.int32), dtype=torch.int32)
    words = replace(HAND["bytes"].kernel, stores=(Store("out", N * i + j, total),))
    words = replace(words, inputs=tuple(replace(b, dtype=torch.int32) for b in words.inputs))
    assert default_tiles(words).walk == "sum" and "matrix units multiply no int32" in (refusal(words, Tiles(16, 16, 16)) or "")


# ---- compiled


def _compiled() -> dict[str, tuple[Kernel, Tiles | None]]:
    def lowered(build_, *shapes, dtype=F32):
        inputs = tuple(graph_input(f"x{n}", TensorType(dtype, s)) for n, s in enumerate(shapes))
        return lower(Graph("g", inputs, (build_(*inputs),)), "k")

    def linear(x, w, b):
        return ops.gelu(ops.linear(x, w, b))

    return {
        "bf16": (lowered(linear, (2048, 1024), (2048, 1024), (2048,), dtype=torch.bfloat16), None),
        "f32_parts": (lowered(linear, (64, 4096), (128, 4096), (128,)), None),
        "one_row": (lowered(linear, (1, 4096), (1024, 4096), (1024,), dtype=torch.bfloat16), None),
        "conv": (KERNELS["conv_2_1_1_1_last"], Tiles(16, 16, 32)),
        "normed": (HAND["normed"].kernel, None),
        "dequantized": (HAND["dequantized"].kernel, None),
        "bytes": (HAND["bytes"].kernel, None),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", _compiled())
def test_compiles_without_spills(name: str, target: str) -> None:
    kernel, tiles = _compiled()[name]
    for compiled in compile_program(build(kernel, tiles), target):
        assert compiled.binary and compiled.spills == 0
