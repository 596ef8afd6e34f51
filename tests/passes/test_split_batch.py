"""split-batch and split-halves: the same results at every place to split, sums that overlap, and every reason not to."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, body, refusals, run
from processes import together
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.pipeline import PREPARING
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.reasons import Reason
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Exactness, Notes
from tilewright.passes.manager import parse_passes, pass_text, run_passes
from tilewright.passes.shard_linears import ShardLinears
from tilewright.passes.split_batch import SplitBatch, SplitHalves
from torch import nn

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32)
DECODERS = {
    "gpt2": lambda t: t.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "llama": lambda t: t.LlamaConfig(num_key_value_heads=1, **SMALL),
    "mistral": lambda t: t.MistralConfig(num_key_value_heads=1, sliding_window=4, **SMALL),
    "bloom": lambda t: t.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2),
    "mixtral": lambda t: t.MixtralConfig(num_key_value_heads=1, num_local_experts=3, **SMALL),
}
TOKENS = torch.arange(3 * 9).reshape(3, 9) * 7 % 61


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


def _graph(model: nn.Module, *args: torch.Tensor) -> Graph:
    captured = captured_of(export_module("model", model.eval(), Example(args, {})))
    with torch.no_grad():
        return run_passes(captured.graph, PREPARING, Notes())


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request) -> Graph:
    torch.manual_seed(0)
    config = DECODERS[request.param](transformers)
    config.use_cache = False
    return _graph(Logits(transformers.AutoModelForCausalLM.from_config(config)), TOKENS)


def _same(before: Graph, after: Graph, *inputs: torch.Tensor) -> None:
    verify(after)
    for x, y in zip(*(interpret(g, inputs, torch.float64) for g in (before, after)), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-13)


def test_halves_at_every_place(decoder) -> None:
    for at in range(1, 9):
        notes = Notes()
        after = SplitHalves(at).run(decoder, notes)
        assert len(notes.applied) == 1 and not notes.declined
        _same(decoder, after, TOKENS)


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches(decoder, parts: int) -> None:
    notes = Notes()
    after = SplitBatch(parts).run(decoder, notes)
    assert [a.what for a in notes.applied] == [f"input tokens: {' + '.join(['2', '1'] if parts == 2 else ['1', '1', '1'])}"]
    _same(decoder, after, TOKENS)


def test_every_part_is_computed_by_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = _graph(model, torch.randn(5, 4))
    after = SplitBatch(2).run(graph)
    assert sorted(int(n.shape[0]) for n in order(after) if n.op.name == "linear") == [2, 2, 3, 3]
    _same(graph, after, torch.randn(5, 4))


def test_picture() -> None:
    lines = ["y = relu(x)", "z = linear(y, w)", "z"]
    _, new, _ = run(SplitBatch(2), body("x: f32[4, 8], w: f32[8, 8]", *lines))
    assert_becomes(new, body(
        "x: f32[4, 8], w: f32[8, 8]", "a = slice(x, dim=0, start=0, stop=2)", "b = slice(x, dim=0, start=2, stop=4)",
        "c = relu(a)", "d = relu(b)", "e = linear(c, w)", "f = linear(d, w)", "z = cat(e, f, dim=0)", "z",
    ))  # fmt: skip


OTHERS = {
    "mean over the batch": ["y = linear(x, w)", "m = mean(y, dims=[0])", "z = add(y, m)"],
    "tokens inside": ["y = linear(x, w)", "r = reshape(y, shape=[24, 8])", "q = linear(r, w)", "z = reshape(q, shape=[4, 6, 8])"],
    "batch behind": ["p = permute(x, dims=[1, 0, 2])", "q = linear(p, w)", "r = reshape(q, shape=[24, 8])", "z = linear(r, w)"],
    "sorted": ["y = linear(x, w)", "z = cumsum(y, dim=0)"],
    "constant of the batch": ["f = full(shape=[4, 1, 8], value=2.0, dtype=f32)", "y = mul(x, f)", "z = linear(y, w)"],
}


@pytest.mark.parametrize("item", [SplitBatch(2), SplitBatch(4), SplitHalves(2)], ids=str)
@pytest.mark.parametrize("case", OTHERS)
def test_what_mixes_reads_the_parts_joined(case: str, item) -> None:
    graph = parse(body("x: f32[4, 6, 8], w: f32[8, 8]", *OTHERS[case], "z"))
    notes = Notes()
    after = item.run(graph, notes)
    assert notes.applied and after is not graph
    _same(graph, after, torch.randn(4, 6, 8), torch.randn(8, 8))


ATTENTION = "a = attention(q, q, q, {mask}causal={causal}, scale=0.5)"
MASKED = {
    "causal and bool": ("m, ", "true", "bool", True),
    "causal and added": ("m, ", "true", "f32", True),
    "not causal": ("", "false", "f32", False),
    "a mask of the caller": ("m, ", "false", "f32", False),
}


@pytest.mark.parametrize("case", MASKED)
def test_masks(case: str) -> None:
    mask, causal, kind, fits = MASKED[case]
    text = body(f"q: f32[2, 6, 4], w: f32[4, 4], m: {kind}[6, 6]", ATTENTION.format(mask=mask, causal=causal), "y = linear(a, w)", "y")
    graph, notes = parse(text), Notes()
    after = SplitHalves(2).run(graph, notes)
    m = torch.rand(6, 6) > 0.3 if kind == "bool" else torch.randn(6, 6)
    if not fits:
        assert after is graph and refusals(notes) == {("split-halves", Reason.MIXED)} and "attention" in notes.declined[0].what
        return
    _same(graph, after, torch.randn(2, 6, 4), torch.randn(4, 4), m)


REFUSED = {
    "no such input": (SplitBatch(2, "other"), "x: f32[4, 8]", "there is no input 'other'"),
    "too small": (SplitBatch(5), "x: f32[4, 8]", "a batch of 4 has no 5 parts"),
    "one part": (SplitBatch(1), "x: f32[4, 8]", "to split in 1"),
    "no dimension": (SplitHalves(1, dim=2), "x: f32[4, 8]", "with a dimension 2"),
    "all of them": (SplitHalves(8), "x: f32[4, 8]", "8 is not between 0 and 8 tokens"),
    "varying": (SplitBatch(2), "x: f32[b, 8]", "b"),
    "nothing multiplied": (SplitBatch(2), "x: f32[4, 8]", "nothing is multiplied part by part"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    item, signature, why = REFUSED[case]
    old, new, notes = run(item, body(signature, "y = relu(x)", "y"))
    assert new is old and why in notes.declined[0].value and item.exactness is Exactness.EXACT


def test_where_only_mixing_products_are_nothing_is_split() -> None:
    old, new, notes = run(SplitBatch(2), body("x: f32[4, 8]", "p = permute(x, dims=[1, 0])", "y = matmul(p, x)", "y"))
    assert new is old and refusals(notes) == {("split-batch", Reason.MIXED)} and "matmul" in notes.declined[0].what


SUM = """graph g(x: f32[2, 4, 8], w: f32[8, 8]) {
  y = linear(x, w) : f32[2, 4, 8]
  s = extern[_c10d_functional.all_reduce.default](y, args=[$0, "sum", "0"], sequence=0) : f32[2, 4, 8]
  t = extern[_c10d_functional.wait_tensor.default](s, sequence=1) : f32[2, 4, 8]
  z = linear(t, w) : f32[2, 4, 8]
  u = extern[_c10d_functional.all_reduce.default](z, args=[$0, "sum", "0"], sequence=2) : f32[2, 4, 8]
  v = extern[_c10d_functional.wait_tensor.default](u, sequence=3) : f32[2, 4, 8]
  return v
}"""


def test_sums_of_one_part_are_under_way_while_another_is_computed() -> None:
    graph = parse(SUM)
    after = SplitHalves(1).run(graph)
    verify(after)
    names = {"linear": "compute", "all_reduce": "begin", "wait_tensor": "wait"}
    steps = []
    for node in order(after):
        name = node.attrs["target"].split(".")[1] if node.op.name == "extern" else node.op.name
        if name in names:
            steps.append((names[name], int(node.shape[1])))
    layer = [("compute", 1), ("begin", 1), ("compute", 3), ("begin", 3)]
    second = [("wait", 1), ("compute", 1), ("begin", 1), ("wait", 3), ("compute", 3), ("begin", 3)]
    assert steps == [*layer, *second, ("wait", 1), ("wait", 3)]


@pytest.mark.parametrize("at", [1, 4, 8])
def test_halves_of_a_model_shared_out_over_processes(at: int, monkeypatch) -> None:
    """Both halves of every layer are summed over the processes, in one order for all."""
    torch.manual_seed(0)
    config = DECODERS["gpt2"](transformers)
    config.use_cache = False
    whole = _graph(Logits(transformers.AutoModelForCausalLM.from_config(config)), TOKENS)
    shards = [ShardLinears(rank, 2).run(whole) for rank in range(2)]
    notes = Notes()
    split = [SplitHalves(at).run(shard, notes) for shard in shards]
    sums = [n for n in order(split[0]) if n.op.name == "extern" and "all_reduce" in n.attrs["target"]]
    assert [int(n.shape[1]) for n in sums] == [at, 9 - at] * 4 and not notes.declined
    for outputs in together(split, [TOKENS], monkeypatch):
        torch.testing.assert_close(outputs, interpret(whole, [TOKENS]), rtol=1e-5, atol=1e-6)


def test_on_the_command_line() -> None:
    items = parse_passes("split-batch{parts=4},split-halves{at=512, input=tokens}")
    assert items == [SplitBatch(4), SplitHalves(512, "tokens")]
    assert [parse_passes(pass_text(i))[0] for i in items] == items
