"""Train a small GPT with rotary positions on the documentation that ships with Python, and answer from pieces of it that come in any order:
what was computed for a piece is used again wherever it stands.

python examples/rag_chunks.py [--seconds 90]
"""

from __future__ import annotations

from statistics import fmean, median

import tilewright
import torch
import torch.nn.functional as F
from rich.table import Table
from small_gpt import HEADS, LAYERS, LENGTH, WIDTH, SmallGpt, trained
from tilewright.driver.generate import Statistics

PIECES, PIECE, QUESTION, TEXTS, NEW = 8, 56, 24, 12, 8
"""Pieces that there are, bytes of one, bytes of the question behind them; texts of four pieces each, bytes that are written."""

RATIOS = (1.0, 0.5, 0.3, 0.15, 0.0)

Text = tuple[list[torch.Tensor], torch.Tensor]
"""Pieces, and the question behind them."""


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


def texts_of(data: torch.Tensor) -> list[Text]:
    """Four of the pieces in some order, and how the last of them goes on."""
    starts = torch.randint(0, len(data) - PIECE - QUESTION, (PIECES,)).tolist()
    chosen = [torch.randperm(PIECES)[:4].tolist() for _ in range(TEXTS)]
    return [([data[starts[i] : starts[i] + PIECE] for i in order], data[starts[order[-1]] + PIECE :][:QUESTION]) for order in chosen]


def main() -> None:
    torch.manual_seed(0)
    model = RotaryGpt()
    _, judged, console = trained(model, __doc__, 90)
    generator = tilewright.Generator(model, max_length=LENGTH, documents=tilewright.ChunkReuse())
    texts = texts_of(judged)
    for _ in range(2):  # the first time, steps are compiled and pieces are read
        answers = [[answer(generator, ratio, text) for ratio in RATIOS] for text in texts]

    store = generator.documents
    whole = [row[0] for row in answers]
    exact = [store.prefill(*text, ratio=1.0).logits for text in texts]
    title = f"{TEXTS} texts of 4 pieces of {PIECE} bytes"
    why = f"Which tokens to compute anew, one of {LAYERS} layers tells; of a deeper model that is less: benchmarks/chunks.py."
    table = Table("computed anew", "tokens", "off by", "same bytes", "time to the first", title=title, caption=why)
    for ratio, found in zip(RATIOS, zip(*answers)):
        logits = [store.prefill(*text, ratio=ratio).logits for text in texts]
        off = median(float((a - b).norm() / b.norm()) for a, b in zip(logits, exact))
        same = sum(a == b for (new, _), (best, _) in zip(found, whole) for a, b in zip(new, best))
        share = median(done.prompt_seconds for _, done in found) / median(done.prompt_seconds for _, done in whole)
        tokens = fmean(done.computed for _, done in found)
        table.add_row(f"{ratio:.0%}", f"{tokens:.0f}", f"{off:.1%}", f"{same} of {TEXTS * NEW}", f"{share:.0%}")
    console.print(table)
    console.print(f"the least share within 5 %: {store.ratio_within(0.05, texts[:4]):.0%}; {store.counts}", highlight=False)


def answer(generator: tilewright.Generator, ratio: float, text: Text) -> tuple[list[int], Statistics]:
    """The bytes that follow, and what was done to write them."""
    pieces, question = text
    generator.documents.ratio = ratio
    return list(generator.stream(question, documents=pieces, max_new_tokens=NEW)), generator.last


if __name__ == "__main__":
    main()
