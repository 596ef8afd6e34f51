"""A limit on intermediate values: kept by patches, whatever was foretold, and refused with what there is."""

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.codegen.program import arena_bytes
from tilewright.driver import measure, places, within
from tilewright.driver.activations import within_activations
from tilewright.driver.compile import Options, compile_graph
from tilewright.driver.errors import BadOption, CannotOptimize
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.pipeline import DEFAULT_PASSES, PREPARING, passes_from
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import interpret
from tilewright.passes.base import Notes, Pass
from tilewright.passes.manager import run_passes
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 24, 2), (24, 24, 1), (24, 32, 2), (32, 48, 2), (48, 64, 2))
        self.body = nn.Sequential(*(m for a, b, s in sizes for m in (nn.Conv2d(a, b, 3, s, 1), nn.ReLU())))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


IMAGE = (1, 3, 96, 96)


def captured(model: nn.Module, *shape: int) -> Graph:
    torch.manual_seed(0)
    return captured_of(export_module("net", model.eval(), Example((torch.randn(shape),), {}, {}))).graph


def activation_passes(graph: Graph, limit) -> tuple[Pass, ...]:
    options, finishing = within_activations(graph, Options(), limit)
    passes = tuple(passes_from(options.passes))
    assert passes == (*PREPARING, *finishing(run_passes(graph, PREPARING, Notes())))
    return passes


def taken(graph: Graph, passes) -> int:
    found = arena_bytes(run_passes(graph, passes, Notes()))
    assert isinstance(found, int)
    return found


@NATIVE
def test_a_share_is_kept():
    graph = captured(Net(), *IMAGE)
    exact = taken(graph, DEFAULT_PASSES)
    passes = activation_passes(graph, "45%")
    made = compile_graph(graph, passes=passes)
    assert made.program.arena_bytes <= 0.45 * exact
    assert any(a.rule == "split-space" and "at a time" in a.what for a in made.receipt.applied)
    x = torch.randn(IMAGE)
    wanted = interpret(graph, [x.double()], dtype=torch.float64)[0]
    torch.testing.assert_close(made.program.run([x])[0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_no_more_arithmetic_than_the_limit_needs():
    graph = captured(Net(), *IMAGE)
    exact = taken(graph, DEFAULT_PASSES)
    much, little = (taken(graph, activation_passes(graph, share)) for share in ("80%", "45%"))
    assert little <= 0.45 * exact < much <= 0.8 * exact


def test_a_limit_in_bytes_that_is_kept_already_changes_nothing():
    graph = captured(Net(), *IMAGE)
    assert activation_passes(graph, "100MB") == DEFAULT_PASSES
    assert activation_passes(graph, taken(graph, DEFAULT_PASSES)) == DEFAULT_PASSES


def test_refused_with_the_least_there_is():
    with pytest.raises(CannotOptimize, match=r"in patches with up to 25% more arithmetic [\d,]+, and 1,000 are allowed") as caught:
        activation_passes(captured(Net(), *IMAGE), 1000)
    assert "mean" in str(caught.value) and "test_activations.py:" in str(caught.value)  # what ends the patches, and where it stands


def test_refused_where_there_is_no_image():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with pytest.raises(CannotOptimize, match="no convolution of an image starts it"):
        activation_passes(captured(model, 64, 16), "10%")


def test_no_amount():
    with pytest.raises(BadOption, match="is no amount"):
        activation_passes(captured(Net(), *IMAGE), "a third")


@NATIVE
def test_optimize_keeps_it_and_measures_the_rest():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(IMAGE)
    exact = tilewright.optimize(model, (x,), tuning_seconds=0).receipt
    made = tilewright.optimize(model, (x,), activations="45%")
    assert int(made.receipt.arena) <= 0.45 * int(exact.arena)
    assert made.receipt.error is not None and made.receipt.error.ours <= made.receipt.error.allowed
    assert made.receipt.speed is not None and not made.receipt.trials
    assert any(a.rule == "split-space" and a.source for a in made.receipt.applied)


def test_with_formats(monkeypatch):
    """Weights in 8 bits are floats again where a convolution reads them, intermediate values: another format is taken."""
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(
        places, "layer_times", lambda layers, formats, *rest: {(x.name, f): 1e-6 for x in layers for f in ("exact", *formats)}
    )
    monkeypatch.setattr(within, "CERTAINTY", 1e9)
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(IMAGE)
    budget = tilewright.Budget(max_error=0.05, formats=("int8", "bf16-bf16"), objective="memory", calibration=[torch.randn(IMAGE)])
    made = tilewright.optimize(model, (x,), tuning_seconds=0, activations="30%", budget=budget)
    spent = made.receipt.spent
    assert int(made.receipt.arena) <= 0.3 * taken(captured(model, *IMAGE), DEFAULT_PASSES)
    assert [a.verdict for a in spent.attempts] == ["declined: over the activations", "kept"] and spent.error <= 0.05
    assert {line.format for line in spent.layers} == {"bf16-bf16"} and spent.bytes < 0.6 * spent.exact_bytes


OTHERS = {"passes": "canonicalize", "target": "sm_90", "remove_padding": True}


@pytest.mark.parametrize("name", OTHERS)
def test_alone_only(name):
    with pytest.raises(BadOption, match="go together with"):
        tilewright.optimize(Net().eval(), (torch.randn(IMAGE),), activations="45%", **{name: OTHERS[name]})
