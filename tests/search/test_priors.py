"""Priors: what LIM and ZD say of blocks and weights, how that agrees with what is measured, and what they prune."""

from __future__ import annotations

import functools

import pytest
import torch
from test_fisher import Transformer, _sensitivity, _spearman
from tilewright.ir.capture import from_exported
from tilewright.passes.base import Notes
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.layers import layers
from tilewright.passes.manager import run_passes
from tilewright.passes.recognize import Recognize
from tilewright.search.priors import important, layer_input_modification, z_share
from tilewright.search.replay import Replay
from tilewright.search.sensitivity import counts


@functools.cache
def _captured(*outputs: float):
    """A transformer whose blocks add so much to what they read; and two batches."""
    torch.manual_seed(0)
    model = Transformer(depth=len(outputs)).eval()
    with torch.no_grad():
        for block, scale in zip(model.blocks, outputs):
            for last in (block.out, block.down):
                last.weight *= scale
                last.bias *= scale
        batches = [[torch.randint(0, 64, (4, 16))] for _ in range(2)]
        program = torch.export.export(model, tuple(batches[0]))
        return run_passes(from_exported(program).graph, [Canonicalize(), Recognize()], Notes()), batches


def test_a_block_that_adds_nothing_matters_least_and_one_that_adds_much_most() -> None:
    graph, batches = _captured(1.0, 0.0, 8.0, 1.0)
    found = list(layer_input_modification(graph, [Replay(graph, batch) for batch in batches]).values())
    assert len(found) == 4 and found[1] == pytest.approx(-1.0) and found[1] == min(found)
    assert found[2] == max(found) and all(-1 <= x <= 1 for x in found)


def test_the_share_of_far_weights() -> None:
    torch.manual_seed(0)
    assert z_share(torch.randn(1000, 1000)) == pytest.approx(0.3173, abs=2e-3)
    assert z_share(torch.randn(1000, 1000) * 5 + 3) == pytest.approx(0.3173, abs=2e-3)
    assert z_share(torch.ones(8, 8)) == 0.0 and z_share(torch.rand(1000, 1000)) == pytest.approx(1 - 3**-0.5, abs=2e-3)


def test_a_quarter_is_important() -> None:
    graph, batches = _captured(1.0, 0.0, 8.0, 1.0)
    found = important(graph, layers(graph), [Replay(graph, batch) for batch in batches])
    assert {name for name, prior in found.items() if prior == "LIM"} == {
        x.name for x in layers(graph) if ".2." in x.name or "_2_" in x.name
    }
    assert list(found.values()).count("LIM") == 4 and len(found) <= 4 + len(layers(graph)) // 4


def test_blocks_that_matter_by_measuring_matter_by_the_prior(tmp_path) -> None:
    """Blocks add 1/8 to 8 times what they did: rank correlation of LIM and the error of two bits in the block. Found: 1."""
    graph, batches = _captured(0.125, 8.0, 0.5, 2.0, 0.25, 4.0)
    found = _sensitivity((graph, batches), tmp_path, "relative")
    effects = found.effects(["int2-g32"])
    modification = layer_input_modification(graph, found.replays)
    errors = [sum(effects[x.name, "int2-g32"].error ** 2 for x in found.layers if x.readers[0] in block.nodes) for block in modification]
    assert _spearman(list(modification.values()), errors) >= 0.9


def test_only_what_has_no_score_is_pruned_and_counted(tmp_path) -> None:
    graph, batches = _captured(1.0, 0.0, 8.0, 1.0)
    names = ["int8", "bf16", "int2-g32"]
    without = _sensitivity((graph, batches), tmp_path, "argmax").effects(names, seconds=0.0)
    pruned = {place for place, e in without.items() if e.pruned}
    assert pruned and {name for _, name in pruned} == {"int2-g32"} and all(without[place].declined for place in pruned)
    told = counts(without)
    assert told["pruned by LIM"] == 4 and told["measured"] + len(pruned) + told.get("declined", 0) == len(without)
    scored = counts(_sensitivity((graph, batches), tmp_path, "relative").effects(names, seconds=0.0))
    assert set(scored) <= {"measured", "estimated", "declined"} and scored["estimated"] > scored["measured"]
    assert "pruned by LIM" not in counts(_sensitivity((graph, batches), tmp_path, "argmax", "other.sqlite").effects(names))
