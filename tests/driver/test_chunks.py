"""driver/chunks.py and passes/blend_kv.py: texts made of chunks that are stored, against the model on the whole text."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tilewright.driver.chunks import ChunkReuse, ChunkStore  # noqa: E402
from tilewright.driver.errors import BadOption  # noqa: E402
from tilewright.driver.generate import Generator  # noqa: E402
from tilewright.driver.stepping import OutOfPlace, stepper  # noqa: E402
from tilewright.passes.blend_kv import CannotBlend  # noqa: E402

VOCAB, LENGTH = 61, 80
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda layers: transformers.LlamaConfig(num_hidden_layers=layers, **LLAMA),
    "mistral": lambda layers: transformers.MistralConfig(num_hidden_layers=layers, sliding_window=12, **LLAMA),
    "phi": lambda layers: transformers.PhiConfig(num_hidden_layers=layers, partial_rotary_factor=0.5, intermediate_size=48, **SIZES),
    "bloom": lambda layers: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_head=4, n_layer=layers, initializer_range=0.1),
    "gpt2": lambda layers: transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=layers, n_positions=LENGTH),
}


def _model(kind: str, layers: int):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](layers)).eval()


def _stepper(model):
    return stepper(model, torch.randint(0, VOCAB, (1, LENGTH)))


def _text(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=made) for n in (20, 13, 24)], torch.randint(0, VOCAB, (5,), generator=made)


def _whole(model, chunks, question, **options) -> torch.Tensor:
    """Logits after the last token, in float64."""
    ids = torch.cat([*chunks, question])[None]
    with torch.no_grad():
        return model.double()(ids, use_cache=False, **options).logits[:, -1]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def llama():
    model = _model("llama", 4)
    return model, _stepper(model)


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi", "bloom"])
def test_all_tokens_computed_anew_is_exact(kind) -> None:
    model = _model(kind, 2)
    store = ChunkStore(_stepper(model))
    chunks, question = _text()
    read = store.prefill(chunks, question, 0.999)  # with 1 it is read as any text, without chunks
    assert read.recomputed.tolist() == list(range(20, 57)), "the first chunk stands where it stood"
    assert _error(read.logits, _whole(model, chunks, question)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "phi", "bloom"])
def test_keys_of_one_layer_depend_on_nothing_but_their_place(kind) -> None:
    """What is kept is turned to where it stands: with a single layer nothing is left to compute anew."""
    model = _model(kind, 1)
    store = ChunkStore(_stepper(model), ChunkReuse(ratio=0.0))
    chunks, question = _text()
    store.prefill(chunks, question)
    moved = [chunks[2], chunks[0], chunks[1]]
    read = store.prefill(moved, question)
    assert store.counts.misses == 3 and store.counts.hits == 3 and not len(read.recomputed)
    assert _error(read.logits, _whole(model, moved, question)) < 1e-5


def test_without_any_computed_anew_it_is_attention_in_blocks(llama) -> None:
    """Each chunk sees itself, the question everything."""
    _, steps = llama
    chunks, question = _text()
    owner = torch.cat([torch.full((len(c),), i) for i, c in enumerate([*chunks, question])])
    at = torch.arange(len(owner))
    seen = (owner[:, None] == owner) | (owner == len(chunks))[:, None]
    mask = (seen & (at[:, None] >= at))[None, None]
    blocks = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    exact = _whole(_model("llama", 4), chunks, question, attention_mask=blocks)
    found = ChunkStore(steps, ChunkReuse(ratio=0.0)).prefill(chunks, question).logits
    assert _error(found, exact) < 1e-5
    assert _error(found, _whole(_model("llama", 4), chunks, question)) > 1e-3


def test_errors_fall_with_the_ratio_and_deviations_choose_better_than_chance(llama, monkeypatch) -> None:
    _, steps = llama
    store = ChunkStore(steps)
    exact = {seed: _whole(_model("llama", 4), *_text(seed)) for seed in range(4)}

    def errors(ratio: float) -> float:
        return sum(_error(store.prefill(*_text(seed), ratio).logits, whole) for seed, whole in exact.items())

    falling = [errors(ratio) for ratio in (0.0, 0.3, 0.6, 1.0)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 1e-4 and falling[0] > 1e-2
    topk = torch.Tensor.topk
    made = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: topk(torch.rand(len(x), generator=made), k))
    assert errors(0.3) > falling[1]


def test_the_ratio_within_an_error(llama) -> None:
    _, steps = llama
    store = ChunkStore(steps)
    examples = [_text(seed) for seed in range(2)]
    ratio = store.ratio_within(0.02, examples)
    exact = [store.prefill(*example, 1.0).logits for example in examples]
    assert all(_error(store.prefill(*e, ratio).logits, x.double()) <= 0.02 for e, x in zip(examples, exact))
    assert store.ratio_within(0.0, examples) == 1.0 and store.ratio_within(10.0, examples) == 0.0


def test_it_goes_on_from_what_was_read(llama) -> None:
    _, steps = llama
    chunks, question = _text()
    read = ChunkStore(steps).prefill(chunks, question, 1.0)
    token = read.logits.argmax(-1, keepdim=True)
    logits = steps.step(token, read.position, read.state)
    assert _error(logits[:, -1], _whole(_model("llama", 4), [*chunks, question], token[0])) < 1e-5


def test_rows_of_a_batch_are_read_where_their_state_lies(llama) -> None:
    """By compiled programs, in a batch of two with documents of their own."""
    _, steps = llama
    generator = Generator(steps, documents=ChunkReuse(0.3))
    chunks, question = _text()
    documents = [chunks, chunks[:1:-1]]
    new = generator.generate(question.repeat(2, 1), documents=documents, max_new_tokens=3)[:, len(question) :]
    for tokens, known in zip(new, documents):
        read = generator.documents.prefill(known, torch.cat([question, tokens[:2]]))
        assert int(tokens[2]) == int(read.logits.argmax())


def test_a_chunk_at_the_start_and_no_chunk_at_all_are_exact(llama) -> None:
    _, steps = llama
    chunks, question = _text()
    store = ChunkStore(steps, ChunkReuse(ratio=0.0))
    for known in (chunks[:1], [], [chunks[0][:0], chunks[0]]):
        assert _error(store.prefill(known, question).logits, _whole(_model("llama", 4), known, question)) < 1e-5


def test_memory_is_kept_and_the_oldest_goes(llama) -> None:
    _, steps = llama
    chunks, question = _text()
    one = ChunkStore(steps)
    one.prefill(chunks[:1], question)
    store = ChunkStore(steps, ChunkReuse(memory=2 * one.nbytes))
    store.prefill(chunks, question)
    assert store.nbytes <= 2 * one.nbytes and store.counts.evicted == 1
    store.prefill([chunks[2], chunks[1]], question)
    assert store.counts.hits == 2
    store.prefill(chunks[:1], question)
    assert store.counts.misses == 4
    nothing = ChunkStore(steps, ChunkReuse(memory=1))
    nothing.prefill(chunks, question)
    assert nothing.nbytes == 0


def test_keys_of_low_rank(llama) -> None:
    """Of full rank they are what they were; below, they take less, and the error grows."""
    _, steps = llama
    chunks, question = [torch.arange(40) % VOCAB, torch.arange(20) + 40], _text()[1]
    whole, thin = ChunkStore(steps, ChunkReuse(ratio=0.0, rank=40)), ChunkStore(steps, ChunkReuse(ratio=0.0, rank=6))
    exact = ChunkStore(steps, ChunkReuse(ratio=0.0)).prefill(chunks, question).logits.double()
    assert _error(whole.prefill(chunks, question).logits, exact) < 1e-5
    assert 1e-5 < _error(thin.prefill(chunks, question).logits, exact) < 0.5
    assert thin.nbytes < 0.85 * whole.nbytes


def test_learned_positions_are_refused() -> None:
    with pytest.raises(CannotBlend, match=r"puts positions into tokens before any attention .*modeling_gpt2.py:\d+"):
        ChunkStore(_stepper(_model("gpt2", 1)))


@pytest.mark.parametrize(
    ("options", "says"), [({"ratio": 1.5}, "ratio.*0 to 1, not 1.5"), ({"rank": 0}, "rank.*from 1 on"), ({"memory": "x"}, "memory")]
)
def test_options_that_mean_nothing(options, says) -> None:
    with pytest.raises(BadOption, match=says):
        ChunkReuse(**options)


def test_texts_that_cannot_be(llama) -> None:
    store = ChunkStore(llama[1])
    with pytest.raises(OutOfPlace, match="90 tokens cannot stand at position 0: texts have at most 80"):
        store.prefill([torch.arange(60), torch.arange(25)], torch.arange(5))
    with pytest.raises(BadOption, match="question: it has no tokens"):
        store.prefill([torch.arange(3)], [])
