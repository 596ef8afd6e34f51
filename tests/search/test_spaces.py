"""What each template offers: enumerated by constraint programming as by brute force, in time; and it is legal where it is printed."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from sampled import F32, KERNELS, TEMPLATES, attention, kernel, linear, pointwise, sampled, softmax
from tilewright.codegen.attentions import find_attention
from tilewright.codegen.kernel import Axis, Buffer, Kernel, Load, Reduce, Store
from tilewright.codegen.space import Space
from tilewright.codegen.triton.attention_tiles import refusal
from tilewright.codegen.triton.legalize import UnsupportedByTriton
from tilewright.codegen.triton.spaces import offers
from tilewright.codegen.triton.templates import build, text_of
from tilewright.codegen.triton.tiles import UNITS
from tilewright.ir import ops
from tilewright.ir.dims import symbol
from tilewright.search.tiles import NoSchedule, schedules


def brute_force(space: Space) -> list[dict[str, int]]:
    choices = itertools.product(*space.variables.values())
    return [v for v in (dict(zip(space.variables, values)) for values in choices) if space.broken(v) is None]


def few_of(space: Space, most: int = 3) -> Space:
    """The same with fewer values: the limits still decide."""
    drawn = {name: tuple(sorted(random.Random(name).sample(v, min(most, len(v))))) for name, v in space.variables.items()}
    return Space(drawn, space.limits)


@pytest.mark.parametrize("target", UNITS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equal_to_brute_force(template: str, target: str) -> None:
    for offer in offers(kernel(template), target):
        expected = brute_force(small := few_of(offer.space))
        if expected:
            assert schedules(small) == expected
        else:
            with pytest.raises(NoSchedule):
                schedules(small)


@pytest.mark.parametrize("name", KERNELS)
def test_enumerated_in_time(name: str) -> None:
    one = KERNELS[name]()
    for target in UNITS:
        begin = time.process_time()
        found = sampled.enumerated(one, target)
        assert time.process_time() - begin < 2 and found and len(found) < 10_000


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_legal_is_printed(name: str) -> None:
    one = KERNELS[name]()
    for target in UNITS:
        found = sampled.enumerated(one, target)
        for schedule in random.Random(name).sample(found, min(len(found), 5)):
            assert build(one, schedule).schedule == schedule


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("attention")])
def test_what_is_legal_for_a_target_is_legal_for_some(name: str) -> None:
    one = KERNELS[name]()
    assert {refusal(one, find_attention(one), s) for target in UNITS for s in sampled.enumerated(one, target)} == {None}


@pytest.mark.parametrize(
    "one", [pointwise(1), pointwise(9), softmax(1, 1), softmax(3, 5), linear(1, 1, 1), linear(17, 3, 5), attention(3, 1)]
)
def test_small_sizes_have_schedules(one) -> None:
    for target in UNITS:
        found = sampled.enumerated(one, target)
        assert found and all(build(one, schedule) for schedule in found[:3])


def test_blocks_do_not_exceed_what_there_is() -> None:
    assert {s.block_m for s in sampled.enumerated(linear(20, 4096, 4096), "sm_90")} == {16, 32}
    assert {s.xblock for s in sampled.enumerated(pointwise(100), "sm_90")} <= {32, 64, 128}


def test_depths_are_shared_where_programs_are_few() -> None:
    assert all(s.split_k == 1 for s in sampled.enumerated(linear(4096, 4096, 4096), "sm_90"))
    assert any(s.split_k > 1 for s in sampled.enumerated(linear(64, 64, 1 << 16), "sm_90"))
    assert all(s.split_k == 1 for s in sampled.enumerated(linear(symbol("s"), 64, 1 << 16), "sm_90")), "nobody knows how many there are"


def test_extents_that_vary_are_walked_in_loops() -> None:
    one = sampled.fused(lambda x: ops.softmax(x, dim=-1), (F32, (symbol("s"), symbol("t"))))
    found = sampled.enumerated(one, "sm_90")
    assert found and not any(s.persistent for s in found)


def test_values_over_two_groups_need_the_whole_block() -> None:
    i, r, s = (symbol(name) for name in "irs")
    total = Reduce(F32, "sum", Load(F32, "x", 512 * i + 32 * r + s), ("s",))
    axes = (Axis("i", 64), Axis("r", 16, inner=True), Axis("s", 32, inner=True))
    stores = (Store("out", i, Reduce(F32, "max", total, ("r",))),)
    one = Kernel("largest_sum", axes, (Buffer("x", F32, 64 * 512),), (Buffer("out", F32, 64),), stores)
    assert all(s.persistent for s in sampled.enumerated(one, "sm_90"))


# ---- as text


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_schedule_survives_being_written(template: str) -> None:
    one = kernel(template)
    for schedule in random.Random(template).sample(sampled.enumerated(one, "sm_90"), 8):
        chosen = replace(one, schedule=text_of(schedule))
        assert build(chosen).schedule == schedule and build(chosen).source == build(one, schedule).source


@pytest.mark.parametrize(
    "text", ["xblock", "xblock=", "xblock=two", "xblock=-1", "wide=False", "block_m=16", "persistent=1", "xblock=1;x=2"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedByTriton, match="is no option of Schedule"):
        build(replace(kernel("blocks"), schedule=text))


@pytest.mark.parametrize("text, reason", [("xblock=3", "power"), ("xblock=0", "power"), ("xblock=4 num_warps=5", "power")])
def test_blocks_that_triton_cannot_have(text: str, reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(replace(kernel("blocks"), schedule=text))
