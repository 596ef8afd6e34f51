"""Capture of sparse weights: a linear whose weight is a matrix of blocks."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from tilewright.ir.capture.export import CapturedModule, from_module
from tilewright.ir.errors import CaptureError
from tilewright.ir.graph import order
from tilewright.ir.interpret import interpret


def weight(rows: int = 64, columns: int = 48) -> torch.Tensor:
    """Blocks of 16 x 8: none in the second row of blocks."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    kept = torch.rand(rows // 16, columns // 8, generator=torch.Generator().manual_seed(1)) < 0.4
    kept[1] = False
    return w * kept.repeat_interleave(16, 0).repeat_interleave(8, 1)


class Layer(torch.nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight().to_sparse_bsr((16, 8)), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(64)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, self.weight, self.bias))


class Product(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight @ x


pytestmark = pytest.mark.filterwarnings("ignore:Sparse")


def captured(layer: torch.nn.Module, x: torch.Tensor) -> CapturedModule:
    """Without torch's log of its graphs, which pytest listens to: it cannot print sparse tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
        return from_module(layer.eval(), (x,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (0, 48)])
def test_linear(bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = Layer(bias), torch.randn(*shape)
    made = captured(layer, x)
    names = [n.op.name for n in order(made.graph)]
    assert "block_sparse_linear" in names and "extern" not in names
    assert sum(n == "constant" for n in names) == 3 + bias
    dense = F.gelu(F.linear(x, layer.weight.to_dense(), layer.bias))
    torch.testing.assert_close(interpret(made.graph, made.inputs((x,)))[0], dense)


def test_other_readers_are_refused() -> None:
    with pytest.raises(CaptureError, match="the sparse matrix weight"):
        captured(Product(), torch.randn(48, 3))
