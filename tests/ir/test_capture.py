"""Capture of whole functions and modules: mutation, aliasing, dynamic shapes, training, export, provenance, real architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_backend import check, compiled, same
from tilewright.ir.capture import CallError, from_module
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers[1](F.gelu(self.layers[0](self.norm(x))))


class Counting(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(x) * self.calls


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@torch.no_grad()
def test_mutated_inputs_hold_eagers_values() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        before = x.clone()
        x.add_(1)
        y[1:].mul_(x[1:])
        return before

    check(f, torch.randn(4, 4), torch.randn(4, 4))


@torch.no_grad()
def test_outputs_are_apart_where_eagers_are() -> None:
    run, _ = compiled(lambda x: (x.clone(), x.clone(), x * 1, x.contiguous()))
    x = torch.randn(3)
    a, b, c, d = run(x)
    assert len({storage(t) for t in (x, a, b, c)}) == 4
    assert d is x


@torch.no_grad()
def test_outputs_share_memory_where_eagers_do() -> None:
    run, _ = compiled(lambda x: ((y := x + 1), y[1:], x.view(-1)))
    x = torch.randn(4, 3)
    y, tail, flat = run(x)
    y.zero_()
    assert not tail.any() and storage(flat) == storage(x)


@torch.no_grad()
def test_eagers_strides_are_kept() -> None:
    check(lambda x: (x.t() * 2, x.t().contiguous(), (x.t() + 1).t(), x[:, ::2] + 1, x.sum(0).expand(5, 6)), torch.randn(4, 6))
    check(lambda x: F.conv2d(x, torch.ones(2, 3, 1, 1)) + 1, torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last))


@torch.no_grad()
@pytest.mark.parametrize("strided", [lambda x: x.t(), lambda x: x[::2], lambda x: x[1:, 1:], lambda x: x[:1].expand(6, 6)])
def test_strided_inputs(strided: Any) -> None:
    check(lambda x: (x + 1, x.sum(0), x.reshape(-1), x @ x.t()), strided(torch.randn(6, 6)))


@torch.no_grad()
def test_one_capture_serves_all_sizes() -> None:
    def f(x: torch.Tensor, n: int) -> Any:
        b, s, d = x.shape
        y = x.view(b * s, d).softmax(-1).reshape(s, b, d).transpose(1, 2)
        return y.sum(-1), x[:, 1:], x[:, -2:].mean(1), torch.cat([x, x], 1)[:, : s + n], torch.arange(s), F.pad(x, (0, 0, 1, n)), s // 2

    run, recorder = compiled(f, dynamic=True)
    for b, s, d, n in ((2, 5, 12, 3), (3, 7, 8, 2), (5, 9, 10, 4)):
        x = torch.randn(b, s, d)
        same(run(x, n), f(x, n))
    assert len(recorder.graphs) == 1 and not recorder.failures and not recorder.externs


@torch.no_grad()
def test_sizes_that_guards_make_equal_are_one() -> None:
    """Every second element, and halves that fit together because the size was even: torch's guards say so, no op falls back."""

    def f(x: torch.Tensor) -> Any:
        even, odd = x[::2], x[1::2]
        return x[:-1:2], x[1:-2:3].exp(), even + odd, torch.stack([even, odd], 1), even.reshape(-1) * odd.reshape(-1)

    run, recorder = compiled(f, dynamic=True)
    for n in (12, 18, 13):
        x = torch.randn(n, 5)
        if n % 2:
            same(compiled(lambda x: (x[:-1:2], x[1:-2:3]), dynamic=True)[0](x), (x[:-1:2], x[1:-2:3]))
        else:
            same(run(x), f(x))
    assert len(recorder.graphs) == 1 and not recorder.failures and not recorder.externs


@torch.no_grad()
def test_symbols_have_the_ranges_that_dynamo_guards() -> None:
    run, recorder = compiled(lambda x: x + 1, dynamic=True)
    run(torch.randn(3, 5))
    assert sorted((r.lo, r.hi) for r in recorder.graphs[0].symbols.values()) == [(2, None), (2, None)]


@torch.no_grad()
def test_assertions_of_the_model_still_fire() -> None:
    run, recorder = compiled(lambda i: F.one_hot(i, 3))
    same(run(torch.tensor([0, 2])), F.one_hot(torch.tensor([0, 2]), 3))
    with pytest.raises(RuntimeError):
        run(torch.tensor([0, 3]))
    assert not recorder.failures


def test_what_cannot_be_captured_runs_by_eager_and_says_why() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with torch.no_grad():
        run, recorder = compiled(f)
        same(run(torch.ones(3)), torch.full((3,), 2.0))
    assert [e.fields["reason"] for e in recorder.failures] == ["higher-order operator cond"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = (x.new_zeros(x.shape[0], 5),) * 2
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(state)


TRAINED = {
    "mlp": (lambda: Block(), (2, 3, 8)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)),
        (5, 3, 6, 6),
    ),
    "group_norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.GroupNorm(2, 6), nn.SiLU(), nn.AdaptiveAvgPool1d(1)), (2, 4, 9)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 3), nn.LogSoftmax(-1)), None),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (2, 5, 8)),
    "lstm": (Recurrent, (2, 3, 4)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_gives_eagers_gradients(name: str) -> None:
    make, shape = TRAINED[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randint(0, 10, (2, 5)) if shape is None else torch.randn(shape, requires_grad=True)
    theirs, their_x = copy.deepcopy(model), copy.deepcopy(x)
    run, recorder = compiled(model)
    for step in range(2):
        torch.manual_seed(step)
        got = run(x)
        got.square().mean().backward()
        torch.manual_seed(step)
        expected = theirs(their_x)
        expected.square().mean().backward()
        torch.testing.assert_close(got, expected)
    same([p.grad for p in model.parameters()], [p.grad for p in theirs.parameters()], rtol=1e-4, atol=1e-6)
    same(list(model.buffers()), list(theirs.buffers()))
    assert x.grad is None or torch.allclose(x.grad, their_x.grad, rtol=1e-4, atol=1e-6)
    assert len(recorder.graphs) == 2 and not recorder.failures


def test_dynamic_training() -> None:
    model = Block()
    theirs = copy.deepcopy(model)
    run, recorder = compiled(model, dynamic=True)
    for shape in ((2, 3, 8), (4, 5, 8)):
        x = torch.randn(shape)
        run(x).sum().backward()
        theirs(x).sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in theirs.parameters()], rtol=1e-4, atol=1e-6)
    assert len(recorder.graphs) == 2 and not recorder.externs


@torch.no_grad()
def test_names_and_provenance_are_the_users() -> None:
    run, recorder = compiled(Block())
    run(torch.randn(2, 3, 8))
    graph = recorder.graphs[0]
    owned = {f"{m}_{p}" for m in ("norm", "layers_0", "layers_1") for p in ("weight", "bias")}
    assert {n.hint for n in graph.inputs} == {"x", *owned}
    linear = next(n for n in order(graph) if n.op.name == "linear")
    assert linear.hint == "layers_0" and linear.prov.modules == ("layers.0",)
    assert linear.prov.source.startswith("test_capture.py:")


@torch.no_grad()
def test_export_keeps_composites_names_and_the_calling_convention() -> None:
    class Model(Block):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> Any:  # type: ignore[override]
            q = self.norm(x)[:, None]
            return {"y": F.scaled_dot_product_attention(q, q, q) * scale, "none": None, "size": x.shape[0], "x": x}

    model = Model()
    batch = torch.export.Dim("batch", max=64)
    captured = from_module(model, (torch.randn(3, 5, 8),), {"scale": 2.0}, dynamic_shapes={"x": {0: batch}, "scale": None})
    ops = [n.op.name for n in order(captured.graph)]
    assert "attention" in ops and "layer_norm" in ops and "extern" not in ops
    x = torch.randn(7, 5, 8)
    got = captured.signature.unflatten(interpret(captured.graph, captured.inputs((x,), {"scale": 2.0})))
    same(got, model(x, scale=2.0))
    assert [r.hi for r in captured.graph.symbols.values()] == [64]
    with pytest.raises(CallError, match="fixed to 2.0"):
        captured.inputs((x,), {"scale": 3.0})


@torch.no_grad()
def test_mutated_buffers_are_state() -> None:
    model = Counting()
    captured = from_module(model, (torch.randn(2, 8),))
    x = torch.randn(2, 8)
    for _ in range(2):
        (got,) = interpret(captured.graph, captured.inputs((x,)))
        same(got, model(x))
    assert captured.signature.state == ("calls",) and captured.state["calls"] == 2 == model.calls


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (2, 7))
    if name == "bert":
        config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        return transformers.BertModel(config).eval(), {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids, "use_cache": False}
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids, "use_cache": False}


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_are_native(name: str) -> None:
    model, kwargs = tiny(name)
    run, recorder = compiled(model, dynamic=name == "bert")
    for rows in (slice(None), slice(0, 2)):
        part = {k: v[rows, 1:] if rows.stop and name == "bert" else v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in kwargs.items() if k not in part}
        same(run(**part, **rest)[0], model(**part, **rest)[0], rtol=1e-4, atol=1e-5)
    assert not recorder.failures and not recorder.externs


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_export(name: str) -> None:
    model, kwargs = tiny(name)
    captured = from_module(model, (), kwargs)
    assert not _externs(captured.graph)
    got = captured.signature.unflatten(interpret(captured.graph, captured.inputs((), kwargs)))
    same(got[0], model(**kwargs)[0], rtol=1e-4, atol=1e-5)


def _externs(graph: Graph) -> set[str]:
    return {n.attrs["target"] for n in order(graph) if n.op.name == "extern"}
