"""LSTM, GRU and plain RNN become one linear and one recurrence per layer and direction; what does not, runs as ATen runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from capture_backend import Recorder, check, relevant_strides
from tilewright.ir.capture import from_module, trace_recurrences
from tilewright.ir.graph import order
from tilewright.ir.interpret import interpret
from torch import nn

OPS = {nn.LSTM: "lstm_layer", nn.GRU: "gru_layer", nn.RNN: "rnn_layer"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "two_layers": {"num_layers": 2}, "both_ways": {"bidirectional": True, "num_layers": 2}, "no_bias": {"bias": False},
    "batch_first": {"batch_first": True, "num_layers": 2, "bidirectional": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def traced() -> None:
    trace_recurrences()


def model(kind: type[nn.RNNBase], **settings: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(5, 6, **settings).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_compiled(kind: type[nn.RNNBase], variant: str) -> None:
    settings = VARIANTS[variant]
    recorder = check(model(kind, **settings), torch.randn(3, 4, 5))
    directions = 2 if settings.get("bidirectional") else 1
    assert recorder.ops.count(OPS[kind]) == recorder.ops.count("linear") == settings.get("num_layers", 1) * directions
    assert not recorder.externs


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_given_states(kind: type[nn.RNNBase], dynamic: bool) -> None:
    h = torch.randn(1, 4, 6)
    recorder = check(model(kind), torch.randn(7, 4, 5), (h, 2 * h) if kind is nn.LSTM else h, dynamic=dynamic)
    assert OPS[kind] in recorder.ops


@torch.no_grad()
def test_relu() -> None:
    assert "rnn_layer" in check(model(nn.RNN, nonlinearity="relu"), torch.randn(3, 4, 5)).ops


@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_one_sequence_without_batch(kind: type[nn.RNNBase]) -> None:
    assert OPS[kind] in check(model(kind), torch.randn(3, 5)).ops


@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_exported(kind: type[nn.RNNBase]) -> None:
    net, x = model(kind, num_layers=2, batch_first=True, bidirectional=True), torch.randn(4, 3, 5)
    captured = from_module(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))  # torch.export fixes the steps
    assert [n.op.name for n in order(captured.graph)].count(OPS[kind]) == 4
    for shape in ((4, 3, 5), (2, 3, 5)):
        x = torch.randn(shape)
        got, want = captured.signature.unflatten(interpret(captured.graph, captured.inputs((x,)))), net(x)
        torch.testing.assert_close(got, want)


REFUSED: dict[str, tuple[nn.RNNBase, torch.Tensor]] = {
    "projected": (nn.LSTM(5, 6, proj_size=3), torch.randn(3, 4, 5)),
    "double": (nn.GRU(5, 6).double(), torch.randn(3, 4, 5).double()),
    "bfloat16": (nn.LSTM(5, 6).bfloat16(), torch.randn(3, 4, 5).bfloat16()),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_refused(name: str) -> None:
    """As one call of ATen, whole."""
    net, x = REFUSED[name]
    recorder = check(net.eval(), x)
    assert recorder.externs == {f"tilewright.{'gru' if isinstance(net, nn.GRU) else 'lstm'}.default"}


def test_dropout_draws_what_eager_draws() -> None:
    net = nn.GRU(5, 6, num_layers=2, dropout=0.5).requires_grad_(False)
    assert check(net, torch.randn(3, 4, 5)).externs == {"tilewright.gru.default"}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(5, 7), nn.LSTM(7, 6, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, (h, _) = self.lstm(self.embed(x).relu())
        return self.head(out.tanh()) + h.sum()


def test_training_runs_it_by_eager() -> None:
    torch.manual_seed(0)
    net, x = Tagger(), torch.randn(3, 4, 5)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    recorder = Recorder()
    got, want = torch.compile(net, backend=recorder, fullgraph=True)(x), twin(x)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(got, want)
    assert relevant_strides(got) == relevant_strides(want)
    for a, b in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    assert not recorder.failures and "linear" in recorder.ops and len(recorder.ops) < 60


@torch.no_grad()
def test_autocast_is_left_to_torch() -> None:
    net, x = Tagger().eval(), torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        recorder = check(net, x)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    inner = check(inside, x)
    for ops in (recorder.ops, inner.ops):
        assert "linear" in ops and "lstm_layer" not in ops
