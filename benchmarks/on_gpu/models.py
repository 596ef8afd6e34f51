"""Whole models in bfloat16, with seeded weights: eager, tilewright and Inductor by torch.compile, called in turn."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tilewright.driver.accuracy import relative_error, to_double
from torch import nn

from .clock import Answer, Call, in_a_line, race
from .place import NotHere, Place

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Peer:
    """How a model is compiled. theirs: by the rival's backend, not by ours."""

    theirs: bool
    mode: str | None = None
    freeze: bool = False


PEERS: dict[str, Peer] = {
    "tilewright": Peer(False),
    "tilewright, frozen": Peer(False, freeze=True),
    "tilewright, reduce-overhead": Peer(False, "reduce-overhead"),
    "tilewright, max-autotune": Peer(False, "max-autotune"),
    "inductor": Peer(True),
    "inductor, reduce-overhead": Peer(True, "reduce-overhead"),
    "inductor, max-autotune": Peer(True, "max-autotune-no-cudagraphs"),
}
DEFAULT = ("tilewright", "inductor")
REPLAYED = ("tilewright, reduce-overhead", "inductor, reduce-overhead")
TUNED = ("tilewright, max-autotune", "inductor, max-autotune")


def compared(model: str, peers: tuple[str, ...], place: Place) -> Answer:
    """Times of a call, of the first call, and errors against float64; those of eager are among them."""
    torch.manual_seed(0)
    try:
        with torch.device(place.device):
            module, inputs = MODELS[model](place)
    except ImportError as error:
        raise NotHere(f"{error}") from error
    module = module.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        _imported(place)
        exact = _exact(module, inputs)
        calls: dict[str, list[Call]] = {}
        started: dict[str, Answer] = {}
        for name in ("eager", *peers):
            started[name], call = _started(name, module, inputs, place)
            if call is not None:
                started[name]["error"] = relative_error(_fresh(module, call), exact)
                calls[name] = [call]
        found = race(place, calls, flush=False, started=started, before=partial(_begin, module))
    return {"peers": {name: found.get(name, about) for name, about in started.items()}, "tokens": getattr(module, "tokens", None)}


def _started(name: str, module: nn.Module, inputs: Any, place: Place) -> tuple[Answer, Call | None]:
    """Seconds of the first call, and what makes the following ones; without a call, why there is none."""
    try:
        place.synchronize()
        begin = time.perf_counter()
        call = partial(module if name == "eager" else _compiled(module, PEERS[name], place), *inputs)
        _fresh(module, call)
        place.synchronize()
        return {"first_call": time.perf_counter() - begin}, call
    except Exception as error:  # a peer that fails is a result
        return {"failed": in_a_line(error)}, None


def _compiled(module: nn.Module, peer: Peer, place: Place) -> Callable[..., torch.Tensor]:
    from tilewright.driver.backend import MODES, tilewright

    if peer.theirs:
        return torch.compile(module, backend=place.rival, **({"mode": peer.mode} if place.rival == "inductor" else {}))
    options = {**MODES[peer.mode or "default"], "freeze": peer.freeze}
    return torch.compile(module, backend=partial(tilewright, options=options))


def _begin(module: nn.Module) -> None:
    """A call of a model with state begins where every call begins."""
    reset = getattr(module, "reset", None)
    if reset is not None:
        reset()
    torch.compiler.cudagraph_mark_step_begin()


def _fresh(module: nn.Module, call: Call) -> torch.Tensor:
    _begin(module)
    return call()


@functools.cache
def _imported(place: Place) -> None:
    """What compiling imports, and looks up once, is not part of the first call of a model."""
    x = torch.randn(8, 8, device=place.device)
    for peer in (Peer(False), Peer(True)):
        _compiled(nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(place.device), peer, place)(x)


def _exact(module: nn.Module, inputs: Any) -> torch.Tensor:
    double = copy.deepcopy(module).double()
    return _fresh(double, lambda: double(*to_double(inputs))).clone()


# -- the models


def encoder(place: Place) -> Made:
    from language import First
    from transformers import BertConfig, BertModel

    width, layers = place.size(768, 32), place.size(12, 2)
    config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16 if width < 64 else 12,
                        intermediate_size=4 * width, vocab_size=place.size(30522, 100))  # fmt: skip
    tokens = torch.randint(0, config.vocab_size, (place.size(32, 2), place.size(256, 8)))
    return First(BertModel(config), "last_hidden_state", "input_ids").bfloat16(), (tokens,)


def vit(place: Place) -> Made:
    from language import First
    from transformers import ViTConfig, ViTModel

    width, layers, image = place.size(768, 32), place.size(12, 2), place.size(224, 32)
    config = ViTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16 if width < 64 else 12,
                       intermediate_size=4 * width, image_size=image)  # fmt: skip
    pixels = torch.randn(place.size(32, 1), 3, image, image, dtype=torch.bfloat16)
    return First(ViTModel(config), "last_hidden_state", "pixel_values").bfloat16(), (pixels,)


def resnet(place: Place) -> Made:
    from vision import ResNet18

    image = place.size(224, 32)
    return ResNet18().bfloat16(), (torch.randn(place.size(64, 1), 3, image, image, dtype=torch.bfloat16),)


def gpt2(place: Place) -> Made:
    from language import First
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config() if place.on_gpu else GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)
    tokens = torch.randint(0, config.vocab_size, (place.size(4, 1), place.size(1024, 8)))
    return First(GPT2LMHeadModel(config), "logits", "input_ids", use_cache=False).bfloat16(), (tokens,)


def decode(place: Place) -> Made:
    """One token through 1.1 billion parameters with a cache of 2048 tokens, half of it filled."""
    from language import Decode
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    width, layers, length = place.size(2048, 32), place.size(16, 2), place.size(2048, 32)
    heads, shared = place.size(32, 4), place.size(8, 2)
    config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
                         intermediate_size=4 * width, vocab_size=place.size(32000, 100), max_position_embeddings=length)  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    cache, kind = StaticCache(config, max_cache_len=length), {"dtype": torch.bfloat16, "device": place.device}
    for layer in cache.layers:
        layer.lazy_initialization(*(torch.zeros(1, shared, 1, width // heads, **kind) for _ in range(2)))
        layer.keys[:, :, : length // 2].normal_()
        layer.values[:, :, : length // 2].normal_()
    step = Decode(model, cache, length // 2)
    step.tokens = 1  # a call makes so many
    step.reset()
    return step, (torch.randint(0, config.vocab_size, (1, 1)),)


MODELS: Mapping[str, Callable[[Place], Made]] = {
    "encoder 12x768, b32 s256": encoder,
    "Llama-like 16x2048, decode": decode,
    "GPT-2 12x768, b4 s1024": gpt2,
    "ViT 12x768, b32 224": vit,
    "ResNet-18, b64 224": resnet,
}
