"""Budgets: every limit is kept by measurement, what cannot be kept is named, what measures badly is repaired, and receipts tell it all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tilewright
import torch
from offline import run, save_program, sentence
from rich.console import Console
from tilewright.driver import measure, pipeline, places, within
from tilewright.driver.budget import DEFAULT_FORMATS, Budget, budget_from, quantity
from tilewright.driver.errors import BadCalibration, BadOption, CannotOptimize
from tilewright.driver.receipt import Receipt
from tilewright.search.layer_times import EXACT, layer_times
from tilewright.search.metrics import UnknownMetric, relative_error

FORMATS = ("bf16", "int8", "int4-g32")
CHEAP = {EXACT: 3.0, "bf16": 2.5, "int8": 2.0, "int8-dynamic": 1.8, "int4-g32": 1.5}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(300, 64)
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        self.head = torch.nn.Linear(64, 96)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(x))))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times are given, not measured: nothing here depends on how fast this machine is."""
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(places, "layer_times", _times)
    monkeypatch.setattr(within, "CERTAINTY", 1e9)  # no candidate is slower beyond noise
    torch.manual_seed(0)


def _times(layers, formats, *rest):
    return {(layer.name, name): CHEAP[name] * 1e-9 * layer.nbytes for layer in layers for name in (EXACT, *formats)}


@pytest.fixture
def ids():
    return [torch.randint(0, 300, (4, 16)) for _ in range(5)]


def _optimized(ids, **budget):
    model = Net().eval()
    formats = budget.pop("formats", FORMATS)
    made = tilewright.optimize(model, (ids[0],), tuning_seconds=0, budget=Budget(formats=formats, calibration=ids[1:], **budget))
    return model, made, made.receipt.spent


def test_the_error_is_kept_and_used(ids) -> None:
    model, made, spent = _optimized(ids, max_error=2e-2)
    assert spent.error <= 2e-2 and spent.held_out and {line.format for line in spent.layers} != {EXACT}
    worst = max(relative_error(made(x), Net.forward(model, x)) for x in ids[-1:])
    assert worst == pytest.approx(spent.error, rel=0.05)
    assert spent.bytes < spent.exact_bytes and spent.attempts[-1].error >= 2e-2 / 16


@pytest.mark.parametrize("memory", ["40%", 0.3])
def test_memory_is_kept(ids, memory) -> None:
    limit = memory if isinstance(memory, str) else 90_000
    _, made, spent = _optimized(ids, max_error=0.3, memory=limit, objective="error")
    most = 0.4 * spent.exact_bytes if isinstance(memory, str) else 90_000
    weights = sum(v.nbytes for v in made_weights(made))
    assert spent.bytes <= most and weights <= most and spent.error < 0.3


def made_weights(made):
    from tilewright.ir.graph import constants

    return [d.value for d in constants(made.graph).values()]


def test_least_error_within_memory_is_better_than_one_format_for_all(ids) -> None:
    _, _, spent = _optimized(ids, memory="20%", objective="error")
    _, _, uniform = _optimized(ids, memory="20%", objective="error", formats=("int4-g32",))
    assert spent.bytes <= 0.2 * spent.exact_bytes and spent.error <= uniform.error * 1.05


def test_mean_bits_and_bops_are_limits(ids) -> None:
    _, _, spent = _optimized(ids, objective="error", bits=9.0)
    assert sum(line.bytes for line in spent.layers) * 8 <= 9.0 * sum(line.exact_bytes for line in spent.layers) / 4
    _, _, spent = _optimized(ids, objective="error", bops="30%")
    assert {"int8", "int4-g32"} & {line.format for line in spent.layers} and spent.limits["bops"] > 0


def test_exact_where_nothing_is_allowed(ids) -> None:
    _, made, spent = _optimized(ids, max_error=0.0)
    assert {line.format for line in spent.layers} == {EXACT} and spent.bytes == spent.exact_bytes
    assert made.receipt.error.ok


def test_what_cannot_be_kept_is_named_with_the_nearest(ids) -> None:
    with pytest.raises(CannotOptimize, match=r"no choice of formats keeps \d+ kB and error 1e-05 together; the nearest has"):
        _optimized(ids, max_error=1e-5, memory="50%")
    with pytest.raises(CannotOptimize, match=r"no choice of formats keeps [\d.]+ kB; the nearest has [\d.]+ kB"):
        _optimized(ids, max_error=1.0, memory="1%")


def test_a_candidate_over_the_error_is_repaired(ids, monkeypatch) -> None:
    """Predictions that are ten times too good: measuring finds out, and less is allowed."""
    real = within.layer_choices

    def hopeful(*args):
        return [
            type(c)(c.layer, tuple(type(x)(x.name, {**x.costs, "error": x.costs["error"] / 100}) for x in c.choices)) for c in real(*args)
        ]

    monkeypatch.setattr(within, "layer_choices", hopeful)
    _, _, spent = _optimized(ids, max_error=2e-2)
    first, *others = spent.attempts
    assert first.verdict == "declined: over the error" and first.error > 2e-2 and first.predicted_error < 0.3 * first.error
    assert others and all(a.predicted_error == pytest.approx(a.error, rel=0.25) for a in others), "what the first attempt taught"
    assert min(abs(p.error / spent.error - 1) for p in spent.front if p.error) < 1, "the front is as measured"
    assert spent.attempts[-1].verdict == "kept" and spent.error <= 2e-2


def test_a_candidate_slower_than_the_exact_model_is_rolled_back(ids, monkeypatch) -> None:
    from tilewright.search.database import Timing
    from tilewright.search.tuner import Verdict

    def timed(model, **candidates):
        formats = any("int4" in str(made.graph) for made in candidates.values())
        ours = 2e-3 if formats else 0.5e-3
        return Verdict("ours", "ours", {"ours": Timing(ours), "exact": Timing(1e-3), "eager": Timing(2e-3)}, {}, 5)

    monkeypatch.setattr(places, "timed", timed)
    monkeypatch.setattr(within, "CERTAINTY", 2.5)
    _, _, spent = _optimized(ids, max_error=0.3)
    assert spent.seconds <= 1e-3
    slow = [a for a in spent.attempts if a.verdict == "declined: over the time"]
    assert slow and all(a.seconds > 1e-3 for a in slow)
    assert {line.format for line in spent.layers} & {"bf16", "int8"} and "int4-g32" not in {line.format for line in spent.layers}


def test_times_that_are_foretold_rule_nothing_out(ids, monkeypatch) -> None:
    """Every format is foretold to be slower, and the user asks for half the memory: what is measured decides."""
    monkeypatch.setattr(places, "layer_times", lambda *args: {k: t if k[1] == EXACT else 1e-3 - t for k, t in _times(*args).items()})
    _, _, spent = _optimized(ids, memory="50%", max_error=0.5)
    assert spent.attempts[-1].verdict == "kept" and spent.attempts[-1].predicted_seconds > spent.exact_seconds
    assert spent.bytes <= 0.5 * spent.exact_bytes


def test_a_loss_of_the_users_own(ids) -> None:
    torch.manual_seed(0)
    exact = Net().eval()
    answers = [exact(x).argmax(-1) for x in ids]

    def wrong(model) -> float:
        return sum((model(x).argmax(-1) != a).double().mean().item() for x, a in zip(ids, answers)) / len(ids)

    torch.manual_seed(0)
    budget = Budget(max_error=0.02, metric=wrong, formats=FORMATS, objective="memory", calibration=ids[1:])
    made = tilewright.optimize(exact, (ids[0],), tuning_seconds=0, budget=budget)
    assert made.receipt.spent.metric == "loss" and wrong(made) <= 0.02 and made.receipt.spent.bytes < made.receipt.spent.exact_bytes


def test_a_loss_with_derivatives_is_foretold(ids) -> None:
    """By its curvature: nothing is measured but the candidates, and a number need not be a float."""
    exact = Net().eval()
    labels = [exact(x).argmax(-1).flatten() for x in ids]

    def loss(model):
        return sum(torch.nn.functional.cross_entropy(5 * model(x).flatten(0, 1), y) for x, y in zip(ids, labels)) / len(ids)

    budget = Budget(max_error=2e-3, metric=loss, formats=FORMATS, objective="memory", calibration=ids[1:])
    found = tilewright.optimize(exact, (ids[0],), tuning_seconds=0, budget=budget)
    spent = found.receipt.spent
    assert spent.candidates.keys() == {"estimated"} and spent.bytes < 0.5 * spent.exact_bytes
    assert spent.attempts[0].predicted_error is not None and 0.05 < spent.attempts[0].predicted_error / spent.attempts[0].error < 20
    with torch.no_grad():
        assert float(loss(found) - loss(exact)) == pytest.approx(spent.error, rel=0.05) and spent.error <= 2e-3


@pytest.mark.parametrize(("answer", "says"), [("a", "to return a number, not str"), (math.nan, "of the model itself it is nan")])
def test_losses_that_are_none(ids, answer, says) -> None:
    with pytest.raises(BadOption, match=f"metric: .*{says}"):
        _optimized(ids, max_error=0.01, metric=lambda model: answer)


def test_a_loss_that_becomes_nan_is_over_the_budget(ids) -> None:
    budget = Budget(max_error=0.01, metric=lambda model: 0.0 if isinstance(model, Net) else math.nan, formats=FORMATS, calibration=ids[1:])
    with pytest.raises(CannotOptimize, match="none of 8 candidates kept the budget|no choice of formats"):
        tilewright.optimize(Net().eval(), (ids[0],), tuning_seconds=0, budget=replace(budget, memory="30%"))


class Several(torch.nn.Module):
    """Outputs of several kinds, of a batch that may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64), torch.nn.Linear(64, 128)

    def forward(self, x):
        h = self.down(torch.nn.functional.gelu(self.up(x)))
        return {"h": h, "side": self.side(h), "large": h.abs() > 1e6, "n": 3}


def test_sizes_that_vary_and_several_outputs(monkeypatch) -> None:
    """The worst output keeps the error, at every size; times are measured at the size of the example."""
    monkeypatch.setattr(places, "layer_times", layer_times)
    model, x = Several().eval(), torch.randn(8, 64)
    calibration = [torch.randn(n, 64) for n in (3, 17, 1, 40)]
    budget = Budget(max_error=2e-2, formats=("bf16", "int8"), objective="memory", latency="10000%", calibration=calibration)
    made = tilewright.optimize(model, (x,), dynamic={"x": {0: "batch"}}, tuning_seconds=0, budget=budget)
    spent = made.receipt.spent
    assert {line.format for line in spent.layers} == {"int8"} and 0 < spent.error <= 2e-2 and all(x.exact_seconds > 0 for x in spent.layers)
    for n in (1, 5, 100):
        x = torch.randn(n, 64)
        ours, eager = made(x), model(x)
        assert ours["n"] == 3 and torch.equal(ours["large"], eager["large"])
        assert max(relative_error(ours[name], eager[name]) for name in ("h", "side")) < 3e-2


@pytest.mark.parametrize("wrong", [torch.randn(3, 64), torch.randn(8, 64).double(), torch.randn(8, 63), 3])
def test_calibration_that_does_not_fit(wrong) -> None:
    with pytest.raises(BadCalibration, match="cannot use --calibration input 1: argument 'x' must be"):
        budget = Budget(max_error=0.1, calibration=[wrong])
        tilewright.optimize(Several().eval(), (torch.randn(8, 64),), tuning_seconds=0, budget=budget)


def test_a_loss_decides_itself_how_far_outputs_may_be_off(ids) -> None:
    """All weights in 4 bits move the outputs by more than is tried first; this loss does not mind."""
    budget = Budget(max_error=0.01, metric=lambda model: 0.5, formats=("int4-g32",), memory="17%", objective="error", calibration=ids[1:])
    spent = tilewright.optimize(Net().eval(), (ids[0],), tuning_seconds=0, budget=budget).receipt.spent
    assert {line.format for line in spent.layers} == {"int4-g32"} and max(line.error for line in spent.layers) > within.LOSS_START
    with pytest.raises(CannotOptimize, match=r"no choice of formats keeps [\d.]+ kB; the nearest"):
        _optimized(ids, max_error=0.01, metric=lambda model: 0.5, memory="1%")


def test_channels_that_are_hard_to_round_are_scaled() -> None:
    """Large channels behind a norm: inputs of 8 bits keep an error that they else would not."""
    inputs = [torch.randn(64, 128) * torch.where(torch.arange(128) % 64 == 0, 30.0, 1.0) for _ in range(5)]
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 32)).eval()
    budget = Budget(max_error=0.3, formats=("int8-dynamic",), objective="memory", calibration=inputs[1:])
    found = tilewright.optimize(model, (inputs[0],), tuning_seconds=0, budget=budget).receipt
    assert any(a.rule == "scale-channels" for a in found.applied) and found.spent.error < 0.008


@pytest.mark.parametrize("metric", ["max-abs", "cosine", "kl", "argmax"])
def test_other_metrics(ids, metric) -> None:
    _, made, spent = _optimized(ids, max_error=2e-2, metric=metric)
    assert spent.metric == metric and spent.error <= 2e-2 and made.receipt.error is None


def test_without_calibration_the_example_stands_for_all(ids) -> None:
    made = tilewright.optimize(Net().eval(), (ids[0],), tuning_seconds=0, budget=Budget(max_error=2e-2, formats=FORMATS))
    assert not made.receipt.spent.held_out


class Shared(torch.nn.Module):
    """Outputs that are equal, and apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(128, 128)

    def forward(self, x):
        y = self.fc(x)
        return y + 0, y * 1, x + 0


def test_times_of_all_passes_and_outputs_that_stay_apart() -> None:
    x = torch.randn(4, 128)
    made = tilewright.optimize(
        Shared().eval(), (x,), tuning_seconds=0, budget=Budget(max_error=0.05, formats=("int8",), objective="memory")
    )
    assert made.receipt.spent.layers[0].format == "int8"
    passes = {p.name for p in pipeline.DEFAULT_PASSES} | {"scale-channels", "quantize", "lower", "compile"}
    assert passes - {"scale-channels"} <= made.receipt.seconds.keys()
    assert sum(made.receipt.seconds[name] for name in passes & made.receipt.seconds.keys()) <= made.receipt.seconds["total"]
    assert len({t.data_ptr() for t in (*made(x), x)}) == 4


def test_receipt_and_artifact(ids, tmp_path) -> None:
    _, made, spent = _optimized(ids, max_error=2e-2, memory="60%")
    assert Receipt.from_json(made.receipt.to_json()) == made.receipt
    made.save(tmp_path / "m.tw")
    again = tilewright.load(tmp_path / "m.tw")
    assert torch.equal(again(ids[0]), made(ids[0])) and again.receipt.spent == spent
    console = Console(width=100, record=True, file=None)
    with console.capture() as captured:
        made.receipt.render(console)
    assert "error (relative)" in captured.get() and "on held-out inputs" in captured.get() and "int8" in captured.get()
    assert spent.candidates["measured"] >= 9 and sum(spent.candidates.values()) == len(FORMATS) * len(spent.layers)
    assert [p for p in spent.front if p.error == 0] and all(math.isfinite(p.seconds) for p in spent.front)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "max-error: say how large it may be; least latency has no end without it"),
        ({"max_error": 0.1, "objective": "speed"}, "objective: it is latency, memory, error, not 'speed'"),
        ({"max_error": -1.0}, "max-error: it is a number from 0 on, not -1.0"),
        ({"max_error": math.nan}, "max-error: it is a number from 0 on"),
        ({"max_error": "5%"}, "max-error: it is a number from 0 on, not '5%'"),
        ({"max_error": 0.1, "memory": 0.35}, "memory: 0.35 would be less than one; a share of what it is now is written 35%"),
        ({"max_error": 0.1, "memory": "half"}, "memory: 'half' is no amount"),
        ({"max_error": 0.1, "latency": "5 parsecs"}, "latency: '5 parsecs' is no amount"),
        ({"max_error": 0.1, "memory": "5ms"}, "memory: '5ms' is no amount"),
        ({"max_error": 0.1, "latency": "5MB"}, "latency: '5MB' is no amount"),
        ({"max_error": 0.1, "bops": "5s"}, "bops: '5s' is no amount"),
        ({"max_error": 0.1, "bits": "4"}, "bits: it is a number above 0, not '4'"),
        ({"max_error": 0.1, "bits": 0}, "bits: it is a number above 0, not 0"),
        ({"max_error": 0.1, "bits": math.nan}, "bits: it is a number above 0, not nan"),
        ({"max_error": 0.1, "calibration": 3}, "calibration: it is a list of inputs, not 3"),
        ({"max_error": 0.1, "formats": "int8"}, "formats: it is a tuple of names"),
        ({"max_error": 0.1, "formats": ("int3",)}, "formats: there is no 'int3'"),
    ],
)
def test_budgets_that_mean_nothing(options, says) -> None:
    with pytest.raises(BadOption, match=says.replace("(", r"\(")):
        Budget(**options)


def test_unknown_metric_and_wrong_calibration(ids) -> None:
    with pytest.raises(UnknownMetric, match="'mse'"):
        Budget(max_error=0.1, metric="mse")
    with pytest.raises(BadCalibration, match="cannot use --calibration input 1: the model takes 1 arguments"):
        tilewright.optimize(Net().eval(), (ids[0],), tuning_seconds=0, budget=Budget(max_error=0.1, calibration=[(1, 2, 3)]))


@pytest.fixture
def deep():
    torch.manual_seed(0)
    layers = [layer for _ in range(2) for layer in (torch.nn.Linear(512, 512), torch.nn.GELU())]
    return torch.nn.Sequential(*layers).eval(), [torch.randn(64, 512) for _ in range(3)]


def _for_target(deep, **budget):
    pytest.importorskip("triton")
    model, inputs = deep
    made = Budget(calibration=inputs[1:], formats=("bf16", "int8-bf16"), **budget)
    return tilewright.optimize(model, (inputs[0],), target="sm_90", tuning_seconds=0, budget=made)


def test_a_budget_for_another_machine(deep, tmp_path, monkeypatch) -> None:
    """Times are those of the cost model, and the receipt says so; error and bytes are measured."""
    monkeypatch.setattr(places, "timed", None)
    made = _for_target(deep, max_error=2e-2, memory="50%")
    spent, receipt = made.receipt.spent, made.receipt
    assert receipt.target == "sm_90" and receipt.speed is None and receipt.unmeasured[-1].endswith("those of the cost model")
    assert spent.error <= 2e-2 and spent.held_out and spent.bytes <= 0.5 * spent.exact_bytes and receipt.error.ok
    assert spent.bytes == sum(v.nbytes for v in made_weights(made)) and {x.format for x in spent.layers} == {"int8-bf16"}
    assert 0 < spent.seconds < spent.exact_seconds < 1e-3 and spent.attempts[-1].predicted_seconds == pytest.approx(spent.seconds, rel=0.3)
    assert receipt.kernels and all(k.usage for k in receipt.kernels) and any(a.rule == "quantize" for a in receipt.applied)
    assert Receipt.from_json(receipt.to_json()) == receipt
    made.save(tmp_path / "a.tw")
    _for_target(deep, max_error=2e-2, memory="50%").save(tmp_path / "b.tw")
    assert (tmp_path / "a.tw").read_bytes() == (tmp_path / "b.tw").read_bytes()


def test_latency_on_another_machine(deep) -> None:
    """A share is one of what is foretold of the exact model."""
    spent = _for_target(deep, max_error=2e-2, latency="95%").receipt.spent
    assert spent.seconds <= spent.limits["time"] == pytest.approx(0.95 * spent.exact_seconds)
    exact = _for_target(deep, max_error=0.0)
    assert exact.receipt.spent.seconds == spent.exact_seconds and exact.receipt.kernels and exact.receipt.error.ok
    with pytest.raises(CannotOptimize, match="no choice of formats keeps"):
        _for_target(deep, max_error=2e-2, latency="1us")


def test_passes_of_the_users_own_have_no_formats(ids) -> None:
    with pytest.raises(BadOption, match="budget: it does not go together with passes: it runs the default ones"):
        tilewright.optimize(Net().eval(), (ids[0],), passes="canonicalize", budget=Budget(max_error=0.1))


def test_amounts() -> None:
    assert quantity("memory", "50%", 200.0) == 100 and quantity("memory", "1.5MB", 0) == 1.5e6 and quantity("latency", "5 ms", 0) == 5e-3
    assert quantity("memory", 7, 0) == 7 and quantity("memory", None, 0) is None


def test_budgets_of_the_command_line() -> None:
    nothing = dict.fromkeys(("max_error", "memory", "latency", "bits", "bops"))
    assert budget_from(nothing, "latency", "relative", None, []) is None
    made = budget_from({**nothing, "max_error": 0.1, "memory": "50%"}, "memory", "kl", "int8, bf16", [])
    assert made == Budget(0.1, "50%", objective="memory", metric="kl", formats=("int8", "bf16"), calibration=[])
    assert budget_from({**nothing, "max_error": 0.1}, "latency", "relative", None, []).formats == DEFAULT_FORMATS
    with pytest.raises(BadCalibration, match="cannot use --calibration no.npz: there is no such file"):
        budget_from({**nothing, "max_error": 0.1}, "latency", "relative", None, ["no.npz"])
    with pytest.raises(BadOption, match="formats: it is for a budget"):
        budget_from(nothing, "latency", "relative", "int8", [])


def test_command_line(tmp_path, capsys, monkeypatch) -> None:
    path = save_program(tmp_path / "net.pt2", Net(), (torch.randint(0, 300, (4, 16)),))
    assert run(path, "--max-error", 0.05, "--memory", "60%", "--formats", "bf16,int8", "--tune", 0, "-o", tmp_path / "m.tw") == 0
    out = capsys.readouterr().out
    assert "budget" in out and "error (relative)" in out
    assert run(path, "--max-error", 0.05, "--memory", "lots", "-o", tmp_path / "n.tw") == 2
    assert "memory: 'lots' is no amount" in sentence(capsys) and not (tmp_path / "n.tw").exists()
