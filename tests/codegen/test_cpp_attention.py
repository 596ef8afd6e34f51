"""Attention through the C++ printer, against its meaning in float64; all are compiled in one build for each vector width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from attentions import CASES, attention, causal, kept, x
from lowering import Case, assert_close, graph_of, memory
from support import NATIVE
from tilewright.codegen.cpp.attention import print_attention
from tilewright.codegen.cpp.schedule import CpuTarget, detect_target
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.lower import lower
from tilewright.codegen.target import Compiled
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import bind_sizes, interpret

pytestmark = NATIVE

NAN, INF = float("nan"), float("inf")
TARGETS = {"native": None, "v3": CpuTarget(32, level="x86-64-v3"), "v2": CpuTarget(16, level="x86-64-v2")}


def graph(case: Case) -> Graph:
    return graph_of(case.build, case.tensors, case.shapes, case.symbols)


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> dict[str, object]:
    target = TARGETS[request.param] or detect_target()
    if detect_target().vector_bytes < target.vector_bytes:
        pytest.skip("not on this CPU")
    kernels = [lower(graph(case), f"k_{n}") for n, case in enumerate(CASES.values())]
    return dict(zip(CASES, compile_kernels(kernels, target)))


def launch(made: object, body: Graph, tensors: Sequence[torch.Tensor], threads: int = 2) -> list[torch.Tensor]:
    assert isinstance(made, Compiled), getattr(made, "reason", "")
    sizes = bind_sizes(body, tensors)
    results = [torch.full(y.shape, 3, dtype=y.dtype) for y in interpret(body, tensors)]
    operands = [memory(t).data_ptr() for t in tensors] + [y.data_ptr() for y in results]
    made.launch(*operands, *(sizes[s] for s in made.kernel.sizes), threads)
    return results


def compute(build, *tensors: torch.Tensor) -> torch.Tensor:
    body = graph_of(build, tensors)
    (made,) = compile_kernels([lower(body, "k_attention")])
    return launch(made, body, tensors)[0]


@pytest.mark.parametrize("name", CASES)
def test_against_the_meaning(name, compiled):
    case, body = CASES[name], graph(CASES[name])
    (got,) = launch(compiled[name], body, case.tensors)
    (eager,), (exact,) = interpret(body, case.tensors), interpret(body, case.tensors, torch.float64)
    assert_close(got, eager, exact)
    for threads in (1, 3, 8):
        assert torch.equal(got, launch(compiled[name], body, case.tensors, threads)[0]), f"{threads} threads differ"


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 2), (5, 48, 400), (1, 130, 49)])
def test_sizes_known_at_run_time(sizes, compiled):
    case = CASES["sizes known at run time"]
    b, s, n = sizes
    tensors = (x(b, s, 64), x(b, n, 32), x(b, n, 32))
    body = graph(case)
    (got,) = launch(compiled["sizes known at run time"], body, tensors)
    assert_close(got, interpret(body, tensors)[0], interpret(body, tensors, torch.float64)[0])


def test_no_keys_give_zero(compiled):
    case = CASES["sizes known at run time"]
    tensors = (x(2, 5, 64), torch.empty(2, 0, 32), torch.empty(2, 0, 32))
    assert not launch(compiled["sizes known at run time"], graph(case), tensors)[0].any()


# ---- levels


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a step, bf16 cache", "tile::Rows<bf16>"),
        ("a step, int8 cache", "tile::Levels<int8_t, float, 0, 1, 0>"),
        ("a step, int4 cache", "tile::Levels<uint8_t, float, 8, 1, 32>"),
        ("a step, heads of a token side by side", "tile::Levels<int8_t, float, 0, 2, 0>"),
        ("a step, int4 cache of narrow heads", "tile::copied<24, 24>"),
        ("columns in pairs", "tile::copied<32, 32>"),
    ],
)
def test_levels_are_read_where_they_lie(name, rows):
    text = print_attention(lower(graph(CASES[name]), "k"), TARGETS["v3"])
    assert text.count(rows) == 2


@pytest.mark.parametrize("name", ["a step, int8 cache", "a step, int4 cache"])
def test_what_a_cache_does_not_hold_yet_does_not_reach_a_step(name, compiled):
    case, body = CASES[name], graph(CASES[name])
    q, k, k_scale, v, v_scale, at = (t.clone() for t in case.tensors)
    (clean,) = launch(compiled[name], body, case.tensors)
    for scale in (k_scale, v_scale):
        for row, position in zip(scale, at.tolist()):
            row[:, position + 1 :] = NAN
    (got,) = launch(compiled[name], body, [q, k, k_scale, v, v_scale, at])
    assert torch.equal(got, clean)
    v_scale[0, 1, 0] = NAN  # a row that was no number when it was kept
    (got,) = launch(compiled[name], body, [q, k, k_scale, v, v_scale, at])
    assert got[0, 2:].isnan().all() and torch.equal(got[0, :2], clean[0, :2]) and torch.equal(got[1:], clean[1:])


# ---- special values


ROWS = [9, 1]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_without_keys_are_zero(rows):
    keep = kept(rows, 70)
    keep[0] = False
    got = compute(attention, x(2, rows, 16), x(2, 70, 16), x(2, 70, 16), keep)
    assert not got[:, 0].any() and got[:, 1:].isfinite().all()
    low = torch.zeros(rows, 70).masked_fill(~keep, -INF)
    assert torch.equal(got, compute(attention, x(2, rows, 16), x(2, 70, 16), x(2, 70, 16), low))


@pytest.mark.parametrize(("rows", "operand", "value"), list(itertools.product(ROWS, range(4), [NAN, INF, -INF])))
def test_special_values_spread_as_in_eager(rows, operand, value):
    tensors = [x(1, rows, 16), x(1, 140, 16), x(1, 140, 16), torch.zeros(rows, 140)]
    tensors[operand].view(-1)[3] = value
    body = graph_of(attention, tensors)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (exact,) = interpret(body, tensors, torch.float64)
    got = compute(attention, *tensors)
    assert torch.equal(got.isnan(), exact.isnan())
    torch.testing.assert_close(got.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_what_a_causal_row_may_not_see_does_not_reach_it():
    k, v = x(1, 200, 16), x(1, 200, 16)
    clean = compute(causal, x(1, 200, 16), k, v)
    k[0, 180:], v[0, 190:] = NAN, NAN
    got = compute(causal, x(1, 200, 16), k, v)
    assert torch.equal(got[:, :96], clean[:, :96])  # not even by 0 * NaN, where a tile ends before
