"""Real architectures cut everywhere, and shared out: the parts in sequence are the graph, to the bit; so are the shards, to rounding."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")

from processes import together
from tilewright.driver.split import BEFORE
from tilewright.ir.analysis.segments import segments
from tilewright.ir.graph import constants
from tilewright.ir.interpret import interpret
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes
from tilewright.passes.manager import run_passes
from tilewright.passes.scatter_norms import ScatterNorms
from tilewright.passes.shard_linears import ShardLinears
from tilewright.passes.split_layers import split
from tilewright.search.metrics import relative_error
from zoo import ZOO, captured

WHOLE = frozenset({"resnet", "mobilenet-v2", "mamba"})
"""Models without two linears in a row, of which nothing is shared out."""


@pytest.fixture(scope="module", params=ZOO)
def prepared(request):
    graph, given = captured(request.param, ZOO[request.param])
    with torch.no_grad():
        return request.param, run_passes(graph, BEFORE, Notes()), list(given.values())


def test_parts_in_sequence_are_the_graph(prepared):
    _, graph, flat = prepared
    found = segments(graph)
    assert len(found.cuts) >= 4  # of two layers: the embedding, each layer, the last norm
    with torch.no_grad():
        wanted = interpret(graph, flat)
        for at in (range(len(found.cuts)), [len(found.cuts) // 2]):
            values = flat
            for part in split(found, at):
                verify(part.graph)
                values = interpret(part.graph, values)
            for a, b in zip(wanted, values, strict=True):
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_shards_together_are_the_graph(prepared, monkeypatch):
    name, graph, flat = prepared
    made = [ScatterNorms(rank, 2).run(ShardLinears(rank, 2).run(graph)) for rank in range(2)]
    for one in made:
        verify(one)
    held = [sum(d.value.nbytes for d in constants(g).values()) for g in (graph, *made)]
    assert held[1] == held[2] <= held[0] * (1.0 if name in WHOLE else 0.95)
    with torch.no_grad():
        wanted = interpret(graph, flat)
    for outputs in together(made, flat, monkeypatch):
        for a, b in zip(wanted, outputs, strict=True):
            if torch.is_tensor(a):
                assert relative_error(b, a.double()) < 1e-5 if a.is_floating_point() else torch.equal(a, b)
