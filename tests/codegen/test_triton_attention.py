"""Attention through the Triton printer, in the interpreter (or on the GPU there is), against its meaning in float64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attentions import CASES, FIRST, INF, attention, causal, heads, kept, window, x
from lowering import Case, assert_close, graph_of, memory
from support import EVERYWHERE, NATIVE, on_gpu
from test_attention_refusals import CASES as REFUSED
from test_attention_refusals import made
from test_program import ANY_S, S, assert_same, fused, t

pytest.importorskip("triton")

from fake_driver import FakeGpu
from tilewright.codegen.attentions import find_attention
from tilewright.codegen.kernel import Kernel
from tilewright.codegen.lower import lower
from tilewright.codegen.program import compile_program as compile_graph
from tilewright.codegen.triton.attention_tiles import AttentionTiles, default_tiles, refusal, space
from tilewright.codegen.triton.legalize import UnsupportedByTriton
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.templates import build
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Graph, Node, graph_input
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.search.tiles import schedules

NAN = float("nan")
BF16, F16 = torch.bfloat16, torch.float16
SMALL = AttentionTiles(16, 16, 4, 2)
TILES = {"default": None, "small": SMALL, "wide": replace(SMALL, block_n=32, wide=True), "split": replace(SMALL, splits=4)}


def documents(q: Node, k: Node, v: Node, ids: Node) -> Node:
    """Tokens attend to those of their own document."""
    return causal(q, k, v, ops.eq(ops.reshape(ids, shape=(*ids.shape, 1)), ids))


def gathered(q: Node, keys: Node, values: Node, slots: Node) -> Node:
    """A cache of which every token has a slot of its own."""
    k, v = (ops.op("embedding")(t, slots) for t in (keys, values))
    return attention(q, *(heads(ops.reshape(t, shape=(1, *t.shape)), 2) for t in (k, v)))


def scored(q: Node, k: Node, v: Node, gate: Node) -> Node:
    """What is done with the result is in the kernel: a gate, a residual, a narrower dtype."""
    return ops.cast(ops.add(ops.mul(attention(q, k, v), ops.op("sigmoid")(gate)), q), dtype=BF16)


def widened(q: Node, k: Node, v: Node) -> Node:
    """Attention in float32 of what has 16 bits."""
    return ops.cast(causal(*(ops.cast(t, dtype=torch.float32) for t in (q, k, v))), dtype=BF16)


def stored_narrow(q: Node, k: Node, v: Node) -> Node:
    """Attention in float32 over a cache in bfloat16: weights keep their 24 bits."""
    return attention(q, *(ops.cast(t, dtype=torch.float32) for t in (k, v)))


SIZES = {"n": SymbolRange(0, 1 << 20), "m": SymbolRange(0, 1 << 20)}
m, n = symbol("m"), symbol("n")

MORE: dict[str, Case] = {
    name: Case(build_, tensors, *more)
    for name, build_, tensors, *more in [
        ("head of 80", causal, tuple(x(1, 2, 70, 80) for _ in range(3))),
        ("head of 128, bfloat16", causal, tuple(x(1, 2, 70, 128, dtype=BF16) for _ in range(3))),
        ("head of 64, float16, blocks that tile", causal, tuple(x(1, 2, 128, 64, dtype=F16) for _ in range(3))),
        ("documents by id", documents, (*(x(2, 50, 16) for _ in range(3)), FIRST)),
        ("cache in slots", gathered, (x(1, 4, 3, 16), x(60, 32), x(60, 32), torch.arange(50).flip(0) + 4)),
        ("gate and residual", scored, (x(2, 3, 40, 16), x(2, 3, 50, 16), x(2, 3, 50, 16), x(2, 3, 40, 16))),
        ("widened operands", widened, tuple(x(1, 2, 40, 16, dtype=BF16) for _ in range(3))),
        ("float32 over bfloat16", stored_narrow, (x(1, 2, 40, 16), *(x(1, 2, 40, 16, dtype=BF16) for _ in range(2)))),
        ("lengths known at run time", causal, (x(2, 40, 16), x(2, 70, 16), x(2, 70, 16)),
         ((2, m, 16), (2, n, 16), (2, n, 16)), SIZES),
        ("bool mask, bfloat16", attention, (*(x(2, 3, 40, 32, dtype=BF16) for _ in range(3)), kept(2, 1, 40, 40))),
        ("additive mask, float16", attention, (*(x(2, 3, 40, 32, dtype=F16) for _ in range(3)), x(2, 1, 40, 40, dtype=F16))),
    ]
}  # fmt: skip
EVERY = CASES | MORE
SIGMOID = ["sigmoid, biased and causal", "sigmoid in a window"]
SEVERAL = ["causal", "sliding window", "alibi", *SIGMOID, "sigmoid, bfloat16", "padding", "grouped heads", "merged projection", "bfloat16",
           "decode over a cache",
           "sizes known at run time", "a cache of run time size", "keys without batch",
           "packed and causal", "packed, 32-bit offsets", *MORE]  # fmt: skip

SPLIT = ["decode, three queries", "decode over a cache", "merged projection", "packed and causal", "gate and residual", "cache in slots",
         *SIGMOID, "sigmoid, a step of decoding"]  # fmt: skip


def graph(case: Case) -> Graph:
    return graph_of(case.build, case.tensors, case.shapes, case.symbols)


def results(body: Graph, tensors: Sequence[torch.Tensor], tiles: AttentionTiles | None = None, device: str = "cpu") -> torch.Tensor:
    kernel = lower(body, "k_attention")
    buffers = {b.name: memory(t).to(device) for b, t in zip(kernel.inputs, tensors)}
    (out,) = run(build(kernel, tiles), buffers, bind_sizes(body, tensors), torch.device(device)).values()
    return out.cpu().view(interpret(body, tensors)[0].shape)


def check(case: Case, tiles: AttentionTiles | None = None, device: str = "cpu") -> None:
    body = graph(case)
    (eager,), (exact,) = interpret(body, case.tensors), interpret(body, case.tensors, torch.float64)
    assert_close(results(body, case.tensors, tiles, device), eager, exact)


def compute(build_, *tensors: torch.Tensor, tiles: AttentionTiles | None = None, device: str = "cpu") -> torch.Tensor:
    return results(graph_of(build_, tensors), tensors, tiles, device)


@pytest.mark.parametrize("name", EVERY)
def test_against_the_meaning(name: str) -> None:
    check(EVERY[name])


PAIRS = [(name, tiles) for name in SEVERAL for tiles in ("small", "wide")] + [(name, "split") for name in SPLIT]


@pytest.mark.parametrize(("name", "tiles"), PAIRS)
def test_in_other_tiles(name: str, tiles: str) -> None:
    check(EVERY[name], TILES[tiles])


@on_gpu
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", EVERY)
def test_on_gpu(name: str, tiles: str) -> None:
    check(EVERY[name], TILES[tiles], "cuda")


@EVERYWHERE
@pytest.mark.parametrize(("build_", "rows", "keys"), [(causal, 16, 16), (causal, 40, 16), (causal, 2, 16), (window, 16, 16)])
def test_a_single_block_of_keys_has_its_masks(build_, rows: int, keys: int, device: str) -> None:
    check(Case(build_, (x(1, 2, rows, 16), x(1, 2, keys, 16), x(1, 2, keys, 16))), SMALL, device)


def banded(q: Node, k: Node, v: Node) -> Node:
    """Each query sees up to seven keys, around its own position."""
    rows, keys = ops.reshape(ops.iota(length=q.shape[-2]), shape=(q.shape[-2], 1)), ops.iota(length=k.shape[-2])
    away = ops.sub(rows, keys)
    return attention(q, k, v, ops.logical_and(ops.gt(away, -4), ops.lt(away, 4)))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("build_", [attention, causal, banded])
def test_lengths_around_those_of_blocks(build_, splits: int) -> None:
    for rows, keys in itertools.product((15, 16, 33), (16, 17, 32)):
        check(Case(build_, (x(2, rows, 16), x(2, keys, 16), x(2, keys, 16))), replace(SMALL, splits=splits))


LENGTHS_OF_BOTH = [((1, 1), 1), ((16, 16), 1), ((17, 33), 1), ((3, 100), 4), ((1, 16), 4), ((40, 0), 1), ((2, 0), 4)]


@EVERYWHERE
@pytest.mark.parametrize(("sizes", "splits"), LENGTHS_OF_BOTH)
def test_one_kernel_for_all_lengths(sizes: tuple[int, int], splits: int, device: str) -> None:
    case, (queries, keys) = MORE["lengths known at run time"], sizes
    check(replace(case, tensors=(x(2, queries, 16), x(2, keys, 16), x(2, keys, 16))), replace(SMALL, splits=splits), device)


@EVERYWHERE
@pytest.mark.parametrize(("length", "splits"), [(0, 4), (1, 1), (16, 4), (100, 4), (300, 1)])
def test_a_cache_is_read_as_far_as_it_is_filled(length: int, splits: int, device: str) -> None:
    case, tiles, read = CASES["decode over a cache"], replace(SMALL, splits=splits), -(-length // 16) * 16
    keys, query, values, _ = (t.clone() for t in case.tensors)
    clean = results(graph(case), (keys, query, values, torch.tensor(length)), tiles, device)
    keys[:, :, read:], values[:, :, read:] = NAN, NAN
    assert torch.equal(results(graph(case), (keys, query, values, torch.tensor(length)), tiles, device), clean)
    assert clean.isfinite().all() and clean.any() == (length > 0)


# ---- special values


@EVERYWHERE
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("rows", [9, 1])
def test_rows_without_keys_are_zero(rows: int, splits: int, device: str) -> None:
    keep, tiles = kept(rows, 70), replace(SMALL, splits=splits)
    keep[0] = False
    got = compute(attention, x(2, rows, 16), x(2, 70, 16), x(2, 70, 16), keep, tiles=tiles, device=device)
    assert not got[:, 0].any() and got.isfinite().all()
    low = torch.zeros(rows, 70).masked_fill(~keep, -INF)
    torch.testing.assert_close(got, compute(attention, x(2, rows, 16), x(2, 70, 16), x(2, 70, 16), low, tiles=tiles, device=device))


@EVERYWHERE
@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("operand", range(4))
def test_special_values_spread_as_in_eager(operand: int, value: float, splits: int, device: str) -> None:
    tensors = [x(1, 9, 16), x(1, 140, 16), x(1, 140, 16), torch.zeros(9, 140)]
    tensors[operand].view(-1)[3] = value
    body = graph_of(attention, tensors)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (exact,) = interpret(body, tensors, torch.float64)
    got = results(body, tensors, replace(SMALL, splits=splits), device)
    assert torch.equal(got.isnan(), exact.isnan())
    torch.testing.assert_close(got.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_what_a_causal_row_may_not_see_does_not_reach_it(device: str) -> None:
    k, v = x(1, 200, 16), x(1, 200, 16)
    clean = compute(causal, x(1, 200, 16), k, v, tiles=SMALL, device=device)
    k[0, 180:], v[0, 192:] = NAN, NAN
    assert torch.equal(compute(causal, x(1, 200, 16), k, v, tiles=SMALL, device=device)[:, :176], clean[:, :176])


# ---- what is printed


def source(case: Case, tiles: AttentionTiles | None = None) -> str:
    return build(lower(graph(case), "k_attention"), tiles).source


def loops(text: str) -> list[str]:
    return re.split(r"\n    for ", text)[1:]


def test_blocks_within_all_limits_have_no_masks() -> None:
    for name in ("causal", "sliding window", "packed and causal", "decode over a cache", *SIGMOID):
        within, edges = loops(source(EVERY[name], SMALL))
        assert "tl.where(k >=" not in within and "mask_a" not in within, name
        assert "tl.where(" in edges.split("\n    attended *=")[0].split("\n    tl.store")[0], name


def test_keys_that_tile_need_one_loop() -> None:
    (only,) = loops(source(Case(attention, tuple(x(2, 64, 16) for _ in range(3))), SMALL))
    assert "mask" not in only
    shapes = ((2, 16 * m, 16), (2, 32 * n, 16), (2, 32 * n, 16))
    (only,) = loops(source(Case(attention, tuple(x(2, 64, 16) for _ in range(3)), shapes, SIZES), SMALL))
    assert "mask" not in only


def test_narrow_operands_stay_narrow() -> None:
    for name in ("bfloat16", "float16"):
        text = source(CASES[name])
        assert f"weights.to(tl.{name})" in text and 'input_precision="ieee"' not in text, name
    assert 'input_precision="ieee"' in source(CASES["causal"])


def test_weights_of_a_wide_attention_are_not_rounded() -> None:
    (loop,) = loops(source(MORE["float32 over bfloat16"], replace(SMALL, block_n=64)))
    assert "weights.to" not in loop and loop.count('input_precision="ieee"') == 2
    (loop,) = loops(source(MORE["widened operands"], replace(SMALL, block_n=64)))
    assert "weights.to" not in loop and loop.count('input_precision="ieee"') == 1


def test_levels_become_numbers_of_the_dtype_that_is_multiplied() -> None:
    for name, dtype in (("bfloat16, int8 cache", "bfloat16"), ("a step, int8 cache", "float32")):
        program = build(lower(graph(CASES[name]), "k"))
        assert program.source.count(f"to(tl.{dtype})") >= 2


def test_heads_that_share_keys_share_a_block() -> None:
    program = build(lower(graph(CASES["decode, many grouped heads"]), "k"))
    assert program.schedule.block_m == 16 and program.launches[0].grid == (2,)


def test_few_programs_split_the_keys() -> None:
    program = build(lower(graph_of(attention, (x(1, 8, 1, 64), x(1, 2, 8192, 64), x(1, 2, 8192, 64))), "k"))
    assert program.schedule.splits == 32 and [launch.function for launch in program.launches] == ["k", "k_join"]
    assert program.launches[0].grid == (64,) and len(program.scratch) == 3


@NATIVE
def test_parts_are_launched_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu("sm_90")
    gpu.watch(monkeypatch)
    q, k, v = (graph_input(name, t(1, heads, length, 16)) for name, heads, length in (("q", 4, 1), ("k", 2, S), ("v", 2, S)))
    body = fused([q, k, v], [attention(q, k, v)], symbols=ANY_S)
    program = compile_graph(body, gpu.targets)
    for keys in (9, 70):
        gpu.launches.clear()
        assert_same(program, body, [x(1, 4, 1, 16), x(1, 2, keys, 16), x(1, 2, keys, 16)])
        first, second = gpu.launches
        assert second.name == f"{first.name}_join" and first.grid == (64, 1, 1)


# ---- what is refused


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(REFUSED[reason](made()))


@pytest.mark.parametrize(("tiles", "reason"), [
    (AttentionTiles(24), "block_m is one of 16, 32, 64, 128, not 24"),
    (AttentionTiles(64, 128, 4, 4), "keys and values in flight fit shared memory"),
    (AttentionTiles(128, 128, 1, 1), "what is attended and its scores fit registers"),
    (AttentionTiles(16, 16, 1, 1, 3), "splits is one of .*, not 3"),
])  # fmt: skip
def test_tiles_refused(tiles: AttentionTiles, reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(made(128), tiles)


def test_tiles_can_be_enumerated() -> None:
    pytest.importorskip("ortools")
    kernel = made(64)
    found = find_attention(kernel)
    offered = schedules(space(kernel, found))
    assert len(offered) > 100 and all(refusal(kernel, found, AttentionTiles(**values)) is None for values in offered)


# ---- for GPUs that are not here


def empty(*shapes: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape, dtype=dtype) for shape in shapes)


def kernel_of(build_, *shapes: tuple[int, ...], dtype: torch.dtype) -> Kernel:
    return lower(graph_of(build_, empty(*shapes, dtype=dtype)), "k_attention")


@pytest.mark.parametrize(("target", "width", "dtype"), [
    ("sm_80", 64, BF16), ("sm_80", 128, torch.float32), ("sm_90", 64, F16), ("sm_90", 128, BF16), ("gfx942", 128, BF16),
])  # fmt: skip
def test_default_tiles_do_not_spill(target: str, width: int, dtype: torch.dtype) -> None:
    kernel = kernel_of(causal, *[(2, 16, 2048, width)] * 3, dtype=dtype)
    (compiled,) = compile_program(build(kernel), target)
    assert compiled.spills == 0 and compiled.binary


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_decoding_does_not_spill(target: str) -> None:
    kernel = kernel_of(attention, (1, 32, 1, 128), (1, 8, 8192, 128), (1, 8, 8192, 128), dtype=BF16)
    compiled = compile_program(build(kernel), target)
    assert len(compiled) == 2 and all(c.spills == 0 for c in compiled)


@pytest.mark.parametrize("name", ["sliding window", "packed and causal", "decode over a cache", "sizes known at run time"])
def test_bounded_and_split_walks_compile(name: str) -> None:
    compiled = compile_program(build(lower(graph(EVERY[name]), "k_attention"), TILES["split"]), "sm_90")
    assert len(compiled) == 2 and all(c.spills == 0 for c in compiled)


@pytest.mark.parametrize(("width", "dtype"), [(w, d) for w in (16, 64, 80, 128, 256) for d in (BF16, torch.float32, torch.float64)])
def test_default_tiles_are_legal(width: int, dtype: torch.dtype) -> None:
    for shape in ((2, 8, 1, width), (2, 8, 100, width)):
        kernel = kernel_of(attention, shape, *[(2, 8, 4096, width)] * 2, dtype=dtype)
        found = find_attention(kernel)
        assert refusal(kernel, found, default_tiles(kernel, found)) is None
