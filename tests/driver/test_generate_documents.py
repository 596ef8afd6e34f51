"""Generating from documents: with all of them computed anew as from one long prompt, with less what their store reads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from interpreted import LENGTH, VOCAB, decoder, interpreted
from steppers import Attends, greedy
from tilewright.driver.chunks import ChunkReuse
from tilewright.driver.errors import BadOption
from tilewright.driver.generate import Generator
from tilewright.driver.prefixes import PrefixStore
from tilewright.driver.speculation import PromptLookup

DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 5}


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=made).tolist() for n in lengths]


DOCUMENTS, QUESTIONS = texts(8, 6, 7), texts(5, 2, 3, seed=1)
EACH = [DOCUMENTS, DOCUMENTS[:1], DOCUMENTS[::-1]]


def reading(ratio: float, **options: Any) -> Generator:
    return Generator(interpreted(), documents=ChunkReuse(ratio), **options)


@pytest.mark.parametrize("options", [{}, DRAWN, {"repetition_penalty": 1.4}, {"eos_token_id": [3, 4], "pad_token_id": 0}], ids=str)
@pytest.mark.parametrize("speculation", [None, PromptLookup(4, 1)], ids=["", "drafts"])
def test_all_computed_anew_is_the_text_of_one_long_prompt(options: dict[str, Any], speculation: PromptLookup | None) -> None:
    options = {"max_new_tokens": 12, **options}
    long = [sum(documents, []) + question for documents, question in zip(EACH, QUESTIONS)]
    new = Generator(interpreted()).generate(long, **options)[:, max(map(len, long)) :]
    generator = reading(1.0, speculation=speculation)
    assert torch.equal(generator.generate(QUESTIONS, documents=EACH, **options)[:, max(map(len, QUESTIONS)) :], new)
    assert (generator.last.reused, generator.last.computed) == (0, sum(map(len, long)))
    assert speculation is None or generator.last.drafted > 0, "what the documents say is drafted, too"


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_each_row_gets_what_the_store_reads(ratio: float) -> None:
    generator = reading(ratio, chunk=3)
    alone = [list(generator.stream(q, documents=d, max_new_tokens=6)) for q, d in zip(QUESTIONS, EACH)]
    for question, documents, made in zip(QUESTIONS, EACH, alone):
        read, steps = generator.documents.prefill(documents, question), generator.stepper
        logits, at = read.logits, read.position
        for token in made:
            assert token == int(logits.argmax())
            logits, at = steps.step(torch.tensor([[token]]), at, read.state)[:, -1], at + 1
    together = generator.generate(QUESTIONS, documents=EACH, max_new_tokens=6)
    assert together[:, -6:].tolist() == alone
    assert together[:, :-6].tolist() == [[0] * (5 - len(q)) + q for q in QUESTIONS], "the questions, without documents"


def test_what_was_done_is_counted() -> None:
    generator = reading(0.25)
    generator.generate(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=1)
    assert (generator.last.reused, generator.last.computed) == (0, 26), "new chunks are computed"
    generator.generate(QUESTIONS[0], documents=DOCUMENTS[::-1], max_new_tokens=1)
    assert (generator.last.reused, generator.last.computed) == (21 - 6, 6 + 5)
    generator.generate(QUESTIONS[0], documents=[DOCUMENTS[1], DOCUMENTS[1]], max_new_tokens=1)
    assert (generator.last.reused, generator.last.computed) == (12 - 3, 3 + 5)
    counts = generator.documents.counts
    assert (counts.hits, counts.misses, counts.reused, counts.computed) == (5, 3, 15 + 9, 21 + 6 + 3)


def test_a_talk_about_documents_goes_on_where_it_was() -> None:
    generator = reading(0.3, prefixes=PrefixStore(1e7))
    first = generator.generate(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=4)[0].tolist()
    follow_up = first + [1, 2]
    again = generator.generate(follow_up, documents=DOCUMENTS, max_new_tokens=6)
    assert (generator.last.reused, generator.last.computed) == (21 + len(first) - 1, 3)
    assert torch.equal(again, reading(0.3).generate(follow_up, documents=DOCUMENTS, max_new_tokens=6))


def test_documents_that_are_asked_for_once_leave_nothing_behind() -> None:
    store = PrefixStore(30_000)  # the state of about one text
    generator = reading(0.3, prefixes=store)
    for documents in itertools.permutations(DOCUMENTS):
        generator.generate(QUESTIONS[0], documents=documents, max_new_tokens=2)
    assert store.counts.evicted >= 4 and len(store._roots) <= 2


def test_what_was_reused_of_documents_is_never_taken_for_what_the_model_computes() -> None:
    generator = reading(0.0, prefixes=PrefixStore(1e7))
    long = sum(DOCUMENTS, []) + QUESTIONS[0]
    generator.generate(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=8)
    assert list(generator.stream(long, max_new_tokens=8)) == greedy(decoder(), long, 8)
    assert generator.last.reused == 0
    generator.documents.ratio = 1.0
    assert list(generator.stream(QUESTIONS[0], documents=DOCUMENTS, max_new_tokens=8)) == greedy(decoder(), long, 8)
    assert generator.last.reused == len(long) - 1, "with all computed anew they are the same"


def test_documents_are_for_all_prompts_or_for_each_and_of_any_kind() -> None:
    generator, options = reading(0.3), {"max_new_tokens": 4}
    expected = generator.generate(QUESTIONS, documents=[DOCUMENTS] * 3, **options)
    tensors = [torch.tensor(d, dtype=torch.int32) for d in DOCUMENTS]
    for documents in (DOCUMENTS, tuple(tensors), [[], *DOCUMENTS], [tensors] * 3):
        assert torch.equal(generator.generate(QUESTIONS, documents=documents, **options), expected)
    twice = generator.generate(QUESTIONS[:1], documents=EACH[:1], num_return_sequences=2, **options)
    assert twice[:, -4:].tolist() == [expected[0, -4:].tolist()] * 2
    plain = Generator(interpreted()).generate(QUESTIONS, **options)
    for nothing in ([], None, [[]], [[], [], []]):
        assert torch.equal(generator.generate(QUESTIONS, documents=nothing, **options), plain)


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([1, 2], "a list of texts, each of token ids"),
        (torch.tensor([1, 2]), "a list of texts, each of token ids"),
        ([[[1]], [[2]]], "lists of them for 2 prompts, and 1 prompts"),
        ([[1, VOCAB]], f"documents: there is no token {VOCAB}"),
        ([torch.tensor([0.5])], r"documents: they are token ids, which are whole numbers, not torch.float32 of shape \[1\]"),
        ([[1] * LENGTH], f"{LENGTH + 5} tokens of a prompt|there is no room for a new token"),
    ],
)
def test_what_are_no_documents_is_refused(documents: Any, said: str) -> None:
    for ask in (reading(0.3).generate, reading(0.3).stream):
        with pytest.raises(BadOption, match=said):
            ask(QUESTIONS[0], documents=documents)


def test_who_cannot_read_documents_says_so() -> None:
    with pytest.raises(BadOption, match=r"documents: say how they are read: Generator\(.*ChunkReuse"):
        Generator(interpreted()).generate(QUESTIONS, documents=DOCUMENTS)
    with pytest.raises(BadOption, match="documents: Attends has no graph that says how keys are turned"):
        Generator(Attends(), documents=ChunkReuse())
    with pytest.raises(BadOption, match="kv: chunks are blended into keys and values kept as computed, not as int8"):
        Generator(interpreted("int8"), documents=ChunkReuse())
