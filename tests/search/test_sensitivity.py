"""Sensitivity: equal to running the whole changed model, the joint error foretold, equal formats measured once, remembered and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.passes.layers import layers
from tilewright.passes.quantize import Plan, Quantize
from tilewright.search.database import Database
from tilewright.search.examples import with_sizes
from tilewright.search.layer_times import EXACT, layer_times
from tilewright.search.metrics import metric
from tilewright.search.replay import Replay
from tilewright.search.sensitivity import Effect, Sensitivity, monotone

TEXT = """graph g(x: f32[b, 64]) {
  v = constant "v"
  w = constant "w"
  u = constant "u"
  h = linear(x, v)
  a = gelu(h)
  k = linear(a, w)
  r = add(k, x)
  y = linear(r, u)
  return y
}"""
RELATIVE = metric("relative")


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return parse(TEXT, {"v": torch.randn(128, 64) / 8, "w": torch.randn(64, 128) / 12, "u": torch.randn(32, 64) / 8})


def _sensitivity(graph, tmp_path, batches=2) -> Sensitivity:
    torch.manual_seed(1)
    return Sensitivity(graph, layers(graph), [[torch.randn(16, 64)] for _ in range(batches)], RELATIVE, Database(tmp_path / "t.sqlite"))


def test_effects_are_those_of_the_whole_model(graph, tmp_path) -> None:
    found = _sensitivity(graph, tmp_path, 1)
    effects = found.effects(["int8", "int4-g32"])
    torch.manual_seed(1)
    x = torch.randn(16, 64)
    for name in ("v", "w", "u"):
        variant = Quantize(Plan(((name, "int4-g32"),), found.grams)).run(graph)
        expected = RELATIVE(interpret(variant, [x]), interpret(graph, [x]))
        assert effects[name, "int4-g32"].error == pytest.approx(expected, rel=1e-6)
        assert effects[name, "int8"].error < effects[name, "int4-g32"].error
        assert effects[name, "int8"].bytes < graph_bytes(graph, name) / 3


def graph_bytes(graph, name: str) -> int:
    return next(x for x in layers(graph) if x.name == name).nbytes


def test_squares_of_errors_add_up(graph, tmp_path) -> None:
    found = _sensitivity(graph, tmp_path)
    effects = found.effects(["int4-g64"])
    joint = found.error_of(Quantize(Plan.parse("*:int4-g64")).run(graph))  # without grams: the nearest
    nearest = Sensitivity(graph, layers(graph), [r.inputs() for r in found.replays], RELATIVE, Database(tmp_path / "other.sqlite"))
    nearest.grams.clear()
    single = nearest.effects(["int4-g64"])
    assert sum(e.error**2 for e in single.values()) ** 0.5 == pytest.approx(joint, rel=0.25)
    assert all(effects[k].error < e.error for k, e in single.items())  # the inputs that rounding knew are those it is judged by


def test_what_is_known_is_not_measured_again(graph, tmp_path, monkeypatch) -> None:
    first = _sensitivity(graph, tmp_path).effects(["int8", "int4-g32"])
    monkeypatch.setattr(Sensitivity, "error_of", lambda self, variant: pytest.fail("measured again"))
    assert _sensitivity(graph, tmp_path).effects(["int8", "int4-g32"]) == first


def test_who_is_interrupted_goes_on(graph, tmp_path, monkeypatch) -> None:
    calls: list[int] = []
    real = Sensitivity.error_of

    def counted(self, variant):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, variant)

    monkeypatch.setattr(Sensitivity, "error_of", counted)
    with pytest.raises(KeyboardInterrupt):
        _sensitivity(graph, tmp_path).effects(["int8", "int4-g32"])
    _sensitivity(graph, tmp_path).effects(["int8", "int4-g32"])
    assert len(calls) == 3 + 4  # two were known


def test_other_inputs_or_weights_are_another_model(graph, tmp_path) -> None:
    keys = {_sensitivity(graph, tmp_path).key, _sensitivity(graph, tmp_path, 3).key}
    other = parse(TEXT, {"v": torch.randn(128, 64), "w": torch.randn(64, 128), "u": torch.randn(32, 64)})
    assert len(keys | {_sensitivity(other, tmp_path).key}) == 3


def test_formats_that_compute_the_same_are_measured_once(graph, tmp_path, monkeypatch) -> None:
    calls: list[int] = []
    real = Sensitivity.error_of
    monkeypatch.setattr(Sensitivity, "error_of", lambda self, variant: calls.append(1) or real(self, variant))
    only = [x for x in layers(graph) if x.name == "u"]
    found = Sensitivity(graph, only, [[torch.randn(4, 64)]], RELATIVE, Database(tmp_path / "t.sqlite"))
    effects = found.effects(["int4-g64", "int4-g128"])  # rows have 64 weights
    assert len(calls) == 1 and effects["u", "int4-g64"] == effects["u", "int4-g128"]


def test_progress_and_refusals(graph, tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    effects = _sensitivity(graph, tmp_path).effects(["int8", "rank-half"], lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6) and not effects["v", "int8"].declined
    text = 'graph g(i: i64[b]) {\n t = constant "t"\n y = embedding(t, i)\n return y\n}'
    table = parse(text, {"t": torch.randn(40, 32)})
    batch = [[torch.arange(8)]]
    refused = Sensitivity(table, layers(table), batch, RELATIVE, Database(tmp_path / "t.sqlite")).effects(["rank-half"])
    assert refused["t", "rank-half"].declined.startswith("no scalar form")


def test_less_luck() -> None:
    effects = {("a", "int8"): Effect(0.2, 8), ("a", "int4-g32"): Effect(0.1, 4), ("a", "int4-g64"): Effect(9.0, 3, "why not")}
    found = monotone(effects, ["a"])
    assert found["a", "int4-g32"] == Effect(0.2, 4) and found["a", "int4-g64"].declined


def test_replay_runs_only_what_follows(graph) -> None:
    x = torch.randn(4, 64)
    replay = Replay(graph, [x])
    assert torch.equal(replay.run(graph)[0], replay.outputs[0]) and torch.equal(replay.outputs[0], interpret(graph, [x])[0])
    for kept in (0, 1 << 30):
        replay = Replay(graph, [x], kept)
        variant = Quantize(Plan.parse("w:bf16")).run(graph)
        assert torch.equal(replay.run(variant)[0], interpret(variant, [x])[0])


def test_replay_leaves_what_is_written_alone() -> None:
    graph = parse("graph g(x: f32[4], s: f32[4]) {\n y = add(x, s)\n write s = y\n return y\n}")
    state = torch.ones(4)
    Replay(graph, [torch.ones(4), state]).run(graph)
    assert torch.equal(state, torch.ones(4))


def test_a_layer_alone_knows_the_sizes_it_mentions() -> None:
    """A table of positions is read for each token, whatever the batch."""
    graph = parse("graph g(ids: i64[b, s], at: i64[1, s], w: f32[8, 4]) where b in 1.., s in 1.. {\n y = embedding(w, at)\n return y\n}")
    made = with_sizes(replace(graph, inputs=graph.inputs[1:]))
    assert list(made.symbols) == ["s"] and [str(n.type) for n in made.inputs] == ["i64[1, s]", "f32[8, 4]", "int=s"]


def test_layer_times_are_of_all_that_runs_instead(graph, tmp_path) -> None:
    """By a compiler that says how long things take: by ops, so that nothing depends on this machine."""
    database = Database(tmp_path / "t.sqlite")
    built: list[int] = []

    def compiled(part):
        built.append(1)
        return lambda inputs: interpret(part, inputs)

    found = layer_times(layers(graph), ["int8", "rank-half"], compiled, database)
    assert set(found) == {(layer, name) for layer in "vwu" for name in (EXACT, "int8", "rank-half")}
    assert all(seconds > 0 for seconds in found.values()) and len(built) == 9
    assert layer_times(layers(graph), ["int8", "rank-half"], compiled, database) == found and len(built) == 9
