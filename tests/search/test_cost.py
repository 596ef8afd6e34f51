"""The cost model: what must be slower is, for every template; ranks are compared as statisticians do."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from sampled import TEMPLATES, attention, kernel, linear, pointwise, sampled, softmax
from tilewright.codegen.target import Usage
from tilewright.codegen.triton.attention_tiles import AttentionTiles
from tilewright.codegen.triton.recurrence_tiles import RecurrenceTiles
from tilewright.codegen.triton.schedule import Schedule
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import Tiles
from tilewright.ir.dims import symbol
from tilewright.search.cost import predicted_seconds, residents, seconds, spearman
from tilewright.search.gpus import of_target
from tilewright.search.work import Work, estimator

H100, A100 = of_target("sm_90"), of_target("sm_80")
LARGE = Tiles(128, 128, 64, num_warps=8)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_gpu_with_more_of_everything_is_faster(template: str) -> None:
    one = kernel(template)
    start = build(one).schedule
    assert predicted_seconds(one, start, H100) < predicted_seconds(one, start, A100)


@pytest.mark.parametrize("template", TEMPLATES)
def test_registers_that_are_spilled_cost_more_than_anything_gains(template: str) -> None:
    one = kernel(template)
    start = build(one).schedule
    fits, spills, more = (predicted_seconds(one, start, H100, Usage(128, n, 0)) for n in (0, 8, 400))
    assert 2 * fits < spills < more


@pytest.mark.parametrize("template", TEMPLATES)
def test_launching_takes_its_time(template: str) -> None:
    one = kernel(template)
    assert predicted_seconds(one, build(one).schedule, H100) > H100.launch


def test_no_kernel_is_faster_than_memory_and_multipliers() -> None:
    assert predicted_seconds(pointwise(1 << 26), Schedule()) > 2 * 4 * 2**26 / H100.bandwidth
    assert predicted_seconds(linear(8192, 8192, 8192), LARGE) > 2 * 8192**3 / H100.rates["bfloat16"]


def test_more_work_takes_longer() -> None:
    for smaller, larger, schedule in [
        (pointwise(1 << 20), pointwise(1 << 24), Schedule()),
        (softmax(4096, 512), softmax(4096, 4096), Schedule(1, 4096, 4)),
        (linear(512, 4096, 4096), linear(4096, 4096, 4096), LARGE),
        (attention(1024, 1024), attention(4096, 1024), AttentionTiles()),
    ]:
        assert predicted_seconds(smaller, schedule) < predicted_seconds(larger, schedule)


def test_only_what_is_there_is_paid_for() -> None:
    few, many = (sampled.sparse(sampled.BF16, 2048, 64, count) for count in (100, 1000))
    tiles = Tiles(64, 64, 64)
    assert 3 * predicted_seconds(few, tiles) < predicted_seconds(many, tiles) < 2 * predicted_seconds(linear(2048, 2048, 2048), tiles)
    spread, together = (sampled.experts(sampled.BF16, 4096, count, 1408, 2048) for count in (64, 2))
    assert predicted_seconds(together, LARGE) < predicted_seconds(spread, LARGE) < 4 * predicted_seconds(linear(4096, 1408, 2048), LARGE)


def test_the_last_wave_takes_as_long_as_a_full_one() -> None:
    work = Work(H100.processors, 8, 1e6, 1e3, 1e5, flops=1e9, dtype="bfloat16", shared=200 << 10)
    full, over, twice = (seconds([replace(work, programs=work.programs + n)], H100) for n in (0, 1, work.programs))
    assert over == pytest.approx(twice, rel=1e-3) and over > 1.5 * full


def test_tiles_beyond_the_sizes_are_paid_for() -> None:
    small = linear(16, 4096, 4096)
    assert predicted_seconds(small, Tiles(16, 64, 64)) < predicted_seconds(small, Tiles(256, 64, 64))


def test_small_tiles_read_operands_again() -> None:
    one = linear(4096, 4096, 4096)
    works = [estimator(one)(Tiles(n, n, 32))[0] for n in (32, 64, 128)]
    assert sorted(works, key=lambda w: w.programs * w.cached, reverse=True) == works
    assert predicted_seconds(one, LARGE) < predicted_seconds(one, Tiles(32, 32, 32))


def test_a_shared_depth_fills_an_empty_gpu_and_hinders_a_full_one() -> None:
    deep, full = linear(64, 64, 1 << 16), linear(4096, 4096, 4096)
    one, eight = Tiles(64, 64, 64), Tiles(64, 64, 64, split_k=8)
    assert predicted_seconds(deep, eight) < predicted_seconds(deep, one)
    assert predicted_seconds(full, eight) > predicted_seconds(full, one)
    assert len(estimator(deep)(eight)) == 2, "the second kernel adds the parts"


def test_keys_are_shared_where_queries_are_few() -> None:
    step = attention(8192, 1, 128)
    assert predicted_seconds(step, AttentionTiles(16, 32, 4, 3, splits=16)) < predicted_seconds(step, AttentionTiles(16, 32, 4, 3))
    assert len(estimator(step)(AttentionTiles(16, 32, splits=16))) == 2


def test_programs_that_walk_all_tiles_start_once() -> None:
    one = linear(4096, 4096, 512)
    every, few = (estimator(one)(replace(LARGE, programs=n))[0] for n in (0, 132))
    assert few.programs == 132 and every.programs == 1024
    assert few.flops * few.programs >= every.flops * every.programs, "the last turn of some programs is empty"


def test_blocks_that_a_unit_copies_spare_threads_the_work() -> None:
    one = linear(4096, 4096, 4096)
    assert predicted_seconds(one, replace(LARGE, descriptors=True)) < predicted_seconds(one, LARGE)


def test_a_pipeline_hides_what_is_waited_for() -> None:
    one = linear(1024, 1024, 8192)
    times = [predicted_seconds(one, Tiles(128, 64, 64, num_warps=4, num_stages=n)) for n in (1, 3)]
    assert times[1] < times[0]


def test_loops_read_again_what_blocks_hold() -> None:
    rows = softmax(4096, 8192)
    assert predicted_seconds(rows, Schedule(1, 8192, 8)) < predicted_seconds(rows, Schedule(1, 1024, 8, persistent=False))


def test_what_lies_side_by_side_is_read_together() -> None:
    columns = kernel("blocks")
    few, many = Schedule(64, 16, 4, persistent=False), Schedule(4, 512, 4, persistent=False)
    assert predicted_seconds(columns, many) < predicted_seconds(columns, few)


def test_states_in_registers_are_faster_than_in_memory() -> None:
    one = kernel("recurrence")
    assert predicted_seconds(one, RecurrenceTiles(16, 256, 256, 8, 1)) < predicted_seconds(one, RecurrenceTiles(16, 16, 16, 8, 1))


def test_sizes_that_vary_are_taken_as_told() -> None:
    varying, fixed = linear(symbol("s"), 1024, 1024), linear(512, 1024, 1024)
    assert predicted_seconds(varying, LARGE, sizes={"s": 512}) == predicted_seconds(fixed, LARGE)
    assert predicted_seconds(varying, LARGE, sizes={"s": 512}) < predicted_seconds(varying, LARGE)


def test_programs_that_a_processor_holds() -> None:
    work = Work(1000, 4, 1e6, 1e3, 1e3, registers=64, shared=0)
    assert residents(work, H100) == 65_536 // (64 * 128)
    assert residents(replace(work, registers=128), H100) < residents(work, H100)
    assert residents(replace(work, shared=100 << 10), H100) == 2
    assert residents(replace(work, warps=32, registers=255, shared=300 << 10), H100) == 1, "one runs, or none would"


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1), "ties stand at their middle rank"
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    for wrong in ([], [1.0]), ([1.0], [1.0]):
        with pytest.raises(ValueError, match="cannot be compared"):
            spearman(*wrong)
