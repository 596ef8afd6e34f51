"""A limit on intermediate values: kept by patches, whatever was foretold, and refused with what there is."""

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.codegen.program import arena_bytes
from tilewright.driver.activations import activation_passes
from tilewright.driver.compile import compile_graph
from tilewright.driver.errors import BadOption, CannotOptimize
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.pipeline import DEFAULT_PASSES
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import interpret
from tilewright.passes.base import Notes
from tilewright.passes.manager import parse_passes, pass_text, run_passes
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


def test_passes_can_be_written_as_text():
    passes = activation_passes(captured(Net(), *IMAGE), "50%")
    assert parse_passes(",".join(map(pass_text, passes))) == list(passes)


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


OTHERS = {"passes": "canonicalize", "target": "sm_90", "budget": tilewright.Budget(max_error=0.1), "remove_padding": True}


@pytest.mark.parametrize("name", OTHERS)
def test_alone_only(name):
    with pytest.raises(BadOption, match="go together with"):
        tilewright.optimize(Net().eval(), (torch.randn(IMAGE),), activations="45%", **{name: OTHERS[name]})
