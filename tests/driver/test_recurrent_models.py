"""Models with recurrences through the doors: kernels of ours, right, and saved and loaded."""

from __future__ import annotations

import copy

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.driver.accuracy import check
from torch import nn


class Tagger(nn.Module):
    """Embedding, recurrences in both directions, a head; last states are read too."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = kind(12, 20, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(40, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out, last = self.layers(self.embed(tokens))
        h = last[0] if isinstance(last, tuple) else last
        return self.head(out.relu()).softmax(-1) + h.sum()


def tagger(kind: type[nn.RNNBase]) -> nn.Module:
    torch.manual_seed(0)
    return Tagger(kind).eval()


@NATIVE
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_compiled(kind: type[nn.RNNBase], dynamic: bool) -> None:
    torch._dynamo.reset()
    model = tagger(kind)
    run = torch.compile(model, backend="tilewright", dynamic=dynamic, fullgraph=True, options={"verify": True})
    for shape in ((4, 7), (2, 7), (4, 3)):
        tokens = torch.randint(0, 20, shape)
        torch.testing.assert_close(run(tokens), model(tokens))
    (receipt,) = tilewright.receipts()[-1:]
    assert sum(k.uses for k in receipt.kernels if "_layer" in k.label) == 4
    assert not receipt.fallbacks


@NATIVE
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@torch.no_grad()
def test_optimized_saved_and_loaded(kind: type[nn.RNNBase], tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, tokens = tagger(kind), torch.randint(0, 20, (4, 7))
    optimized = tilewright.optimize(model, (tokens,), tuning_seconds=0)
    assert not optimized.receipt.fallbacks
    optimized.save(tmp_path / "tagger.tw")
    torch.testing.assert_close(tilewright.load(tmp_path / "tagger.tw")(tokens), model(tokens))


def test_training_goes_on_with_eager_recurrences() -> None:
    torch._dynamo.reset()
    model, tokens = tagger(nn.LSTM).train(), torch.randint(0, 20, (4, 7))
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    results = [torch.compile(model, backend="tilewright")(tokens), twin(tokens), exact(tokens)]
    for result in results:
        result.square().sum().backward()
    gradients = [nn.utils.parameters_to_vector([p.grad for p in m.parameters() if p.grad is not None]) for m in (model, twin, exact)]
    assert check(*results).ok and check(*gradients).ok
