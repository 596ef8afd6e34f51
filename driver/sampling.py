"""How the next token is chosen: the likeliest, or drawn at a temperature from the top k, the top p, or what is not far below the best.

Settings mean what they mean in `transformers`, and apply in the same order, so that distributions are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ir.errors import TilewrightError
from .errors import BadOption


class NoDistribution(TilewrightError):
    template = "no token can be drawn after {count} tokens: the model's logits there hold NaN or infinity"


_RANGES = {
    "temperature": (lambda t: t > 0, "it is a number above 0; do_sample=False takes the likeliest token"),
    "top_k": (lambda k: k >= 0, "it is a count of tokens; 0 keeps all"),
    "top_p": (lambda p: 0 <= p <= 1, "it is a probability from 0 to 1; 1 keeps all"),
    "min_p": (lambda p: 0 <= p <= 1, "it is a share of the largest probability, from 0 to 1; 0 keeps all"),
    "repetition_penalty": (lambda r: r > 0, "it is a factor above 0; 1 changes nothing"),
}


@dataclass(frozen=True)
class Sampling:
    """do_sample: draw, where False takes the likeliest token and only the penalty counts.

    temperature: logits are divided by it. top_k: the k largest logits stay, with those that equal the k-th. top_p: the likeliest tokens
    stay whose probabilities reach it. min_p: what is less likely than this share of the likeliest goes. repetition_penalty: logits of
    tokens that stand in the text are divided by it where they are positive, and multiplied where negative.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises BadOption for what cannot be meant."""
        for name, (fine, reason) in _RANGES.items():
            value = getattr(self, name)
            if not fine(value):
                raise BadOption(option=name, reason=f"{reason}, not {value!r}")


class Sampler:
    """Chooses the tokens of one row. Takes one random number per token, so what is drawn depends on the seed and the row's text alone:
    not on other rows of the batch, nor on what was drafted."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling = sampling
        self.random = torch.Generator().manual_seed(seed)

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> int:
        """The token after `text`, from its logits [vocabulary]. Raises NoDistribution."""
        if not self.sampling.do_sample:
            return int(penalized(logits, self.sampling, text).argmax())
        if not logits.max().isfinite():
            raise NoDistribution(count=len(text))
        ids, probabilities = distribution(logits, self.sampling, text)
        cumulated = probabilities.double().cumsum(0)
        drawn = torch.rand((), dtype=torch.float64, generator=self.random).item() * float(cumulated[-1])
        # the first token whose sum lies above what was drawn: never one of probability 0
        at = int(torch.searchsorted(cumulated, drawn, right=True))
        return int(ids[min(at, len(ids) - 1)])


def distribution(logits: torch.Tensor, sampling: Sampling, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may follow `text`, and their probabilities, which add up to 1."""
    scores = penalized(logits, sampling, text) / sampling.temperature
    ids = torch.arange(len(scores), device=scores.device)
    if 0 < sampling.top_k < len(scores):
        kept = scores >= scores.topk(sampling.top_k).values[-1]
        ids, scores = ids[kept], scores[kept]
    if sampling.top_p < 1:
        scores, by_score = scores.sort()
        kept = scores.softmax(0).cumsum(0) > 1 - sampling.top_p
        kept[-1] = True
        ids, scores = ids[by_score][kept], scores[kept]
    probabilities = scores.softmax(0)
    if sampling.min_p > 0:
        kept = probabilities >= sampling.min_p * probabilities.max()
        ids, probabilities = ids[kept], scores[kept].softmax(0)
    return ids, probabilities


def penalized(logits: torch.Tensor, sampling: Sampling, text: Sequence[int]) -> torch.Tensor:
    """Logits in fp32, those of tokens in the text made smaller."""
    scores = logits.float()
    if sampling.repetition_penalty == 1:
        return scores
    seen = torch.tensor(sorted(set(text)), dtype=torch.int64, device=scores.device)
    at = scores[seen]
    penalty = sampling.repetition_penalty
    return scores.index_put((seen,), torch.where(at < 0, at * penalty, at / penalty))


def seeds_of(seed: int | None, count: int) -> list[int]:
    """One for each row; without a seed they come from torch's own numbers, which `torch.manual_seed` seeds."""
    first = int(torch.randint(2**62, ())) if seed is None else seed
    return [(first + i) % 2**63 for i in range(count)]
