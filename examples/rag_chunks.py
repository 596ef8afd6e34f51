"""Train a small GPT with rotary positions on the documentation that ships with Python, and answer from pieces of it that come in any order:
what was computed for a piece is used again wherever it stands.

python examples/rag_chunks.py [--seconds 90]
"""

from __future__ import annotations

import statistics
import time

import tilewright
import torch
import torch.nn.functional as F
from rich.table import Table
from small_gpt import HEADS, LENGTH, WIDTH, SmallGpt, trained

PIECES, PIECE, QUESTION, TEXTS = 8, 56, 24, 12
"""Pieces that there are, bytes of one, bytes of the question behind them; texts of four pieces each."""


class RotaryGpt(SmallGpt):
    """The same without learned positions: queries and keys are turned by where they stand."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        frequency = 1e4 ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angle = torch.arange(tokens.shape[1])[:, None] * torch.cat([frequency, frequency])
        cos, sin = angle.cos(), angle.sin()
        for block in self.blocks:
            q, k, v = block.heads(x)
            q, k = (t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k))
            x = block.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.norm(x))


def texts_of(data: torch.Tensor) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Four of the pieces in some order, and how the last of them goes on."""
    starts = torch.randint(0, len(data) - PIECE - QUESTION, (PIECES,)).tolist()
    chosen = [torch.randperm(PIECES)[:4].tolist() for _ in range(TEXTS)]
    return [([data[starts[i] : starts[i] + PIECE] for i in order], data[starts[order[-1]] + PIECE :][:QUESTION]) for order in chosen]


def main() -> None:
    torch.manual_seed(0)
    model = RotaryGpt()
    _, judged, console = trained(model, __doc__, 90)
    steps = tilewright.Generator(model, max_length=LENGTH).stepper

    texts = texts_of(judged)
    store = tilewright.ChunkStore(steps)
    table = Table(
        "computed anew", "tokens", "off by", "same next byte", "time, of all", title=f"{TEXTS} texts of 4 pieces of {PIECE} bytes"
    )
    exact = [store.prefill(*t, ratio=1.0).logits for t in texts]
    for ratio in (1.0, 0.5, 0.3, 0.15, 0.0):
        for t in texts[:2]:
            store.prefill(*t, ratio=ratio)  # steps are compiled when they are first needed
        times = [(timed(store, t, 1.0), timed(store, t, ratio)) for t in texts]
        found = [store.prefill(*t, ratio=ratio) for t in texts]
        off = statistics.median(float((a.logits - b).norm() / b.norm()) for a, b in zip(found, exact))
        same = sum(bool(a.logits.argmax() == b.argmax()) for a, b in zip(found, exact))
        tokens = statistics.fmean(len(f.recomputed) + QUESTION for f in found)
        share = statistics.median(ours for _, ours in times) / statistics.median(whole for whole, _ in times)
        table.add_row(f"{ratio:.0%}", f"{tokens:.0f}", f"{off:.1%}", f"{same} of {TEXTS}", f"{share:.0%}")
    console.print(table)
    console.print(f"the least share within 5 %: {store.ratio_within(0.05, texts[:4]):.0%}; {store.counts}", highlight=False)


def timed(store: tilewright.ChunkStore, t: tuple[list[torch.Tensor], torch.Tensor], ratio: float) -> float:
    begin = time.perf_counter()
    store.prefill(*t, ratio=ratio)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
