"""`PrefixStore`: what a model computed for a text is kept, and a text that begins alike starts from there.

A radix tree over token ids, one for each model (and format of its keys and values). An edge holds a run of tokens, and of each tensor of
the model's state the part that belongs to them; where two texts part, the run is split. So any common beginning is found, to the token,
and tokens themselves are compared: a hash decides nothing.

What is not finite is not kept, nor what follows it: a number that is none spoils what a kernel computes beside it, earlier tokens too,
and another text that only begins alike would get it.

What takes more than the budget is evicted, least recently used first. A path is used from its end to its root, so that a run is always
older than the one before it: the oldest is a leaf. What is in use stays. With a folder to spill to, runs go to a file first
(`driver/spill.py`) and come back when they are asked for; a file that was damaged counts as a miss.

After RadixAttention (SGLang, arXiv:2312.07104).
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from .budget import quantity
from .errors import BadOption
from .spill import Damaged, SpillFolder, read

Read = Callable[[int, int], list[torch.Tensor]]
"""From one position to another, of each tensor of a row's state the part that belongs to them: memory of its own."""


@dataclass(frozen=True)
class Owner:
    """Whose state it is: `name` stands for the model, its weights, and the format of keys and values. dims: of each tensor the one along
    which tokens lie."""

    name: str
    dims: tuple[int, ...]


@dataclass
class Counts:
    """What came of the store: texts that were looked up and began like one that is kept; tokens found; runs that went, and where to."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0
    evicted: int = 0
    spilled: int = 0
    loaded: int = 0
    damaged: int = 0


@dataclass(eq=False)
class Run:
    """tokens: those of the edge. tensors: None where they are in `file`. users: how many prefixes in use go through here."""

    owner: Owner
    tokens: list[int]
    parent: Run | None
    nbytes: int = 0
    tensors: list[torch.Tensor] | None = None
    file: Path | None = None
    device: torch.device = torch.device("cpu")
    users: int = 0
    children: dict[int, Run] = field(default_factory=dict)

    @property
    def upwards(self) -> Iterator[Run]:
        """This and those before it, without the root."""
        run = self
        while run.parent is not None:
            yield run
            run = run.parent


class Prefix:
    """The beginning of a text that is kept: its length, and (first position, count, tensors) of each part; of those, the first `count`
    tokens belong to it. It stays where it is until `release`, or the end of a `with`."""

    def __init__(self, store: PrefixStore, last: Run, pieces: Sequence[tuple[int, int, list[torch.Tensor]]]) -> None:
        self.length = pieces[-1][0] + pieces[-1][1] if pieces else 0
        self.pieces = pieces
        self._store = store
        self._last: Run | None = last

    def release(self) -> None:
        """May be called again."""
        last, self._last, self.pieces = self._last, None, ()
        if last is not None:
            self._store._release(last)

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class PrefixStore:
    """budget: what keys and values may take in memory, in bytes or as "256MB". spill: a folder for what does not fit, which takes up to
    `spill_budget`. One store serves several models and threads."""

    def __init__(self, budget: str | float, spill: str | Path | None = None, spill_budget: str | float = "4GB") -> None:
        """Raises BadOption, and OSError where nothing can be written to the folder."""
        self.budget, self.spill_budget = _bytes("budget", budget), _bytes("spill_budget", spill_budget)
        self.counts = Counts()
        self.bytes = self.spilled_bytes = 0
        self._folder = None if spill is None else SpillFolder(spill)
        self._full = False
        self._roots: dict[Owner, Run] = {}
        # both from the oldest to the latest used, so that what comes later in a text comes earlier here
        self._kept: OrderedDict[Run, None] = OrderedDict()
        self._spilled: OrderedDict[Run, None] = OrderedDict()
        self._lock = threading.RLock()

    def longest(self, owner: Owner, tokens: Sequence[int]) -> Prefix:
        """The longest beginning of `tokens` that is kept, to be released."""
        with self._lock:
            last, pieces = self._walk(owner, list(tokens))
            found = Prefix(self, last, pieces)
            self.counts.hits += found.length > 0
            self.counts.misses += found.length == 0
            self.counts.tokens += found.length
            return found

    def insert(self, owner: Owner, tokens: Sequence[int], read: Read) -> int:
        """Keeps the state of a text, or of as much of its beginning as fits; says how many of its tokens are kept. `read` is asked only
        for what is new."""
        tokens = list(tokens)
        with self._lock:
            last, pieces = self._walk(owner, tokens)
            try:
                start = sum(count for _, count, _ in pieces)
                if start == len(tokens):
                    return start
                if pieces and pieces[-1][1] < len(last.tokens):
                    last = self._split(last, pieces[-1][1])
                elif tokens[start] in last.children:
                    return start  # it goes on in a file that there was no room for
                return start + self._append(last, start, tokens[start:], read)
            finally:
                self._release(last)

    def _walk(self, owner: Owner, tokens: list[int]) -> tuple[Run, list[tuple[int, int, list[torch.Tensor]]]]:
        """The last run that has tokens in common, and the pieces so far. The path has one more user."""
        run = self._roots.setdefault(owner, Run(owner, [], None))
        pieces, at = list[tuple[int, int, list[torch.Tensor]]](), 0
        while at < len(tokens) and (following := run.children.get(tokens[at])) is not None:
            following.users += 1
            tensors = self._tensors(following)
            if tensors is None:
                following.users -= 1
                break
            run, count = following, _common(following.tokens, tokens, at)
            pieces.append((at, count, tensors))
            at += count
            if count < len(run.tokens):
                break
        for passed in run.upwards:
            self._kept.move_to_end(passed)
        return run, pieces

    def _tensors(self, run: Run) -> list[torch.Tensor] | None:
        """Those of a run, from its file where they are there; None where there is no room for them, or it is damaged and now gone."""
        if run.file is None:
            return run.tensors
        if self._room(run.nbytes) < run.nbytes:
            return None
        try:
            run.tensors = read(run.file, run.owner.name, run.tokens, run.device)
        except Damaged as error:
            self.counts.damaged += 1
            warnings.warn(f"{error}; it is computed anew", RuntimeWarning, 2)
            self._drop(run)
            return None
        self._leave_disk(run)
        self._kept[run] = None
        self.bytes += run.nbytes
        self.counts.loaded += 1
        return run.tensors

    def _append(self, parent: Run, start: int, tokens: list[int], read: Read) -> int:
        """A new run, as long as there is room for and its numbers are finite; its length."""
        each = _size(read(start, start + 1))
        count = min(len(tokens), self._room(each * len(tokens)) // max(each, 1))
        if count == 0:
            return 0
        tensors = read(start, start + count)
        finite = _finite(tensors, parent.owner.dims)
        if finite < count:
            return self._append(parent, start, tokens[:finite], read) if finite else 0
        run = Run(parent.owner, tokens[:count], parent, _size(tensors), tensors, device=tensors[0].device)
        parent.children[tokens[0]] = run
        self._kept[run] = None
        self.bytes += run.nbytes
        for passed in parent.upwards:
            self._kept.move_to_end(passed)
        return count

    def _split(self, run: Run, count: int) -> Run:
        """The run of its first `count` tokens, which `run` now follows. All users go through both, but for the caller, who goes on from
        the first."""
        assert run.tensors is not None and run.parent is not None
        parts = [[t.narrow(d, at, n).clone() for t, d in zip(run.tensors, run.owner.dims)] for at, n in
                 ((0, count), (count, len(run.tokens) - count))]  # fmt: skip
        first = Run(run.owner, run.tokens[:count], run.parent, _size(parts[0]), parts[0], device=run.device, users=run.users)
        run.parent.children[run.tokens[0]] = first
        run.tokens, run.tensors, run.nbytes, run.parent = run.tokens[count:], parts[1], _size(parts[1]), first
        run.users -= 1
        first.children[run.tokens[0]] = run
        self._kept[first] = None
        for passed in first.upwards:
            self._kept.move_to_end(passed)
        return first

    def _release(self, last: Run) -> None:
        with self._lock:
            for run in last.upwards:
                run.users -= 1
            self._roots = {owner: root for owner, root in self._roots.items() if root.children}  # owners may be many, and come once

    def _room(self, wanted: int) -> int:
        """Bytes that are free, at most so many, after what nobody uses made room."""
        wanted = min(wanted, self.budget)
        while self.bytes + wanted > self.budget and (oldest := _unused(self._kept)) is not None:
            self.counts.evicted += 1
            if not self._spill(oldest):
                self._drop(oldest)
        return min(wanted, self.budget - self.bytes)

    def _spill(self, run: Run) -> bool:
        """Whether it is in a file now."""
        if self._folder is None or self._full or run.nbytes > self.spill_budget:
            return False
        while self.spilled_bytes + run.nbytes > self.spill_budget and (oldest := _unused(self._spilled)) is not None:
            self._drop(oldest)
        if self.spilled_bytes + run.nbytes > self.spill_budget:
            return False
        assert run.tensors is not None
        try:
            run.file = self._folder.write(run.owner.name, run.tokens, run.tensors)
        except OSError as error:
            warnings.warn(f"{self._folder.path} takes no more ({error}): what does not fit into memory is computed anew", RuntimeWarning, 2)
            self._full = True  # the folder stays: what it holds is still read
            return False
        self._leave_memory(run)
        self._spilled[run] = None
        self.spilled_bytes += run.nbytes
        self.counts.spilled += 1
        return True

    def _drop(self, run: Run) -> None:
        """Takes a run, and what follows it, out of the tree."""
        for following in list(run.children.values()):
            self._drop(following)
        if run in self._kept:
            self._leave_memory(run)
        if run in self._spilled:
            self._leave_disk(run)
        assert run.parent is not None
        del run.parent.children[run.tokens[0]]

    def _leave_memory(self, run: Run) -> None:
        run.tensors = None
        del self._kept[run]
        self.bytes -= run.nbytes

    def _leave_disk(self, run: Run) -> None:
        assert run.file is not None
        run.file.unlink(missing_ok=True)
        run.file = None
        del self._spilled[run]
        self.spilled_bytes -= run.nbytes


def _unused(runs: OrderedDict[Run, None]) -> Run | None:
    return next((run for run in runs if run.users == 0), None)


def _common(edge: list[int], tokens: list[int], at: int) -> int:
    """How many tokens of an edge the text has at that place."""
    if edge == tokens[at : at + len(edge)]:
        return len(edge)
    return next((i for i, (a, b) in enumerate(zip(edge, tokens[at:])) if a != b), min(len(edge), len(tokens) - at))


def _finite(tensors: Sequence[torch.Tensor], dims: Sequence[int]) -> int:
    """How many tokens come before one with numbers that are not finite."""
    count = tensors[0].shape[dims[0]]
    for tensor, d in zip(tensors, dims):
        if tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite()):
            others = tuple(i for i in range(tensor.dim()) if i != d)
            whole = tensor.isfinite().all(others) if others else tensor.isfinite()  # a sum may be too large, too
            count = min(count, int(whole.cumprod(0).sum()))
    return count


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _bytes(name: str, value: str | float) -> int:
    try:
        amount = quantity("memory", value, float("nan"))  # a share, of what?
    except BadOption:
        amount = None
    if amount is None or not amount >= 1:
        raise BadOption(option=name, reason=f'it is a number of bytes, such as "256MB", not {value!r}')
    return int(amount)
