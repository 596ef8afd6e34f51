"""What is foretold of whole graphs on a GPU that is not here: kernels, what the library computes, and what has no kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tilewright.driver.memory import constant_bytes
from tilewright.ir.text import parse
from tilewright.passes.base import Notes
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.layers import layers
from tilewright.passes.manager import run_passes
from tilewright.passes.plan_memory import PlanMemory
from tilewright.search.foretold import Foretold
from tilewright.search.gpus import of_target
from tilewright.search.layer_times import EXACT, foretold_times

H100, A100 = of_target("sm_90"), of_target("sm_80")


def text(rows, dtype="f32", body="h = linear(x, w)", result="h"):
    where = " where s in 1..100000" if rows == "s" else ""
    kinds = f'x: {dtype}[{rows}, 1024]@"cuda:0", w: {dtype}[4096, 1024]@"cuda:0"'.replace('"', "")
    return f"graph g({kinds}){where} stage canonical {{\n  {body}\n  return {result}\n}}"


def fused(*args, **kwargs):
    return run_passes(parse(text(*args, **kwargs)), (FuseRegions(), PlanMemory()), Notes())


PRODUCT_THEN_GELU = {"body": "h = linear(x, w)\n  g = gelu(h)", "result": "g"}


@pytest.mark.parametrize("searched", [False, True])
def test_more_work_and_less_gpu_take_longer(searched) -> None:
    h100, a100 = Foretold(H100, searched), Foretold(A100, searched)
    for body in ({}, PRODUCT_THEN_GELU):
        small, large = fused(256, "bf16", **body), fused(4096, "bf16", **body)
        assert 0 < h100(small) < h100(large) < a100(large)


def test_the_library_reaches_no_more_than_the_peak() -> None:
    seconds = Foretold(H100, False)(fused(4096, "bf16"))
    assert 2 * 4096 * 1024 * 4096 / H100.rates["bfloat16"] < seconds < 4 * 2 * 4096 * 1024 * 4096 / H100.rates["bfloat16"]
    assert Foretold(H100, False)(fused(4096)) > 5 * seconds


def test_the_best_schedule_is_no_slower_than_the_first() -> None:
    graph = fused(1024, **PRODUCT_THEN_GELU)
    assert Foretold(H100, True)(graph) <= Foretold(H100, False)(graph)


def test_equal_kernels_are_counted_as_often_as_they_are_called() -> None:
    twice = {"body": "h = linear(x, w)\n  g = gelu(h)\n  k = linear(x, v)\n  f = gelu(k)", "result": "g, f"}
    both = parse(text(64, **twice).replace("w: f32[4096, 1024]@cuda:0", "w: f32[4096, 1024]@cuda:0, v: f32[4096, 1024]@cuda:0"))
    two = run_passes(both, (FuseRegions(), PlanMemory()), Notes())
    assert Foretold(H100, False)(two) == pytest.approx(2 * Foretold(H100, False)(fused(64, **PRODUCT_THEN_GELU)))


def test_sizes_that_vary_and_what_has_no_kernel() -> None:
    foretold = Foretold(H100, False)
    assert foretold(fused("s", **PRODUCT_THEN_GELU)) > 0
    by_torch = parse(text(64, **PRODUCT_THEN_GELU))
    assert foretold(by_torch) > foretold(fused(64)), "the product, and what follows it"


def test_layers_are_foretold_within_their_model() -> None:
    body = '{\n  w = constant "w" : f32[512, 256]\n  v = constant "v" : f32[512, 256]\n'
    body += "  h = linear(x, w)\n  k = linear(x, v)\n  y = add(h, k)\n  return y\n}"
    graph = parse("graph g(x: f32[64, 256]) stage canonical " + body, {name: torch.randn(512, 256) for name in ("w", "v")})
    asked = []

    def foretold(variant) -> float:
        """What its weights take."""
        asked.append(variant)
        return float(constant_bytes(variant))

    found = foretold_times(graph, layers(graph), ["bf16", "int8"], foretold)
    assert found.keys() == {(name, kind) for name in ("w", "v") for kind in (EXACT, "bf16", "int8")}
    assert all(found[name, EXACT] - found[name, "bf16"] == 2 * 512 * 256 and found[name, "int8"] > 0 for name in ("w", "v"))
    assert len(asked) == 4, "the whole, one of the group alone, and the group in each format"
