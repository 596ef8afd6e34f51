"""`tilewright verify`: right artifacts pass, wrong ones are told from them, and bad input is one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tilewright
import torch
from offline import Mlp, Running, run, save_program, sentence
from rich.console import Console
from safetensors.torch import save_file
from support import NATIVE
from tilewright.codegen import lower
from tilewright.driver.budget import Spent
from tilewright.driver.errors import BadOption
from tilewright.driver.inputs import Example
from tilewright.driver.loading import Model, export_module
from tilewright.driver.verify import verify

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An artifact of an Mlp, the program that it was made of, and inputs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Mlp()
    save_program(tmp_path / "mlp.pt2", model, (X,))
    tilewright.optimize(model, (X,), tuning_seconds=0).save("mlp.tw")
    save_file({"x": X}, "x.safetensors")
    return tmp_path


def test_by_its_own_graph(here, capsys) -> None:
    assert run("mlp.tw", "--inputs", "x.safetensors", command="verify") == 0
    said = capsys.readouterr().out
    assert "result" in said and "its graph" in said and "ok" in said and "the model" not in said


def test_by_the_model(here, capsys) -> None:
    assert run("mlp.tw", "--model", "mlp.pt2", command="verify") == 0
    assert "the model" in capsys.readouterr().out
    found = verify(here / "mlp.tw", Example((X,)), export_module("mlp", Mlp(), Example((X,))))
    assert [(line.against, line.ok) for line in found.lines] == [("its graph", True), ("the model", False)], "other weights"
    assert found.culprit == ""


def test_another_model_fails(here, capsys) -> None:
    save_program(here / "other.pt2", Mlp(), (X,))
    assert run("mlp.tw", "-m", "other.pt2", command="verify") == 1
    assert "too far" in capsys.readouterr().out
    assert run("mlp.tw", "-m", "other.pt2", "--max-error", 10, command="verify") == 0


@NATIVE
def test_a_wrong_kernel_is_named(here, monkeypatch, capsys) -> None:
    monkeypatch.setitem(lower.REDUCE_OPS, "sum", "max")
    assert run("mlp.tw", "-i", "x.safetensors", command="verify") == 1
    said = capsys.readouterr().out
    assert "too far" in said and "the first whose own result is wrong: " in said and "layer_norm" in said


def test_what_a_model_updates(here) -> None:
    tilewright.optimize(Running(), (X,), tuning_seconds=0).save("running.tw")
    found = verify(here / "running.tw", Example((X,)), export_module("running", Running(), Example((X,))))
    assert found.ok
    assert [line.output for line in found.lines if line.against == "its graph"] == ["[0]", "[1]", "count (updated)", "average (updated)"]
    assert [line.output for line in found.lines if line.against == "the model"] == ["[0]", "[1]"]


@pytest.fixture
def spent(here):
    """Writes an artifact with slightly other weights and a budget on its receipt; gives the model."""
    torch.manual_seed(0)
    model, near = Mlp(), Mlp()
    near.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()})
    made = tilewright.optimize(near, (X,), tuning_seconds=0)

    def write(metric: str, **limits: float) -> Model:
        budget = Spent(metric, "memory", limits, 0.0, 1, 1, 1.0, 1.0, True)
        replace(made, receipt=replace(made.receipt, spent=budget)).save("near.tw")
        return export_module("model", model, Example((X,)))

    return write


def test_within_the_budget_of_the_receipt(spent) -> None:
    model = spent("relative", error=0.05)
    found = verify(Path("near.tw"), Example((X,)), model)
    (line,) = [line for line in found.lines if line.against == "the model"]
    assert found.ok and line.allowed == 0.05 and line.ours > 1e-3
    assert not verify(Path("near.tw"), Example((X,)), model, 1e-4).ok
    spent("relative", error=1e-4)
    assert not verify(Path("near.tw"), Example((X,)), model).ok


def test_by_the_metric_of_the_receipt(spent, capsys) -> None:
    model = spent("cosine", error=0.01)
    found = verify(Path("near.tw"), Example((X,)), model)
    assert found.ok and found.metric == "cosine" and found.lines[-1].ours < 1e-3
    found.render(Console())
    assert "errors against the model are by cosine" in capsys.readouterr().out


@pytest.mark.parametrize(("metric", "message"), [("loss", "which only its maker can measure"), ("relative", "say how large it may be")])
def test_a_budget_that_cannot_be_held_to(spent, metric, message) -> None:
    model = spent(metric)
    with pytest.raises(BadOption, match=message):
        verify(Path("near.tw"), Example((X,)), model)
    assert verify(Path("near.tw"), Example((X,))).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mlp.tw"], "mlp.tw carries no example inputs"),
        (["none.tw", "-i", "x.safetensors"], "there is no such file"),
        (["mlp.tw", "-i", "y=3x8:f32"], "the model has no argument 'y'"),
        (["mlp.tw", "-i", "x=3x9:f32"], "argument 'x' must be f32[3, 8]"),
        (["mlp.tw", "-i", "x=3x8:i64"], "argument 'x' must be f32[3, 8]"),
        (["mlp.tw", "-i", "x.npz"], "there is no such file"),
        (["mlp.tw", "-m", "none.pt2"], "there is no file none.pt2"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, here, capsys) -> None:
    assert run(*arguments, command="verify") == 2
    assert message in sentence(capsys)
