"""A diffusion model of digits, trained here: blocks whose input changed little since they were computed are left out.

python examples/reused_blocks.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import tilewright
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tilewright.driver.iterated import Iterated
from torch import nn

WIDTH, LAYERS, STEPS, IMAGES = 64, 4, 50, 64
THRESHOLDS = (0.03, 0.06, 0.12)


class Block(nn.Module):
    """An attention and an MLP; what they read is scaled by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.scales = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        first, second = self.scales(level)[:, None].chunk(2, -1)
        h = self.norm1(x) * (1 + first)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x) * (1 + second))


class Denoiser(nn.Module):
    """Noisy images [b, 16 patches, 4] and their noise levels [b] -> the noise in them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.positions = nn.Parameter(torch.randn(16, WIDTH) * 0.1)
        self.level = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        h, known = self.enter(x) + self.positions, self.level(level[:, None])
        for block in self.blocks:
            h = block(h, known)
        return self.leave(h)


def noisy(images: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Level 0: the images; level 1: noise."""
    angle = (level * torch.pi / 2)[:, None, None]
    return angle.cos() * images + angle.sin() * noise


def train(model: nn.Module, images: torch.Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (128,))]
        noise, level = torch.randn_like(batch), torch.rand(len(batch))
        loss = (model(noisy(batch, noise, level), level) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def sampled(model: Callable[..., torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """Images out of noise, step by step (DDIM)."""
    x, levels = noise, torch.linspace(0.99, 0.0, STEPS + 1)
    for now, then in zip(levels, levels[1:]):
        found = model(x, now.expand(len(x)))
        image = (x - (now * torch.pi / 2).sin() * found) / (now * torch.pi / 2).cos()
        x = noisy(image, found, then.expand(len(x)))
    return x


def seconds_of(model: Callable[..., torch.Tensor], noise: torch.Tensor) -> float:
    """Of processor time for a loop, the best of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        sampled(model, noise)
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)
    console.print(f"training a diffusion transformer on {len(images)} digits")
    model = train(Denoiser(), patches, 1500)
    noise = torch.randn(IMAGES, 16, 4)
    expected = sampled(model, noise)
    table = Table("threshold", "branches reused", "time", "difference of images", title=f"{STEPS} steps, {2 * LAYERS} branches each")
    whole = seconds_of(tilewright.optimize(model, (noise, torch.ones(IMAGES)), tuning_seconds=0), noise)
    table.add_row("the model as a whole", "", "100%", "")
    for threshold in THRESHOLDS:
        console.print(f"  images with threshold {threshold:g}", highlight=False)
        cached = tilewright.reuse_blocks(model, (noise, torch.ones(IMAGES)), threshold=threshold)
        difference = (sampled(cached, noise) - expected).norm() / expected.norm()
        share = cached.reused / (cached.reused + cached.computed)

        def forgetful(x: torch.Tensor, level: torch.Tensor, cached: Iterated = cached) -> torch.Tensor:
            if level[0] > 0.98:  # the first step
                cached.reset()
            return cached(x, level)

        table.add_row(f"{threshold:g}", f"{share:.0%}", f"{seconds_of(forgetful, noise) / whole:.0%}", f"{difference:.1e}")
    console.print(table)


if __name__ == "__main__":
    main()
