"""The simulator: tasks run when they can, and parts are advised only where something runs beside them."""

from __future__ import annotations

import pytest
from tilewright.ir.reasons import Reason
from tilewright.ir.text import parse
from tilewright.passes.base import Notes
from tilewright.passes.split_batch import SplitHalves
from tilewright.search.simulate import (
    LEAST_TOKENS,
    STEP,
    Cluster,
    Layer,
    Span,
    Task,
    batch_parts,
    halves,
    in_parts,
    in_pipeline,
    in_two,
    layers_of,
    micro_batches,
    simulate,
    total,
)

LAYERS = [Layer(flops=1e6, pair_flops=100.0, nbytes=2e4)] * 8
PAIR = Cluster(devices=2, rate=1e12, wave=128, link=2e10, latency=1e-6)


def test_tasks_wait_for_their_device_and_for_each_other() -> None:
    tasks = [Task("a", "x", 2.0), Task("b", "x", 1.0), Task("c", "y", 1.0, ("a",)), Task("d", "y", 5.0), Task("e", "x", 1.0, ("c", "b"))]
    spans = simulate(tasks)
    assert spans == {"a": Span(0, 2), "b": Span(2, 3), "c": Span(2, 3), "d": Span(3, 8), "e": Span(3, 4)} and total(tasks) == 8
    assert total([]) == 0


def test_one_part_is_one_thing_after_the_other() -> None:
    tokens = 2048
    expected = sum(PAIR.computing(x, tokens, 0) + PAIR.summing(x, tokens) for x in LAYERS)
    assert total(in_parts(LAYERS, [tokens], PAIR)) == pytest.approx(expected)


def test_halves_hide_the_link() -> None:
    found = halves(LAYERS, 4096, PAIR)
    assert found.pays and sum(found.parts) == 4096 and found.parts[0] % STEP == 0
    assert found.seconds == total(in_parts(LAYERS, found.parts, PAIR)) < 0.8 * found.whole
    computing = sum(PAIR.computing(x, n, before) for x in LAYERS for n, before in zip(found.parts, (0, found.parts[0])))
    summing = sum(PAIR.summing(x, n) for x in LAYERS for n in found.parts)
    assert max(computing, summing) <= found.seconds <= computing + summing


def test_never_a_gain_below_the_least() -> None:
    for tokens in (1, 100, 512, 768, LEAST_TOKENS - 1):
        for link in (1e7, 1e9, 1e11):
            found = halves(LAYERS, tokens, Cluster(2, 1e12, 128, link))
            assert not found.pays and found.parts == (tokens,) and "fewer than 1024" in found.reason


ALONE = {
    "one device": (Cluster(1, 1e12, 128, 2e10), LAYERS, 4096, "on one device nothing is waited for"),
    "no sums": (PAIR, [Layer(1e6)] * 4, 4096, "nothing is summed over devices"),
    "fast link": (Cluster(2, 1e12, 128, 1e15), LAYERS, 4096, "of the time"),
    "slow to start": (Cluster(2, 1e12, 128, 1e12, latency=1.0), LAYERS, 4096, "of the time"),
    "more waves": (Cluster(2, 1e12, 3000, 2e10), LAYERS, 3000, "more waves"),
}


@pytest.mark.parametrize("case", ALONE)
def test_declined(case: str) -> None:
    cluster, layers, tokens, why = ALONE[case]
    found = halves(layers, tokens, cluster)
    assert not found.pays and why in found.reason and found.seconds == found.whole and found.parts == (tokens,)


def test_later_parts_pay_for_the_keys_before_them() -> None:
    layer = Layer(0.0, 1.0)
    whole, first, second = (PAIR.computing(layer, n, before) for n, before in ((2048, 0), (1024, 0), (1024, 1024)))
    assert first + second == pytest.approx(whole) and second == pytest.approx(3 * first)


TEXT = """graph g(x: f32[2, 8, 16], w: f32[16, 16]) {
  y = linear(x, w) : f32[2, 8, 16]
  s = extern[_c10d_functional.all_reduce.default](y, args=[$0, "sum", "0"], sequence=0) : f32[2, 8, 16]
  t = extern[_c10d_functional.wait_tensor.default](s, sequence=1) : f32[2, 8, 16]
  z = linear(t, w) : f32[2, 8, 16]
  return z
}"""


def test_layers_lie_between_sums() -> None:
    first, second = layers_of(parse(TEXT), 16)
    assert first.flops == second.flops > 2 * 16 * 16 - 1 and first.nbytes == 4 * 16 and second.nbytes == 0


SLOW = Cluster(2, 1e9, 128, 1e8)


def test_the_passes_where_they_pay_and_why_where_not() -> None:
    graph, notes = parse(TEXT.replace("8", "2048")), Notes()
    chosen = in_two(graph, SLOW, notes)
    assert {item.name for item, _ in chosen} == {"split-halves", "split-batch"} and not notes.declined
    assert all(0 < item.at < 2048 for item, _ in chosen if isinstance(item, SplitHalves))
    assert [d.seconds for _, d in chosen] == sorted(d.seconds for _, d in chosen)
    assert in_two(graph, Cluster(1, 1e9), notes) == []
    assert {(d.rule, d.what, d.reason, d.value) for d in notes.declined} == {
        (rule, "2 x 2048 tokens", Reason.NO_GAIN, "on one device nothing is waited for") for rule in ("split-halves", "split-batch")
    }


@pytest.mark.parametrize(
    ("text", "rules", "value"),
    [
        (TEXT, {"split-halves", "split-batch"}, "16 tokens are fewer than 1024"),
        (TEXT.replace("[2, 8, 16]", "[4096, 16]"), set(), ""),
        (TEXT.replace("[2, 8, 16]", "[1, 16]"), {"split-batch"}, "1 tokens are fewer than 1024"),
        (TEXT.replace("2, 8", "2, n"), {"split-batch"}, "f32[2, n, 16] is summed"),
        (TEXT.replace("2, 8", "2, 4, 4, 8"), {"split-batch"}, "f32[2, 4, 4, 8, 16] is summed"),
        (TEXT.replace("[2, 8", "[3000, 8"), {"split-halves"}, "24000 tokens are no more than the 96000 that parts are multiples of"),
        ("graph g(x: f32[2048, 16]) {\n  return x\n}", {"split-batch"}, "nothing is summed over devices"),
    ],
)
def test_what_is_summed_says_what_there_is_to_split(text: str, rules: set[str], value: str) -> None:
    notes = Notes()
    chosen = in_two(parse(text), SLOW, notes)
    assert {d.rule for d in notes.declined} == rules and {d.value for d in notes.declined} <= {value}
    assert [item.name for item, _ in chosen] == ([] if "split-batch" in rules else ["split-batch"])


def test_rows_of_a_batch_attend_to_themselves_alone() -> None:
    """Halves of tokens: the second one has three quarters of the pairs; halves of the batch have as many each."""
    layers = [Layer(flops=0.0, pair_flops=2.0, nbytes=1e-9)]
    found = batch_parts(layers, 2, 2048, PAIR)
    assert found.whole == pytest.approx(total(in_parts(layers, [4096], PAIR)))
    assert batch_parts(layers, 1, 4096, PAIR).reason == "a batch of one has no parts"
    assert halves(LAYERS, 3 * 2048, PAIR, batch=3).parts[0] % (3 * STEP) == 0


def test_micro_batches_fill_a_pipeline() -> None:
    found = micro_batches([1.0, 1.0], [0.0], 8)
    assert found.pays and found.parts == (1,) * 8 and found.whole == 2.0
    assert found.seconds == pytest.approx((8 + 1) / 8)  # GPipe: (parts + stages - 1) / parts
    three = total(in_pipeline([1.0, 1.0, 1.0], [0.1, 0.1], 4))
    assert three == pytest.approx(3 / 4 + 2 * 0.1 / 4 + 3 / 4)


def test_micro_batches_weigh_what_a_part_costs() -> None:
    few, many = (len(micro_batches([1.0, 1.0], [0.0], 64, overhead).parts) for overhead in (0.1, 0.001))
    assert 1 < few < many <= 64
    assert micro_batches([1.0, 1.0], [0.0], 10, 0.05).parts[0] - micro_batches([1.0, 1.0], [0.0], 10, 0.05).parts[-1] in (0, 1)


@pytest.mark.parametrize("seconds,batch,overhead,why", [
    ([1.0], 8, 0.0, "on one device nothing is waited for"), ([1.0, 1.0], 1, 0.0, "a batch of one has no parts"),
    ([1.0, 1.0], 8, 10.0, "of the time"),
])  # fmt: skip
def test_micro_batches_declined(seconds, batch, overhead, why) -> None:
    found = micro_batches(seconds, [0.0] * (len(seconds) - 1), batch, overhead)
    assert not found.pays and why in found.reason and found.parts == (batch,)
