"""`ChunkStore`: what a model computed for pieces of text, for use wherever they stand in later ones.

    generator = Generator(model, max_length=2048, documents=ChunkReuse(ratio=0.15))
    generator.generate(question, documents=[document, another])

A prefix store (`prefixes.py`) needs texts that begin alike. Here each chunk is computed once, on its own; in a text, its keys are turned
to where it stands now (they are kept before RoPE), and the tokens whose values differ most from what they are in this text are computed
anew (`passes/blend_kv.py`). With ratio 1 all of them are, and the result is exact; with ratio 0 none, which is exact for models that were
trained to read blocks on their own (Block-Attention, arXiv:2409.15355).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..passes.blend_kv import Blending, blending
from ..passes.reuse_kv import CannotDerive
from .budget import quantity
from .errors import BadOption
from .meant import COUNT, NUMBER, TEXTS, Meaning, check, text_of
from .stepping import OutOfPlace, State, Step, Stepper, size_class

Tokens = Sequence[int] | torch.Tensor
RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Shares of the tokens that `ratio_within` tries."""


_MEANT = {
    "ratio": Meaning(lambda r: NUMBER.fine(r) and 0 <= r <= 1, "a share of the tokens, 0 to 1"),
    "max_error": Meaning(lambda e: NUMBER.fine(e) and e >= 0, "a number, such as 0.02: the norm of what is off by that of the logits"),
    "rank": replace(COUNT, optional=True),
    "stepper": Meaning(lambda s: isinstance(s, Stepper), "what tilewright.stepper(model, tokens) gives, or generator.stepper"),
    "reuse": Meaning(lambda r: isinstance(r, ChunkReuse), "how chunks are read, such as tilewright.ChunkReuse(ratio=0.15)"),
    "chunks": TEXTS,
}
"""What can be meant by what is given here."""


@dataclass(frozen=True)
class ChunkReuse:
    """ratio: the share of the tokens of chunks that is computed anew. memory: what chunks may take, the least recently used go first. rank:
    of the matrix that the keys of a chunk and a layer are kept as, before RoPE, where that is smaller (ShadowKV, arXiv:2410.21465); None
    keeps them as they are."""

    ratio: float = 0.15
    memory: str | float = "1GB"
    rank: int | None = None

    def __post_init__(self) -> None:
        """Raises BadOption for what cannot be meant."""
        check(_MEANT, vars(self))
        quantity("memory", self.memory, math.inf)


@dataclass
class ChunkCounts:
    """Chunks that were found and that were computed; their tokens that were taken as they are kept, and that were computed, for the first
    time or anew; chunks that went."""

    hits: int = 0
    misses: int = 0
    reused: int = 0
    computed: int = 0
    evicted: int = 0


@dataclass(frozen=True)
class Filled:
    """known: how many tokens a state holds now. computed: how many of those were computed, for the first time or anew. recomputed: the
    positions of what is computed anew, by the caller where the state holds nothing."""

    known: int
    computed: int
    recomputed: torch.Tensor


@dataclass(frozen=True)
class Read:
    """A text that was read. logits [1, vocab]: of the token after it; state, position i64[1]: to go on from. recomputed: the positions of
    its chunks that were computed anew."""

    logits: torch.Tensor
    state: State
    position: torch.Tensor
    recomputed: torch.Tensor


@dataclass(frozen=True)
class _Factors:
    """Keys [1, h, n, d] of a chunk as left [n, r] @ right [r, h * d]."""

    left: torch.Tensor
    right: torch.Tensor
    shape: torch.Size

    def whole(self) -> torch.Tensor:
        return (self.left @ self.right).unflatten(1, (self.shape[1], self.shape[3])).transpose(0, 1)[None]


@dataclass
class _Programs:
    """For one number of tokens; compiled when first asked for."""

    graphs: Blending
    made: dict[str, Step] = field(default_factory=dict)


class ChunkStore:
    """stepper: of a model whose positions enter by RoPE or by masks. ratio: as in `ChunkReuse`; what is kept holds for any.

    Raises CannotBlend where positions enter otherwise, CannotDerive, BadOption.
    """

    def __init__(self, stepper: Stepper, reuse: ChunkReuse = ChunkReuse()) -> None:
        check(_MEANT, {"stepper": stepper, "reuse": reuse})
        if stepper.kv != "same":
            raise BadOption(option="kv", reason=f"chunks are blended into keys and values kept as computed, not as {stepper.kv}")
        self.stepper, self.ratio, self.rank = stepper, reuse.ratio, reuse.rank
        self.most_bytes = quantity("memory", reuse.memory, math.inf) or 0.0
        self.counts, self.nbytes = ChunkCounts(), 0
        self._sizes: dict[int, _Programs] = {}
        self._chunks: OrderedDict[tuple[int, ...], list[torch.Tensor | _Factors]] = OrderedDict()
        if stepper.state(1).given:
            raise CannotDerive(model=stepper.graph.name, reason="what it computes of other inputs is not part of a chunk")
        self._graphs(1)

    def prefill(self, chunks: Sequence[Tokens], question: Tokens, ratio: float | None = None) -> Read:
        """Chunks one after the other and a question behind them, which is always computed. Raises OutOfPlace where they are too long."""
        ratio = self.ratio if ratio is None else ratio
        check(_MEANT, {"chunks": chunks, "ratio": ratio})
        texts, asked = [self._text("chunks", c) for c in chunks], self._text("question", question)
        if not len(asked):
            raise BadOption(option="question", reason="it has no tokens: nothing says what to compute")
        text = torch.cat([*texts, asked])
        if len(text) > self.stepper.max_length:
            raise OutOfPlace(count=len(text), position=0, most=self.stepper.max_length)
        state = self.stepper.state(1)
        if ratio != 1:
            state.expect(len(text) - len(asked))
        filled = self.fill(texts, state, ratio)
        left = text[None, filled.known :]
        ends = torch.tensor([[filled.known], [left.shape[1] - 1], [len(text)]])
        left, (start, last, position) = (x.to(state.tensors[0].device) for x in (left, ends))
        return Read(self.stepper.last(left, start, last, state), state, position, filled.recomputed)

    def fill(self, chunks: Sequence[Tokens], state: State, ratio: float | None = None) -> Filled:
        """Chunks one after the other, in an empty state of one text. With ratio 1 nothing is done: the text is to be read as any other."""
        ratio = self.ratio if ratio is None else ratio
        check(_MEANT, {"chunks": chunks, "ratio": ratio})
        texts = [ids for c in chunks if len(ids := self._text("chunks", c))]
        context = torch.cat([*texts, torch.arange(0)])
        if ratio == 1 or not texts:
            return Filled(0, 0, torch.arange(len(context)))
        hits = self._turned(texts, state)
        start = len(texts[0])  # a chunk at the start stands where it stood
        chosen = self._deviating(context, start, min(math.ceil(ratio * len(context)), len(context) - start), state)
        if len(chosen):
            self._run("anew", context[chosen], chosen, state)
        computed = torch.cat([torch.full((len(text),), not hit) for text, hit in zip(texts, hits)])
        computed[chosen] = True
        count = int(computed.sum())
        self.counts.reused += len(context) - count
        self.counts.computed += count
        return Filled(len(context), count, chosen)

    def mark(self, chunks: Sequence[Tokens]) -> str:
        """Tells what texts hold that begin with these chunks from what others hold; empty where there is nothing to fill: where all is what
        the model computes."""
        if self.ratio == 1 or not any(len(c) for c in chunks):
            return ""
        about = [self.ratio, self.rank, *(self._text("chunks", c).tolist() for c in chunks)]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def ratio_within(self, max_error: float, examples: Sequence[tuple[Sequence[Tokens], Tokens]]) -> float:
        """The least of RATIOS with which the logits of no example are off by more, relative to those of all tokens computed anew."""
        check(_MEANT, {"max_error": max_error})
        examples = list(examples)
        if not examples or not all(isinstance(example, (list, tuple)) and len(example) == 2 for example in examples):
            raise BadOption(option="examples", reason="give one or more to measure on, each of chunks and the question behind them")
        exact = [self.prefill(chunks, question, 1.0).logits for chunks, question in examples]
        for ratio in RATIOS[:-1]:
            found = (self.prefill(chunks, question, ratio).logits for chunks, question in examples)
            if all(float((a - b).norm()) <= max_error * float(b.norm()) for a, b in zip(found, exact)):
                return ratio
        return RATIOS[-1]

    def _text(self, option: str, tokens: Tokens) -> torch.Tensor:
        return text_of(option, tokens, self.stepper.vocab)

    # -- what is computed

    def _turned(self, texts: Sequence[torch.Tensor], state: State) -> list[bool]:
        """Fills the state with chunks as they are kept, turned to where they stand; of each whether it was."""
        hits, start = list[bool](), 0
        for text in texts:
            hit, raw = self._raw(text)
            size = self._size(len(text))
            places = _row(torch.arange(start, start + len(text)), size).to(raw[0].device)
            parts = [_padded(x, d, size) for x, d in zip(raw, self._graphs(size).graphs.dims)]
            self._program(size, "encode").program.run([places, *parts, *state.tensors])
            hits.append(hit)
            start += len(text)
        return hits

    def _deviating(self, context: torch.Tensor, start: int, count: int, state: State) -> torch.Tensor:
        """Positions of the tokens from `start` on whose values are off most, ascending."""
        places = torch.arange(start, len(context))
        if not count:
            return places[:0]
        checked = self._graphs(1).graphs.checked
        d = state.dims[checked]
        stored = state.tensors[checked].narrow(d, start, len(places)).clone()
        (new,) = self._run("probe", context[start:], places, state)
        others = tuple(i for i in range(new.dim()) if i != d)
        deviation = (new.narrow(d, 0, len(places)) - stored).double().square().sum(others)
        return places[deviation.topk(count).indices.sort().values.cpu()]

    def _raw(self, text: torch.Tensor) -> tuple[bool, list[torch.Tensor]]:
        """Whether a chunk was kept; of it on its own: keys before RoPE, and values, each with len(text) tokens."""
        name = tuple(text.tolist())
        found = self._chunks.get(name)
        hit = found is not None
        if found is None:
            self.counts.misses += 1
            found = self._computed(text)
            self._keep(name, found)
        else:
            self.counts.hits += 1
            self._chunks.move_to_end(name)
        return hit, [x.whole() if isinstance(x, _Factors) else x for x in found]

    def _computed(self, text: torch.Tensor) -> list[torch.Tensor | _Factors]:
        graphs, state = self._graphs(self._size(len(text))).graphs, self.stepper.state(1)
        found = self._run("read", text, torch.arange(len(text)), state)
        exact = [x.narrow(d, 0, len(text)).clone() for x, d in zip(found, graphs.dims)]
        return [self._factored(x) if is_key and x.dim() == 4 and d == 2 else x for x, d, is_key in zip(exact, graphs.dims, graphs.keys)]

    def _factored(self, keys: torch.Tensor) -> torch.Tensor | _Factors:
        """Of the rank that is asked for, if that takes less."""
        _, heads, count, width = keys.shape
        if self.rank is None or self.rank * (count + heads * width) >= count * heads * width:
            return keys
        u, s, v = torch.linalg.svd(keys[0].transpose(0, 1).flatten(1), full_matrices=False)
        return _Factors((u * s)[:, : self.rank].contiguous(), v[: self.rank].contiguous(), keys.shape)

    def _keep(self, name: tuple[int, ...], parts: list[torch.Tensor | _Factors]) -> None:
        taken = _nbytes(parts)
        if taken > self.most_bytes:
            return
        self._chunks[name] = parts
        self.nbytes += taken
        while self.nbytes > self.most_bytes:
            _, gone = self._chunks.popitem(last=False)
            self.nbytes -= _nbytes(gone)
            self.counts.evicted += 1

    # -- programs

    def _run(self, what: str, tokens: torch.Tensor, places: torch.Tensor, state: State) -> list[torch.Tensor]:
        """Results for tokens [n] at ascending places [n]. What fills up the size of the program repeats the last token at its place."""
        size = self._size(len(tokens))
        device = state.tensors[0].device
        return self._program(size, what).program.run([_row(tokens, size).to(device), _row(places, size).to(device), *state.tensors])

    def _size(self, count: int) -> int:
        return size_class(count, self.stepper.max_length)

    def _graphs(self, size: int) -> _Programs:
        if size not in self._sizes:
            self._sizes[size] = _Programs(blending(self.stepper.graph, size, self.stepper.tokens))
        return self._sizes[size]

    def _program(self, size: int, what: str) -> Step:
        known = self._graphs(size)
        if what not in known.made:
            known.made[what] = self.stepper.compiled(getattr(known.graphs, what), 1)
        return known.made[what]


def _row(values: torch.Tensor, size: int) -> torch.Tensor:
    return _padded(values[None], 1, size)


def _padded(x: torch.Tensor, d: int, size: int) -> torch.Tensor:
    """With the last of dimension d repeated up to the size."""
    missing = size - x.shape[d]
    return x if not missing else torch.cat([x, x.narrow(d, -1, 1).expand(*(missing if i == d else n for i, n in enumerate(x.shape)))], d)


def _nbytes(parts: Sequence[torch.Tensor | _Factors]) -> int:
    return sum(p.left.nbytes + p.right.nbytes if isinstance(p, _Factors) else p.nbytes for p in parts)
