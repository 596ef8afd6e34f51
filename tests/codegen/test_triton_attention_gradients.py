"""Gradients of attention through the Triton printer, in the interpreter (or on the GPU there is), against torch's autograd in float64."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from attention_gradients import CASES, SCALE, Gradients, assert_within, gradients
from lowering import graph_of, memory, outputs
from support import NATIVE
from test_program import ANY_S, S, assert_same, fused, t
from tilewright.codegen.errors import Unsupported
from tilewright.codegen.kernel import Attend, Dot, Kernel, scalars
from tilewright.codegen.lower import lower
from tilewright.ir import ops
from tilewright.ir.graph import graph_input
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.ir.ops.attention_gradients import OF
from tilewright.ir.retarget import retarget

pytest.importorskip("triton")

from fake_driver import FakeGpu
from tilewright.codegen.cpp.attention import print_attention
from tilewright.codegen.cpp.schedule import CpuTarget
from tilewright.codegen.program import compile_program as compile_graph
from tilewright.codegen.triton.attention_tiles import AttentionTiles
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.templates import build

SMALL = AttentionTiles(16, 16, 4, 2)
TILES = {"default": None, "small": SMALL, "wide": replace(SMALL, block_n=32, wide=True), "split": replace(SMALL, splits=2)}
made = cache(lambda name: gradients(**CASES[name]))


def kernel_of(found: Gradients, of: str) -> Kernel:
    return lower(graph_of(found.build(of), found.operands), f"k_{of}")


def check(found: Gradients, of: str, tiles: AttentionTiles | None, device: str = "cpu") -> torch.Tensor:
    """err(ours, autograd in float64) is within that of the meaning in the dtype, up to a few units in the last place."""
    body = graph_of(found.build(of), found.operands)
    kernel, (eager,) = lower(body, f"k_{of}"), interpret(body, found.operands)
    buffers = {b.name: memory(t).to(device) for b, t in zip(kernel.inputs, found.operands)}
    (out,) = run(build(kernel, tiles), buffers, bind_sizes(body, found.operands), torch.device(device)).values()
    got = out.cpu().view(eager.shape)
    dtype = found.operands[0].dtype  # where heads share keys results are wider than what they are made of
    assert_within(got.to(dtype), eager.to(dtype), found.exact[of])
    return got


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_means_it(name: str, of: str) -> None:
    """By the reference evaluator: what the printers are given."""
    found = made(name)
    body, kernel = graph_of(found.build(of), found.operands), kernel_of(found, of)
    values = scalars(kernel.stores)
    assert sum(isinstance(v, Attend) for v in values) == 1 and sum(isinstance(v, Dot) for v in values) == (1 if of == "value" else 2)
    (got,), (eager,) = outputs(kernel, body, found.operands, {}), interpret(body, found.operands)
    assert_within(got, eager, found.exact[of])


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", CASES)
def test_against_autograd(name: str, of: str) -> None:
    check(made(name), of, None)


SEVERAL = ["more keys", "fewer keys", "grouped heads", "causal and a mask", "mask of each head", "bfloat16"]


@pytest.mark.parametrize("tiles", ["small", "wide", "split"])
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", SEVERAL)
def test_in_other_tiles(name: str, of: str, tiles: str) -> None:
    check(made(name), of, TILES[tiles])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name: str, of: str, tiles: str) -> None:
    check(made(name), of, TILES[tiles], "cuda")


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_rows_without_keys_give_nothing(value: float, of: str) -> None:
    """Kernels of torch say -inf or inf for the logarithm of nothing."""
    found = made("mask of each head")
    grad, q, k, v, logsumexp, *rest = found.operands
    logsumexp = torch.where(logsumexp.isinf(), value, logsumexp)
    got = check(replace(found, operands=(grad, q, k, v, logsumexp, *rest)), of, SMALL)
    assert got.isfinite().all() and (of != "query" or not got[:, :, 0].any())


@NATIVE
@pytest.mark.parametrize("of", OF)
def test_one_program_for_all_lengths(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched as on a GPU, with operands that the gradient of a value does not read."""
    gpu = FakeGpu("sm_90")
    gpu.watch(monkeypatch)
    long, row = t(1, 2, S, 16), t(1, 2, S)
    inputs = [graph_input(name, row if name in ("lse", "delta") else long) for name in ("grad", "q", "k", "v", "lse", "delta")]
    node = ops.op("attention_gradient")(*inputs, of=of, causal=True, scale=SCALE)
    body = retarget(fused(inputs, [node], "cuda:0", symbols=ANY_S), "cpu")  # decided for a GPU, run on this machine
    program = compile_graph(body, gpu.targets)
    for length in (2, 33, 70):
        gpu.launches.clear()
        assert_same(program, body, list(gradients((1, 2, length, 16), causal=True).operands), rtol=1e-4, atol=1e-5)
        assert len(gpu.launches) == 1


# ---- what is printed


def test_limits_bound_the_queries_of_a_key() -> None:
    """A key is met by the queries from its own position on; those that meet a whole block of keys have no masks."""
    source = build(kernel_of(made("heads of 64, causal"), "key"), SMALL).source
    within, edges = re.split(r"\n    for ", source)[1:]
    assert "    begin = tl.maximum(tl.min(" in source and '"-inf")' not in within.replace('float("-inf"), 0.0', "") and "a >= k" in edges


def test_the_scale_is_in_the_exponent() -> None:
    source = build(kernel_of(made("heads of 16"), "query"), SMALL).source
    assert "libdevice.exp2(tl.fma(dot, " in source and "libdevice.exp(" not in source


def test_a_cpu_has_no_walk_for_two_products() -> None:
    with pytest.raises(Unsupported, match="several contractions"):
        print_attention(kernel_of(made("heads of 16"), "key"), CpuTarget(32))


@pytest.mark.parametrize(("target", "of", "width", "dtype"), [
    ("sm_80", "query", 64, torch.bfloat16), ("sm_80", "key", 128, torch.bfloat16), ("sm_80", "key", 64, torch.float32),
    ("sm_90", "query", 128, torch.float16), ("sm_90", "key", 64, torch.bfloat16), ("sm_90", "value", 128, torch.bfloat16),
    ("gfx942", "query", 128, torch.bfloat16), ("gfx942", "key", 64, torch.bfloat16), ("gfx942", "key", 128, torch.bfloat16),
    ("gfx942", "value", 64, torch.float16),
])  # fmt: skip
def test_default_tiles_do_not_spill(target: str, of: str, width: int, dtype: torch.dtype) -> None:
    shapes = [(2, 16, 2048, width)] * 4 + [(2, 16, 2048)] * 2
    operands = tuple(torch.empty(s, dtype=torch.float32 if len(s) == 3 else dtype) for s in shapes)
    (compiled,) = compile_program(build(kernel_of(Gradients(operands, True, {}), of)), target)
    assert compiled.spills == 0 and compiled.binary
