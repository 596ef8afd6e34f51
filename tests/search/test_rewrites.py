"""Choices of rewrites: what each place offers, what it costs, and what passes are made of what is chosen."""

from __future__ import annotations

import pytest
import torch
from tilewright.ir.capture import from_exported
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from tilewright.passes.base import Notes
from tilewright.passes.merge_tokens import MergeTokens
from tilewright.passes.prune_blocks import PruneBlocks
from tilewright.search.allocate import allocate
from tilewright.search.device import Device
from tilewright.search.merging import Merging
from tilewright.search.metrics import METRICS
from tilewright.search.pruning import REMOVED, SHARED, Pruning
from tilewright.search.rewrites import EXACT, Rewrites, predicted_seconds, weight_bytes
from torch import nn

DEVICE = Device("a machine", 1, 1, 1e10, 1e10, {"float32": 1e11}, ())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer() for _ in range(3)))
    with torch.no_grad():
        layers[1].down.weight *= 1e-3
        layers[1].down.bias *= 1e-3
    from tilewright.driver.pipeline import PREPARING
    from tilewright.passes.manager import run_passes

    exported = torch.export.export(layers.eval(), (torch.randn(2, 16, 8),))
    with torch.no_grad():
        return run_passes(from_exported(exported, "g").graph, PREPARING, Notes())


def test_places_and_passes_of_merging(graph) -> None:
    family = Merging(graph, Notes(), protected=1)
    assert [p.choices for p in family.places] == [("merge 1", "merge 2", "merge 4", "merge 6")] * 3
    a, b, c = (p.name for p in family.places)
    assert family.passes({}) == []
    assert family.passes({c: "merge 1", a: "merge 6"}) == [MergeTokens(((a, 6), (c, 1)), 1)]
    assert family.passes({a: "merge 6", b: "merge 6"}) == [MergeTokens(((a, 6), (b, 4)), 1)]  # of 10 tokens, 4 can go
    assert Merging(graph, Notes(), shares=(0.5, 0.9)).places[0].choices == ("merge 8",)


def test_places_and_passes_of_pruning(graph) -> None:
    both = Pruning(graph)
    assert [p.choices for p in both.places] == [(REMOVED,), (REMOVED,), *[(REMOVED, SHARED)] * 4]
    assert [p.choices for p in Pruning(graph, (SHARED,)).places] == [(SHARED,)] * 4
    names = [p.name for p in both.places]
    assert both.passes({names[1]: REMOVED, names[2]: SHARED}) == [PruneBlocks((names[1],), (names[2],))] and both.passes({}) == []


def test_a_model_without_such_places() -> None:
    text = from_exported(torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)), "g").graph
    assert not Merging(text, Notes()).places and not Pruning(text).places


def test_effects_are_those_of_the_rewritten_graph(graph) -> None:
    rewrites = Rewrites(graph, [Pruning(graph), Merging(graph, Notes(), shares=(0.25,))])
    x = torch.randn(2, 16, 8)
    effects = rewrites.effects([[x]], METRICS["relative"], lambda g: predicted_seconds(g, DEVICE))
    expected = interpret(graph, [x])
    for (family, place), found in zip(rewrites.places, effects, strict=True):
        assert set(found) == set(place.choices)
        for name, effect in found.items():
            variant = rewrites.rewritten([(family, place.name, name)])
            assert effect.error == pytest.approx(METRICS["relative"](interpret(variant, [x]), expected), rel=1e-5)
            assert effect.bytes == weight_bytes(graph) - weight_bytes(variant)
            assert (effect.seconds > 0) == (name == REMOVED) or name.startswith("merge")


def test_what_changes_least_is_chosen(graph) -> None:
    """The MLP in the middle does next to nothing: it goes first."""
    rewrites = Rewrites(graph, [Pruning(graph, (REMOVED,))])
    effects = rewrites.effects([[torch.randn(2, 16, 8)]], METRICS["relative"], lambda g: predicted_seconds(g, DEVICE))
    choices = rewrites.choices(effects, 2)
    chosen = rewrites.chosen(allocate(choices, "time", {"error": 1e-4}))
    assert [(place, how) for _, place, how in chosen] == [("1.down", REMOVED)]
    assert allocate(choices, "time", {"error": 0.0}).names == (EXACT,) * 6
    after = rewrites.rewritten(chosen)
    assert len(order(after)) < len(order(graph))


def test_predicted_seconds_fall_with_tokens_and_blocks(graph) -> None:
    rewrites = Rewrites(graph, [Pruning(graph), merging := Merging(graph, Notes())])
    before = predicted_seconds(graph, DEVICE)
    assert before > predicted_seconds(rewrites.rewritten([(rewrites.families[0], "0.down", REMOVED)]), DEVICE) > 0
    assert merging.count == 16
