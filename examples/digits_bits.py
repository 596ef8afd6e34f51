"""Small image classifiers in at most 4.5 bits a weight: formats chosen for each layer, against one format for all of the same size.

python examples/digits_bits.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import tilewright
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

FORMATS = ("int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "int4-split3", "int2-g32", "int2-split3")
UNIFORM = ("int4-g64", "int4-g128")
BITS = 4.5


def cnn() -> nn.Module:
    """Images [batch, 1, 8, 8] -> logits [batch, 10]."""
    blocks = [(1, 32), (32, 64), (64, 64)]
    convolutions = [m for a, b in blocks for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


class ViT(nn.Module):
    """Images [batch, 1, 8, 8] -> logits [batch, 10]; patches of 2 x 2."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(x).mean(1))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(images) // 64))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def wrong(images: torch.Tensor, labels: torch.Tensor) -> Callable[[Callable[..., torch.Tensor]], float]:
    """The share that a model gets wrong."""

    def loss(model: Callable[..., torch.Tensor]) -> float:
        with torch.no_grad():
            return (model(images).argmax(-1) != labels).double().mean().item()

    return loss


def within_bits(model: nn.Module, known: torch.Tensor, held_out: torch.Tensor, formats: tuple[str, ...]) -> Any:
    """Of least error in 4.5 bits, however long it takes; errors are measured on the second images."""
    budget = tilewright.Budget(objective="error", bits=BITS, latency="1000%", formats=formats, calibration=[(held_out,)])
    return tilewright.optimize(model, (known,), budget=budget, tuning_seconds=0)


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    learned, judged = order[:1200], order[1200:]
    table = Table("model", "formats", "bits", "error of logits", "accuracy", "before", title="Digits in at most 4.5 bits a weight")
    for name, model, epochs in (("CNN", cnn(), 30), ("ViT", ViT(), 120)):
        train(model, images[learned], labels[learned], epochs)
        loss = wrong(images[judged], labels[judged])
        for what, formats in {"chosen": FORMATS, **{f: (f,) for f in UNIFORM}}.items():
            small = within_bits(model, images[learned[: len(judged)]], images[judged], formats)
            spent = small.receipt.spent
            bits = sum(line.bytes for line in spent.layers) * 8 / (sum(line.exact_bytes for line in spent.layers) / 4)
            shown = ", ".join(f"{count} {form}" for form, count in Counter(line.format for line in spent.layers).items())
            accuracy = f"{1 - loss(small):.2%}", f"{1 - loss(model):.2%}"
            table.add_row(f"{name}, {what}", shown, f"{bits:.2f}", f"{spent.error:.3f}", *accuracy)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
