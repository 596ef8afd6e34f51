"""simplify: fewer tokens and blocks keep the error that is allowed, on inputs held out; what is not worth it stays exact."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tilewright
import torch
from offline import run, sentence
from rich.console import Console
from tilewright.driver import measure, simplify
from tilewright.driver.errors import BadOption
from tilewright.driver.receipt import Receipt
from tilewright.ir.graph import order
from tilewright.search.device import Device
from tilewright.search.metrics import METRICS, UnknownMetric
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from digits_bits import ViT, train, wrong

DEVICE = Device("a machine", 1, 1, 1e10, 1e10, {"float32": 1e11}, ())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times are not what decides here: nothing depends on how fast this machine is."""
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(simplify, "this_device", lambda: DEVICE)
    monkeypatch.setattr(simplify, "CERTAINTY", 1e9)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits():
    """A ViT that knows digits, trained for a moment; images and labels to judge by."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    model = train(ViT(32), images[:1200], labels[:1200], 6)
    return model, images, labels


def _batches(images, count=4, size=64):
    return [images[i * size : (i + 1) * size] for i in range(count)]


def _simplified(digits, max_error, **options):
    model, images, _ = digits
    first, *others = _batches(images)
    return tilewright.simplify(model, (first,), max_error=max_error, calibration=[(x,) for x in others], **options)


def _lengths(made):
    return [int(n.shape[-2]) for n in order(made.graph) for n in _inside(n) if n.op.name == "attention"]


def _inside(node):
    body = node.attrs.get("body")
    return [node] if body is None else order(body)


def test_tokens_are_merged_within_the_error(digits) -> None:
    model, images, labels = digits
    made = _simplified(digits, 0.1)
    spent = made.receipt.spent
    assert 0 < spent.error <= 0.1 and spent.held_out and spent.limits == {"error": 0.1}
    assert min(_lengths(made)) < 16 and any(a.rule == "merge-tokens" for a in made.receipt.applied)
    held = _batches(images)[-1]
    assert METRICS["relative"]([made(held)], [model(held).detach()]) == pytest.approx(spent.error, rel=1e-2)
    # what is reported to a user: accuracy before and after, and both times
    judged = images[1200:1264], labels[1200:1264]
    drop = wrong(*judged)(made) - wrong(*judged)(model)
    assert drop <= 0.1 and spent.seconds > 0 and spent.exact_seconds > 0
    (trial,) = [t for t in made.receipt.trials if "merge" in t.what]
    assert trial.kept and trial.with_it == spent.seconds


def test_more_error_more_tokens(digits) -> None:
    few, many = (_simplified(digits, e) for e in (0.02, 0.3))
    assert few.receipt.spent.error <= 0.02 and sum(_lengths(many)) < sum(_lengths(few)) <= 48


def test_nothing_is_allowed_nothing_is_done(digits) -> None:
    made = _simplified(digits, 0.0, rewrites=("merge-tokens", "remove-blocks", "share-blocks"))
    assert set(_lengths(made)) == {16} and made.receipt.spent.error < 1e-5 and made.receipt.error.ok
    assert made.receipt.trials[-1].note.startswith("not done: of those that save time the best errs ")


def test_blocks_are_removed(digits) -> None:
    model, images, _ = digits
    made = _simplified(digits, 0.9, rewrites=("remove-blocks",))
    spent = made.receipt.spent
    assert spent.error <= 0.9 and spent.bytes < spent.exact_bytes and any("is left out" in a.what for a in made.receipt.applied)
    assert made(images[:64]).shape == (64, 10)


def test_weights_are_shared_for_memory(digits) -> None:
    made = _simplified(digits, 1.5, rewrites=("share-blocks",), objective="memory")
    spent = made.receipt.spent
    assert spent.bytes < spent.exact_bytes and any("computes with" in a.what for a in made.receipt.applied)


def test_together(digits) -> None:
    made = _simplified(digits, 1.0, rewrites=("merge-tokens", "remove-blocks"))
    rules = {a.rule for a in made.receipt.applied}
    assert {"merge-tokens", "prune-blocks"} <= rules and made.receipt.spent.error <= 1.0


def test_errors_that_do_not_add_up_are_repaired(digits, monkeypatch) -> None:
    """Predictions that are ten times too good: measuring finds out, and less is allowed."""
    real = simplify.Rewrites.choices

    def hopeful(self, effects, power):
        small = [{name: type(e)(e.error / 10, e.seconds, e.bytes) for name, e in here.items()} for here in effects]
        return real(self, small, power)

    monkeypatch.setattr(simplify.Rewrites, "choices", hopeful)
    spent = _simplified(digits, 0.05).receipt.spent
    assert spent.attempts[0].verdict == "declined: over the error" and spent.error <= 0.05


def test_what_is_slower_stays_exact(digits, monkeypatch) -> None:
    monkeypatch.setattr(simplify, "CERTAINTY", -1e9)
    made = _simplified(digits, 0.1)
    assert set(_lengths(made)) == {16} and not made.receipt.trials[-1].kept and made.receipt.spent.error < 1e-5


def test_a_class_token_is_protected() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 1024, 0.0, batch_first=True, norm_first=True)

        def forward(self, x):
            return self.layer(x)[:, 0]

    x = torch.randn(2, 33, 16)
    made = tilewright.simplify(First().eval(), (x,), max_error=1e-5, protected=1)
    assert made.receipt.spent.error <= 1e-5 and min(_lengths(made)) == 33
    assert any("tokens" in a.what for a in made.receipt.applied)  # behind the only attention, where the first token does not see it


def test_receipts_are_kept_and_shown(digits) -> None:
    made = _simplified(digits, 0.1)
    assert Receipt.from_json(made.receipt.to_json()) == made.receipt
    console = Console(width=120, record=True, file=io.StringIO())
    made.receipt.render(console)
    assert "error (relative)" in console.export_text()


def test_kernels_over_the_error_are_not_returned(digits, monkeypatch) -> None:
    """Whatever the interpreter said."""
    real = simplify.compile_graph

    def off(*args):
        made = real(*args)
        return replace(made, program=SimpleNamespace(run=lambda inputs: [x + 1 for x in made.program.run(inputs)]))

    monkeypatch.setattr(simplify, "compile_graph", off)
    made = _simplified(digits, 0.1)
    assert set(_lengths(made)) == {16} and made.receipt.spent.error < 1e-5
    assert made.receipt.trials[-1].note.startswith("not done: its kernels err")


def test_why_nothing_is_done_is_on_the_receipt() -> None:
    made = tilewright.simplify(nn.Linear(4, 4), (torch.randn(2, 4),), max_error=1e9, rewrites=("remove-blocks",), objective="memory")
    (trial,) = made.receipt.trials
    assert not trial.kept and trial.note == "not done: there is nothing that it could be done to"


def test_a_refusal_is_on_the_receipt_of_the_exact_model() -> None:
    class Causal(nn.Module):
        def forward(self, x):
            h = x.unflatten(-1, (2, 8)).transpose(1, 2)
            return x + nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2).flatten(2)

    made = tilewright.simplify(Causal(), (torch.randn(2, 16, 16),), max_error=0.5)
    assert any(r.rule == "merge-tokens" for r in made.receipt.refused)


NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        for block, scale in zip(self.blocks, (0.01, 1.0)):
            x = x + scale * block(x)
        return x

def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(8, 16),)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    np.savez(tmp_path / "a.npz", x=np.ones((8, 16), np.float32))
    np.savez(tmp_path / "short.npz", x=np.ones((8, 15), np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_by_the_command(nets, capsys) -> None:
    options = ("--rewrites", "merge-tokens, remove-blocks", "--objective", "memory", "--calibration", "a.npz", "--json", "r.json")
    assert run("nets:net", "--max-error", 0.05, *options, "--levels", "none", command="simplify") == 0
    said = capsys.readouterr().out
    assert "blocks.0 removed" in said and "wrote net.tw" in said and "held-out inputs" in said
    receipt = Receipt.from_json((nets / "r.json").read_text())
    assert 0 < receipt.spent.error <= 0.05 and receipt.spent.bytes < 0.6 * receipt.spent.exact_bytes
    assert receipt.before is not None and len(receipt.before.rows) > len(receipt.after.rows)
    assert run("net.tw", "--model", "nets:net", command="verify") == 0
    assert tilewright.load("net.tw")(torch.ones(8, 16)).shape == (8, 16)


@pytest.mark.parametrize("options,words", [
    ([], "Missing option '--max-error'"), (["--max-error", "-1"], "'--max-error'"), (["--max-error", "nan"], "max"),
    (["--max-error", "1", "--rewrites", "fewer-layers"], "there is no 'fewer-layers'"),
    (["--max-error", "1", "--objective", "error"], "there are latency, memory"),
    (["--max-error", "1", "--metric", "luck"], "there is no error metric 'luck'"),
    (["--max-error", "1", "--protected", "-1"], "'--protected'"),
    (["--max-error", "1", "--calibration", "none.npz"], "cannot use --calibration none.npz: there is no such file"),
    (["--max-error", "1", "--calibration", "short.npz"], "cannot use --calibration input 1: argument 'x' must be"),
    (["--max-error", "1", "-o", "."], "it is a directory"), (["--max-error", "1", "--levels", "v9"], "v9"),
])  # fmt: skip
def test_bad_options_of_the_command(nets, capsys, options, words) -> None:
    assert run("nets:net", *options, command="simplify") == 2
    assert words in sentence(capsys) and not list(nets.glob("*.tw"))


@pytest.mark.parametrize("option,value,words", [
    ("max_error", "5%", "it is a number from 0 on, not '5%'"),
    ("rewrites", "merge-tokens", "it is a tuple of names"),
    ("rewrites", ("fewer-layers",), "there is no 'fewer-layers'; there are merge-tokens, remove-blocks, share-blocks"),
    ("objective", "beauty", "there is no 'beauty'; there are latency, memory"), ("max_error", -1.0, "from 0 on"),
    ("protected", -1, "from 0 on"),
])  # fmt: skip
def test_what_cannot_be_meant(option, value, words) -> None:
    with pytest.raises(BadOption, match=words):
        tilewright.simplify(nn.Linear(4, 4), (torch.randn(2, 4),), **{"max_error": 0.1, option: value})
    with pytest.raises(UnknownMetric):
        tilewright.simplify(nn.Linear(4, 4), (torch.randn(2, 4),), max_error=0.1, metric="luck")
