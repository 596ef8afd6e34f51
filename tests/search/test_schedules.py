"""Which schedule a kernel gets: by the compiler's facts, by measuring on a device, and how that stands in the graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from support import NATIVE

pytest.importorskip("triton")

from fake_driver import FakeGpu, Launched
from sampled import linear, softmax
from tilewright.codegen.program import compile_program, list_program
from tilewright.codegen.regions import lowered_regions
from tilewright.codegen.target import TARGETS, Usage
from tilewright.codegen.triton.binary import Binary, OfflineError
from tilewright.codegen.triton.cross import cross_target
from tilewright.codegen.triton.templates import text_of
from tilewright.driver import tune
from tilewright.driver.compile import Options
from tilewright.driver.receipt import Receipt
from tilewright.driver.tune import SCHEDULES, compile_tuned
from tilewright.ir.graph import order
from tilewright.ir.text import parse
from tilewright.passes import fusion_units
from tilewright.passes.base import Notes
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.manager import run_passes
from tilewright.passes.plan_memory import PlanMemory
from tilewright.search import candidates as candidates_module
from tilewright.search import schedules as module
from tilewright.search.bench import LIBRARY, Bench
from tilewright.search.candidates import candidates, explored
from tilewright.search.database import Database
from tilewright.search.examples import example_inputs
from tilewright.search.gpus import of_target
from tilewright.search.schedules import by_facts, by_measuring, region_name, with_schedules
from tilewright.search.tuner import remembered

H100 = of_target("sm_90")
ROWS = "graph g(x: f32[4096, 1024]) stage canonical {\n  y = softmax(x, dim=1)\n  z = mul(y, 2.0)\n  return z\n}"
TWO = """graph g(x: f32[4096, 1024], b: f32[65536]) stage canonical {
  y = softmax(x, dim=1)
  z = gelu(b)
  return y, z
}"""
LAYER = """graph g(x: f32[300, 64], w: f32[512, 64]) stage canonical {
  h = linear(x, w)
  g = gelu(h)
  return g
}"""


def fused(text: str):
    return run_passes(parse(text), (FuseRegions(), PlanMemory()), Notes())


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(tmp_path / "t.sqlite")


@pytest.fixture
def compiler(monkeypatch):
    """What the compiler says, instead of asking it: compiler.rule(schedule) is what is spilled, or why it fails; asked: of which."""

    class Compiler:
        asked: list = []
        rule: Callable = staticmethod(lambda schedule: 0)

    compiler = Compiler()
    compiler.asked = []

    def usage_of(program, target, database):
        compiler.asked.append(program.schedule)
        answer = compiler.rule(program.schedule)
        if isinstance(answer, str):
            raise OfflineError(kernel=program.kernel.name, target=target, reason=answer)
        return Usage(64, answer, 0)

    monkeypatch.setattr(candidates_module, "usage_of", usage_of)
    return compiler


# ---- candidates


def test_ranked_by_prediction_and_the_start_among_the_compiled(compiler, database) -> None:
    found = candidates(linear(4096, 4096, 4096), H100)
    assert found.legal == len(found.ranked) > 1000
    made = explored(found, database, 8)
    assert len(made) == 8 and found.start in [c.schedule for c in made]
    assert made[0].seconds == min(c.seconds for c in made)
    assert len({text_of(c.schedule) for c in made}) == 8


def test_one_that_spills_never_comes_first(compiler, database) -> None:
    found = candidates(linear(4096, 4096, 4096), H100)
    compiler.rule = lambda s: 8 if s.block_m * s.block_n > 64 * 64 else 0
    made = explored(found, database, 12)
    assert not made[0].spills and [c.spills for c in made] == sorted(c.spills for c in made)
    assert sum(c.spills for c in made) < 9, "others that take as many registers are not tried"
    compiler.rule = lambda s: 8
    assert explored(found, database, 4)[0].spills, "where all spill, one does"


def test_those_that_fail_come_last(compiler, database) -> None:
    found = candidates(softmax(4096, 1024), H100)
    compiler.rule = lambda s: "no" if s.num_warps < 8 else 0
    made = explored(found, database, 12)
    assert not made[0].failure and "no" in made[-1].failure and made[0].schedule.num_warps >= 8


def test_more_shared_memory_than_there_is_is_a_failure(monkeypatch, database) -> None:
    monkeypatch.setattr(candidates_module, "usage_of", lambda *rest: Usage(32, 0, 300_000))
    (made,) = explored(candidates(softmax(4096, 1024), H100), database, 1)
    assert "300000 bytes of shared memory, and there are 232448" in made.failure


def test_the_compiler_is_asked_once(monkeypatch, database) -> None:
    found = candidates(softmax(64, 256), H100)
    first = explored(found, database, 3)
    assert all(c.usage and c.usage.registers for c in first)
    monkeypatch.setattr(candidates_module, "launch_usage", lambda *rest: pytest.fail("compiled again"))
    assert explored(found, database, 3) == first


# ---- by facts


def test_a_schedule_stands_in_the_graph(compiler, database) -> None:
    graph = fused(ROWS)
    (region,) = [n for n in order(graph) if n.op.name == "region"]
    made = with_schedules(graph, {region_name(region): "xblock=2 num_warps=2"})
    assert 'schedule="xblock=2 num_warps=2"' in str(made) and made.arena.keys() <= set(order(made))
    assert len(made.arena) == len(graph.arena) and len(made.inplace) == len(graph.inplace)
    ((kernel, _),) = lowered_regions(parse(str(made)), ("cpu",))
    assert kernel.schedule == "xblock=2 num_warps=2"
    assert str(with_schedules(graph, {})) == str(graph)


def test_what_ranks_first_is_compiled_in(database) -> None:
    graph = fused(ROWS)
    found = by_facts(graph, H100, 4, database, "cpu")
    (line,) = found.lines
    assert line.schedule and not line.measured and line.legal > 100 and line.compiled == 4 and line.seconds < line.start_seconds
    assert line.why.startswith("predicted to take") and list(found.schedules.values()) == [line.schedule]
    binaries: dict[str, Binary] = {}
    program = list_program(with_schedules(graph, found.schedules), {"cpu": cross_target("sm_90", binaries)})
    (binary,) = binaries.values()
    assert program.kernels[0].usage.spills == 0 and f"num_warps={binary.threads // 32}" in f"{line.schedule} num_warps=4"


def test_time_is_counted_in_compilations(compiler, database) -> None:
    graph = fused(TWO)
    for seconds, compiled in [(0, [0, 0]), (3, [3, 0]), (100, [12, 12])]:
        compiler.asked.clear()
        found = by_facts(graph, H100, seconds, database, "cpu")
        assert [line.compiled for line in found.lines][0] == compiled[0] and len(compiler.asked) <= sum(compiled)
        assert [line.why.startswith("not searched") for line in found.lines] == [n == 0 for n in compiled]
    assert by_facts(graph, H100, 100, database, "cpu") == found, "equal graphs get equal schedules"


def test_one_to_start_from_that_spills_is_replaced_whatever_is_predicted(compiler, database, monkeypatch) -> None:
    graph = fused(ROWS)
    monkeypatch.setattr(module, "WORTH", 0.99)
    assert not by_facts(graph, H100, 100, database, "cpu").schedules and len(compiler.asked) == 1
    compiler.rule = lambda s: 16 if s == compiler.asked[0] else 0
    (line,) = by_facts(graph, H100, 100, database, "cpu").lines
    assert line.schedule and line.why == "the one to start from spills"


# ---- by measuring


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(module, "COMPILED", 5)
    monkeypatch.setattr(module, "MEASURED", 3)
    return FakeGpu("sm_90")


def bench(gpu: FakeGpu, price: Callable[[Launched], float]) -> Bench:
    """On which a launch takes so many seconds."""
    passed, counted = 0.0, 0

    def clock() -> float:
        nonlocal passed, counted
        passed += sum(map(price, gpu.launches[counted:]))
        counted = len(gpu.launches)
        return passed

    return Bench(H100, "a fake one", clock, gpu.targets, "cpu")


def soon() -> float:
    return time.perf_counter() + 600


@NATIVE
def test_the_fastest_is_taken_and_remembered(gpu, compiler, database) -> None:
    graph, seen = fused(ROWS), set[int]()

    def price(launched: Launched) -> float:
        seen.add(launched.grid[0])
        return 1.0 / launched.grid[0]  # whatever has most programs

    found = by_measuring(graph, bench(gpu, price), soon(), database)
    (line,) = found.lines
    assert line.measured and len(seen) > 1 and line.compiled == 5
    assert line.seconds == pytest.approx(1.0 / max(seen)) and line.seconds <= line.start_seconds
    count = len(gpu.launches)
    again = by_measuring(graph, bench(gpu, price), soon(), database)
    assert again == found and len(gpu.launches) == count, "the database knows"


@NATIVE
def test_the_start_stays_where_nothing_is_faster(gpu, compiler, database) -> None:
    found = by_measuring(fused(ROWS), bench(gpu, lambda launched: 1e-3), soon(), database)
    (line,) = found.lines
    assert not found.schedules and line.schedule == "" and "is faster" in line.why and line.seconds == line.start_seconds


@NATIVE
def test_another_gpu_or_triton_is_measured_anew(gpu, compiler, database, monkeypatch) -> None:
    one = bench(gpu, lambda launched: 1e-3)
    counts = []
    for change in (lambda: one, lambda: replace(one, identity="another"), lambda: monkeypatch.setattr("triton.__version__", "9") or one):
        by_measuring(fused(ROWS), change(), soon(), database)
        counts.append(len(gpu.launches))
    assert counts[0] < counts[1] < counts[2]


@NATIVE
def test_one_that_fails_is_out(gpu, compiler, database, monkeypatch) -> None:
    from tilewright.codegen.triton import toolchain

    real = toolchain.compile_binary

    def failing(program, one, *rest):
        if program.schedule.num_warps != 4:
            raise OfflineError(kernel=program.kernel.name, target="sm_90", reason="the compiler fell over")
        return real(program, one, *rest)

    monkeypatch.setattr(toolchain, "compile_binary", failing)
    (line,) = by_measuring(fused(ROWS), bench(gpu, lambda launched: 1.0 / launched.grid[0]), soon(), database).lines
    assert "the compiler fell over" in line.why and "num_warps" not in line.schedule


@NATIVE
def test_the_library_is_taken_where_it_is_faster(gpu, compiler, database) -> None:
    graph = fused(LAYER)
    for product, gelu, wins in [(1e-3, 1e-5, True), (1e-5, 1e-3, False)]:
        own = Database(database.path.with_suffix(f".{wins}"))
        found = by_measuring(graph, bench(gpu, lambda x, p=product, g=gelu: p if "linear" in x.name else g), soon(), own)
        (line,) = found.lines
        assert (line.schedule == LIBRARY) == wins == bool(found.library)
    names = tuple(found.library) or ("linear/f32[300x64]/f32[512x64]/f32[300x512]",)
    apart = run_passes(parse(LAYER), (FuseRegions(library=names),), Notes())
    assert [n.op.name for n in order(apart) if n.op.name in ("linear", "region")] == ["linear", "region"]


@NATIVE
def test_the_time_ends(gpu, database) -> None:
    found = by_measuring(fused(TWO), bench(gpu, lambda launched: 1e-3), time.perf_counter() - 1, database)
    assert [line.why for line in found.lines] == ["not searched: the time for tuning was used up"] * 2 and not gpu.launches


@NATIVE
def test_a_fault_costs_one_kernel_its_search(gpu, compiler, database, monkeypatch) -> None:
    monkeypatch.setattr(module, "explored", lambda *rest: 1 // 0)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        found = by_measuring(fused(ROWS), bench(gpu, lambda launched: 1e-3), soon(), database)
    assert "internal error" in found.lines[0].why and not found.schedules


@NATIVE
@pytest.mark.parametrize("schedule, other", [("xblock=1 rblock=1024 num_warps=16", True), ("xblock=2 rblock=1024 num_warps=4", False)])
def test_a_chosen_one_that_does_not_work_here_gives_way_to_the_start(gpu, monkeypatch, schedule, other) -> None:
    """As in an artifact that was made on a larger GPU."""
    graph = fused(ROWS)
    (region,) = [n for n in order(graph) if n.op.name == "region"]
    graph = with_schedules(graph, {region_name(region): schedule})
    gpu.library.fake_most_threads(256)
    program = compile_program(graph, gpu.targets)
    assert not program.fallbacks and bool(program.kernels[0].notes) == other
    assert not other or "num_warps=16" in program.kernels[0].notes[0]


# ---- in the tuner


@NATIVE
def test_the_tuner_takes_schedules_that_gain(gpu, compiler, database, monkeypatch) -> None:
    """What has fewest programs is fastest."""
    made = tuned("graph g(x: f32[64, 1024]) {\n  y = softmax(x, dim=1)\n  return y\n}", gpu, database, monkeypatch)
    (line,) = made.receipt.schedules
    trial = next(t for t in made.receipt.trials if t.what == SCHEDULES)
    assert line.schedule and line.measured and not trial.kept and f'schedule="{line.schedule}"' in str(made.graph)
    assert Receipt.from_json(made.receipt.to_json()) == made.receipt


@NATIVE
@pytest.mark.parametrize("faster", [True, False])
def test_the_tuner_offers_what_is_the_librarys(gpu, compiler, database, monkeypatch, faster) -> None:
    """A convolution becomes a kernel of ours if that is measured to be faster."""
    for place in (tune, fusion_units):
        monkeypatch.setattr(place, "can_be_offered", lambda node: node.op.name == "conv")
    text = """graph g(x: f32[2, 8, 16, 16], w: f32[16, 8, 3, 3]) {
      h = conv(x, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1])
      y = relu(h)
      return y
    }"""
    ours = 1e-5 if faster else 1e-1
    made = tuned(text, gpu, database, monkeypatch, lambda launched: ours if "conv" in launched.name else 1e-2)
    assert ("conv" in [n.op.name for n in order(made.graph)]) != faster, str(made.graph)


def tuned(text: str, gpu, database, monkeypatch, seconds=lambda launched: 1e-2 * launched.grid[0]):
    """Everything on the fake device, by its clock; what launches nothing is slow."""
    on_gpu = bench(gpu, seconds)
    extra, last = 0.0, -1.0

    def clock() -> float:
        nonlocal extra, last
        now = on_gpu.clock()
        extra, last = extra + (10.0 if now == last else 0.0), now
        return now + extra

    monkeypatch.setattr(module, "WORTH", -10.0)
    monkeypatch.setattr(tune, "bench_of", lambda graph: on_gpu)
    monkeypatch.setattr(tune, "Database", lambda: database)
    monkeypatch.setattr(tune, "remembered", partial(remembered, clock=clock))
    monkeypatch.setitem(TARGETS, "cpu", gpu.targets["cpu"])
    graph = parse(text)
    return compile_tuned(graph, Options(max_autotune=True, tuning_seconds=120.0), example_inputs(graph))
