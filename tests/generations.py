"""What a `Generator` does in one call: features as data, and what came of each pair of them on a small decoder.

`python tests/compositions.py` writes docs/composition.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from interpreted import LENGTH, VOCAB, decoder, interpreted
from matrices import EXACT, Outcome
from tilewright.driver import generate
from tilewright.driver.chunks import ChunkReuse
from tilewright.driver.errors import BadOption
from tilewright.driver.generate import Generator
from tilewright.driver.prefixes import PrefixStore
from tilewright.driver.sampling import Sampler

NEW = 10
"""Tokens of a text."""


@dataclass(frozen=True)
class Feature:
    """wants: settings by name, of which a generator has one each. bounded: by how much it may move logits, relative; None where it is
    exact. asks: it says what text is wanted, not how it is computed. used: whether a generator did it."""

    wants: Mapping[str, Any]
    bounded: float | None = None
    asks: bool = False
    used: Callable[[Generator], bool] = lambda made: True


def _copied(made: Generator) -> bool:
    return made.prefixes is not None and made.prefixes.counts.hits > 0


def _loaded(made: Generator) -> bool:
    return made.prefixes is not None and made.prefixes.counts.loaded > 0


def _turned(made: Generator) -> bool:
    return made.documents is not None and made.documents.counts.hits > 0


FEATURES: dict[str, Feature] = {
    "prompts of any lengths": Feature({"prompts": "ragged"}, asks=True),
    "drawn, seeded": Feature({"do_sample": True}, asks=True),
    "prompts in chunks": Feature({"chunk": 4}),
    "drafts": Feature({"prompt_lookup_num_tokens": 3}, used=lambda made: made.statistics.accepted > 0),
    "prefix store": Feature({"prefixes": "in memory"}, used=_copied),
    "prefix store, spilled": Feature({"prefixes": "on disk"}, used=_loaded),
    "documents": Feature({"documents": True}, 0.007, used=_turned),
    "low-rank keys": Feature({"documents": True, "rank": 3}, 0.01, used=_turned),
    "keys and values, bf16": Feature({"kv": "bf16"}, 0.0004),
    "keys and values, int8": Feature({"kv": "int8"}, 0.001),
    "keys and values, int4": Feature({"kv": "int4"}, 0.015),
    "weights, int8": Feature({"plan": "int8"}, 0.012),
    "weights, int4": Feature({"plan": "int4-g32"}, 0.18),
}
"""What is asked, what reads and drafts, what keeps, what is kept and in which format."""


# -- texts


def _texts(*lengths: int) -> list[list[int]]:
    made = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCAB, (n,), generator=made).tolist() for n in lengths]


DOCUMENTS, QUESTIONS = _texts(8, 6, 7), _texts(5, 2, 9)


@cache
def _exact(text: tuple[int, ...]) -> torch.Tensor:
    return decoder()(torch.tensor([text]))[0, -1]


@dataclass
class Heard:
    """What tokens were chosen from: squares of what logits were off, and of what they are."""

    off: float = 0.0
    whole: float = 0.0
    texts: list[list[list[int]]] = field(default_factory=list)

    def choose(self, logits: torch.Tensor, text: list[int]) -> None:
        exact = _exact(tuple(text))
        self.off += float((logits - exact).square().sum())
        self.whole += float(exact.square().sum())

    @property
    def error(self) -> float:
        return (self.off / self.whole) ** 0.5


# -- pairs


class Refused(Exception):
    """Features that do not go together, and why."""


def single(name: str) -> Outcome:
    return _outcome((name,))


def pair(first: str, second: str) -> Outcome:
    return _outcome((first, second))


@cache
def _outcome(names: tuple[str, ...]) -> Outcome:
    """Raises AssertionError where a feature was not used, or an exact one changed a text."""
    try:
        heard, made = _done(names)
    except (BadOption, Refused) as why:
        return Outcome(refused=str(why))
    unused = [name for name in names if not FEATURES[name].used(made)]
    assert not unused, f"{unused} did nothing in {names}"
    bounded = tuple(name for name in names if FEATURES[name].asks or FEATURES[name].bounded is not None)
    assert bounded == names or heard.texts == _done(bounded)[0].texts, f"{names} are to write what {bounded} write"
    allowed = sum(FEATURES[name].bounded or 0.0 for name in names) or EXACT
    return Outcome(heard.error, allowed)


@cache
def _done(names: tuple[str, ...]) -> tuple[Heard, Generator]:
    """What a generator with these features wrote, and the generator. Raises Refused, BadOption."""
    wants = dict[str, Any]()
    for name in names:
        for what, value in FEATURES[name].wants.items():
            if wants.setdefault(what, value) != value:
                raise Refused(f"a generator has one `{what}`")
    heard = Heard()

    class Hearing(Sampler):
        def choose(self, logits: torch.Tensor, text: Any) -> int:
            heard.choose(logits, text)
            return super().choose(logits, text)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Sampler", Hearing)
        made = _generator(wants, folder)
        for documents in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS):
            heard.texts.append(_written(made, wants, documents))
    return heard, made


def _generator(wants: Mapping[str, Any], folder: str) -> Generator:
    plan = wants.get("plan")
    steps = interpreted(wants.get("kv", "same"), plan, torch.float64 if plan is None else torch.float32)
    text = sum(t.nbytes for t in steps.state(1).tensors) / LENGTH * (sum(map(len, DOCUMENTS)) + max(map(len, QUESTIONS)) + NEW)
    prefixes = {"in memory": lambda: PrefixStore(100 * text), "on disk": lambda: PrefixStore(1.2 * text, folder)}
    return Generator(
        steps,
        chunk=wants.get("chunk", LENGTH),
        prefixes=prefixes[wants["prefixes"]]() if "prefixes" in wants else None,
        documents=ChunkReuse(0.3, rank=wants.get("rank")) if "documents" in wants else None,
    )


def _written(made: Generator, wants: Mapping[str, Any], documents: list[list[int]]) -> list[list[int]]:
    """The new tokens of each row; documents are the beginning of the prompt where nobody wants to read them otherwise."""
    questions = QUESTIONS if "prompts" in wants else QUESTIONS[:1]
    each = [documents, documents[:2], documents[:1]][: len(questions)]
    options = {name: wants[name] for name in ("do_sample", "prompt_lookup_num_tokens") if name in wants}
    if "documents" in wants:
        prompts, options["documents"] = questions, each
    else:
        prompts = [sum(texts, []) + question for texts, question in zip(each, questions)]
    text = made.generate(prompts, max_new_tokens=NEW, max_matching_ngram_size=1, seed=1, temperature=0.1, **options)
    return text[:, -NEW:].tolist()
