"""Steppers without a compiler: what tests of generation run on where the steps themselves are not the subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class KeptTokens:
    tensors: list[torch.Tensor]
    dims: list[int]


class Rerun:
    """Runs a whole model at every step; its state is the tokens themselves, so what is reused wrongly gives a wrong text.

    Keeps to the protocol as strictly as can be: what lies behind a position is overwritten with nonsense before it is read.
    """

    def __init__(self, model: Callable[[torch.Tensor], torch.Tensor], max_length: int, vocab: int) -> None:
        self.model, self.max_length, self.vocab = model, max_length, vocab
        self.widths: list[int] = []

    def state(self, batch: int) -> KeptTokens:
        return KeptTokens([torch.full((batch, self.max_length), -1)], [1])

    def step(self, tokens: torch.Tensor, position: torch.Tensor, state: KeptTokens) -> torch.Tensor:
        (kept,), width = state.tensors, tokens.shape[1]
        assert int(position.min()) >= 0 and int(position.max()) + width <= self.max_length
        self.widths.append(width)
        logits = []
        for row, new, at in zip(kept, tokens, position.tolist()):
            row[at : at + width] = new
            row[at + width :] = -1
            logits.append(self.model(row[None, : at + width])[0, at:])
        return torch.stack(logits)


class Attends(nn.Module):
    """A small decoder with random weights: tokens [b, n] -> logits, and the same step by step with keys and values, written by hand."""

    def __init__(self, vocab: int = 50, width: int = 32, layers: int = 2, heads: int = 2, length: int = 64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab, self.max_length, self.heads = vocab, length, heads
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)
        self.double().requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        empty = self.state(len(tokens))
        return self.step(tokens, torch.zeros(len(tokens), dtype=torch.int64), empty)

    def state(self, batch: int) -> KeptTokens:
        shape = (batch, self.heads, self.max_length, self.head.in_features // self.heads)
        return KeptTokens([torch.full(shape, float("nan"), dtype=torch.float64) for _ in range(2 * len(self.qkv))], [2] * 2 * len(self.qkv))

    def step(self, tokens: torch.Tensor, position: torch.Tensor, state: KeptTokens) -> torch.Tensor:
        n = tokens.shape[1]
        at = position[:, None] + torch.arange(n)
        x = self.tokens(tokens) + self.positions(at)
        end = int(at.max()) + 1
        seen = torch.arange(end) <= at[:, None, :, None]
        rows = torch.arange(len(tokens))[:, None]
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out)):
            q, *new = (t.unflatten(-1, (self.heads, -1)) for t in qkv(x).chunk(3, -1))
            for kept, part in zip(state.tensors[2 * i : 2 * i + 2], new):
                kept[rows, :, at] = part
            keys, values = (t[:, :, :end].nan_to_num() for t in state.tensors[2 * i : 2 * i + 2])
            x = x + out(scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen).transpose(1, 2).flatten(2))
        return self.head(x)


def greedy(model: Callable[[torch.Tensor], torch.Tensor], prompt: list[int], count: int, stop: tuple[int, ...] = ()) -> list[int]:
    """What follows a prompt, by running the whole model for every token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        if text[-1] in stop:
            break
    return text[len(prompt) :]
