"""Speculation by prompt lookup: the text often goes on as it did before. What followed the last few tokens earlier is drafted, the model
computes all drafts in one step, and those that it would have chosen itself are kept.

Nothing has to be undone in the model's state: what was written for refused drafts lies behind the position, is never read, and is
written over by the next step.

After the ideas of prompt lookup decoding and CopySpec. There, a draft that is drawn with probability p(t) may count only where p(t) = 1,
which is right for greedy decoding alone; here `accepted` keeps every distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .meant import COUNT, check
from .sampling import Sampler

_LONGEST_REST = 32
"""Tokens for which no draft is made, at most, after drafts that were all refused."""


@dataclass(frozen=True)
class PromptLookup:
    """drafts: tokens that one step verifies at most, beside the one it computes anyway. ngram: how many last tokens must be the same."""

    drafts: int = 7
    ngram: int = 3

    def __post_init__(self) -> None:
        """Raises BadOption for what cannot be meant."""
        check({"drafts": COUNT, "ngram": COUNT}, vars(self))


class Lookup:
    """The text of one row, and where each of its n-grams was last followed by something.

    Keys are the tokens themselves, and a dict compares them: two n-grams of one hash are not mistaken for each other.
    """

    def __init__(self, options: PromptLookup, text: Sequence[int] = ()) -> None:
        self.options = options
        self._text: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        self._rest, self._misses = 0, 0
        self.extend(text)

    def extend(self, tokens: Sequence[int]) -> None:
        n = self.options.ngram
        for token in tokens:
            if len(self._text) >= n:
                self._follows[tuple(self._text[-n:])] = len(self._text)
            self._text.append(token)

    def draft(self, most: int) -> list[int]:
        """What followed when the last tokens stood there before, at most so many; empty where they did not, or while it rests.

        Where that place is so near that the copy reaches the end of the text, it copies itself: a period goes on.
        """
        if self._rest > 0:
            self._rest -= 1
            return []
        start = self._follows.get(tuple(self._text[-self.options.ngram :]))
        if start is None:
            return []
        drafted = list[int]()
        for i in range(start, start + min(most, self.options.drafts)):
            drafted.append(self._text[i] if i < len(self._text) else drafted[i - len(self._text)])
        return drafted

    def learn(self, drafted: int, kept: int) -> None:
        """After drafts that were all refused it rests, each time twice as long: verifying costs more than a step of one token."""
        if drafted == 0:
            return
        self._misses = 0 if kept else self._misses + 1
        self._rest = min(2**self._misses // 2, _LONGEST_REST)


def accepted(logits: torch.Tensor, drafted: Sequence[int], sampler: Sampler, text: Sequence[int]) -> list[int]:
    """The tokens that come after `text`: the drafts that are right, and one more. logits [1 + drafts, vocabulary]: the first are those
    after `text`, each next those after one more draft.

    At each place a token is drawn as without drafts; if it is the draft t, the next logits hold, if not, the rest of the drafts are void,
    and the token that was drawn stands. So t is kept with probability p(t), and any other token x comes with p(x) = (1 - p(t)) times
    its probability in p without t, renormalised: the rule of speculative sampling for drafts that are certain. And as the same random
    numbers are used in the same order, what is drawn is token for token what would have been drawn without drafts.
    """
    text, tokens = list(text), list[int]()
    for i in range(len(drafted) + 1):
        tokens.append(sampler.choose(logits[i], text))
        text.append(tokens[-1])
        if i == len(drafted) or tokens[-1] != drafted[i]:
            break
    return tokens
