"""The zoo: small seeded models of many architectures, built from `transformers` configurations (no downloads).

`ZOO[name]()` returns (model in eval mode, inputs(batch, length) -> keyword arguments). Sizes are tiny; the structure is the real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.ir.graph import Graph

Inputs = Callable[[int, int], dict[str, torch.Tensor]]
Entry = Callable[[], tuple[torch.nn.Module, Inputs]]

VOCAB = 99
BODY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
COMMON: dict[str, Any] = BODY | {"vocab_size": VOCAB}
DECODER: dict[str, Any] = COMMON | {"use_cache": False, "max_position_embeddings": 64, "pad_token_id": 0}
GQA: dict[str, Any] = DECODER | {"num_key_value_heads": 2}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_channels": 3}


def _tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return {"input_ids": torch.randint(1, VOCAB, (batch, length), generator=generator)}


def _masked(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length - length // 3 :] = 0
    return _tokens(batch, length) | {"attention_mask": mask}


def _causal(batch: int, length: int) -> dict[str, Any]:
    return _tokens(batch, length) | {"use_cache": False}


def _encoder_decoder(batch: int, length: int) -> dict[str, Any]:
    ids = _tokens(batch, length)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, : max(2, length // 2)], "use_cache": False}


def _image(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def _audio(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {"input_values": torch.randn(batch, 400 + 40 * length, generator=generator)}


def _build(model: str, config: str, inputs: Inputs, **fields: Any) -> Entry:
    def make() -> tuple[torch.nn.Module, Inputs]:
        torch.manual_seed(0)
        return getattr(hf, model)(getattr(hf, config)(**fields)).eval(), inputs

    return make


def _whisper_inputs(batch: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, 16, 64, generator=generator)
    return {"input_features": features, "decoder_input_ids": _tokens(batch, length)["input_ids"], "use_cache": False}


def _clip_inputs(batch: int, length: int) -> dict[str, Any]:
    return _tokens(batch, min(length, 30)) | _image(batch, length)


ZOO: dict[str, Entry] = {
    # encoders
    "bert": _build("BertModel", "BertConfig", _masked, **COMMON),
    "roberta": _build("RobertaModel", "RobertaConfig", _masked, **COMMON, max_position_embeddings=70),
    "distilbert": _build("DistilBertModel", "DistilBertConfig", _masked, vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "albert": _build("AlbertModel", "AlbertConfig", _masked, **COMMON, embedding_size=16),
    "electra": _build("ElectraModel", "ElectraConfig", _masked, **COMMON, embedding_size=16),
    "mpnet": _build("MPNetModel", "MPNetConfig", _masked, **COMMON),
    "deberta-v2": _build("DebertaV2Model", "DebertaV2Config", _masked, **COMMON, relative_attention=True, position_buckets=16,
                         pos_att_type=["p2c", "c2p"], max_relative_positions=32),
    "modernbert": _build("ModernBertModel", "ModernBertConfig", _masked, **COMMON, pad_token_id=0, max_position_embeddings=64,
                         bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    # decoders
    "gpt2": _build("GPT2LMHeadModel", "GPT2Config", _causal, vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": _build("GPTNeoXForCausalLM", "GPTNeoXConfig", _causal, **DECODER),
    "opt": _build("OPTForCausalLM", "OPTConfig", _causal, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "bloom": _build("BloomForCausalLM", "BloomConfig", _causal, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _build("FalconForCausalLM", "FalconConfig", _causal, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
                     num_attention_heads=4, multi_query=True),
    "llama": _build("LlamaForCausalLM", "LlamaConfig", _causal, **GQA),
    "mistral": _build("MistralForCausalLM", "MistralConfig", _causal, **GQA, sliding_window=8),
    "qwen2": _build("Qwen2ForCausalLM", "Qwen2Config", _causal, **GQA),
    "qwen3": _build("Qwen3ForCausalLM", "Qwen3Config", _causal, **GQA, head_dim=8),
    "gemma": _build("GemmaForCausalLM", "GemmaConfig", _causal, **GQA, head_dim=8),
    "gemma2": _build("Gemma2ForCausalLM", "Gemma2Config", _causal, **GQA, head_dim=8, sliding_window=8),
    "phi": _build("PhiForCausalLM", "PhiConfig", _causal, **DECODER),
    "starcoder2": _build("Starcoder2ForCausalLM", "Starcoder2Config", _causal, **GQA),
    # mixtures of experts, state space
    "mixtral": _build("MixtralForCausalLM", "MixtralConfig", _causal, **GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": _build("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _causal, **GQA, num_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "mamba": _build("MambaForCausalLM", "MambaConfig", _causal, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    # encoder-decoders
    "t5": _build("T5ForConditionalGeneration", "T5Config", _encoder_decoder, vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48,
                 num_layers=2, num_heads=4, decoder_start_token_id=0),
    "bart": _build("BartForConditionalGeneration", "BartConfig", _encoder_decoder, vocab_size=VOCAB, d_model=32, encoder_layers=2,
                   decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                   max_position_embeddings=64),
    # vision
    "vit": _build("ViTModel", "ViTConfig", _image, **BODY, **IMAGE),
    "deit": _build("DeiTModel", "DeiTConfig", _image, **BODY, **IMAGE),
    "swin": _build("SwinModel", "SwinConfig", _image, image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                   window_size=4),
    "resnet": _build("ResNetModel", "ResNetConfig", _image, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    "convnext": _build("ConvNextModel", "ConvNextConfig", _image, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "mobilenet-v2": _build("MobileNetV2Model", "MobileNetV2Config", _image, image_size=32, depth_multiplier=0.25),
    "segformer": _build("SegformerModel", "SegformerConfig", _image, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                        hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    "clip": _build("CLIPModel", "CLIPConfig", _clip_inputs,
                   text_config={**COMMON, "max_position_embeddings": 32, "eos_token_id": 2, "projection_dim": 16},
                   vision_config={**BODY, **IMAGE, "projection_dim": 16},
                   projection_dim=16),
    # audio
    "wav2vec2": _build("Wav2Vec2Model", "Wav2Vec2Config", _audio, **BODY, conv_dim=[16, 16],
                       conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
                       vocab_size=VOCAB),
    "whisper": _build("WhisperForConditionalGeneration", "WhisperConfig", _whisper_inputs, vocab_size=VOCAB, d_model=32, encoder_layers=2,
                      decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                      num_mel_bins=16, max_source_positions=32, max_target_positions=64, pad_token_id=0, decoder_start_token_id=1),
}  # fmt: skip


@functools.cache
def captured(name: str, make: Entry) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph of a model as it is captured for three rows, and its inputs; capturing takes long, and several files look at one graph."""
    model, inputs = make()
    given = inputs(3, 12)
    graph = captured_of(export_module(name, model, Example((), given))).graph
    return graph, {k: v for k, v in given.items() if torch.is_tensor(v)}
