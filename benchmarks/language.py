"""Workloads of language models: encoders, prefill of decoders, and one step of decoding with a static cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]

CACHE, POSITION = 512, 384
"""Tokens that the cache of a decode step holds, and how many are there already."""


class First(nn.Module):
    """A transformers model reduced to tensors in, one tensor out, so that every peer can take it. names: of the inputs, in order."""

    def __init__(self, model: nn.Module, field: str, *names: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.field, self.names, self.fixed = model, field, names, fixed

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(**dict(zip(self.names, xs)), **self.fixed), self.field)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522)
    return BertModel(config)


def encoder() -> Made:
    return First(_bert(), "last_hidden_state", "input_ids"), (torch.randint(1, 30000, (8, 128)),)


def padded_encoder() -> Made:
    """Lengths from 128 down to 23, as a batch of sentences has them: 60% of the tokens are real."""
    lengths = torch.tensor([128, 115, 101, 84, 66, 52, 39, 23])
    mask = (torch.arange(128) < lengths[:, None]).long()
    model = First(_bert(), "last_hidden_state", "input_ids", "attention_mask")
    return model, (torch.randint(1, 30000, (8, 128)) * mask, mask)


class Tokens(nn.Module):
    """The last layer of an encoder at tokens, 0 where there is padding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)


def uneven_encoder() -> Made:
    """16 sequences, their lengths uniform in 16 .. 128: 56% of the tokens are real."""
    mask = (torch.arange(128) < torch.linspace(16, 128, 16).round()[:, None]).long()
    return Tokens(_bert()), (torch.randint(1, 30000, (16, 128)) * mask, mask)


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    return First(GPT2LMHeadModel(GPT2Config()), "logits", "input_ids", use_cache=False), (torch.randint(0, 50000, (1, 256)),)


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1408,
                         vocab_size=32000, max_position_embeddings=512)  # fmt: skip
    return First(LlamaForCausalLM(config), "logits", "input_ids", use_cache=False), (torch.randint(0, 32000, (1, 256)),)


class Decode(nn.Module):
    """One token through a model with transformers' StaticCache, which it updates in place: as `generate` calls it.

    A call advances the cache by one token; `reset` takes it back.
    """

    def __init__(self, model: nn.Module, cache: Any, position: int = POSITION) -> None:
        super().__init__()
        self.model, self.cache, self.position = model, cache, position

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits

    def reset(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.position)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Decode:
        """`double()` and the like take the cache along."""
        super()._apply(fn, recurse)
        for layer in self.cache.layers:
            layer.keys, layer.values = fn(layer.keys), fn(layer.values)
        return self


class PortableDecode(nn.Module):
    """The same with keys and values of all layers as inputs, and updated as outputs, for peers without state."""

    def __init__(self, step: Decode) -> None:
        super().__init__()
        self.model, self.config = step.model, step.model.config

    def forward(self, token: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = _cache(self.config, states)
        logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


def _cache(config: Any, states: tuple[torch.Tensor, ...]) -> Any:
    """A cache whose `POSITION` first entries are those of `states` (keys and values of each layer); updates make new tensors."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            where = torch.arange(key_states.shape[-2]) + self.cumulative_length
            self.keys = self.keys.index_copy(2, where, key_states)
            self.values = self.values.index_copy(2, where, value_states)
            return self.keys, self.values

    cache = StaticCache(config, max_cache_len=states[0].shape[2])
    cache.layers = [Layer(states[0].shape[2]) for _ in range(len(states) // 2)]
    for i, layer in enumerate(cache.layers):
        layer.lazy_initialization(states[2 * i], states[2 * i + 1])
        layer.keys, layer.values = states[2 * i], states[2 * i + 1]
        layer.cumulative_length = torch.tensor(POSITION)
    return cache


def _step() -> tuple[Decode, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, intermediate_size=2048,
                         vocab_size=32000, max_position_embeddings=1024, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cache = StaticCache(config, max_cache_len=CACHE)
    for layer in cache.layers:
        layer.lazy_initialization(torch.zeros(1, 12, 1, 64), torch.zeros(1, 12, 1, 64))
        layer.keys[:, :, :POSITION].normal_()
        layer.values[:, :, :POSITION].normal_()
    step = Decode(model, cache)
    step.reset()
    return step, torch.randint(0, 32000, (1, 1))


def decode() -> Made:
    """110 million parameters: 12 layers of 768, tied embeddings."""
    step, token = _step()
    return step, (token,)


def portable_decode() -> Made:
    step, token = _step()
    return PortableDecode(step), (token, *(t for layer in step.cache.layers for t in (layer.keys, layer.values)))
