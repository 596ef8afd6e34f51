"""The axes of real architectures: every label is judged by numbers, and graphs for fewer tokens compute what they did."""

import dataclasses
import functools
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")

import transformers as hf
from axis_oracle import judged, values_of
from tilewright.driver.pipeline import PREPARING
from tilewright.ir.analysis.axes import How, Label, axis_of, resized
from tilewright.ir.interpret import interpret
from tilewright.passes.base import Notes
from tilewright.passes.manager import run_passes
from zoo import GQA, VOCAB, ZOO, captured


def _more(config, **fields):
    """A decoder that only these tests build."""

    def make():
        torch.manual_seed(0)
        made = hf.AutoModelForCausalLM.from_config(getattr(hf, config)(**{**GQA, **fields})).eval()
        return made, lambda batch, length: ZOO["llama"]()[1](batch, length)

    return make


MORE = {
    # attention with a sink, in windows, and experts by turns
    "gpt-oss": _more("GptOssConfig", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    # keys and values of few numbers, groups of experts
    "deepseek-v3": _more("DeepseekV3Config", num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1,
                         num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                         first_k_dense_replace=1, n_shared_experts=1),
    # rotations by complex numbers
    "llama4": _more("Llama4TextConfig", head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1),
    # masks that are a part of a larger table, and scores that are divided after them
    "gpt-neo": _more("GPTNeoConfig", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "codegen": _more("CodeGenConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
}  # fmt: skip
MODELS = ZOO | MORE


@functools.cache
def graph_of(name):
    """The canonical graph of a model up to its first output, two sets of inputs, and their names; several tests look at one."""
    graph, given = captured(name, MODELS[name])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        canonical = run_passes(dataclasses.replace(graph, outputs=graph.outputs[:1]), PREPARING, Notes())
    return canonical, list(given.values()), [another(k, x, generator) for k, x in given.items()], list(given)


def another(name, x, generator):
    """Other values of the same kind."""
    if name == "attention_mask":
        return torch.ones_like(x)
    return torch.randint(1, VOCAB, x.shape, generator=generator) if x.dtype == torch.int64 else torch.randn(x.shape, generator=generator)


CAUSAL = (
    "gpt2", "gpt-neox", "opt", "bloom", "falcon", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "starcoder2", "mixtral",
    "qwen2-moe", *MORE,
)  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "modernbert")
ATTENTION = {"attention", "softmax", "matmul"}
PIXELS = {"conv", "max_pool", "avg_pool", "pad", "slice"}

# (model, input) -> dimension, the ops that may be PREFIX, WINDOW, and MIXING along it; all others are parallel
AXES = {
    **{(name, "input_ids"): (1, ATTENTION | {"amax"}, set(), set()) for name in CAUSAL},
    **{(name, "input_ids"): (1, {"cumsum"}, set(), ATTENTION) for name in ENCODERS},
    **{(name, "attention_mask"): (1, {"cumsum"}, set(), ATTENTION) for name in ENCODERS},
    **{(name, "decoder_input_ids"): (1, ATTENTION, set(), set()) for name in ("t5", "bart", "whisper")},
    **{(name, "input_ids"): (1, set(), set(), ATTENTION) for name in ("t5", "bart")},
    ("clip", "input_ids"): (1, ATTENTION, set(), {"index", "argmax", "select"}),
    ("mamba", "input_ids"): (1, set(), {"conv", "slice"}, {"select"}),
    **{(name, "pixel_values"): (2, set(), PIXELS, set()) for name in ("resnet", "convnext")},
    ("mobilenet-v2", "pixel_values"): (2, set(), PIXELS, {"conv"}),  # the last stages have one row
    **{(name, "pixel_values"): (2, set(), {"conv"}, {"cat"}) for name in ("vit", "deit", "clip")},
    ("segformer", "pixel_values"): (2, set(), {"conv"}, ATTENTION | {"reshape"}),
    ("swin", "pixel_values"): (2, set(), PIXELS | {"cat"}, ATTENTION | {"reshape", "cat"}),
    ("whisper", "input_features"): (2, set(), {"conv"}, ATTENTION),
    ("wav2vec2", "input_values"): (1, set(), {"conv", "slice"}, ATTENTION | {"group_norm"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_labels_are_what_numbers_show(name):
    graph, first, second, names = graph_of(name)
    one, other = values_of(graph, first), values_of(graph, second)
    for node, given in zip(graph.inputs, names):
        batch = axis_of(graph, node, 0)
        assert batch.first(How.MIXING, How.PREFIX, How.WINDOW) is None, batch.why(batch.first(How.MIXING, How.PREFIX, How.WINDOW))
        assert not list(judged(batch, one, other))
        dim, *ops = AXES[name, given]
        found = axis_of(graph, node, dim)
        assert not list(judged(found, one, other))
        for how, expected in zip((How.PREFIX, How.WINDOW, How.MIXING), ops):
            assert {n.op.name for n, label in found.labels.items() if label.how is how} <= expected


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bart", "whisper"])
def test_a_decoder_for_fewer_tokens_computes_what_it_did_on_a_prefix(name):
    graph, given, _, names = graph_of(name)
    at = len(names) - 1  # the tokens of the decoder come last
    found = axis_of(graph, graph.inputs[at], 1)
    whole = interpret(graph, given, torch.float64)[0]
    for size in (1, 5):
        fewer = [x[:, :size] if i == at else x for i, x in enumerate(given)]
        part = interpret(resized(graph, found, size), fewer, torch.float64)[0]
        torch.testing.assert_close(part, whole[:, :size], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_for_fewer_tokens_is_the_model_on_fewer_tokens(name):
    graph, given, _, names = graph_of(name)
    model, _ = ZOO[name]()
    fewer = [x[:, :7] for x in given]
    ours = interpret(resized(graph, axis_of(graph, graph.inputs[0], 1), 7), fewer, torch.float64)[0]
    with torch.no_grad():
        theirs = model.double()(**dict(zip(names, fewer)))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral", "vit", "resnet", "mamba", "whisper"])
def test_a_model_for_fewer_sequences_or_images(name):
    graph, given, _, _ = graph_of(name)
    small = resized(graph, axis_of(graph, graph.inputs[0], 0), 2)
    part = interpret(small, [x[:2] for x in given], torch.float64)[0]
    torch.testing.assert_close(part, interpret(graph, given, torch.float64)[0][:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrong", list(How))
def test_a_wrong_label_is_found(wrong):
    graph, first, second, _ = graph_of("gpt2")
    found = axis_of(graph, graph.inputs[0], 1)
    node = found.first(How.PREFIX if wrong is not How.PREFIX else How.PARALLEL)
    false = dataclasses.replace(found, labels={**found.labels, node: Label(wrong)})
    caught = list(judged(false, values_of(graph, first), values_of(graph, second)))
    assert [n for n, _ in caught] == ([] if wrong in (How.PREFIX, How.MIXING) else [node] * len(caught))
    assert bool(caught) == (wrong in (How.PARALLEL, How.WINDOW))
