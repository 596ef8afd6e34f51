"""Every provider forced in turn: who computes contractions, attentions, windows and recurrences changes no result; nor does the CPU."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.codegen import build
from tilewright.codegen.cpp import toolchain
from tilewright.codegen.cpp.schedule import CpuTarget, detect_target
from tilewright.driver import pipeline
from tilewright.driver.accuracy import check, reference_outputs
from tilewright.driver.receipt import Receipt
from tilewright.passes import fuse_regions, fusion_units
from tilewright.passes.pack_weights import PackWeights
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")

from zoo import ZOO

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Patch = pytest.MonkeyPatch
Given = tuple[nn.Module, dict[str, Any]]


# ---- models


def from_zoo(name: str) -> Callable[[], Given]:
    def make() -> Given:
        model, inputs = ZOO[name]()
        return model, inputs(2, 12)

    return make


class Tagger(nn.Module):
    """A recurrence in both directions and a head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(12, 20, bidirectional=True, batch_first=True), nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.head(self.layers(x)[0].relu())}


class Step(nn.Module):
    """A step of decoding: few rows read large weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x + self.down(nn.functional.silu(self.up(self.norm(x))))}


def tagger(kind: type[nn.RNNBase]) -> Callable[[], Given]:
    return lambda: (Tagger(kind).eval(), {"x": torch.randn(3, 7, 12)})


MODELS: dict[str, Callable[[], Given]] = {
    **{name: from_zoo(name) for name in ("bert", "llama", "convnext", "resnet")},
    "lstm": tagger(nn.LSTM), "gru": tagger(nn.GRU), "step": lambda: (Step().eval(), {"x": torch.randn(3, 1, 128)}),
}  # fmt: skip


def compare(name: str, freeze: bool) -> Receipt:
    """Compiles a model, checks what it returns by the float64 rule, and gives its receipt."""
    torch.manual_seed(0)
    model, given = MODELS[name]()
    start = len(tilewright.receipts())
    compiled = torch.compile(model, backend="tilewright", options={"freeze": freeze, "verify": True})
    with torch.no_grad():
        ours = [dict(compiled(**given).items()) for _ in range(2)]
        eager, exact = dict(model(**given).items()), dict(reference_outputs(copy.deepcopy(model), (), given).items())
    for found in ours:
        result = check(found, eager, exact)
        assert result.ok, str(result)
    (receipt,) = tilewright.receipts()[start:]
    assert not receipt.failure
    return receipt


# ---- providers


def libraries_contractions(patch: Patch) -> None:
    patch.setattr(pipeline, "DEFAULT_PASSES", tuple(p for p in pipeline.DEFAULT_PASSES if not isinstance(p, PackWeights)))
    patch.setattr(fusion_units, "is_native", lambda node: False)


def libraries_packed_contractions(patch: Patch) -> None:
    """Weights are panels, which the library reads through the view of them."""
    patch.setattr(fusion_units, "is_native", lambda node: False)


def libraries_attention(patch: Patch) -> None:
    patch.setattr(fusion_units, "is_native_attention", lambda node: False)
    patch.setattr(fusion_units, "merging_reshapes", lambda nodes, readers, roots: set())


def libraries_windows(patch: Patch) -> None:
    patch.setattr(fusion_units, "is_native_window", lambda node: False)


def eager_recurrences(patch: Patch) -> None:
    patch.setattr(fuse_regions, "recurrence_region", lambda node, operands, rule: node.with_inputs(tuple(operands)))


def ours(patch: Patch) -> None:
    """What passes choose by themselves."""


LINEARS, ATTENTIONS, WINDOWS = {"linear", "matmul", "conv"}, {"attention"}, {"conv", "max_pool", "avg_pool"}
BOTH = (False, True)
FORCED: dict[str, tuple[Callable[[Patch], None], set[str], tuple[str, ...], tuple[bool, ...]]] = {
    "contractions": (libraries_contractions, LINEARS, ("bert", "convnext", "resnet"), (True,)),
    "packed contractions": (libraries_packed_contractions, LINEARS, ("bert", "convnext"), (True,)),
    "few rows": (libraries_packed_contractions, LINEARS, ("step",), BOTH),
    "attention": (libraries_attention, ATTENTIONS, ("bert", "llama"), BOTH),
    "windows": (libraries_windows, WINDOWS, ("convnext", "resnet"), BOTH),
    "recurrences": (eager_recurrences, {"lstm_layer", "gru_layer"}, ("lstm", "gru"), BOTH),
}
"""What -> how to force it on the library, the ops it is about, the models that have them, and whether those are frozen: without that the
library has nearly all contractions already."""


def by_torch(receipt: Receipt, names: set[str]) -> int:
    """How many of these ops the library, or torch op by op, runs."""
    return sum(c.node in names for c in (*receipt.library, *receipt.fallbacks))


@NATIVE
@pytest.mark.parametrize("what, name, freeze", [(w, n, f) for w, (_, _, names, modes) in FORCED.items() for n in names for f in modes])
def test_the_library(what: str, name: str, freeze: bool, monkeypatch: Patch) -> None:
    force, ops, *_ = FORCED[what]
    force(monkeypatch)
    assert by_torch(compare(name, freeze), ops)


@NATIVE
@pytest.mark.parametrize("name", MODELS)
def test_ours(name: str) -> None:
    """Frozen, all products and attentions are kernels of ours."""
    receipt = compare(name, freeze=True)
    assert not receipt.fallbacks
    assert not by_torch(receipt, {"linear", "matmul", "attention"})


# ---- machines


@NATIVE
@pytest.mark.parametrize("target", [CpuTarget(32, level="x86-64-v3"), CpuTarget(16, level="x86-64-v2")], ids=lambda t: t.level)
@pytest.mark.parametrize("name", ["bert", "llama", "convnext", "lstm", "step"])
def test_cpus_without_wide_vectors(name: str, target: CpuTarget, monkeypatch: Patch) -> None:
    if detect_target().vector_bytes < target.vector_bytes:
        pytest.skip("not on this CPU")
    monkeypatch.setattr(toolchain, "detect_target", lambda: target)
    assert not compare(name, freeze=True).fallbacks


@pytest.mark.parametrize("name, freeze", [("bert", False), ("step", False), *((name, True) for name in MODELS)])
def test_without_a_compiler(name: str, freeze: bool, monkeypatch: Patch, tmp_path: Any) -> None:
    """Everything runs by torch, packed weights too; one warning says so, and the receipt lists what."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    build._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        receipt = compare(name, freeze)
    assert sum("no C++ compiler" in str(w.message) for w in caught) == 1
    assert not receipt.kernels and receipt.fallbacks
    assert all("no C++ compiler" in f.reason for f in receipt.fallbacks)
