"""Weights of few bits in words, through `pack-weights`, fusion and the C++ printer: against float64, on several levels of CPUs."""

from __future__ import annotations

import pytest
import torch
from handmade import TARGETS
from support import NATIVE
from tilewright.codegen.cpp.schedule import CpuTarget, detect_target
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.lower import lower
from tilewright.codegen.target import Compiled
from tilewright.driver.accuracy import check
from tilewright.ir.graph import Graph, Node, constants
from tilewright.ir.interpret import bind_sizes, interpret
from words import CASES, Case, operands_of, region_of

pytestmark = NATIVE

LEVELS = TARGETS | {"v4": CpuTarget(64, level="x86-64-v4")}


def target_of(name: str) -> CpuTarget:
    target = LEVELS[name] or detect_target()
    if detect_target().vector_bytes < target.vector_bytes:
        pytest.skip("not on this CPU")
    return target


def compiled_at(level: str, cases: dict[str, Case]) -> dict[str, tuple[Graph, Node, Compiled]]:
    graphs = {name: case.graph() for name, case in cases.items()}
    regions = {name: region_of(graph) for name, graph in graphs.items()}
    made = compile_kernels([lower(r.attrs["body"], f"k_{n}") for n, r in regions.items()], target_of(level))
    return {name: (graphs[name], regions[name], function) for name, function in zip(graphs, made)}  # type: ignore[misc]


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request: pytest.FixtureRequest) -> dict[str, tuple[Graph, Node, Compiled]]:
    return compiled_at(request.param, CASES)


def results(made: tuple[Graph, Node, Compiled], tensors: tuple[torch.Tensor, ...], threads: int = 2) -> torch.Tensor:
    """What the kernel makes of inputs of its graph; what stands before it is computed by eager."""
    graph, region, function = made
    assert isinstance(function, Compiled), function.reason  # type: ignore[attr-defined]
    sizes, operands = bind_sizes(graph, tensors), operands_of(region, graph, tensors)
    (like,) = interpret(graph, tensors)
    out = torch.full_like(like, 77)
    function.launch(*(t.data_ptr() for t in (*operands, out)), *(sizes[s] for s in function.kernel.sizes), threads)
    return out


@pytest.mark.parametrize("name", CASES)
def test_words_give_what_the_meaning_gives(name: str, compiled: dict[str, tuple[Graph, Node, Compiled]]) -> None:
    made, tensors = compiled[name], CASES[name].tensors
    out = results(made, tensors)
    (eager,), (exact,) = interpret(made[0], tensors), interpret(made[0], tensors, torch.float64)
    assert check(out, eager, exact).ok, f"{check(out, eager, exact)}\n{made[2].source}"
    for threads in (1, 3, 8):
        assert torch.equal(out, results(made, tensors, threads)), f"{threads} threads differ"


SPECIAL = ("int8_5", "int4_5", "int4_1", "uint8_zeros_3", "int8_21", "dynamic_3", "bf16_3", "bfp6_3", "split_3")


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-40, 1e-30, 0.0])
def test_rows_of_any_numbers(name: str, value: float, compiled: dict[str, tuple[Graph, Node, Compiled]]) -> None:
    """A row with one such number, a row of them, and ordinary rows beside them, which must not notice."""
    (x,) = CASES[name].tensors
    x = x.clone()
    x[0, 7] = value
    x[1:2] = value
    made = compiled[name]
    out, (eager,), (exact,) = results(made, (x,)), interpret(made[0], (x,)), interpret(made[0], (x,), torch.float64)
    if value == 3e38:  # sums of such numbers overflow in one order and not in another
        out, eager, exact = out[2:], eager[2:], exact[2:]
    assert check(out, eager, exact).ok, check(out, eager, exact)
    assert check(out[2:], eager[2:], exact[2:]).ok


def test_scales_that_are_not_finite() -> None:
    """They make of a column what they make of it in eager."""
    case = CASES["int8_5"]
    graph = case.graph()
    scale = next(c for name, c in constants(graph).items() if name == "s")
    scale.value[3], scale.value[5], scale.value[7] = float("inf"), float("nan"), 0.0  # type: ignore[index]
    region = region_of(graph)
    (made,) = compile_kernels([lower(region.attrs["body"], "k_scales")])
    (eager,), (exact,) = interpret(graph, case.tensors), interpret(graph, case.tensors, torch.float64)
    out = results((graph, region, made), case.tensors)  # type: ignore[arg-type]
    assert check(out, eager, exact).ok


def test_levels_of_several_axes_are_found() -> None:
    """What is read where decides: words of 8 and 4 bits, with and without padding, are read as they lie."""
    walks = {name: _walk(compiled_at("native", {name: CASES[name]})[name][2].source) for name in EXPECTED}
    assert walks == EXPECTED


EXPECTED = {
    "int8_5": "product_of_words", "int4_20": "product_of_words", "int4_70": "product_of_runs_packed", "int4_odd": "product_of_words",
    "int4_padded_depth": "product_of_words", "int4_padded_bytes": "product_of_words", "dynamic_3": "product_of_bytes",
    "bf16_40": "product_of_runs_packed", "heads_few": "product_of_words", "matmul_by_the_turned_weight": "product_of_words",
    "some_rows": "product_of_words", "int2_3": "product_of_words", "int1_3": "product_of_words", "bfp6_3": "product_packed",
    "split_40": "product_packed",
}  # fmt: skip


def _walk(source: str) -> str:
    return next(line.strip().split("<")[0] for line in reversed(source.splitlines()) if "left, right, finish" in line)
