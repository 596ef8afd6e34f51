"""The manager: order, stages, records, one callback; reading passes from text."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_same_values
from tilewright.driver.pipeline import DEFAULT_PASSES, passes_from
from tilewright.ir.graph import Stage, order
from tilewright.ir.text import parse
from tilewright.passes.base import Notes, Steps
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.manager import PassSyntaxError, StageError, parse_passes, pass_text, run_passes
from tilewright.passes.merge_linears import MergeLinears
from tilewright.passes.pack_weights import PackWeights
from tilewright.passes.recognize import Recognize

TEXT = """graph g(x: f32[b, 8]) {
  w = constant "w"
  q = matmul(x, w)
  s = sigmoid(q)
  y = mul(q, s)
  return y
}"""
WEIGHTS = {"w": torch.randn(8, 4)}


def test_default_passes_keep_the_function() -> None:
    graph, ran = parse(TEXT, WEIGHTS), list[str]()
    after = run_passes(graph, DEFAULT_PASSES, Notes(), lambda item, *rest: ran.append(item.name))
    assert ran == [p.name for p in DEFAULT_PASSES]
    assert after.stage == Stage.FUSED
    assert_same_values(graph, after, [torch.randn(3, 8)], 1e-5)


def test_callback_sees_each_pass_with_its_graphs_and_time() -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(item, before, after, seconds: float) -> None:
        assert seconds >= 0
        seen.append((item.name, len(order(before)), len(order(after))))

    run_passes(parse(TEXT, WEIGHTS), [Canonicalize(), Recognize()], Notes(), watch)
    assert seen == [("canonicalize", 5, 6), ("recognize", 6, 5)]


def test_a_pass_out_of_order_is_named() -> None:
    with pytest.raises(
        StageError, match="pass 'recognize' needs a graph that is at least canonical, and 'g' is captured: run 'canonicalize'"
    ):
        run_passes(parse(TEXT, WEIGHTS), [Recognize(), Canonicalize()], Notes())


def test_passes_from_text() -> None:
    found = parse_passes("canonicalize, merge-linears{max_columns=4096},fold_constants{ allowance = 16 }")
    assert found == [Canonicalize(), MergeLinears(max_columns=4096), FoldConstants(allowance=16)]
    assert parse_passes("pack-weights{vendor=fc.weight head.weight}") == [PackWeights(vendor=("fc.weight", "head.weight"))]
    assert passes_from(None) == list(DEFAULT_PASSES) and parse_passes("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "there is no pass 'nope'; passes are canonicalize, "),
        ("merge-linears{width=3}", "pass 'merge-linears' has no option 'width'; its options are max_columns"),
        ("recognize{a=3}", "pass 'recognize' has no option 'a'; it has none"),
        ("merge-linears{max_columns=wide}", "option 'max_columns' of 'merge-linears' takes an integer, not 'wide'"),
        ("merge-linears{max_columns}", "option 'max_columns' of 'merge-linears' is given as max_columns=value"),
        ("merge-linears{max_columns=1", "expected name{option=value, ...} at 'merge-linears{max_columns=1'"),
    ],
)
def test_bad_text_is_one_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(PassSyntaxError) as error:
        parse_passes(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_first_steps_of_the_passes_are_those_of_all() -> None:
    graph, inputs = parse(TEXT, WEIGHTS), [torch.randn(3, 8)]
    whole = Steps()
    run_passes(graph, DEFAULT_PASSES, Notes(steps=whole))
    assert [s.item for s in whole.taken if not s.rule] == [p.name for p in DEFAULT_PASSES]
    assert {"canonicalize.product-with-weight", "recognize.silu"} & {s.rule for s in whole.taken}
    for limit in range(len(whole.taken) + 1):
        steps = Steps(limit)
        after = run_passes(graph, DEFAULT_PASSES, Notes(steps=steps))
        assert steps.taken == whole.taken[:limit]
        assert_same_values(graph, after, inputs, 1e-5)


def test_no_steps_leave_the_graph_alone() -> None:
    graph = parse(TEXT, WEIGHTS)
    assert run_passes(graph, DEFAULT_PASSES, Notes(steps=Steps(0))) is graph


@pytest.mark.parametrize("text", ["canonicalize", "merge-linears{max_columns=4096}", "quantize{plan=a.weight:int8 *:int4-g32}"])
def test_passes_as_text_and_back(text: str) -> None:
    (item,) = parse_passes(text)
    assert pass_text(item) == text and parse_passes(pass_text(item)) == [item]
