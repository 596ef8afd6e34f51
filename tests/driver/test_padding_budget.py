"""Few bits and no padding: both programs keep the limits, each where it runs, and are the graph that the budget chose."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tilewright
import torch
from offline import run, save_program
from support import NATIVE
from test_padding import DYNAMIC, SMALL, ids_like, mask_of
from tilewright.driver import measure, packed, packing, places, within
from tilewright.driver.budget import Budget
from tilewright.driver.inputs import Example
from tilewright.driver.loading import export_module
from tilewright.driver.memory import constant_bytes
from tilewright.driver.padding import Way
from tilewright.driver.verify import verify
from tilewright.ir.graph import constants, order
from tilewright.search.layer_times import EXACT
from tilewright.search.metrics import relative_error
from torch import nn

transformers = pytest.importorskip("transformers")
pytestmark = NATIVE

FORMATS = ("int8", "int8-dynamic")
CHEAP = {EXACT: 3.0, "int8": 2.0, "int8-dynamic": 1.8, "int4-g32": 1.5}
EXAMPLE, *CALIBRATION = (mask_of(lengths) for lengths in ([24, 5, 9, 1], [20, 24, 4, 9], [24, 3, 2, 7]))


class Encoder(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = transformers.BertConfig(**{**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 24})
        self.encoder = transformers.BertModel(sizes, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Times are given, not measured: nothing here depends on how fast this machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MEASURE_SECONDS", 0.01)
        patch.setattr(packing, "MEASURE_SECONDS", 0.01)
        patch.setattr(places, "layer_times", _times)
        patch.setattr(within, "CERTAINTY", 1e9)
        patch.setattr(within, "LEAST_WEIGHTS", 512)
        yield


def _times(layers, formats, *rest):
    return {(layer.name, name): CHEAP[name] * 1e-9 * layer.nbytes for layer in layers for name in (EXACT, *formats)}


def _optimized(dynamic=None, **budget):
    calibration = [(ids_like(mask), mask) for mask in CALIBRATION]
    limits = Budget(**{"max_error": 2e-2, "formats": FORMATS, "calibration": calibration, **budget})
    args = (ids_like(EXAMPLE), EXAMPLE)
    return tilewright.optimize(Encoder().eval(), args, dynamic=dynamic, tuning_seconds=0, remove_padding=True, budget=limits)


@pytest.fixture(scope="module")
def encoder():
    """Optimized, packed wherever it may be; and the captured graph and that in formats."""
    seen = []
    real = places.with_packing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "with_packing", lambda *args: seen.append((args[1].graph, args[-1])) or real(*args))
        made = _optimized(DYNAMIC, memory="40%")
    assert made.unpadded is not None, made.receipt.refused
    return replace(made, unpadded=made.unpadded.whenever_possible()), *seen[-1]


def test_the_error_is_kept_at_tokens(encoder):
    made, mask = encoder[0], CALIBRATION[-1]
    spent, ids, there = made.receipt.spent, ids_like(mask), mask.bool()
    with torch.no_grad():
        ours, exact = made(ids, mask), Encoder().eval().double()(ids, mask)
        padded = made.program.run([ids, mask])[0]
    assert made.unpadded.statistic() == {Way.PACKED.value: 1} and not ours[~there].any()
    errors = relative_error(ours[there], exact[there]), relative_error(padded, exact)
    assert max(errors) == pytest.approx(spent.error, rel=1e-3) and spent.error <= 2e-2 and spent.held_out
    assert relative_error(ours[there], padded[there]) < 1e-4  # the formats are those of the budget, no others
    assert made.receipt.error.ours <= made.receipt.error.allowed == 2e-2


def test_weights_are_there_once_and_limited(encoder):
    made = encoder[0]
    assert _bytes(made) == made.receipt.spent.bytes <= 0.4 * made.receipt.spent.exact_bytes


def _bytes(made) -> int:
    graphs = made.graph, made.unpadded.plan.graph
    return sum({d.value.data_ptr(): d.value.nbytes for graph in graphs for d in constants(graph).values()}.values())


def test_the_receipt_names_both(encoder):
    made = encoder[0]
    assert {"quantize", "remove-padding"} <= {a.rule for a in made.receipt.applied}
    assert {line.format for line in made.receipt.spent.layers} & set(FORMATS)
    assert [t.what for t in made.receipt.trials] == [packing.MEASURED]
    assert made.plan is not None and any(kind != EXACT for _, kind in made.plan.entries)


def test_an_artifact_keeps_both(encoder, tmp_path):
    made = encoder[0]
    made.save(tmp_path / "m.tw", levels=())
    loaded, ids = tilewright.load(tmp_path / "m.tw"), ids_like(EXAMPLE)
    assert torch.equal(loaded(ids, EXAMPLE), made(ids, EXAMPLE)) and loaded.unpadded.statistic() == {Way.PACKED.value: 1}
    assert constant_bytes(loaded.unpadded.plan.graph, beside=loaded.graph) == 0
    example = Example((ids, EXAMPLE), {}, DYNAMIC)
    found = verify(tmp_path / "m.tw", example, export_module("encoder", Encoder().eval(), example))
    own, own_rows, whole, rows = found.lines
    assert (own.against, own_rows.against) == ("its graph", "its graph without padding")
    assert (whole.against, rows.against) == ("the model", "the model, at tokens") and rows.ok and rows.allowed == whole.allowed == 2e-2
    assert rows.ours != whole.ours and rows.ours > 10 * rows.eager


def test_what_cannot_be_packed_has_its_budget(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    program, options = save_program(tmp_path / "m.pt2", model, (torch.randn(4, 64),)), ("--remove-padding", "--tune", 0, "--max-error", 0.1)
    assert run(program, "-o", tmp_path / "m.tw", *options, "--formats", "int8", "--objective", "memory", "--levels", "none") == 0
    made = tilewright.load(tmp_path / "m.tw")
    assert made.unpadded is None and {line.format for line in made.receipt.spent.layers} == {"int8"}
    assert [r.value for r in made.receipt.refused if r.rule == "remove-padding"] == ["there is no attention"]


def _wrong(made, by: float, at_padding: bool = False):
    """A program whose results are off, at tokens or where padding stands."""

    def run(inputs):
        (x,) = made.program.run(list(inputs))
        there = inputs[1].bool()[..., None]
        return [torch.where(there == at_padding, x, x + by * x.abs().amax())]

    return replace(made, program=SimpleNamespace(run=run))


@pytest.mark.parametrize("at_padding", [False, True])
def test_a_program_that_computes_something_else_is_found(encoder, at_padding):
    """Though it is off by less than the budget allows, and inputs that are rounded may go either way."""
    made, captured, formatted = encoder
    inputs = [ids_like(EXAMPLE), EXAMPLE]
    assert any(n.op.name == "quantize_rows" for n in order(formatted))
    assert packing.packed_error(captured, formatted, made.unpadded, inputs).ok
    assert not packing.packed_error(captured, None, made.unpadded, inputs).ok  # it computes the formats, not the model
    off = packing.packed_error(captured, formatted, _wrong(made.unpadded, 2e-3, at_padding), inputs)
    assert not off.ok and (at_padding or off.ours < 2e-2)


def test_candidates_are_judged_by_what_runs(monkeypatch):
    """A program without padding is over the error, in the first formats that are tried: others are taken."""
    real = places.with_packing
    worse = []

    def once_worse(*args):
        found = real(*args)
        if worse:
            return found
        worse.append(str(found.graph))
        return replace(found, unpadded=_wrong(found.unpadded, 0.1))

    monkeypatch.setattr(places, "with_packing", once_worse)
    made = _optimized()
    first, *others = made.receipt.spent.attempts
    assert first.verdict == "declined: over the error" and first.error > 2e-2 >= others[-1].error and str(made.graph) not in worse


def test_weights_that_are_not_shared_count(monkeypatch):
    def apart(graph, other):
        for name, data in constants(graph).items():
            data.name = f"{name}.rows"

    monkeypatch.setattr(packed, "share_constants", apart)
    made = _optimized(memory="80%")
    assert constant_bytes(made.graph) < made.receipt.spent.bytes == _bytes(made) <= 0.8 * made.receipt.spent.exact_bytes
