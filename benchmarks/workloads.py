"""The workloads of `benchmarks/cpu.py`, by name: seeded, float32, eval mode, no downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import language
import layers
import torch
import vision
from torch import nn

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """make: () -> (model, inputs), the same in every process.

    portable: the same for peers that take no state and no Python objects: what `model` mutates goes in as inputs and comes out as
    further outputs, in that order. flops: where torch cannot count them (products inside opaque ops).
    """

    make: Callable[[], tuple[nn.Module, Inputs]]
    portable: Callable[[], tuple[nn.Module, Inputs]] | None = None
    flops: int | None = None


WORKLOADS: Mapping[str, Workload] = {
    "encoder 6x384, b8 s128": Workload(language.encoder),
    "encoder, padded batch": Workload(language.padded_encoder),
    "encoder, lengths 16 to 128": Workload(language.uneven_encoder),
    "ViT 6x384, b4 224": Workload(vision.vit),
    "ResNet-18, b4 224": Workload(vision.resnet18),
    "MobileNetV2-like, b2 224": Workload(vision.mobilenet_v2),
    "ConvNeXt-like, b2 224": Workload(vision.convnext),
    "U-Net block, b2 64": Workload(vision.unet_block),
    "GPT-2 12x768, prefill 256": Workload(language.gpt2),
    "Llama-like, prefill 256": Workload(language.llama),
    "decode 110M, cache 512": Workload(language.decode, language.portable_decode),
    "MoE FFN, routed": Workload(layers.moe_routed, flops=layers.MOE_FLOPS),
    "MoE FFN, dense": Workload(layers.moe_dense),
    "chain 4096x1024": Workload(layers.chain),
    "softmax 4096x1024": Workload(layers.softmax),
    "LSTM 256, b8 s128": Workload(layers.lstm, flops=layers.LSTM_FLOPS),
    "MLP, batch 1": Workload(layers.mlp_1),
    "MLP, batch 256": Workload(layers.mlp_256),
}


def build(name: str, portable: bool = False) -> tuple[nn.Module, Inputs]:
    """The workload, the same weights and inputs in every process."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model, inputs = (workload.portable if portable and workload.portable else workload.make)()
    return model.eval(), inputs


def reset(model: nn.Module) -> None:
    """Sets a model with state back to where its step begins; not timed."""
    restore: Any = getattr(model, "reset", None)
    if restore is not None:
        restore()
