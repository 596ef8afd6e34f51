"""Cases that stand alone: what is written is what is checked, whatever a model calls its values."""

from __future__ import annotations

import os
import runpy

import pytest
import torch
from tilewright.driver.errors import CannotWrite
from tilewright.driver.reproduce import Case, case_of, interpreted, write_case
from tilewright.ir.graph import Data, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.rules import Rule
from tilewright.ir.text import parse
from tilewright.passes import canonicalize

HOSTILE = 'w"""\'; raise SystemExit(7)  # \\ \u2028 \U0001f600'


def ran(path) -> Case:
    return runpy.run_path(str(path), run_name="__main__")["case"]


def test_names_are_data(tmp_path) -> None:
    plain = parse("graph g(x: f32[2]) {\nreturn x\n}")
    weight = OPS["constant"](data=Data(HOSTILE, torch.ones(2)), hint="w")
    case = case_of(make_graph("g", plain.inputs, [OPS["add"](plain.inputs[0], weight)]), [torch.ones(2)])
    assert [p.name for p in write_case(tmp_path / "a.py", case, HOSTILE)] == ["a.py", "a.py.safetensors"]
    again = ran(tmp_path / "a.py")
    assert again.text == case.text and torch.equal(interpreted(again.graph(0), again.inputs())[0], torch.full((2,), 2.0))


def test_seeded_values(tmp_path) -> None:
    text = 'graph g(x: f32[n, 4], i: i64[3], n: int) {\nw = constant "w" : f32[4]\ny = mul(x, w)\nreturn y, i\n}\n'
    case = Case(text, passes="canonicalize", sizes={"n": 5})
    write_case(tmp_path / "a.py", case, "nothing")
    assert os.listdir(tmp_path) == ["a.py"]
    again = ran(tmp_path / "a.py")
    x, i, n = again.inputs()
    assert x.shape == (5, 4) and n == 5 and i.dtype == torch.int64 and set(i.tolist()) <= {0, 1}
    assert torch.equal(x, case.inputs()[0]) and x.std() > 0.5


def test_strides_are_kept() -> None:
    (x,) = Case("graph g(x: f32[2, 3] strides (1, 2)) {\nreturn x\n}").inputs()
    assert x.stride() == (1, 2)


def test_the_graphs_are_shown_where_it_fails(monkeypatch) -> None:
    case = Case("graph g(x: f32[4]) {\ny = mul(x, 1.0)\nz = tanh(y)\nreturn z\n}", passes="canonicalize", after=2)
    case.require()
    wrong = Rule("canonicalize.mul-one", ("mul",), lambda node, site: OPS["neg"](node.inputs[0]))
    monkeypatch.setattr(canonicalize, "RULES", [wrong])
    with pytest.raises(AssertionError, match=r"off by 2\.0e\+00 where 1\.0e-06 is allowed(.|\n)*mul\((.|\n)*neg\("):
        case.require()


def test_random_draws_are_the_same_always() -> None:
    case = Case("graph g(x: f32[4]) {\ny = extern[aten.rand_like.default](x, sequence=0) : f32[4]\nreturn y\n}", program=True)
    before = torch.random.get_rng_state()
    assert case.check().ours == 0.0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_where_it_cannot_be_written(tmp_path) -> None:
    case = Case("graph g(x: f32[2]) {\nreturn x\n}")
    with pytest.raises(CannotWrite, match="cannot write .*a.py: No such file"):
        write_case(tmp_path / "none" / "a.py", case, "")
