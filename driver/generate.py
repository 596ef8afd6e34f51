"""`Generator`: text from a model that knows nothing of caches, token by token, for a batch of prompts of any lengths.

    generator = tilewright.Generator(model, max_length=512)
    generator.generate(input_ids, max_new_tokens=64)                 # like model.generate of transformers
    for token in generator.stream(prompt, do_sample=True, seed=1):   # as they come
    generator.generate(question, documents=[document, another])      # what was read before, wherever it stands

A `Stepper` (`driver/stepping.py`) computes; here is decided what it computes next. Rows of a batch are at positions of their own: a
prompt is read in chunks, from where a stored prefix (`driver/prefixes.py`) or its documents (`driver/chunks.py`) end, and then step by
step, with drafts where there are some (`driver/speculation.py`). What stands behind a row's position in the state means nothing, so
nothing is ever undone.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ..ir.analysis.hashing import structural_hash
from ..passes.quantize import Plan
from .errors import BadOption, ModelFails
from .generation_options import TRANSFORMERS_DEFAULTS, Limits, Request, Tokens, request
from .meant import COUNT, Meaning, check
from .prefixes import Owner, PrefixStore
from .sampling import Sampler
from .speculation import Lookup, PromptLookup, accepted

if TYPE_CHECKING:
    from .chunks import ChunkReuse, ChunkStore

CHUNK = 256
"""Tokens of a prompt that one step reads."""


class State(Protocol):
    """What a model remembers of its texts. tensors: the batch lies in the first dimension, and in `dims` of each the tokens."""

    @property
    def tensors(self) -> Sequence[torch.Tensor]: ...

    @property
    def dims(self) -> Sequence[int]: ...


@runtime_checkable
class Stepper(Protocol):
    """A model step by step: logits [batch, n, vocabulary] of tokens [batch, n] that stand at position [batch] and after it."""

    max_length: int
    vocab: int

    def state(self, batch: int) -> Any: ...

    def step(self, tokens: torch.Tensor, position: torch.Tensor, state: Any) -> torch.Tensor: ...


@runtime_checkable
class Reader(Protocol):
    """A stepper that can leave out the logits of all but one token of each row, the one `at` [batch]: [batch, vocabulary]."""

    def last(self, tokens: torch.Tensor, position: torch.Tensor, at: torch.Tensor, state: Any) -> torch.Tensor: ...


@runtime_checkable
class Fillable(Protocol):
    """A state that takes other memory where so many tokens of each row are about to be written into it."""

    def expect(self, count: int) -> None: ...


@dataclass
class Statistics:
    """What was done: tokens of prompts and documents that were kept from earlier texts, and that were computed; tokens made; steps after
    the prompts; drafts that were verified, and were right; seconds until the first tokens, and after."""

    reused: int = 0
    computed: int = 0
    generated: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all rows, from the first call to the last token."""
        seconds = self.prompt_seconds + self.step_seconds
        return self.generated / seconds if seconds else 0.0

    def add(self, other: Statistics) -> None:
        for name in (f.name for f in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        drafts = f"; {self.accepted} of {self.drafted} drafts accepted" if self.drafted else ""
        return (
            f"prompts: {self.reused} tokens reused, {self.computed} computed in {self.prompt_seconds:.3g} s; "
            f"{self.generated} tokens in {self.steps} steps, {self.step_seconds:.3g} s{drafts}; {self.tokens_per_second:.3g} tokens/s"
        )


def _is_reuse(value: Any) -> bool:
    from .chunks import ChunkReuse  # it brings the compiler

    return isinstance(value, ChunkReuse)


_MEANT = {
    "model": Meaning(
        lambda m: isinstance(m, (torch.nn.Module, Stepper)), "a module, such as AutoModelForCausalLM.from_pretrained gives, or a Stepper"
    ),
    "max_length": replace(COUNT, optional=True),
    "chunk": COUNT,
    "plan": Meaning(lambda p: isinstance(p, (Plan, str)), 'a Plan or the name of a format, such as "int4-g64"', optional=True),
    "prefixes": Meaning(lambda p: isinstance(p, PrefixStore), 'a store, such as tilewright.PrefixStore("512MB")', optional=True),
    "documents": Meaning(_is_reuse, "how they are read, such as tilewright.ChunkReuse(ratio=0.15)", optional=True),
    "speculation": Meaning(lambda s: isinstance(s, PromptLookup), "how to draft, such as tilewright.PromptLookup(drafts=7)", optional=True),
}
"""What a Generator is made of."""


class Generator:
    """model: a module from token ids [batch, length] to logits, a causal language model of transformers, or a Stepper, which says the next
    two itself. max_length: tokens of a text, with its prompt. kv: the format of keys and values, one of `passes.kv_formats.KV_FORMATS`.
    plan: formats of weights, "int4-g64" for all, or what a budget chose for the same model (`optimize(...).plan`).

    prefixes: where to keep what was computed for texts; may be shared. documents: how those of a call are read; `documents` then is their
    store. speculation: draft what the text said before. chunk: tokens of a prompt that one step reads. `statistics` adds up all that was
    done, `last` holds what the latest call did.
    """

    def __init__(
        self,
        model: torch.nn.Module | Stepper,
        max_length: int | None = None,
        *,
        kv: str = "same",
        plan: Plan | str | None = None,
        prefixes: PrefixStore | None = None,
        documents: ChunkReuse | None = None,
        speculation: PromptLookup | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Raises CannotDerive where the model mixes tokens otherwise than by causal attention, CannotBlend where it cannot read documents,
        BadOption, and what exporting raises."""
        options = {"max_length": max_length, "plan": plan, "prefixes": prefixes, "documents": documents, "speculation": speculation}
        check(_MEANT, {"model": model, "chunk": chunk, **options})
        self.stepper: Stepper = model if isinstance(model, Stepper) else _stepper(model, max_length, kv, plan)
        self.prefixes, self.chunk = prefixes, min(chunk, self.stepper.max_length)
        self.documents = None if documents is None else _chunk_store(self.stepper, documents)
        self.statistics, self.last = Statistics(), Statistics()
        self._name = "" if prefixes is None else _identity(self.stepper)
        self._limits = Limits(self.stepper.max_length, self.stepper.vocab, speculation, documents is not None, _defaults(model))

    def generate(self, input_ids: Tokens, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """The prompts and what follows, [batch, length]: like `generate` of transformers, whose options it takes (`generation_options`).

        documents=: texts that stand before each prompt, one after the other, or a list of such for each. Rows that end before others are
        filled up with padding. Raises BadOption, and NoDistribution.
        """
        asked = request(input_ids, attention_mask, options, self._limits)
        made: list[list[int]] = [[] for _ in asked.prompts]
        for step in self._steps(asked):
            for row, tokens in zip(made, step):
                row.extend(tokens)
        width = max(map(len, made))
        new = torch.tensor([row + [asked.pad or 0] * (width - len(row)) for row in made])
        return torch.cat([asked.padded, new], 1).to(input_ids.device if isinstance(input_ids, torch.Tensor) else "cpu")

    def stream(self, prompt: Tokens, **options: Any) -> Iterator[int]:
        """The tokens that follow one prompt, as they come."""
        asked = request(prompt, None, options, self._limits)
        if len(asked.prompts) > 1:
            raise BadOption(option="input_ids", reason=f"one text is streamed, not {len(asked.prompts)}; steps() takes several")
        return (token for step in self._steps(asked) for token in step[0])

    def steps(self, input_ids: Tokens, attention_mask: torch.Tensor | None = None, **options: Any) -> Iterator[list[list[int]]]:
        """After each step the new tokens of every row: none where it has ended, several where drafts were right."""
        return self._steps(request(input_ids, attention_mask, options, self._limits))

    def _steps(self, asked: Request) -> Iterator[list[list[int]]]:
        """Every way to generate goes through here."""
        if asked.streamer is None:
            yield from self._run(asked)
            return
        asked.streamer.put(asked.padded)
        for step in self._run(asked):
            for token in step[0]:
                asked.streamer.put(torch.tensor([token]))
            yield step
        asked.streamer.end()

    def _run(self, asked: Request) -> Iterator[list[list[int]]]:
        self.last = counted = Statistics()
        batch = _Batch(self.stepper, asked, counted)
        try:
            begin = time.perf_counter()
            for i in range(len(batch.rows)):
                self._recall(batch, i)
            first = batch.first_tokens(self.chunk)
            counted.prompt_seconds += time.perf_counter() - begin
            yield first
            while not all(row.ended for row in batch.rows):
                yield batch.next_tokens()
        finally:
            self._keep(batch)
            self.statistics.add(counted)

    def _recall(self, batch: _Batch, i: int) -> None:
        """Fills the state of a row with what is kept: of the text, or where its documents reach further, of those."""
        row, computed = batch.rows[i], 0
        row.mark = "" if self.documents is None else self.documents.mark(row.documents)
        known, context = self._prefix(batch, i), sum(map(len, row.documents))
        if self.documents is not None and row.mark and known < context:
            batch.expect(context)
            filled = self.documents.fill(row.documents, batch.alone(i))
            known, computed = filled.known, filled.computed
        row.done = known
        batch.counted.reused += known - computed
        batch.counted.computed += computed

    def _prefix(self, batch: _Batch, i: int) -> int:
        """Copies what is kept of a text into the state; how many tokens that are. The last one is left: its logits are needed."""
        if self.prefixes is None:
            return 0
        owner = self._owner(batch, i)
        with self.prefixes.longest(owner, batch.rows[i].text[:-1]) as prefix:
            batch.expect(prefix.length)
            for start, count, tensors in prefix.pieces:
                for part, dim, kept in zip(batch.parts(i, start, start + count), owner.dims, tensors):
                    part.copy_(kept.narrow(dim, 0, count))
            return prefix.length

    def _keep(self, batch: _Batch) -> None:
        if self.prefixes is None:
            return
        for i, row in enumerate(batch.rows):
            read = lambda start, stop, i=i: [t.clone(memory_format=torch.contiguous_format) for t in batch.parts(i, start, stop)]  # noqa: E731
            self.prefixes.insert(self._owner(batch, i), row.text[: row.done], read)

    def _owner(self, batch: _Batch, i: int) -> Owner:
        """Texts that begin with documents are apart from others of the same tokens: what was reused of those is not quite the model's."""
        return Owner(f"{self._name} {batch.rows[i].mark}".rstrip(), tuple(d - 1 for d in batch.state.dims))


class _Row:
    """One text: documents, prompt, and what follows. mark: of its documents, as `ChunkStore.mark` says. `done`: how many of its tokens the
    state holds. left: tokens that may still come."""

    def __init__(self, asked: Request, index: int) -> None:
        self.documents, self.mark = asked.documents[index], ""
        self.text = [*chain(*self.documents), *asked.prompts[index]]
        self.sampler = Sampler(asked.sampling, asked.seeds[index])
        self.lookup = None if asked.lookup is None else Lookup(asked.lookup, self.text)
        self.stop, self.left, self.done, self.ended = asked.stop, asked.length, 0, False

    def ahead(self, room: int) -> list[int]:
        """The next tokens to compute with: the last one, and drafts. room: places that there are.

        There are as many drafts where fewer tokens may come: a step of another size would be another program.
        """
        if self.ended:
            return []
        return [self.text[-1], *(self.lookup.draft(room - 1) if self.lookup else ())]

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Adds tokens up to the one that ends the text; all before the last of them are in the state."""
        tokens = list(tokens[: self.left])
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop), len(tokens))
        tokens = tokens[:end]
        self.text += tokens
        self.left -= len(tokens)
        self.done = len(self.text) - 1
        self.ended = self.left == 0 or tokens[-1] in self.stop
        if self.lookup is not None:
            self.lookup.extend(tokens)
        return tokens


class _Batch:
    """Texts that one state holds, row by row."""

    def __init__(self, stepper: Stepper, asked: Request, counted: Statistics) -> None:
        self.stepper, self.counted = stepper, counted
        self.rows = [_Row(asked, i) for i in range(len(asked.prompts))]
        self.state = stepper.state(len(self.rows))

    def parts(self, row: int, start: int, stop: int) -> list[torch.Tensor]:
        """What the state holds of a row between two positions."""
        return [t[row].narrow(d - 1, start, stop - start) for t, d in zip(self.state.tensors, self.state.dims)]

    def expect(self, count: int) -> None:
        """So many tokens of the text are about to be written, if there is one alone."""
        if len(self.rows) == 1 and isinstance(self.state, Fillable):
            self.state.expect(count)

    def alone(self, row: int) -> Any:
        """The state of one row, in the same memory."""
        return replace(self.state, tensors=[t[row : row + 1] for t in self.state.tensors])

    def first_tokens(self, chunk: int) -> list[list[int]]:
        """Reads the texts from where they are known on, and chooses what follows them."""
        last = dict[int, torch.Tensor]()
        while len(last) < len(self.rows):
            parts = [row.text[row.done : row.done + chunk] for row in self.rows]
            logits = self._compute_last(parts)
            for i, (row, part) in enumerate(zip(self.rows, parts)):
                row.done += len(part)
                self.counted.computed += len(part)
                if part and row.done == len(row.text):
                    last[i] = logits[i].clone()
        made = [row.take([row.sampler.choose(last[i], row.text)]) for i, row in enumerate(self.rows)]
        self.counted.generated += len(made)
        return made

    def next_tokens(self) -> list[list[int]]:
        """One step: of each row that has not ended a token, and those that were drafted and are right."""
        begin, made = time.perf_counter(), list[list[int]]()
        ahead = [row.ahead(self.stepper.max_length - row.done) for row in self.rows]
        logits = self._compute(ahead)
        for row, tokens, computed in zip(self.rows, ahead, logits):
            made.append(self._verified(row, tokens[1:], computed) if tokens else [])
        self.counted.steps += 1
        self.counted.generated += sum(map(len, made))
        self.counted.step_seconds += time.perf_counter() - begin
        return made

    def _verified(self, row: _Row, drafted: Sequence[int], logits: torch.Tensor) -> list[int]:
        tokens = row.take(accepted(logits, drafted, row.sampler, row.text))
        self.counted.drafted += len(drafted)
        self.counted.accepted += len(tokens) - 1
        if row.lookup is not None:
            row.lookup.learn(len(drafted), len(tokens) - 1)
        return tokens

    def _compute(self, parts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits of the tokens that follow what the state holds of each row; none of a row for which there are none."""
        tokens, starts = self._placed(parts)
        with torch.no_grad():
            logits = self.stepper.step(tokens, starts, self.state)
        offsets = (row.done - start for row, start in zip(self.rows, starts.tolist()))
        return [computed[at : at + len(part)] for computed, at, part in zip(logits, offsets, parts)]

    def _compute_last(self, parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [batch, vocabulary] of the last token of each part; of a row without any they mean nothing."""
        tokens, starts = self._placed(parts)
        ends = [max(row.done - start + len(part) - 1, 0) for row, start, part in zip(self.rows, starts.tolist(), parts)]
        at = torch.tensor(ends, device=tokens.device)
        with torch.no_grad():
            if isinstance(self.stepper, Reader):
                return self.stepper.last(tokens, starts, at, self.state)
            return self.stepper.step(tokens, starts, self.state)[torch.arange(len(ends)), at]

    def _placed(self, parts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [batch, width], and where the first of each row stands.

        A step has one width. Where a row has fewer tokens, its last one is read again, behind its position, which means nothing; where the
        width reaches beyond the last place, it begins earlier, with tokens that are computed again to the same end.
        """
        width = max(map(len, parts))
        starts = [min(row.done, self.stepper.max_length - width) for row in self.rows]
        texts = [[*row.text[start : row.done], *part] for row, start, part in zip(self.rows, starts, parts)]
        device = self.state.tensors[0].device
        lasts = [text[-1] if text else row.text[-1] for row, text in zip(self.rows, texts)]
        tokens = torch.tensor([text + [last] * (width - len(text)) for text, last in zip(texts, lasts)], device=device)
        return tokens, torch.tensor(starts, device=device)


def _stepper(model: torch.nn.Module, max_length: int | None, kv: str, plan: Plan | str | None) -> Stepper:
    from .stepping import stepper  # it brings the compiler, which a Stepper of the user's own does without

    if max_length is None:
        raise BadOption(option="max_length", reason="say how many tokens a text may have: memory is taken for so many")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise BadOption(option="model", reason=f"{type(model).__name__} has an encoder, whose text a Generator is not given; use stepper()")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        return stepper(model, torch.zeros(1, max_length, dtype=torch.int64, device=device), kv=kv, plan=plan)
    except ModelFails as error:
        places = _places(model)
        if places is None or max_length <= places:
            raise
        reason = f"{type(model).__name__} has {places} positions, and fails on a text of {max_length} tokens ({error.fields['reason']})"
        raise BadOption(option="max_length", reason=f"{reason}; say {places} at most") from error


def _places(model: Any) -> int | None:
    """For how long texts a model of transformers was made. Where positions are no weights, longer ones may do."""
    config = getattr(model, "config", None)
    return next((n for name in ("max_position_embeddings", "n_positions") if isinstance(n := getattr(config, name, None), int)), None)


def _chunk_store(stepper: Stepper, reuse: ChunkReuse) -> ChunkStore:
    from .chunks import ChunkStore
    from .stepping import Stepper as Derived

    if not isinstance(stepper, Derived):
        raise BadOption(option="documents", reason=f"{type(stepper).__name__} has no graph that says how keys are turned to another place")
    return ChunkStore(stepper, reuse)


def _identity(stepper: Stepper) -> str:
    """What tells a model, its weights, and the format of keys and values from others; a Stepper of the user's own is like no other."""
    from .stepping import Stepper as Derived

    if isinstance(stepper, Derived):
        return f"{structural_hash(stepper.graph, weights=True)} {stepper.kv}"
    return str(uuid.uuid4())


def _defaults(model: Any) -> dict[str, Any]:
    """Options that a model of transformers brings."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    return {**TRANSFORMERS_DEFAULTS, **{name: value for name, value in config.to_dict().items() if value is not None}}
