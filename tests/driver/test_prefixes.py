"""The store finds the longest beginning it has, holds what belongs to exactly those tokens, and never takes more than its budget."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from steppers import Attends, KeptTokens
from support import in_threads
from tilewright.driver import spill
from tilewright.driver.errors import BadOption
from tilewright.driver.generate import Generator
from tilewright.driver.prefixes import Owner, Prefix, PrefixStore, Run

OWNERS = (Owner("one", (1, 0)), Owner("other", (1, 0)))
EACH = 2 * 3 * 4 + 8
"""Bytes of a token in `state_of`."""


def state_of(owner: Owner, tokens: Sequence[int]) -> list[torch.Tensor]:
    """A state in which what belongs to a token depends on all before it, as keys and values do: [2, n, 3] and [n]."""
    seen, codes = len(owner.name), list[int]()
    for token in tokens:
        seen = (seen * 31 + token + 1) % 1_000_003
        codes.append(seen)
    code = torch.tensor(codes, dtype=torch.int64)
    return [code[None, :, None].float().expand(2, -1, 3), code]


def reader(owner: Owner, tokens: Sequence[int]) -> Callable[[int, int], list[torch.Tensor]]:
    return lambda start, stop: [t.narrow(d, start, stop - start).clone() for t, d in zip(state_of(owner, tokens), owner.dims)]


def kept(store: PrefixStore, owner: Owner, tokens: Sequence[int]) -> bool:
    return store.insert(owner, tokens, reader(owner, tokens)) == len(tokens)


def found(store: PrefixStore, owner: Owner, tokens: Sequence[int]) -> int:
    """How many tokens are found, after a look at whether what is found is theirs."""
    with store.longest(owner, tokens) as prefix:
        require_theirs(prefix, owner, tokens)
        return prefix.length


def require_theirs(prefix: Prefix, owner: Owner, tokens: Sequence[int]) -> None:
    at = 0
    for start, count, tensors in prefix.pieces:
        assert start == at and count > 0
        for ours, theirs, dim in zip(tensors, state_of(owner, tokens), owner.dims):
            assert torch.equal(ours.narrow(dim, 0, count), theirs.narrow(dim, start, count))
        at += count
    assert at == prefix.length


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return len(os.path.commonprefix([list(a), list(b)]))


def runs(run: Run) -> list[Run]:
    return [run, *(r for child in run.children.values() for r in runs(child))]


TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


class Stored(RuleBasedStateMachine):
    """Texts come, are looked up, used and released in any order; what the store says is compared with a search of all texts."""

    budget, spill_budget, spills = 10**6, 0, False
    prefixes = Bundle("prefixes")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp() if self.spills else None
        self.store = PrefixStore(self.budget, self.folder, max(self.spill_budget, 1))
        self.texts: list[tuple[Owner, list[int]]] = []
        self.held: list[tuple[Prefix, Owner, list[int]]] = []

    @rule(owner=st.sampled_from(OWNERS), tokens=TEXTS)
    def text_comes(self, owner: Owner, tokens: list[int]) -> None:
        count = self.store.insert(owner, tokens, reader(owner, tokens))
        assert count == len(tokens) if self.budget == 10**6 else count <= len(tokens)
        self.texts.append((owner, tokens))

    @rule(target=prefixes, owner=st.sampled_from(OWNERS), tokens=TEXTS)
    def text_is_looked_up(self, owner: Owner, tokens: list[int]) -> object:
        prefix = self.store.longest(owner, tokens)
        longest = max((common(tokens, text) for whose, text in self.texts if whose == owner), default=0)
        assert prefix.length == longest if self.budget == 10**6 else prefix.length <= longest
        require_theirs(prefix, owner, tokens)
        if prefix.length == 0:
            prefix.release()
            return multiple()
        self.held.append((prefix, owner, tokens[: prefix.length]))
        return self.held[-1]

    @rule(one=consumes(prefixes))
    def prefix_is_released(self, one: tuple[Prefix, Owner, list[int]]) -> None:
        self.held.remove(one)
        one[0].release()
        one[0].release()

    @invariant()
    def what_is_in_use_stays(self) -> None:
        for prefix, owner, tokens in self.held:
            assert found(self.store, owner, tokens) == len(tokens)
            require_theirs(prefix, owner, tokens)

    @invariant()
    def the_budget_is_kept_and_the_books_are_right(self) -> None:
        store = self.store
        tree = [run for root in store._roots.values() for run in runs(root)[1:]]
        inside = [run for run in tree if run.tensors is not None]
        outside = [run for run in tree if run.file is not None]
        assert set(inside) == set(store._kept) and set(outside) == set(store._spilled) and len(inside) + len(outside) == len(tree)
        assert store.bytes == sum(t.nbytes for run in inside for t in run.tensors or ()) <= store.budget
        assert all(run.nbytes == len(run.tokens) * EACH for run in tree)
        assert store.spilled_bytes == sum(run.nbytes for run in outside) <= store.spill_budget
        assert not any(run.users for run in outside)
        assert sum(run.users for root in store._roots.values() for run in root.children.values()) == len(self.held)
        for used in (store._kept, store._spilled):
            order = {run: i for i, run in enumerate(used)}
            assert all(order[child] < at for run, at in order.items() for child in run.children.values() if child in order)
        assert all(run.parent in inside or run.parent.parent is None for run in inside if run.parent is not None)
        if self.folder is not None:
            assert {str(run.file) for run in outside} == {str(path) for path in Path(self.folder).glob("*/*")}

    def teardown(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)


class StoredTightly(Stored):
    budget = 17 * EACH


class StoredOnDisk(Stored):
    budget, spill_budget, spills = 13 * EACH, 20 * EACH, True

    @rule(which=st.integers(0, 99), at=st.floats(0, 1), cut=st.booleans())
    def file_is_damaged(self, which: int, at: float, cut: bool) -> None:
        spilled = list(self.store._spilled)
        if not spilled:
            return
        path = spilled[which % len(spilled)].file
        assert path is not None
        data = bytearray(path.read_bytes() or b"empty since it was damaged before")
        place = int(at * (len(data) - 1))
        data[place] ^= 0x41
        path.write_bytes(data[:place] if cut else data)


for machine in (Stored, StoredTightly, StoredOnDisk):
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStored, TestStoredTightly = Stored.TestCase, StoredTightly.TestCase
TestStoredOnDisk = pytest.mark.filterwarnings("ignore:.*computed anew:RuntimeWarning")(StoredOnDisk.TestCase)


def test_the_least_recently_used_goes_first() -> None:
    store = PrefixStore(8 * EACH)
    for text in ([1, 1, 1, 1], [2, 2, 2, 2]):
        assert kept(store, OWNERS[0], text)
    assert found(store, OWNERS[0], [1, 1, 1, 1, 5]) == 4
    assert kept(store, OWNERS[0], [3, 3, 3])
    assert [found(store, OWNERS[0], [t] * 4) for t in (1, 2, 3)] == [4, 0, 3]
    assert store.counts.evicted == 1 and store.counts.hits == 3 and store.counts.misses == 1 and store.counts.tokens == 11


def test_of_a_branch_the_end_goes_first() -> None:
    store = PrefixStore(9 * EACH)
    assert kept(store, OWNERS[0], [1, 2, 3, 4, 5, 6]) and kept(store, OWNERS[0], [1, 2, 3, 7, 8])
    assert store.bytes == 8 * EACH, "what they have in common is there once"
    assert kept(store, OWNERS[0], [9, 9, 9])
    assert found(store, OWNERS[0], [1, 2, 3, 4, 5, 6]) == 3 and found(store, OWNERS[0], [1, 2, 3, 7, 8]) == 5


def test_a_text_that_does_not_fit_is_kept_as_far_as_it_does() -> None:
    store = PrefixStore(5 * EACH + 3)
    assert store.insert(OWNERS[0], [1] * 9, reader(OWNERS[0], [1] * 9)) == 5
    assert found(store, OWNERS[0], [1] * 9) == 5 and store.bytes == 5 * EACH
    with store.longest(OWNERS[0], [1] * 9):
        assert store.insert(OWNERS[0], [2, 2], reader(OWNERS[0], [2, 2])) == 0, "all there is, is in use"
    assert kept(store, OWNERS[0], [2, 2])


@pytest.mark.parametrize("text, first", [([1, 2, 3, 4], None), ([1, 2], None), ([1, 2, 9, 9], 2), ([1, 2, 3, 4, 5], 4), ([2], 0)])
def test_only_what_is_new_is_read(text: list[int], first: int | None) -> None:
    store, starts = PrefixStore(1e6), set[int]()

    def read(start: int, stop: int) -> list[torch.Tensor]:
        starts.add(start)
        return reader(OWNERS[0], text)(start, stop)

    assert kept(store, OWNERS[0], [1, 2, 3, 4])
    assert store.insert(OWNERS[0], text, read) == len(text)
    assert starts == (set() if first is None else {first})


def test_texts_of_other_models_are_not_found() -> None:
    store = PrefixStore(1e6)
    assert kept(store, OWNERS[0], [1, 2, 3])
    assert found(store, OWNERS[1], [1, 2, 3]) == 0


@pytest.mark.parametrize("budget", ["50%", 0, "much", -1.0])
def test_what_is_no_budget_is_refused(budget: object) -> None:
    with pytest.raises(BadOption, match="budget"):
        PrefixStore(budget)  # type: ignore[arg-type]


def test_threads_may_share_a_store() -> None:
    store = PrefixStore(60 * EACH)

    def work(thread: int) -> None:
        numbers = random.Random(thread)
        for _ in range(150):
            owner, text = numbers.choice(OWNERS), numbers.choices(range(2), k=numbers.randint(1, 15))
            found(store, owner, text)
            store.insert(owner, text, reader(owner, text))

    in_threads(work)
    assert store.bytes <= store.budget
    assert not any(run.users for root in store._roots.values() for run in runs(root))


def spilled(folder: Path) -> tuple[PrefixStore, Path]:
    """A store whose memory holds [2, 2, 2, 2], and its file with [1, 1, 1, 1]."""
    store = PrefixStore(4 * EACH, folder)
    assert kept(store, OWNERS[0], [1] * 4) and kept(store, OWNERS[0], [2] * 4)
    (file,) = folder.glob("*/*")
    return store, file


def test_what_was_spilled_comes_back(tmp_path: Path) -> None:
    store, _ = spilled(tmp_path)
    assert found(store, OWNERS[0], [1, 1, 1, 1, 1]) == 4 and found(store, OWNERS[0], [2, 2, 2, 2]) == 4
    assert (store.counts.spilled, store.counts.loaded, store.counts.damaged) == (3, 2, 0)
    assert store.bytes == store.spilled_bytes == 4 * EACH


@pytest.mark.parametrize("harm", ["gone", "cut", "empty", "changed", "exchanged"])
def test_a_damaged_file_is_a_miss(tmp_path: Path, harm: str) -> None:
    store, file = spilled(tmp_path)
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    elif harm == "exchanged":
        folder = spill.SpillFolder(tmp_path / "other")
        shutil.copy(folder.write("one", [5] * 4, reader(OWNERS[0], [5] * 4)(0, 4)), file)
    else:
        file.write_bytes({"cut": data[:-5], "empty": b"", "changed": data[:-3] + b"abc"}[harm])
    with pytest.warns(RuntimeWarning, match="does not hold what was written.*computed anew"):
        assert found(store, OWNERS[0], [1] * 4) == 0
    assert store.counts.damaged == 1 and store.spilled_bytes <= 4 * EACH
    assert kept(store, OWNERS[0], [1] * 4) and found(store, OWNERS[0], [1] * 4) == 4


def test_a_disk_that_is_full_ends_spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = spilled(tmp_path)

    def full(tensors: object, path: Path, about: object) -> None:
        path.write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "save_file", full)
    with pytest.warns(RuntimeWarning, match="takes no more"):
        assert kept(store, OWNERS[0], [3] * 4)
    assert [found(store, OWNERS[0], [t] * 4) for t in (3, 2)] == [4, 0]
    gc.collect()
    assert list(tmp_path.glob("*/*")) == [file], "nothing is left of what was not written"
    assert found(store, OWNERS[0], [1] * 4) == 4, "what was written before is still read"


def test_files_go_with_the_store(tmp_path: Path) -> None:
    store, file = spilled(tmp_path)
    assert file.exists()
    del store
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("at", [0, 3])
def test_what_is_not_finite_is_not_kept(bad: float, at: int) -> None:
    """Nor what follows it; large numbers are, though their sum is not finite."""
    store, whole = PrefixStore(1e9), reader(OWNERS[0], [5] * 6)

    def read(start: int, stop: int) -> list[torch.Tensor]:
        tensors = whole(start, stop)
        if start <= at < stop:
            tensors[0][1, at - start] = bad
        return tensors

    expected = at if bad != 3e38 else 6
    assert store.insert(OWNERS[0], [5] * 6, read) == expected
    with store.longest(OWNERS[0], [5] * 6) as prefix:
        assert prefix.length == expected
    assert store.bytes == expected * EACH


class Recorded:
    """A stepper that notes the logits of each step's last tokens."""

    def __init__(self, model: Attends) -> None:
        self.model, self.max_length, self.vocab, self.state = model, model.max_length, model.vocab, model.state
        self.logits: list[torch.Tensor] = []

    def step(self, tokens: torch.Tensor, position: torch.Tensor, state: KeptTokens) -> torch.Tensor:
        self.logits.append(self.model.step(tokens, position, state))
        return self.logits[-1]


@pytest.mark.parametrize("spills", [False, True])
def test_logits_and_texts_are_equal_with_and_without_a_store(tmp_path: Path, spills: bool) -> None:
    numbers, beginnings = random.Random(0), [[7] * 20, list(range(15)), [7] * 10 + [3] * 10]
    model = Attends()
    each = sum(t[0].nbytes for t in model.state(1).tensors) // model.max_length
    store = PrefixStore(60 * each, tmp_path if spills else None)
    with_store, without = Recorded(model), Recorded(model)
    generators = [Generator(with_store, prefixes=store, chunk=8), Generator(without, chunk=8)]
    for _ in range(25):
        prompts = [numbers.choice(beginnings) + numbers.choices(range(50), k=numbers.randint(0, 6)) for _ in range(2)]
        texts = [g.generate(prompts, max_new_tokens=8) for g in generators]
        assert torch.equal(*texts)
        for ours, theirs in zip(with_store.logits[-7:], without.logits[-7:]):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    mine, other = (g.statistics for g in generators)
    assert mine.reused + mine.computed == other.computed and mine.reused > other.computed / 3 and other.reused == 0
    assert store.bytes <= store.budget and (store.counts.loaded > 0) == spills


def test_the_next_turn_of_a_talk_reads_only_what_was_added() -> None:
    generator = Generator(Attends(), prefixes=PrefixStore(1e9))
    talk = generator.generate([[1, 2, 3, 4, 5]], max_new_tokens=10)[0].tolist()
    generator.generate([[*talk, 8, 9]], max_new_tokens=5)
    assert (generator.last.reused, generator.last.computed) == (14, 3), "the last token of a text was never computed with"


def test_a_text_that_nobody_reads_to_its_end_is_kept_so_far() -> None:
    generator = Generator(Attends(), prefixes=PrefixStore(1e9))
    steps = generator.steps([[1, 2, 3]], max_new_tokens=20)
    for _ in range(4):
        next(steps)
    del steps
    generator.generate([[1, 2, 3]], max_new_tokens=20)
    assert generator.last.reused == 2 and generator.prefixes is not None and generator.prefixes.counts.tokens == 2
