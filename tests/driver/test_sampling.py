"""Distributions are those of transformers' processors, draws follow them, and nonsense is refused."""

from __future__ import annotations

import pytest
import torch
from tilewright.driver.errors import BadOption
from tilewright.driver.sampling import NoDistribution, Sampler, Sampling, distribution, penalized, seeds_of

VOCAB = 40
SETTINGS = [
    Sampling(do_sample=True),
    Sampling(do_sample=True, temperature=0.5),
    Sampling(do_sample=True, top_k=5),
    Sampling(do_sample=True, top_k=1),
    Sampling(do_sample=True, top_k=1000),
    Sampling(do_sample=True, top_p=0.6),
    Sampling(do_sample=True, top_p=0.0),
    Sampling(do_sample=True, min_p=0.2),
    Sampling(do_sample=True, repetition_penalty=1.7),
    Sampling(do_sample=True, temperature=1.5, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
]


def full(logits: torch.Tensor, sampling: Sampling, text: list[int]) -> torch.Tensor:
    """The probability of every token."""
    ids, probabilities = distribution(logits, sampling, text)
    return torch.zeros(len(logits)).index_put((ids,), probabilities)


def of_transformers(logits: torch.Tensor, sampling: Sampling, text: list[int]) -> torch.Tensor:
    from transformers.generation import logits_process as of

    steps = [
        of.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)),
        of.TemperatureLogitsWarper(float(sampling.temperature)),
    ]
    steps += [of.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [of.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [of.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = logits[None]
    for step in steps:
        scores = step(torch.tensor([text]), scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(sampling: Sampling) -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(VOCAB, generator=random) * 3
        text = torch.randint(VOCAB, (7,), generator=random).tolist()
        torch.testing.assert_close(full(logits, sampling, text), of_transformers(logits, sampling, text), rtol=1e-6, atol=1e-7)


def test_equal_logits_at_the_border_of_top_k_all_stay() -> None:
    probabilities = full(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), Sampling(do_sample=True, top_k=2), [])
    assert (probabilities > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[-1]], ids=["plain", "all"])
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits, text, count = torch.linspace(-2, 2, 12), [3, 4], 20_000
    expected = full(logits, sampling, text).double()
    sampler = Sampler(sampling, 1)
    drawn = torch.tensor([sampler.choose(logits, text) for _ in range(count)]).bincount(minlength=12)
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    chi_square = ((drawn - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert chi_square < 40, f"{chi_square:.1f}, for {int(possible.sum()) - 1} degrees of freedom: a chance of 1 in 10^4 at most"


def test_greedy_takes_the_likeliest_and_hears_only_the_penalty() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert Sampler(Sampling(temperature=9.0, top_k=1), 0).choose(logits, []) == 1
    assert Sampler(Sampling(repetition_penalty=2.0), 0).choose(logits, [1, 1]) == 2
    assert torch.equal(logits, torch.tensor([0.0, 3.0, 2.9])), "the model's logits stay as they are"


def test_the_penalty_makes_negative_logits_smaller_too() -> None:
    assert penalized(torch.tensor([-1.0, 1.0, 1.0]), Sampling(repetition_penalty=2.0), [0, 1]).tolist() == [-2.0, 0.5, 1.0]


def test_half_precision_logits_are_read_in_single() -> None:
    logits = torch.linspace(-3, 3, VOCAB).bfloat16()
    assert distribution(logits, SETTINGS[-1], [])[1].dtype == torch.float32


def test_the_same_seed_draws_the_same_and_others_other() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(SETTINGS[0], seed)
        return [sampler.choose(torch.zeros(1000), []) for _ in range(8)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert seeds_of(7, 3) == [7, 8, 9] and seeds_of(2**63 - 1, 2) == [2**63 - 1, 0]
    torch.manual_seed(0)
    first = seeds_of(None, 2)
    torch.manual_seed(0)
    assert seeds_of(None, 2) == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", SETTINGS[:6:5], ids=str)
def test_nothing_is_drawn_from_what_is_no_distribution(bad: float, sampling: Sampling) -> None:
    with pytest.raises(NoDistribution, match="after 2 tokens"):
        Sampler(sampling, 0).choose(torch.tensor([0.0, bad, 1.0]), [0, 1])
    with pytest.raises(NoDistribution):
        Sampler(sampling, 0).choose(torch.full((4,), float("-inf")), [0, 1])


def test_tokens_that_cannot_come_do_not_come() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf")])
    assert {Sampler(SETTINGS[0], seed).choose(logits, []) for seed in range(50)} == {1}


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 0.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0)],
)
def test_what_cannot_be_meant_is_refused(name: str, value: float) -> None:
    with pytest.raises(BadOption, match=name):
        Sampling(**{name: value})
