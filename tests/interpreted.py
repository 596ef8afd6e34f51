"""A small decoder like Llama, and its steps by the meaning of each op: nothing is compiled, and in float64 one sees what is exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tilewright.driver.stepping import Step, Stepper, stepper
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import interpret
from tilewright.ir.sizes import with_sizes
from torch import nn
from torch.nn import functional as F

VOCAB, WIDTH, HEADS, LENGTH = 16, 32, 4, 64


class Layer(nn.Module):
    """Two heads of keys and values for four of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.kv, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, 48), (WIDTH, 48), (48, WIDTH)))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in (self.q(y), *self.kv(y).chunk(2, -1)))
        q, k = (t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k))
        attended = F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens [b, n] -> logits [b, n, VOCAB], with random weights; so few tokens that texts repeat themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        frequency = 1e4 ** -(torch.arange(0, WIDTH // HEADS, 2, dtype=x.dtype) / (WIDTH // HEADS))
        angle = torch.arange(tokens.shape[1])[:, None] * torch.cat([frequency, frequency])
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return self.head(self.norm(x))


class Interpreted(Stepper):
    """Programs are the graphs themselves."""

    def compiled(self, graph: Graph, batch: int) -> Step:
        settled = with_sizes(graph, {self._batch: batch})

        def run(inputs: Sequence[Any]) -> list[Any]:
            return interpret(settled, inputs)

        return SimpleNamespace(program=SimpleNamespace(run=run))  # type: ignore[return-value]


@cache
def decoder(dtype: torch.dtype = torch.float64) -> Decoder:
    """Always with the same weights."""
    torch.manual_seed(0)
    return Decoder().to(dtype).requires_grad_(False).eval()


@cache
def interpreted(kv: str = "same", plan: str | None = None, dtype: torch.dtype = torch.float64) -> Interpreted:
    """Steps of it. plan: formats of weights, which are those of float32."""
    made = stepper(_captured(dtype), kv=kv, plan=plan)
    return Interpreted(made.graph, kv, made.tokens)


@cache
def _captured(dtype: torch.dtype) -> Graph:
    return stepper(decoder(dtype), torch.zeros(1, LENGTH, dtype=torch.int64)).graph
