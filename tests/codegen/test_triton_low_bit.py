"""Contractions with operands of few bits through lowering and the Triton printer: every walk is right, and reads every byte once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from low_bit import CASES, F8, dequantizing, of_integers, unpacking
from lowering import Build, assert_close, graph_of, memory
from support import on_gpu

pytest.importorskip("triton")

from tilewright.codegen.kernel import Kernel
from tilewright.codegen.lower import lower
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import Tiles, refusal
from tilewright.ir import ops
from tilewright.ir.graph import Graph, Node, graph_input, order
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.passes.fuse_regions import FuseRegions

TILES: dict[str, Tiles | None] = {
    "default": None,
    "blocks": Tiles(16, 16, 32, group_m=2),
    "wide": Tiles(16, 32, 64, group_m=1, wide=True),
    "parts": Tiles(16, 16, 32, split_k=2),
    "sums": Tiles(4, 8, 32, walk="sum"),
    "row_sums": Tiles(1, 16, 16, split_k=2, walk="sum"),
}

GRAPHS = {name: graph_of(c.build, c.tensors, c.shapes, c.symbols) for name, c in CASES.items()}
KERNELS = {name: lower(graph, "k") for name, graph in GRAPHS.items()}


def applies(name: str, tiles: Tiles | None) -> bool:
    if tiles is None:
        return True
    few = tiles.block_m > 1 or CASES[name].tensors[0].shape[0] < 10  # a program for each row is slow to interpret
    return few and refusal(KERNELS[name], tiles) is None


ALL = [(c, t) for c in CASES for t, tiles in TILES.items() if applies(c, tiles)]


def check(name: str, tiles: Tiles | None, device: str = "cpu") -> None:
    graph, kernel, tensors = GRAPHS[name], KERNELS[name], CASES[name].tensors
    inputs = {b.name: memory(t).to(device) for b, t in zip(kernel.inputs, tensors)}
    outputs = run(build(kernel, tiles), inputs, bind_sizes(graph, tensors), torch.device(device)).values()
    for ours, eager, exact in zip(outputs, interpret(graph, tensors), interpret(graph, tensors, torch.float64), strict=True):
        assert ours.dtype == eager.dtype
        assert_close(ours.cpu().reshape(eager.shape), eager, exact)


@pytest.mark.parametrize(("name", "tiles"), ALL)
def test_low_bit(name: str, tiles: str) -> None:
    check(name, TILES[tiles])


@on_gpu
@pytest.mark.parametrize(("name", "tiles"), ALL)
def test_on_gpu(name: str, tiles: str) -> None:
    check(name, TILES[tiles], "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_quantized_as_they_come(dtype: torch.dtype) -> None:
    """Rows of zeros, and rows that hold what is no number, among others."""
    rows = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1], rows[2, 3], rows[4, 7], rows[5, 0] = 0, float("nan"), float("inf"), float("-inf")

    def both(a: Node) -> tuple[Node, ...]:
        made = ops.quantize_rows(a)
        return ops.item(made, index=0), ops.item(made, index=1)

    graph = graph_of(both, (rows,))
    got = run(build(lower(graph, "k")), {"x0": rows}, {}).values()
    for ours, eager in zip(got, interpret(graph, (rows,)), strict=True):
        torch.testing.assert_close(ours.reshape(eager.shape), eager, rtol=0, atol=0, equal_nan=True)


# ---- what is printed, at sizes of models

BF16, F16, F32, U8, I8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8


def of_inputs(make: Build, **inputs: tuple[torch.dtype, tuple[int, ...]]) -> Kernel:
    nodes = [graph_input(name, TensorType(dtype, shape)) for name, (dtype, shape) in inputs.items()]
    return lower(Graph("g", tuple(nodes), (make(*nodes),)), "k")


def in_groups(rows: int, group: int = 128, dtype: torch.dtype = BF16, size: int = 4096) -> Kernel:
    """Weights of 4 bits with zeros."""
    groups = size // group
    return of_inputs(unpacking(4, dtype, True), x=(dtype, (rows, size)), w=(U8, (size, size // 2)), scale=(F32, (size, groups)),
                     zero=(U8, (size, groups // 2)))  # fmt: skip


def in_channels(rows: int, storage: torch.dtype, dtype: torch.dtype = BF16) -> Kernel:
    size = (4096, 4096)
    return of_inputs(dequantizing(dtype), x=(dtype, (rows, size[0])), w=(storage, size), scale=(F32, (size[0], 1)))


def integral(rows: int) -> Kernel:
    return of_inputs(of_integers, q=(I8, (rows, 4096)), w=(I8, (4096, 4096)), s=(F32, (rows, 1)), t=(F32, (4096,)), b=(F32, (4096,)))


MODELS: dict[str, Callable[[], Kernel]] = {
    **{f"int4_{rows}_{group}": partial(in_groups, rows, group) for rows in (1, 512) for group in (32, 64, 128)},
    "int4_f16": partial(in_groups, 512, dtype=F16), "int4_f32": partial(in_groups, 512, dtype=F32),
    **{f"{word}_{rows}": partial(in_channels, rows, F8[word]) for word in F8 for rows in (1, 512)},
    **{f"i8_{rows}": partial(in_channels, rows, I8) for rows in (1, 512)},
    **{f"int_linear_{rows}": partial(integral, rows) for rows in (1, 512)},
}  # fmt: skip


def loop(source: str) -> list[str]:
    """The lines of the loop over the depth."""
    lines = source.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("    for k_start"))
    return [line.strip() for line in lines[start + 1 :] if line.startswith(" " * 8)]


@pytest.mark.parametrize("name", MODELS)
def test_every_buffer_is_loaded_once_a_block(name: str) -> None:
    source = build(MODELS[name]()).source
    loads = Counter(re.findall(r"tl\.load\((\w+)_ptr", source))
    assert loads["w"] == 1 and loads["scale"] <= 1 and loads["zero"] <= 1, source
    weight = next(line for line in loop(source) if "tl.load(w_ptr" in line)
    assert "//" not in weight, "neighbours read the same byte"
    scale = [line for line in source.splitlines() if "tl.load(scale_ptr" in line]
    assert not any(re.search(r"\bk\b", line) for line in scale), "a scale is loaded for each element"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", MODELS)
def test_default_tiles_do_not_spill(name: str, target: str) -> None:
    kernel = MODELS[name]()
    program = build(kernel)
    assert refusal(kernel, program.schedule, target) is None
    for compiled in compile_program(program, target):
        assert compiled.spills == 0
        if name.endswith("_1") or "_1_" in name or name == "int4_f32":
            continue
        text = compiled.stages["amdgcn" if target == "gfx942" else "ptx"]
        assert {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}[target] in text
        kind = "s8.s8" if name.startswith("int_linear") else "f16.f16" if name == "int4_f16" else "bf16.bf16"
        assert target == "gfx942" or kind in text, "what is computed is multiplied as the activations are"


def test_a_fused_layer_is_one_such_kernel() -> None:
    fused = FuseRegions().run(
        parse("""
        graph g(x: bf16[512, 4096]@cuda:0, q: u8[4096, 2048]@cuda:0, s: f16[4096, 32]@cuda:0, c: bf16[4096]@cuda:0) stage canonical {
          p = unpack(q, bits=4)
          w = dequantize(p, s, dtype=bf16)
          y = linear(x, w, c)
          return y
        }""")
    )
    (region,) = (n for n in order(fused) if n.op.name == "region")
    (compiled,) = compile_program(build(lower(region.attrs["body"], "layer")), "sm_90")
    assert compiled.spills == 0 and "wgmma" in compiled.stages["ptx"]


def test_fp8_is_converted_by_targets_that_can() -> None:
    program = build(in_channels(1, torch.float8_e4m3fn))
    assert "e4m3x2" in compile_program(program, "sm_90")[0].stages["ptx"]
    assert "e4m3x2" not in compile_program(program, "sm_80")[0].stages["ptx"]


@pytest.mark.parametrize("word", F8)
def test_every_byte_is_the_float_that_torch_takes_it_for(word: str) -> None:
    bytes_ = torch.arange(256).to(U8).view(F8[word])
    kernel = lower(graph_of(lambda a: ops.cast(a, dtype=F32), (bytes_,)), "k")
    (got,) = run(build(kernel), {"x0": bytes_}, {}).values()
    torch.testing.assert_close(got, bytes_.float(), rtol=0, atol=0, equal_nan=True)
    padded = graph_of(lambda a: ops.neg(ops.pad(ops.cast(a, dtype=F32), low=(0,), high=(44,), value=1.5)), (bytes_,))
    (longer,) = run(build(lower(padded, "k")), {"x0": bytes_}, {}).values()
    torch.testing.assert_close(longer[256:], torch.full((44,), -1.5))
