"""Workloads that are single layers or short chains: experts, norm and softmax, recurrence, perceptron."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, one_hot, silu

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]

TOKENS, WIDTH, INNER, EXPERTS, TOP = 512, 512, 1024, 8, 2
MOE_FLOPS = 2 * TOKENS * (WIDTH * EXPERTS + TOP * 3 * WIDTH * INNER)
LSTM_BATCH, LSTM_STEPS, LSTM_WIDTH = 8, 128, 256
LSTM_FLOPS = 2 * LSTM_BATCH * LSTM_STEPS * 2 * 4 * LSTM_WIDTH * LSTM_WIDTH


class Chain(nn.Module):
    """layer norm, gelu, residual, softmax: memory-bound."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(gelu(self.norm(x)) + x, dim=-1)


class DenseMoE(nn.Module):
    """Every expert on every token, weighted by the router: gated feed-forward layers of `INNER` units."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * INNER**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, chosen = torch.softmax(self.router(x), -1).topk(TOP, -1)
        weights = (one_hot(chosen, EXPERTS) * (values / values.sum(-1, keepdim=True)).unsqueeze(-1)).sum(-2)
        gate, up = torch.matmul(x.unsqueeze(0), self.up).chunk(2, -1)
        outputs = torch.matmul(silu(gate) * up, self.down)
        return (outputs * weights.t().unsqueeze(-1)).sum(0)


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(LSTM_WIDTH, LSTM_WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def chain() -> Made:
    return Chain(1024), (torch.randn(4096, 1024),)


def softmax() -> Made:
    return nn.Softmax(-1), (torch.randn(4096, 1024),)


def moe_routed() -> Made:
    """Mixtral's layer: top 2 of 8 experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=TOP)
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return block, (torch.randn(1, TOKENS, WIDTH),)


def moe_dense() -> Made:
    return DenseMoE(), (torch.randn(TOKENS, WIDTH),)


def lstm() -> Made:
    return LSTM(), (torch.randn(LSTM_BATCH, LSTM_STEPS, LSTM_WIDTH),)


def _mlp(batch: int) -> Made:
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, (torch.randn(batch, 784),)


def mlp_1() -> Made:
    return _mlp(1)


def mlp_256() -> Made:
    return _mlp(256)
