"""What cannot be meant: a sentence that says what is wrong and what to do, before anything is computed."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import VOCAB, interpreted
from steppers import Attends, Rerun
from tilewright.driver.chunks import ChunkReuse, ChunkStore
from tilewright.driver.errors import BadOption, ModelFails
from tilewright.driver.generate import Generator
from tilewright.driver.speculation import PromptLookup


def never(*_: Any) -> Any:
    raise AssertionError("nothing is computed")


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(Rerun(never, 64, VOCAB))


@pytest.fixture(scope="module")
def store() -> ChunkStore:
    return ChunkStore(interpreted())


def refused(ask: Callable[[], Any], said: str) -> None:
    with pytest.raises(BadOption) as caught:
        ask()
    text = str(caught.value)
    assert said in text and "\n" not in text and len(text) < 400, text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "gpt2"}, "model: it is a module, such as AutoModelForCausalLM.from_pretrained gives, or a Stepper, not 'gpt2'"),
        ({"model": None}, "or a Stepper, not None"),
        ({"max_length": -1}, "max_length: it is a count from 1 on, not -1"),
        ({"max_length": 1.5}, "not 1.5"),
        ({"max_length": "128"}, "not '128'"),
        ({"max_length": True}, "not True"),
        ({"chunk": 0}, "chunk: it is a count from 1 on, not 0"),
        ({"chunk": None}, "not None"),
        ({"plan": 4}, 'plan: it is a Plan or the name of a format, such as "int4-g64", not 4'),
        ({"prefixes": "512MB"}, "prefixes: it is a store, such as tilewright.PrefixStore(\"512MB\"), not '512MB'"),
        ({"speculation": True}, "speculation: it is how to draft, such as tilewright.PromptLookup(drafts=7), not True"),
        ({"documents": 0.15}, "documents: it is how they are read, such as tilewright.ChunkReuse(ratio=0.15), not 0.15"),
        ({"documents": ChunkReuse}, "not <class 'tilewright.driver.chunks.ChunkReuse'>"),
    ],
    ids=str,
)
def test_of_what_no_generator_is_made(options: dict[str, Any], said: str) -> None:
    refused(lambda: Generator(**{"model": torch.nn.Identity(), "max_length": 8, **options}), said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 1.5}, "top_k: it is a whole number, not 1.5"),
        ({"top_k": True}, "top_k: it is a whole number, not True"),
        ({"max_new_tokens": "5"}, "max_new_tokens: it is a count from 1 on, not '5'"),
        ({"max_new_tokens": 0}, "max_new_tokens: it is a count from 1 on, not 0"),
        ({"max_length": 2.5}, "max_length: it is a count from 1 on, not 2.5"),
        ({"num_return_sequences": 0}, "num_return_sequences: it is a count from 1 on, not 0"),
        ({"prompt_lookup_num_tokens": 2.5}, "prompt_lookup_num_tokens: it is a whole number"),
        ({"seed": "x"}, "seed: it is a whole number, not 'x'"),
        ({"seed": 0.5}, "seed: it is a whole number, not 0.5"),
        ({"temperature": "hot"}, "temperature: it is a number, not 'hot'"),
        ({"temperature": torch.ones(3)}, "temperature: it is a number, not torch.float32 of shape [3]"),
        ({"do_sample": "yes"}, "do_sample: it is True or False, not 'yes'"),
        ({"pad_token_id": 1.5}, "pad_token_id: it is a whole number"),
        ({"eos_token_id": "</s>"}, "eos_token_id: they are token ids, which a tokenizer makes of text, not '</s>'"),
        ({"streamer": print}, "streamer: it is something with put and end"),
        ({"documents": "Hello"}, "documents: it is a list of texts, each of token ids; one text alone is in a list, too, not 'Hello'"),
        ({"documents": 5}, "documents: it is a list of texts"),
        ({"documents": (x for x in ())}, "documents: it is a list of texts"),
        ({"documents": ["Hello"]}, "documents: they are token ids, which a tokenizer makes of text, not 'Hello'"),
        ({"documents": [[0.5, 1.0]]}, "documents: they are token ids, which are whole numbers, not torch.float32 of shape [2]"),
        ({"documents": [torch.ones(2, 3, dtype=torch.int64)]}, "documents: a text is a list of token ids, not torch.int64 of shape [2, 3]"),
        ({"token_type_ids": torch.zeros(4, 99)}, "token_type_ids: torch.float32 of shape [4, 99] is not done here"),
        ({"bad_words_ids": [list(range(99))]}, "bad_words_ids: a list is not done here"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_options_cannot_be(generator: Generator, options: dict[str, Any], said: str) -> None:
    refused(lambda: generator.generate([1, 2, 3], **options), said)


IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("prompts", "mask", "said"),
    [
        ("Hello", None, "input_ids: they are token ids, which a tokenizer makes of text, not 'Hello'"),
        (["Hello"], None, "a tokenizer makes of text, not 'Hello'"),
        ([["Hello", "you"]], None, "a tokenizer makes of text, not ['Hello', 'you']"),
        (None, None, "a tokenizer makes of text, not None"),
        (5, None, "they are token ids [batch, length], not 5"),
        ({"input_ids": IDS}, None, "input_ids: it is what a tokenizer returns, not the tokens of it: write generate(**encoding)"),
        (UserDict(input_ids=IDS), None, "write generate(**encoding)"),
        (IDS.float(), None, "whole numbers, not torch.float32 of shape [1, 5]"),
        (np.ones((2, 3)), None, "whole numbers, not torch.float64 of shape [2, 3]"),
        ([1.5, 2.0], None, "whole numbers, not torch.float32 of shape [2]"),
        ([[1, 2], [1.5]], None, "whole numbers, not torch.float32 of shape [1]"),
        ([[[1, 2], [3, 4]]], None, "a text is a list of token ids, not torch.int64 of shape [2, 2]"),
        ([[2**70]], None, "they are token ids"),
        (IDS, torch.ones(1, 3), "one number for each token; torch.float32 of shape [1, 3] does not fit torch.int64 of shape [1, 5]"),
        (IDS, torch.ones(1, 1, 5, 5), "attention_mask: it has one number for each token"),
        (IDS, "11111", "attention_mask: it says of each token whether it counts, with 1 or 0, not '11111'"),
        (
            [[1, 2], [3]],
            [[1, 1], [1, 1]],
            "for each token; [[1, 1], [1, 1]] does not fit [[1, 2], [3]]",
        ),
        ([1] * 70, None, "there is no room for a new token after a prompt of 70: texts have at most 64"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_are_no_prompts(generator: Generator, prompts: Any, mask: Any, said: str) -> None:
    refused(lambda: generator.generate(prompts, mask), said)
    refused(lambda: generator.steps(prompts, mask), said)


def test_what_means_the_same_is_taken_for_the_same() -> None:
    model = Attends()
    generator, options = Generator(model), {"max_new_tokens": 3, "do_sample": True}
    prompts, mask = [[7, 1, 2], [3, 7]], [[0, 1, 1], [1, 0]]
    expected = generator.generate([[1, 2], [3]], temperature=0.5, top_k=5, seed=1, **options)[:, 2:]
    numbers = {"temperature": torch.tensor(0.5, dtype=torch.float64), "top_k": np.int64(5), "seed": torch.tensor(1)}
    found = generator.generate(prompts, mask, **numbers, **{**options, "do_sample": np.True_})
    assert found[:, :3].tolist() == [[7, 1, 2], [0, 3, 7]] and torch.equal(found[:, 3:], expected), "a mask counts for lists, too"
    one = generator.generate([1, 2], max_new_tokens=3)
    for same in (list(np.array([1, 2])), list(torch.tensor([1, 2])), [torch.tensor([[1, 2]])], range(1, 3)):
        assert torch.equal(generator.generate(same, max_new_tokens=3), one)
    assert torch.equal(generator.generate([9, 1, 2], [False, True, True], max_new_tokens=3)[:, 1:], one)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda store: store.ratio_within(0.1, []), "examples: give one or more to measure on"),
        (lambda store: store.ratio_within(0.1, [[1, 2, 3]]), "each of chunks and the question behind them"),
        (lambda store: store.ratio_within(0.1, [5]), "each of chunks and the question behind them"),
        (lambda store: store.ratio_within("1%", [([[1]], [2])]), "max_error: it is a number, such as 0.02"),
        (lambda store: store.ratio_within(float("nan"), [([[1]], [2])]), "max_error: it is a number"),
        (lambda store: store.prefill([[1.5]], [2]), "chunks: they are token ids, which are whole numbers, not torch.float32 of shape [1]"),
        (lambda store: store.prefill([[1]], [2.5]), "question: they are token ids, which are whole numbers"),
        (
            lambda store: store.prefill(torch.tensor([1, 2, 3]), [2]),
            "chunks: it is a list of texts, each of token ids; one text alone is in",
        ),
        (lambda store: store.prefill([1, 2, 3], [2]), "chunks: it is a list of texts"),
        (lambda store: store.prefill("Hello", [2]), "chunks: it is a list of texts"),
        (lambda store: store.prefill([[1]], "why?"), "question: they are token ids, which a tokenizer makes of text, not 'why?'"),
        (lambda store: store.prefill([[1]], [VOCAB]), f"question: there is no token {VOCAB}; the model knows 0 to {VOCAB - 1}"),
        (lambda store: store.prefill([[1], [-1]], [2]), "chunks: there is no token -1"),
        (lambda store: store.prefill([[1]], [2], 1.5), "ratio: it is a share of the tokens, 0 to 1, not 1.5"),
        (lambda store: store.prefill([[1]], [2], "all"), "ratio: it is a share of the tokens, 0 to 1, not 'all'"),
        (
            lambda store: ChunkStore(Generator(store.stepper)),
            "stepper: it is what tilewright.stepper(model, tokens) gives, or",
        ),
        (
            lambda store: ChunkStore(store.stepper, 0.15),
            "reuse: it is how chunks are read, such as",
        ),
        (lambda _: ChunkReuse("15%"), "ratio: it is a share of the tokens, 0 to 1, not '15%'"),
        (lambda _: ChunkReuse(rank=1.5), "rank: it is a count from 1 on, not 1.5"),
        (lambda _: PromptLookup(drafts=1.5), "drafts: it is a count from 1 on, not 1.5"),
        (lambda _: PromptLookup(ngram="3"), "ngram: it is a count from 1 on, not '3'"),
    ],
)
def test_what_chunks_and_drafts_cannot_be(store: ChunkStore, ask: Callable[[ChunkStore], Any], said: str) -> None:
    refused(lambda: ask(store), said)


def test_examples_may_come_one_by_one(store: ChunkStore) -> None:
    example = ([[1, 2, 3], [4, 5, 6]], [7])
    assert store.ratio_within(0.0, iter([example])) == store.ratio_within(0.0, [example]) > 0


def of_transformers(kind: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 12, "num_hidden_layers": 1}
    more = {"opt": {"ffn_dim": 8, "word_embed_proj_dim": 8}, "llama": {"intermediate_size": 8}}.get(kind, {})
    config = transformers.AutoConfig.for_model(kind, **sizes, **more, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_are_so_many(kind: str) -> None:
    refused(lambda: Generator(of_transformers(kind), max_length=16), "has 12 positions, and fails on a text of 16 tokens (index")


def test_positions_that_are_computed_are_as_many_as_one_likes() -> None:
    assert Generator(of_transformers("llama"), max_length=16).stepper.max_length == 16


def test_a_model_that_fails_otherwise_says_so_itself() -> None:
    with pytest.raises(ModelFails, match="it is broken"):
        Generator(Broken(), max_length=4)


class Broken(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise ValueError("it is broken")
