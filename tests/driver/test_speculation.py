"""Drafts change how fast a text comes, never the text: greedy or drawn, nor how tokens are distributed."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steppers import Attends, Rerun
from tilewright.driver.errors import BadOption
from tilewright.driver.generate import Generator
from tilewright.driver.sampling import Sampler, Sampling
from tilewright.driver.speculation import Lookup, PromptLookup, accepted

DRAWN = Sampling(do_sample=True)


def test_what_followed_the_last_tokens_is_drafted() -> None:
    lookup = Lookup(PromptLookup(drafts=4, ngram=2), [1, 2, 3, 4, 5, 1, 2])
    assert lookup.draft(9) == [3, 4, 5, 1]
    assert lookup.draft(2) == [3, 4] and lookup.draft(0) == []
    lookup.extend([9])
    assert lookup.draft(9) == [], "2 9 is new"


def test_the_last_place_counts_and_a_period_goes_on() -> None:
    assert Lookup(PromptLookup(drafts=3, ngram=1), [1, 2, 1, 3, 1]).draft(9) == [3, 1, 3]
    assert Lookup(PromptLookup(drafts=5, ngram=2), [7, 7, 7]).draft(9) == [7] * 5


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(0, 6))
def test_drafts_are_what_a_search_of_the_text_finds(text: list[int], ngram: int, most: int) -> None:
    starts = [i for i in range(ngram, len(text)) if text[i - ngram : i] == text[-ngram:]]
    expected = list(text)
    for i in range(most if starts else 0):
        expected.append(expected[starts[-1] + i])
    assert Lookup(PromptLookup(8, ngram), text).draft(most) == expected[len(text) :]


def test_after_refused_drafts_it_rests_longer_and_longer() -> None:
    lookup, drafts = Lookup(PromptLookup(drafts=2, ngram=1), [1, 1, 1]), list[bool]()
    for _ in range(200):
        drafted = lookup.draft(9)
        drafts.append(bool(drafted))
        lookup.learn(len(drafted), 0)
    at = [i for i, made in enumerate(drafts) if made]
    assert [b - a - 1 for a, b in zip(at, at[1:])][:7] == [1, 2, 4, 8, 16, 32, 32]
    while not (drafted := lookup.draft(9)):
        pass
    lookup.learn(len(drafted), 1)
    assert lookup.draft(9), "a draft that is right wakes it"


def test_drafts_are_accepted_up_to_the_first_that_is_wrong() -> None:
    logits = torch.eye(6)[[3, 4, 5, 1]]
    assert accepted(logits, [3, 4, 5], Sampler(Sampling(), 0), [0]) == [3, 4, 5, 1]
    assert accepted(logits, [3, 0, 5], Sampler(Sampling(), 0), [0]) == [3, 4]
    assert accepted(logits, [2, 4, 5], Sampler(Sampling(), 0), [0]) == [3], "the first draft is verified, too"
    assert accepted(logits[:1], [], Sampler(Sampling(), 0), [0]) == [3]


def test_each_place_hears_the_text_with_the_drafts_before_it() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9], [0.0, 2.0, 1.9]])
    assert accepted(logits, [1], Sampler(Sampling(repetition_penalty=2.0), 0), [0]) == [1, 2]


@pytest.mark.parametrize("draft", [0, 1, 2])
def test_tokens_keep_their_distribution_whatever_is_drafted(draft: int) -> None:
    """Drawing anew from p after a refusal would give (.75, .15, .10) for draft 0; accepting what has probability 1 would accept nothing."""
    expected, count = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 20_000
    logits, sampler = expected.log().float().repeat(2, 1), Sampler(DRAWN, 3)
    firsts, seconds = torch.zeros(3), torch.zeros(3)
    for _ in range(count):
        tokens = accepted(logits, [draft], sampler, [])
        firsts[tokens[0]] += 1
        if len(tokens) == 2:
            seconds[tokens[1]] += 1
    assert seconds.sum() == firsts[draft], "p(t) of all drafts t are kept"
    for counted in (firsts, seconds):
        total = counted.sum()
        assert ((counted - total * expected) ** 2 / (total * expected)).sum() < 18.4, "a chance of 1 in 10^4"


def test_a_text_is_the_same_with_and_without_drafts() -> None:
    """On prompts that repeat themselves, so that there is much to draft, and with a model that often does."""
    model = Attends(vocab=6, length=48, seed=3)
    plain, drafting = Generator(model), Generator(model, speculation=PromptLookup(drafts=5, ngram=2))
    numbers = random.Random(0)
    for seed in range(150):
        prompts = [numbers.choices(range(6), k=numbers.randint(1, 4)) * numbers.randint(1, 3) for _ in range(2)]
        options = {"max_new_tokens": 30, "do_sample": seed % 2 == 1, "temperature": 0.4, "seed": seed, "eos_token_id": seed % 3 or None}
        assert torch.equal(drafting.generate(prompts, **options), plain.generate(prompts, **options))
    counts = drafting.statistics
    assert 0 < counts.accepted < counts.drafted and counts.steps < plain.statistics.steps
    assert counts.generated == plain.statistics.generated and plain.statistics.drafted == 0


def test_a_predictable_text_takes_few_steps() -> None:
    def counts_on(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((tokens + 1) % 5, 5).float()

    stepper = Rerun(counts_on, max_length=100, vocab=5)
    generator = Generator(stepper, speculation=PromptLookup(drafts=7, ngram=3))
    text = generator.generate([[0, 1, 2, 3, 4, 0, 1, 2]], max_new_tokens=92)[0].tolist()
    assert text == [i % 5 for i in range(100)]
    assert generator.last.steps == 12
    assert "79 of 80 drafts accepted" in str(generator.last), "there was no more place for the last"


@pytest.mark.parametrize("options", [{"drafts": 0}, {"ngram": 0}])
def test_what_cannot_be_meant_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(BadOption, match=next(iter(options))):
        PromptLookup(**options)
