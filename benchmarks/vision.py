"""Workloads on images: ViT, ResNet-18, a depthwise network, a ConvNeXt-like one, and a block of a diffusion U-Net."""

from __future__ import annotations

import torch
from language import First
from torch import nn

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        skip = stride != 1 or c_in != c_out
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)) if skip else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.down(x))


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        self.body = nn.Sequential(*(b for i, o, s in widths for b in (BasicBlock(i, o, s), BasicBlock(o, o, 1))))
        self.head = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU6()] if act else []))


class Inverted(nn.Module):
    """1x1 wider, 3x3 depthwise, 1x1 narrower; a residual where shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = c_in * expand
        wide = [_conv_bn(c_in, inner, 1)] if expand != 1 else []
        self.body = nn.Sequential(*wide, _conv_bn(inner, inner, 3, stride, inner), _conv_bn(inner, c_out, 1, act=False))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


_INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, stride of the first) of MobileNetV2."""


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv_bn(3, 32, 3, 2)]
        width = 32
        for expand, channels, count, stride in _INVERTED:
            for i in range(count):
                blocks.append(Inverted(width, channels, stride if i == 0 else 1, expand))
                width = channels
        self.body = nn.Sequential(*blocks, _conv_bn(width, 1280, 1))
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class UNetBlock(nn.Module):
    """GroupNorm, SiLU, conv twice with a residual; down, the same, up, the skip added by concatenation."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.outer, self.inner = ResidualConv(width, width), ResidualConv(2 * width, 2 * width)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(2 * width, width, 3, padding=1))
        self.leave = ResidualConv(2 * width, width)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.outer(self.enter(x))
        y = self.up(self.inner(self.down(skip)))
        return self.head(self.leave(torch.cat([y, skip], 1)))


class ResidualConv(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(nn.functional.silu(self.norm2(y)))


def vit() -> Made:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    return First(ViTModel(config), "last_hidden_state", "pixel_values"), (torch.randn(4, 3, 224, 224),)


def resnet18() -> Made:
    return _with_statistics(ResNet18()), (torch.randn(4, 3, 224, 224),)


def mobilenet_v2() -> Made:
    return _with_statistics(MobileNetV2()), (torch.randn(2, 3, 224, 224),)


def convnext() -> Made:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(depths=[2, 2, 4, 2], hidden_sizes=[64, 128, 256, 512])
    return First(ConvNextModel(config), "pooler_output", "pixel_values"), (torch.randn(2, 3, 224, 224),)


def unet_block() -> Made:
    return UNetBlock(), (torch.randn(2, 4, 64, 64),)


def _with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics that are not 0 and 1, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model
