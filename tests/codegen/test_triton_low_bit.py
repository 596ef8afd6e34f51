"""Contractions with operands of few bits through lowering and the Triton printer: every walk is right, and reads every byte once."""

from __future__ import annotations

import pytest
import torch
from low_bit import CASES
from lowering import assert_close, graph_of, memory
from triton_kernels import OLD_INTERPRETER

pytest.importorskip("triton")

from tilewright.codegen.lower import lower
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import Tiles, refusal
from tilewright.ir.interpret import bind_sizes, interpret

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
    if OLD_INTERPRETER and (CASES[name].symbols or tiles in ("parts", "row_sums")):
        pytest.skip("the interpreter cannot loop up to what is computed")
    check(name, TILES[tiles])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "tiles"), ALL)
def test_on_gpu(name: str, tiles: str) -> None:
    check(name, TILES[tiles], "cuda")
