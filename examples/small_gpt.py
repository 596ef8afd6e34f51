"""Train a small GPT on the documentation that ships with Python, then keep its weights in about four bits: perplexity, bytes, decoding.

python examples/small_gpt.py [--seconds 120]
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable

import tilewright
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tilewright.passes.quantize import Plan
from torch import nn

LENGTH, WIDTH, LAYERS, HEADS = 256, 384, 4, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))

    def rest(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class SmallGpt(nn.Module):
    """Bytes [batch, length] -> logits of the next ones [batch, length, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            q, k, v = block.heads(x)
            x = block.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.norm(x))


class Step(nn.Module):
    """One byte [1, 1] at a position [1] -> logits of the next; keys and values of those before are buffers."""

    def __init__(self, model: SmallGpt) -> None:
        super().__init__()
        self.model = model
        for name in ("keys", "values"):
            for i in range(LAYERS):
                self.register_buffer(f"{name}{i}", torch.zeros(1, HEADS, LENGTH, WIDTH // HEADS))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        model = self.model
        x = model.tokens(token) + model.positions(position)
        seen = (torch.arange(LENGTH) <= position)[None, None, None]
        for i, block in enumerate(model.blocks):
            q, k, v = block.heads(x)
            keys, values = (getattr(self, f"{name}{i}").index_copy_(2, position, new) for name, new in (("keys", k), ("values", v)))
            x = block.rest(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=seen))
        return model.head(model.norm(x))


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """What to learn, and what to be judged by."""
    topics = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(topics), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def windows(data: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.stack([data[s : s + LENGTH + 1] for s in starts.tolist()])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(model: SmallGpt, data: torch.Tensor, seconds: float, console: Console) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    begin, step, shown = time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50, 1.05 - elapsed / seconds)
        inputs, targets = windows(data, torch.randint(0, len(data) - LENGTH - 1, (16,)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed - shown > 15:
            shown = elapsed
            console.print(f"  {elapsed:4.0f} s  step {step}  loss {loss.item():.3f}", highlight=False)


def trained(model: SmallGpt, description: str | None, seconds: float) -> tuple[torch.Tensor, torch.Tensor, Console]:
    """Trains the model for `--seconds` of the command line: the text it learned from, the text to judge it by, and where to print."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="for training")
    seconds = parser.parse_args().seconds
    console = Console()
    learned, judged = text()
    console.print(f"training {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters for {seconds:.0f} s")
    train(model, learned, seconds, console)
    model.eval()
    return learned, judged, console


def loss_on(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[Callable[..., torch.Tensor]], float]:
    """A loss as a budget takes it: nats per byte, so that exp of it is the perplexity."""

    def loss(model: Callable[..., torch.Tensor]) -> float:
        with torch.no_grad():
            return statistics.fmean(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in batches)

    return loss


Next = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A byte [1, 1] and its position [1] -> logits of the next."""


def bytes_per_second(step: Next, count: int = 200) -> float:
    """Greedy decoding from an empty cache."""
    token = torch.tensor([[10]])
    begin = time.perf_counter()
    with torch.no_grad():
        for i in range(count):
            token = step(token, torch.tensor([i])).argmax(-1)
    return count / (time.perf_counter() - begin)


def main() -> None:
    torch.manual_seed(0)
    model = SmallGpt()
    learned, judged, console = trained(model, __doc__, 120)
    starts = torch.arange(0, len(judged) - LENGTH - 1, LENGTH).split(16)
    batches = [windows(judged, s) for s in starts if len(s) == 16][:6]
    loss = loss_on(batches)
    calibration = [windows(learned, torch.randint(0, len(learned) - LENGTH - 1, (16,)))[0] for _ in range(4)]
    formats = ("int8-bf16", "int4-g32", "int4-g32-bf16", "int4-g64", "int4-g64-bf16", "int8")
    limit = {"max_error": math.log(1.01), "metric": loss, "memory": "20%", "formats": formats}
    small = tilewright.optimize(model, (batches[0][0],), budget=tilewright.Budget(**limit, calibration=[(c,) for c in calibration]))
    small.receipt.render(console)

    before, after = (math.exp(loss(m)) for m in (model, small))
    spent = small.receipt.spent
    table = Table("", "fp32", "in the budget", "", title="A small GPT in about four bits")
    table.add_row("perplexity of a byte", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}")
    table.add_row("weights, MB", f"{spent.exact_bytes / 1e6:.1f}", f"{spent.bytes / 1e6:.1f}", f"{spent.bytes / spent.exact_bytes:.0%}")
    decoding(model, small.plan, table)
    console.print(table)


def decoding(model: SmallGpt, plan: Plan, table: Table) -> None:
    """A cache written by hand and run by eager, against steps derived from the model, its weights in the formats of the budget."""
    by_hand, steps = Step(model).eval(), tilewright.Generator(model, LENGTH, plan=plan).stepper
    state = steps.state(1)
    rates = [(bytes_per_second(by_hand), bytes_per_second(lambda token, at: steps.step(token, at, state))) for _ in range(6)]
    eager, fast = (statistics.median(r) for r in zip(*rates[1:]))
    table.add_row("decoding, bytes/s", f"{eager:.0f}", f"{fast:.0f}", f"{fast / eager:.2f}x")


if __name__ == "__main__":
    main()
