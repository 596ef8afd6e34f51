"""A small camera's classifier, 96 x 96 pixels, in 40% of the memory for intermediate values: the same answers, patch by patch.

python examples/tiny_memory_cnn.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import tilewright
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

SIZE, LIMIT, HELD_OUT = 96, "40%", 200
BLOCKS = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 48, 2))
"""(channels in, out, stride)."""


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    weights = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(weights, nn.BatchNorm2d(c_out), nn.ReLU6())


class Block(nn.Module):
    """1 x 1 wider, 3 x 3 for each channel, 1 x 1 narrower, as in MobileNetV2."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        wide = 4 * c_in
        narrow = nn.Sequential(nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.layers = nn.Sequential(conv(c_in, wide, 1), conv(wide, wide, 3, stride, wide), narrow)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class Camera(nn.Module):
    """Images [batch, 1, 96, 96] from 0 to 1 -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(1, 16, 3, 2), *(Block(*sizes) for sizes in BLOCKS))
        self.head = nn.Linear(BLOCKS[-1][1], 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(2 * images - 1).mean((2, 3)))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits as the camera sees them."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear"), torch.tensor(data.target)


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int = 3) -> nn.Module:
    batches = len(images) // 32
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32)[:batches]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def answers(model: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Logits [images, 10], one image at a time."""
    with torch.no_grad():
        return torch.cat([model(image[None]) for image in images])


def milliseconds(models: dict[str, Callable[..., torch.Tensor]], image: torch.Tensor, rounds: int = 50) -> dict[str, float]:
    """The least time of a call, the models in turn."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            begin = time.perf_counter()
            model(image)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    images, labels = digits()
    model = train(Camera(), images[HELD_OUT:1200], labels[HELD_OUT:1200])
    seen = images[:HELD_OUT]
    made = {
        "as it is": tilewright.optimize(model, (seen[:1],), tuning_seconds=0),
        f"--activations {LIMIT}": tilewright.optimize(model, (seen[:1],), activations=LIMIT),
    }
    for line in next(reversed(made.values())).receipt.applied:
        if line.rule == "split-space":
            console.print(f"split-space  {line.what}  {line.source}")
    logits = {name: answers(m, seen) for name, m in made.items()}
    times = milliseconds(dict(made), seen[:1])
    table = Table("", "right", "largest difference", "intermediate values", "time", box=None, pad_edge=False)
    for name, m in made.items():
        right = (logits[name].argmax(1) == labels[:HELD_OUT]).float().mean().item()
        apart = (logits[name] - logits["as it is"]).abs().max().item()
        table.add_row(name, f"{right:.1%}", f"{apart:.1g}", f"{int(m.receipt.arena) / 1024:.0f} KiB", f"{times[name]:.2f} ms")
    console.print(table)


if __name__ == "__main__":
    main()
