"""The workloads of `benchmarks/cpu.py`: name -> function giving (model in eval mode, tuple of inputs). Seeded, float32, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Workload = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]


class Chain(nn.Module):
    """layer norm, gelu, residual, softmax: memory-bound."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(nn.functional.gelu(self.norm(x)) + x, dim=-1)


class First(nn.Module):
    """A transformers model reduced to tensors in, one tensor out, so that every peer can take it."""

    def __init__(self, model: nn.Module, field: str, name: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.field, self.name, self.fixed = model, field, name, fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(**{self.name: x}, **self.fixed), self.field)


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


def chain() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Chain(1024), (torch.randn(4096, 1024),)


def softmax() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return nn.Softmax(-1), (torch.randn(4096, 1024),)


def bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522)
    return First(BertModel(config), "last_hidden_state", "input_ids"), (torch.randint(1, 30000, (8, 128)),)


def vit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    return First(ViTModel(config), "last_hidden_state", "pixel_values"), (torch.randn(4, 3, 224, 224),)


def resnet18() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return ResNet18(), (torch.randn(4, 3, 224, 224),)


def gpt2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return First(GPT2LMHeadModel(GPT2Config()), "logits", "input_ids", use_cache=False), (torch.randint(0, 50000, (1, 256)),)


def llama() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1408,
                         vocab_size=32000, max_position_embeddings=512)  # fmt: skip
    return First(LlamaForCausalLM(config), "logits", "input_ids", use_cache=False), (torch.randint(0, 32000, (1, 256)),)


WORKLOADS: dict[str, Workload] = {
    "chain 4096x1024": chain,
    "softmax 4096x1024": softmax,
    "BERT 6x384, b8 s128": bert,
    "ViT 6x384, b4 224": vit,
    "ResNet-18, b4 224": resnet18,
    "GPT-2 12x768, prefill 256": gpt2,
    "Llama-like 6x512, prefill 256": llama,
}


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The workload, the same weights and inputs in every process."""
    torch.manual_seed(0)
    model, inputs = WORKLOADS[name]()
    return model.eval(), inputs
