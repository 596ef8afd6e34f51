"""Padding removal: rows of tokens are as they were, whatever mixes padding in is refused by name."""

from __future__ import annotations

import pytest
import torch
from packing import CAUSAL, ENDS, KEEP, assert_equal_on_tokens, encoder, inputs_of, mask_of, packed
from tilewright.ir.graph import order, topological
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes, Reason, Steps
from tilewright.passes.remove_padding import FIRST, LAST, RemovePadding

CAUSAL_KEEP = (*KEEP, *CAUSAL, "both = logical_and(before, keep)")
WINDOW = (*KEEP, *CAUSAL, "from = sub(q, i)", "near = lt(from, 3)", "some = logical_and(before, near)", "all = logical_and(some, keep)")
LOW = ("one = sub(1, mask)", "f = cast(one, dtype=f32)", "low = mul(f, -3.4e38)", "bias = reshape(low, shape=[4, 1, 1, 8])")
ALIBI = (*KEEP, "i = iota(length=8)", "f = cast(i, dtype=f32)", "b = mul(f, 0.25)", "bias = where(keep, b, -3.4e38)")
INVERTED = ("k = cast(mask, dtype=bool)", "no = logical_not(k)", "keep = reshape(no, shape=[4, 1, 1, 8])")
BOTH = (*KEEP, "rows = reshape(k, shape=[4, 1, 8, 1])", "square = logical_and(rows, keep)")

MASKS = {
    "keys": encoder(),
    "causal": encoder(mask=CAUSAL_KEEP, attended="attention(h, h, h, both, scale=0.5)"),
    "causal attention": encoder(attended="attention(h, h, h, keep, causal=true, scale=0.5)"),
    "window": encoder(mask=WINDOW, attended="attention(h, h, h, all, scale=0.5)"),
    "added": encoder(mask=LOW, attended="attention(h, h, h, bias, scale=0.5)"),
    "alibi": encoder(mask=ALIBI, attended="attention(h, h, h, bias, scale=0.5)"),
    "queries, too": encoder(mask=BOTH, attended="attention(h, h, h, square, scale=0.5)"),
    "sigmoid": encoder(attended='attention(h, h, h, keep, scale=0.5, weights="sigmoid")'),
}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", ENDS)
@pytest.mark.parametrize("name", MASKS)
def test_tokens_keep_their_values(name: str, lengths: str, left: bool) -> None:
    graph, found, notes = packed(MASKS[name])
    assert found is not None, notes.declined
    verify(found.graph)
    assert found.spread == ((0, 1),) and not found.present and found.padding == 0
    assert {str(n.shape[1]) for n in order(found.graph) if n.op.name in ("linear", "embedding")} == {"n"}
    assert_equal_on_tokens(graph, found, mask_of(ENDS[lengths], left))


def test_inputs_in_8_bits() -> None:
    """Codes and scales come of one node."""
    rounded = ("both = quantize_rows(y)", "q = item(both, index=0)", "s = item(both, index=1)", "f = cast(q, dtype=f32)", "r = mul(f, s)")
    graph, found, notes = packed(encoder(*rounded, result="r"))
    assert found is not None, notes.declined
    assert {str(n.shape[1]) for n in order(found.graph) if n.op.name == "round"} == {"n"}
    assert_equal_on_tokens(graph, found, mask_of(ENDS["mixed"]))


def test_a_mask_of_what_is_padding() -> None:
    graph, found, _ = packed(encoder(mask=INVERTED))
    assert found is not None and found.padding == 1
    assert_equal_on_tokens(graph, found, 1 - mask_of(ENDS["mixed"]))


def test_causal_masks_compare_packed_rows() -> None:
    """So that keys behind a row are never walked."""
    _, found, _ = packed(MASKS["causal"])
    assert found is not None
    (attention,) = (n for n in order(found.graph) if n.op.name == "attention")
    assert {n.hint for n in topological(attention.inputs[3:]) if n.op.name == "input"} == {"first", "last"}


POOLED = {
    "masked mean": ("f = cast(mask, dtype=f32)", "u = reshape(f, shape=[4, 8, 1])", "v = mul(y, u)", "s = sum(v, dims=[1])",
                    "c = sum(u, dims=[1])", "d = maximum(c, 1.0e-9)", "r = div(s, d)"),
    "masked maximum": ("u = reshape(k, shape=[4, 8, 1])", "v = where(u, y, -inf)", "r = amax(v, dims=[1])"),
}  # fmt: skip


@pytest.mark.parametrize("lengths", ENDS)
@pytest.mark.parametrize("name", POOLED)
def test_pooling_under_the_mask(name: str, lengths: str) -> None:
    graph, found, notes = packed(encoder(*POOLED[name], result="r"))
    assert found is not None, notes.declined
    assert found.spread == (None,)
    assert_equal_on_tokens(graph, found, mask_of(ENDS[lengths]), of_rows=False)


@pytest.mark.parametrize(
    ("line", "at", "left"), [("select(y, dim=1, index=0)", FIRST, False), ("slice(y, dim=1, start=7, stop=8)", LAST, True)]
)
def test_a_token_that_is_read_by_itself_must_be_there(line: str, at: int, left: bool) -> None:
    graph, found, _ = packed(encoder(f"r = {line}", result="r"))
    assert found is not None and found.present == {at}
    assert_equal_on_tokens(graph, found, mask_of(ENDS["mixed"], left), of_rows=False)


WEIGHTS_OF_MASK = ("f = cast(mask, dtype=f32)", "u = reshape(f, shape=[4, 8, 1])")
EITHER = (*KEEP, *CAUSAL, "either = logical_or(before, keep)")
A_LITTLE = (*LOW[:2], "low = mul(f, -3.0)", LOW[3])
MIXED, NO_MASK = Reason.PADDED_ROWS, Reason.NO_KEY_MASK

REFUSED = {
    "an unmasked mean": (encoder("r = mean(y, dims=[1])", result="r"), "mean", MIXED, "all indices together"),
    "a sum of more than the mask lets through": (
        encoder(*WEIGHTS_OF_MASK, "v = add(y, u)", "r = sum(v, dims=[1])", result="r"), "sum", MIXED, "all indices together"),
    "a running sum": (encoder("r = cumsum(y, dim=1)", result="r"), "cumsum", MIXED, "those before it"),
    "a token in between": (encoder("r = select(y, dim=1, index=3)", result="r"), "select", MIXED, ""),
    "no mask": (encoder(attended="attention(h, h, h, scale=0.5)"), "attention", NO_MASK, ""),
    "a mask that hides nothing for certain": (
        encoder(mask=EITHER, attended="attention(h, h, h, either, scale=0.5)"), "attention", NO_MASK, ""),
    "scores that padding moves a little": (
        encoder(mask=A_LITTLE, attended="attention(h, h, h, bias, scale=0.5)"), "attention", NO_MASK, ""),
    "a second attention, without mask": (
        encoder("b = attention(h, h, a, scale=0.5)", "z = permute(b, dims=[0, 2, 1, 3])", result="z"),
        "attention", MIXED, "without padding"),
    "keys of something else": (
        encoder(attended="attention(h, o, o, keep, scale=0.5)", mask=(*KEEP, "o = full(shape=[4, 2, 8, 4], value=1.0, dtype=f32)")),
        "attention", MIXED, "the same tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    text, node, reason, why = REFUSED[name]
    graph, found, notes = packed(text)
    assert found is None and RemovePadding().run(graph) is graph
    (declined,) = notes.declined
    assert declined.rule == "remove-padding" and declined.reason is reason
    assert declined.what.startswith(node) and why in declined.value


def test_a_refusal_names_the_source_line() -> None:
    _, found, notes = packed(encoder("r = mean(y, dims=[1])  # model.py:9", result="r"))
    assert found is None and notes.declined[0].source == "model.py:9"


def test_no_attention() -> None:
    _, found, notes = packed("graph g(ids: i64[4, 8], mask: i64[4, 8]) stage canonical {\n y = add(ids, mask)\n return y\n }")
    assert found is None and notes.declined[0].value == "there is no attention"


def test_notes_may_forbid_it() -> None:
    graph = parse(encoder())
    assert RemovePadding().run(graph, Notes(steps=Steps(0))) is graph


def test_values_of_sizes_that_vary() -> None:
    text = encoder().replace("i64[4, 8]", "i64[b, 8]").replace("shape=[4,", "shape=[b,")
    graph, found, _ = packed(text)
    assert found is not None
    assert_equal_on_tokens(graph, found, mask_of(ENDS["mixed"]))


def test_tokens_and_batch_may_be_one_dimension() -> None:
    graph, found, _ = packed(encoder("f = reshape(y, shape=[32, 8])", "g = linear(f, w)", result="g"))
    assert found is not None and found.spread == ((0, 0),)
    mask = mask_of(ENDS["mixed"])
    (before,), (after,) = interpret(graph, inputs_of(mask)[:2]), interpret(found.graph, inputs_of(mask))
    present = mask.reshape(-1) == 1
    torch.testing.assert_close(after[present], before[present], rtol=1e-5, atol=1e-6)
    assert not after[~present].any()


def test_results_lie_as_they_did() -> None:
    graph, found, _ = packed(encoder("r = layout(y, strides=[8, 32, 1])", result="r"))
    assert found is not None and found.spread == ((0, 1),)
    assert found.graph.outputs[0].op.name == "layout"
    assert_equal_on_tokens(graph, found, mask_of(ENDS["mixed"]))


def test_values_of_each_sequence_are_refused_by_name() -> None:
    text = encoder("z = add(y, s)  # model.py:8", result="z").replace("mask: i64[4, 8])", "mask: i64[4, 8], s: f32[4, 1, 8])")
    _, found, notes = packed(text)
    assert found is None and notes.declined[0].source == "model.py:8" and "of each sequence" in notes.declined[0].value
