"""`tilewright diff`: what differs is named, what is equal is not, and the exit status says which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from offline import Mlp, run, save_program, sentence
from receipts import HOSTILE, full
from tilewright.driver import measure
from tilewright.driver.budget import Spent
from tilewright.driver.difference import Difference, differences
from tilewright.driver.receipt import KernelLine, Receipt, Refusal, Speed
from tilewright.passes.base import Applied


def _with(**fields: object) -> Receipt:
    return replace(full(), **fields)


def _spent(**fields: object) -> Spent:
    spent = full().spent
    assert spent is not None
    return replace(spent, **fields)


A = full()
assert A.spent
KERNEL = KernelLine("k7_softmax", "softmax", (), 1, 2, 10, 10)
CASES = {
    "another speed": (_with(speed=Speed(0.06, 0.03, 9)), ("speed", "a call", "20 ms", "30 ms, 1.5x slower")),
    "no speed": (_with(speed=None), ("speed", "a call", "20 ms", "-")),
    "another error": (_with(spent=_spent(error=2e-3)), ("error", "by relative", "0.008", "0.002")),
    "more bytes": (_with(arena="2097152"), ("bytes", "arena", "1.05 MB", "2.1 MB")),
    "another limit": (_with(spent=_spent(limits=A.spent.limits | {"error": 0.5})), ("limits", "error", "0.01", "0.5")),
    "another format": (
        _with(spent=_spent(layers=(replace(A.spent.layers[0], format="bf16"), *A.spent.layers[1:]))),
        ("formats", "encoder.0", "exact", "bf16"),
    ),
    "a kernel more": (_with(kernels=(*A.kernels, KERNEL)), ("kernels", "softmax", "-", "2 calls")),
    "a kernel less": (_with(kernels=A.kernels[:1]), ("kernels", "gelu", "6 calls", "-")),
    "a call less": (_with(library=A.library[:1]), ("library", "linear", "2 calls", "1 call")),
    "nothing by eager": (_with(fallbacks=()), ("eager", "encoder, because no native form", "1 time", "-")),
    "rolled back": (_with(trials=(replace(A.trials[0], kept=False), *A.trials[1:])), ("measured", "encoder", "kept", "rolled back")),
    "a rewrite": (_with(applied=(*A.applied, Applied("recognize", "rope"))), ("rewrites", "recognize: rope", "-", "1 time")),
    "a refusal": (_with(refused=(*A.refused, Refusal("r", "w", "why", "", "", 2))), ("declined", "r, because why", "-", "2 times")),
    "a target": (_with(target="sm_90"), ("model", "target", "-", "sm_90")),
}


@pytest.mark.parametrize("name", CASES)
def test_what_differs_is_named(name) -> None:
    other, expected = CASES[name]
    assert differences(A, other) == (Difference(*expected),)
    assert [(d.before == "-", d.now == "-") for d in differences(other, A)] == [(expected[3] == "-", expected[2] == "-")]


def test_what_is_equal_is_not_named() -> None:
    """Times differ within noise; kernels are numbered otherwise; passes take another time."""
    renamed = tuple(replace(k, name=f"k{9 - i}{k.name[2:]}") for i, k in enumerate(A.kernels))
    assert not differences(A, _with(speed=Speed(0.09, 0.0205, 7), kernels=renamed, seconds={"fuse-regions": 9.0}))
    assert not differences(Receipt("empty"), Receipt("empty"))


def test_other_weights_are_seen_where_both_are_artifacts() -> None:
    one, other = (
        {"graph": "a", "kernels": "b", "weight x": "c", "weight y": "d"},
        {"graph": "a", "kernels": "b", "weight x": "c", "weight y": "e"},
    )
    assert differences(A, A, one, other) == (Difference("file", "weights and binaries", "", "1 of 2 differ"),)
    assert not differences(A, A, one, one) and not differences(A, A, one, {})
    assert differences(A, A, one, one | {"graph": "z"}) == (Difference("file", "graph", "", "differs"),)


def test_from_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, width in (("a", 8), ("b", 16)):
        program = save_program(tmp_path / f"{name}.pt2", Mlp(width), (torch.randn(3, width),))
        assert run(program, "--tune", "0", "-o", f"{name}.tw", "--json", f"{name}.json") == 0
    capsys.readouterr()
    assert run("a.tw", "a.tw", command="diff") == 0 and capsys.readouterr().out == ""
    assert run("a.tw", "a.json", command="diff") == 0
    assert run("a.tw", "b.json", command="diff") == 1
    said = capsys.readouterr().out
    assert "graph" in said and "mlp" not in said.replace("Mlp", "")
    assert run("a.tw", "b.tw", command="diff") == 1
    assert "weights and binaries" in capsys.readouterr().out
    assert run("a.tw", "none.tw", command="diff") == 2
    assert "there is no such file" in sentence(capsys)


def test_names_do_not_reach_the_terminal_as_commands(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, model in (("a.json", "tame"), ("b.json", HOSTILE)):
        (tmp_path / name).write_text(full(model).to_json())
    assert run("a.json", "b.json", command="diff") == 1
    assert "\x1b[31m" not in capsys.readouterr().out
