"""merge-tokens: exact where tokens are duplicates, the same matching as written out, every way out, and every reason not to."""

from __future__ import annotations

import copy

import pytest
import torch
from pass_checks import refusals
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.pipeline import PREPARING
from tilewright.ir.graph import Graph, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.provenance import NOWHERE
from tilewright.ir.reasons import Reason
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify
from tilewright.passes.base import Exactness, Notes
from tilewright.passes.manager import PassSyntaxError, parse_passes, pass_text, run_passes
from tilewright.passes.merge_tokens import MergeTokens, tokens_of
from tilewright.passes.token_maps import Builder, apart, merged, most_merged, places_after, rows_of
from torch import nn
from torch.nn import functional as F

# -- the matching


def _reference(keys: torch.Tensor, count: int, protected: int) -> torch.Tensor:
    """Places of one row [t, d], one token after the other."""
    unit = F.normalize(keys.double(), dim=-1)
    odd = [i for i in range(len(keys)) if i % 2 and i >= protected]
    best = {i: max(odd, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in range(protected, len(keys)) if not i % 2}
    first = sorted(best, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:count]
    stay = [i for i in range(len(keys)) if i not in first]
    return torch.tensor([stay.index(best[i] if i in first else i) for i in range(len(keys))])


def _places(keys: torch.Tensor, count: int, protected: int = 0) -> torch.Tensor:
    node = graph_input("keys", TensorType(keys.dtype, tuple(keys.shape), "cpu"))
    graph = make_graph("g", [node], [places_after(node, count, protected, Builder(NOWHERE))])
    verify(graph)
    return interpret(graph, [keys])[0]


@pytest.mark.parametrize("tokens,protected", [(2, 0), (3, 1), (7, 0), (8, 1), (9, 2), (16, 3), (17, 1)])
def test_places_are_those_of_the_method(tokens: int, protected: int) -> None:
    torch.manual_seed(tokens)
    keys = torch.randn(3, tokens, 5, dtype=torch.float64)
    for count in range(1, most_merged(tokens, protected) + 1):
        found = _places(keys, count, protected)
        for row, expected in zip(found, keys, strict=True):
            assert torch.equal(row, _reference(expected, count, protected))


def test_how_many_can_go() -> None:
    assert [most_merged(n, 0) for n in range(6)] == [0, 0, 1, 2, 2, 3]
    assert [most_merged(n, 1) for n in range(6)] == [0, 0, 0, 1, 1, 2]
    assert [most_merged(n, 2) for n in range(6)] == [0, 0, 0, 0, 1, 2]


def test_ties_go_to_the_first() -> None:
    keys = torch.ones(1, 6, 4)
    assert _places(keys, 2).tolist() == [[0, 0, 0, 1, 2, 3]]
    assert _places(keys, 2, 1).tolist() == [[0, 1, 1, 2, 1, 3]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_as_many_go_whatever_the_keys_are(value: float) -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 8, 4)
    keys[0], keys[1, 3] = value, value
    for count in (1, 2, 4):
        found = _places(keys, count)
        assert all(sorted(set(row.tolist())) == list(range(8 - count)) for row in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_sizes(dtype: torch.dtype) -> None:
    """Means by size; sizes add up to the number of tokens; tokens that stay are as they were, to the bit."""
    torch.manual_seed(0)
    x, keys = torch.randn(2, 9, 3).to(dtype), torch.randn(2, 9, 4)
    a, b = graph_input("x", TensorType(dtype, (2, 9, 3), "cpu")), graph_input("k", TensorType(torch.float32, (2, 9, 4), "cpu"))
    make = Builder(NOWHERE)
    first = places_after(b, 3, 1, make)
    y, sizes = merged(a, None, rows_of(first, 6, make), 6, make)
    second = places_after(y, 2, 1, make)
    z, more = merged(y, sizes, rows_of(second, 4, make), 4, make)
    graph = make_graph("g", [a, b], [first, y, sizes, z, more, apart(y, first, make)])
    verify(graph)
    places, once, counts, _, twice, back = interpret(graph, [x, keys])
    assert torch.equal(counts.sum(1), torch.full((2,), 9.0)) and torch.equal(twice.sum(1), torch.full((2,), 9.0))
    for row in range(2):
        for token in range(6):
            parts = x[row][places[row] == token]
            assert len(parts) == counts[row, token]
            torch.testing.assert_close(once[row, token], parts.double().mean(0).to(dtype))
            assert len(parts) > 1 or torch.equal(once[row, token], parts[0])
        assert torch.equal(back[row], once[row][places[row]]) and torch.equal(once[row, 0], x[row, 0])


# -- models


class Block(nn.Module):
    def __init__(self, width: int, causal: bool, batch_first: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.second, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.causal, self.batch_first = causal, batch_first

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.norm(x) if self.batch_first else self.norm(x).transpose(0, 1)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(a if self.batch_first else a.transpose(0, 1))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Encoder(nn.Module):
    """ends: what comes of the tokens."""

    def __init__(self, ends: str = "mean", layers: int = 3, causal: bool = False, batch_first: bool = True, scale: float = 1.5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, causal, batch_first) for _ in range(layers))
        self.table = nn.Parameter(torch.randn(12, 1))
        self.ends, self.batch_first, self.scale = ends, batch_first, scale

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = block(x) if mask is None else block(x, mask)
            if self.ends == "positions in every block":
                x = x + self.table
        tokens = 1 if self.batch_first else 0
        return {"mean": lambda: x.mean(tokens), "first": lambda: x.select(tokens, 0), "largest": lambda: x.amax(tokens)}.get(
            self.ends, lambda: x
        )()


def _graph(model: nn.Module, *args: torch.Tensor) -> Graph:
    captured = captured_of(export_module("model", model.eval(), Example(args, {})))
    with torch.no_grad():
        return run_passes(captured.graph, PREPARING, Notes())


def _names(graph: Graph) -> list[str]:
    found = tokens_of(graph)
    return [] if found is None else [site.name for site in found.sites]


def _merge(graph: Graph, *counts: int, protected: int = 0) -> tuple[Graph, Notes]:
    notes = Notes()
    after = MergeTokens(tuple(zip(_names(graph), counts)), protected).run(graph, notes)
    verify(after)
    return after, notes


def _lengths(graph: Graph) -> list[int]:
    return [int(n.shape[-2]) for n in order(graph) if n.op.name == "attention"]


def _twins(copies: int, tokens: int = 12) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, tokens // copies, 16).repeat_interleave(copies, 1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


ENDS = ("mean", "first", "largest", "all tokens")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("ends", ENDS)
def test_duplicates_merge_exactly(ends: str, batch_first: bool) -> None:
    model = Encoder(ends, batch_first=batch_first)
    x = _twins(4) if batch_first else _twins(4).transpose(0, 1)
    graph = _graph(model, x)
    after, notes = _merge(graph, 6, 3)
    assert _lengths(after) == [12, 6, 3] and len(notes.applied) == 2
    before, now = (interpret(g, [x], torch.float64)[0] for g in (graph, after))
    assert now.shape == before.shape
    torch.testing.assert_close(now, before, rtol=1e-13, atol=1e-13)


def test_tokens_that_are_an_input() -> None:
    graph = _graph(Encoder(scale=1.0), _twins(2))
    assert len(_names(graph)) == 3
    after, _ = _merge(graph, 6)
    before, now = (interpret(g, [_twins(2)], torch.float64)[0] for g in (graph, after))
    torch.testing.assert_close(now, before, rtol=1e-13, atol=1e-13)


def test_without_sizes_duplicates_would_not_be_exact() -> None:
    """What the sizes in the attentions are for: some tokens twice, others once."""
    x = _twins(1)
    x[:, 1], x[:, 3], x[:, 4], x[:, 5] = x[:, 0], x[:, 0], x[:, 0], x[:, 0]
    graph = _graph(Encoder("first"), x)
    after, _ = _merge(graph, 2)
    before, now = (interpret(g, [x], torch.float64)[0] for g in (graph, after))
    torch.testing.assert_close(now, before, rtol=1e-13, atol=1e-13)
    shares = [n.inputs[3] for n in order(after) if n.op.name == "attention" and len(n.inputs) == 4]
    assert len(shares) == 2
    ones = interpret(after, [x], torch.float64, known={n: torch.zeros(tuple(n.shape), dtype=torch.float64) for n in shares})[0]
    assert (ones - before).norm() / before.norm() > 1e-3


def test_nothing_asked_nothing_done() -> None:
    graph = _graph(Encoder(), _twins(1))
    assert MergeTokens().run(graph) is graph and _merge(graph, 0, 0, 0)[0] is graph
    assert MergeTokens.exactness is Exactness.BOUNDED


@pytest.mark.parametrize("counts", [(1,), (0, 2), (0, 0, 5), (6, 3, 1), (2, 2, 2)])
@pytest.mark.parametrize("ends", ENDS)
def test_any_counts(ends: str, counts: tuple[int, ...]) -> None:
    x = _twins(1)
    graph = _graph(Encoder(ends), x)
    after, _ = _merge(graph, *counts, protected=1)
    lengths, left = [12], 12
    for count in (*counts, 0, 0)[:2]:
        left -= count if count <= most_merged(left, 1) else 0
        lengths.append(left)
    assert _lengths(after) == lengths
    before, now = (interpret(g, [x])[0] for g in (graph, after))
    assert now.shape == before.shape and now.isfinite().all()
    assert torch.equal(now, before) == (ends == "first" and not any(counts[:2]))  # behind the last attention the first token is alone


def test_protected_tokens_stay() -> None:
    """All are alike; still the first one is itself: behind one layer its own attention and MLP made it, to the bit."""
    x = _twins(1) * 1e-3 + 1
    graph = _graph(Encoder("first", layers=1), x)
    after, notes = _merge(graph, 5, protected=1)
    assert notes.applied
    torch.testing.assert_close(interpret(after, [x])[0], interpret(graph, [x])[0], rtol=1e-6, atol=1e-6)


def test_what_tells_tokens_by_their_place_reads_them_apart() -> None:
    x = _twins(1)
    graph = _graph(Encoder("positions in every block"), x)
    after, notes = _merge(graph, 4, 4, 4)
    assert _lengths(after) == [12, 12, 12] and [a.what.split(": ")[1] for a in notes.applied] == ["12 -> 8 tokens"] * 3
    assert interpret(after, [x])[0].shape == (2, 12, 16)


REFUSED = {
    "causal": (Encoder, {"causal": True}, "it is causal: a token would see later ones"),
    "mask": (Encoder, {"mask": True}, "its mask tells tokens by their place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    kind, options, why = REFUSED[case]
    options = dict(options)
    mask = [torch.rand(2, 1, 1, 12) > 0.2] if options.pop("mask", False) else []
    notes = Notes()
    graph = _graph(kind(**options), _twins(1), *mask)
    assert tokens_of(graph, notes) is None
    assert ("merge-tokens", Reason.MIXED) in refusals(notes) and why in {d.value for d in notes.declined}
    assert MergeTokens((("blocks.0", 2),)).run(graph) is graph


class Alone(nn.Module):
    """An attention whose result is added to nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(h, h * 2, h).sin()


class Flat(Encoder):
    """Tokens of all sequences in one dimension."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, block = self.blocks[0], x.flatten(0, 1)
        q, k, v = (t.unflatten(0, (2, 12)).unflatten(-1, (4, -1)).transpose(1, 2) for t in b.qkv(block).chunk(3, -1))
        return block + b.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))


@pytest.mark.parametrize("kind", [Alone, Flat])
def test_refused_shapes(kind: type[nn.Module]) -> None:
    notes = Notes()
    assert tokens_of(_graph(kind(), _twins(1)), notes) is None
    assert notes.declined[0].value == "its result is not added to what it was computed from"
    assert notes.declined[0].reason is Reason.SHAPE_MISMATCH


def test_too_many_and_unknown_names_are_said() -> None:
    graph = _graph(Encoder(), _twins(1))
    after, notes = _merge(graph, 6, 4)
    assert _lengths(after) == [12, 6, 6] and notes.declined[0].value == "4 of 6 tokens, 3 can go"
    notes = Notes()
    assert MergeTokens((("elsewhere", 2),)).run(graph, notes) is graph and notes.declined[0].what == "elsewhere"


def test_no_attention_no_tokens() -> None:
    assert tokens_of(_graph(nn.Linear(4, 4), torch.randn(2, 4))) is None


def test_outside_of_the_tokens_nothing_changes() -> None:
    """Another result of the same graph, and a value that joins behind."""

    class Two(Encoder):
        def forward(self, x, mask=None):
            return super().forward(x) + x.amax((0, 1)), x.sin()

    x = _twins(2)
    model = Two()
    graph = _graph(copy.deepcopy(model), x)
    after, _ = _merge(graph, 6)
    for before, now in zip(interpret(graph, [x], torch.float64), interpret(after, [x], torch.float64), strict=True):
        torch.testing.assert_close(now, before, rtol=1e-13, atol=1e-13)


def test_on_the_command_line() -> None:
    (item,) = parse_passes("merge-tokens{counts=a.attention:4 b.attention:2, protected=1}")
    assert item == MergeTokens((("a.attention", 4), ("b.attention", 2)), 1) and parse_passes(pass_text(item)) == [item]
    with pytest.raises(PassSyntaxError, match="takes name:number ..., not 'a:x'"):
        parse_passes("merge-tokens{counts=a:x}")
