"""prune-blocks: the units of a model are found, each one leaves or shares its weights, and what cannot be is said."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.analysis.residuals import units
from tilewright.ir.graph import constants
from tilewright.ir.interpret import interpret
from tilewright.ir.reasons import Reason
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Exactness
from tilewright.passes.manager import parse_passes, pass_text
from tilewright.passes.prune_blocks import PruneBlocks


def _mlp(i: int, x: str, y: str, kind: str = "relu") -> list[str]:
    return [
        f"n{i} = layer_norm({x}, g{i}, axes=1, eps=1e-05)",
        f"a{i} = linear(n{i}, w{i})",
        f"r{i} = {kind}(a{i})",
        f"b{i} = linear(r{i}, v{i}, c{i})   # m.py:{i} block.{i}.mlp",
        f"{y} = add({x}, b{i})",
    ]


def _parameters(*units: int) -> list[str]:
    return [f'{name}{i} = constant "{name}{i}"' for i in units for name in "wvgc"]


TEXT = body("x: f32[3, 8]", *_parameters(0, 1, 2), *_mlp(0, "x", "y"), *_mlp(1, "y", "z"), *_mlp(2, "z", "u"), "u")


def _values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"w": (16, 8), "v": (8, 16), "g": (8,), "c": (8,)}
    return {f"{name}{i}": torch.randn(shape) for i in range(3) for name, shape in shapes.items()}


def test_units() -> None:
    found = units(parse(TEXT, _values()))
    assert [(u.name, u.kind, u.kept.hint, u.result.hint) for u in found] == [
        ("block.0.mlp", "mlp", "x", "y"), ("block.1.mlp", "mlp", "y", "z"), ("block.2.mlp", "mlp", "z", "u"),
    ]  # fmt: skip
    assert len({u.digest for u in found}) == 1
    for a, b in zip(found[0].branch, found[1].branch, strict=True):
        assert a.op is b.op and a.type == b.type


NO_UNITS = {
    "sum of two branches": (["a = linear(x, w0)", "b = linear(x, v0)", "y = add(a, b)"], (8, 8)),
    "nothing is multiplied": (["a = relu(x)", "y = add(x, a)"], (8, 8)),
    "other sizes": (["s = mean(x, dims=[0], keepdim=true)", "a = linear(x, w0)", "t = mean(a, dims=[0], keepdim=true)",
                     "r = linear(s, v0)", "q = add(t, s)", "y = add(q, a)"], (8, 8)),
    "twice the same": (["a = linear(x, w0)", "y = add(a, a)"], (8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_UNITS)
def test_no_units(case: str) -> None:
    lines, shape = NO_UNITS[case]
    text = body("x: f32[3, 8]", *(f'{n}0 = constant "{n}0"' for n in "wv"), *lines, "y")
    assert not units(parse(text, {n: torch.randn(shape) for n in ("w0", "v0")}))


def test_only_innermost_units_count() -> None:
    text = body("x: f32[3, 8]", *_parameters(0, 1), *_mlp(0, "x", "y"), *_mlp(1, "y", "z"), "u = add(x, z)", "u")
    assert [u.name for u in units(parse(text, _values()))] == ["block.0.mlp", "block.1.mlp"]


def test_units_without_modules_have_names() -> None:
    text = body("x: f32[3, 8]", 'w = constant "w"', "a = linear(x, w)", "y = add(a, x)", "b = linear(y, w)", "z = add(y, b)", "z")
    found = units(parse(text, {"w": torch.randn(8, 8)}))
    assert [u.name for u in found] == ["linear_0", "linear_1"]


def test_a_removed_unit_is_gone() -> None:
    old, new, notes = run(PruneBlocks(removed=("block.1.mlp",)), TEXT, _values())
    assert_becomes(new, body("x: f32[3, 8]", *(f'{n}{i} = constant "{n}{i}" : f32[{s}]' for i in (0, 2) for n, s in _SHAPES.items()),
                             *_mlp(0, "x", "y"), *_mlp(2, "y", "u"), "u"))  # fmt: skip
    verify(new)
    assert [a.what for a in notes.applied] == ["block.1.mlp is left out"] and not notes.declined


_SHAPES = {"w": "16, 8", "v": "8, 16", "g": "8", "c": "8"}


def test_shared_weights_are_those_of_the_first() -> None:
    values = _values()
    old, new, notes = run(PruneBlocks(shared=("block.1.mlp", "block.2.mlp")), TEXT, values)
    verify(new)
    assert sorted(constants(new)) == ["c0", "c1", "c2", "g0", "g1", "g2", "v0", "w0"] and len(notes.applied) == 2
    same = values | {f"{name}{i}": values[f"{name}0"] for name in "wv" for i in (1, 2)}
    assert_same_values(parse(TEXT, same), new, [torch.randn(3, 8)])


def test_removed_and_shared_together() -> None:
    values = _values()
    _, new, _ = run(PruneBlocks(removed=("block.0.mlp",), shared=("block.1.mlp",)), TEXT, values)
    text = body("x: f32[3, 8]", *_parameters(0, 1, 2), *_mlp(1, "x", "z"), *_mlp(2, "z", "u"), "u")
    assert_same_values(parse(text, values | {"w1": values["w0"], "v1": values["v0"]}), new, [torch.randn(3, 8)])


def test_a_unit_whose_branch_is_zero_can_go() -> None:
    values = _values() | {"v1": torch.zeros(8, 16), "c1": torch.zeros(8)}
    old, new, _ = run(PruneBlocks(removed=("block.1.mlp",)), TEXT, values)
    assert_same_values(old, new, [torch.randn(3, 8)])


def test_refused() -> None:
    other = body("x: f32[3, 8]", *_parameters(0, 1), *_mlp(0, "x", "y"), *_mlp(1, "y", "z", "gelu"), "z")
    old, new, notes = run(PruneBlocks(shared=("block.1.mlp", "block.0.mlp")), other, _values())
    assert new is old and refusals(notes) == {("prune-blocks", Reason.SHAPE_MISMATCH)} and len(notes.declined) == 2
    old, new, notes = run(PruneBlocks(removed=("elsewhere",)), TEXT, _values())
    assert new is old and "there is no such unit; there are block.0.mlp" in notes.declined[0].value


def test_nothing_is_asked_nothing_is_done() -> None:
    old, new, notes = run(PruneBlocks(), TEXT, _values())
    assert new is old and not notes.applied and PruneBlocks.exactness is Exactness.BOUNDED


def test_on_the_command_line() -> None:
    (item,) = parse_passes("prune-blocks{removed=a.mlp b.attention, shared=c.mlp}")
    assert item == PruneBlocks(("a.mlp", "b.attention"), ("c.mlp",)) and parse_passes(pass_text(item)) == [item]


def test_outputs_of_a_removed_unit() -> None:
    text = body("x: f32[3, 8]", *_parameters(0), *_mlp(0, "x", "y"), "y")
    _, new, _ = run(PruneBlocks(removed=("block.0.mlp",)), text, _values())
    x = torch.randn(3, 8)
    assert torch.equal(interpret(new, [x])[0], x)
