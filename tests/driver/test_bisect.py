"""`tilewright bisect`: wrong rewrites, kernels and plans put in on purpose are named, and reproduced alone."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from offline import run, sentence
from support import NATIVE
from tilewright.codegen import lower, steps
from tilewright.codegen.host import Scope
from tilewright.driver.bisect import Finding, bisect_graph
from tilewright.driver.pipeline import passes_from
from tilewright.driver.reproduce import write_case
from tilewright.ir.graph import Node, constants, lift, order
from tilewright.ir.ops import OPS
from tilewright.ir.rules import Rule, Site
from tilewright.ir.text import parse
from tilewright.passes import canonicalize, plan_memory
from tilewright.passes.fusion_regions import Builder

LAYERS = 100
X = torch.linspace(-1, 1, 32).reshape(4, 8)


def layered(broken: int, layers: int = LAYERS) -> str:
    """Two rewrites for each layer, and one layer whose op is met nowhere else."""
    lines = ["h0 = mul(x, 1.0)"]
    for i in range(1, layers + 1):
        lines += [f"a{i} = mul(h{i - 1}, 1.0)", f"e{i} = add(a{i}, 0.015625)", f"d{i} = {'tanh' if i == broken else 'sin'}(e{i})"]
        lines += [f"h{i} = div(d{i}, 1.0)  # model.py:{i}"]
    return "\n".join(["graph g(x: f32[4, 8]) {", *lines, f"return h{layers}", "}"])


def wrong(name: str, op: str, made: Callable[[Node], Node | None]) -> Rule:
    return Rule(name, (op,), lambda node, site: made(node))


def tanh_as_its_square(node: Node) -> Node:
    """Wrong everywhere but at 0 and 1; as another op, so that it is done once."""
    return OPS["square"](OPS["sin"](node.inputs[0]))


@pytest.fixture
def broken_rule(monkeypatch):
    monkeypatch.setattr(canonicalize, "RULES", [wrong("canonicalize.broken", "tanh", tanh_as_its_square), *canonicalize.RULES])


def search(text: str, passes: str | None = "canonicalize", inputs: list[torch.Tensor] | None = None, constants=(), **options) -> Finding:
    return bisect_graph(parse(text, dict(constants)), passes_from(passes), [X] if inputs is None else inputs, **options)


def reproduces(found: Finding, where: Path) -> bool:
    """Whether the file that is written fails; a fault that it does not show lets it run to its end."""
    assert found.case is not None
    write_case(where / "case.py", found.case, found.fault)
    try:
        runpy.run_path(str(where / "case.py"), run_name="__main__")
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("layer", [1, 37, LAYERS])
def test_one_wrong_rewrite_among_two_hundred(layer, broken_rule, tmp_path, monkeypatch) -> None:
    found = search(layered(layer))
    assert found.steps >= 200 and found.runs <= 10
    assert found.step is not None and (found.step.item, found.step.rule) == ("canonicalize", "canonicalize.broken")
    assert "tanh" in found.step.what
    assert found.without is not None and found.without.ok and not found.with_it.ok
    assert found.case is not None and not found.case.values, "seeded numbers show it"
    assert [n.op.name for n in order(found.case.graph(found.case.before))] == ["input", "tanh"]
    assert reproduces(found, tmp_path)
    monkeypatch.undo()
    assert not reproduces(found, tmp_path)


def test_the_reproducer_runs_by_itself(broken_rule, tmp_path) -> None:
    found = search(layered(3))
    assert found.case is not None
    written = write_case(tmp_path / "case.py", found.case, found.fault)
    assert [p.name for p in written] == os.listdir(tmp_path) == ["case.py"]
    imports = [line for line in written[0].read_text().splitlines() if line.startswith(("import", "from"))]
    assert imports == ["from tilewright.driver.reproduce import Case"]
    put_back = subprocess.run([sys.executable, written[0]], capture_output=True, text=True, cwd=tmp_path)
    assert put_back.returncode == 0 and "canonicalize.broken" in put_back.stdout and "it is gone" in put_back.stdout
    again = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}\n"
    again += "import runpy, test_bisect as t; from tilewright.passes import canonicalize as c\n"
    again += "c.RULES.insert(0, t.wrong('canonicalize.broken', 'tanh', t.tanh_as_its_square))\n"
    again += f"runpy.run_path({str(written[0])!r}, run_name='__main__')"
    with_it = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, cwd=tmp_path)
    assert with_it.returncode == 1 and "AssertionError: off by" in with_it.stderr and "it is gone" not in with_it.stdout


def test_nothing_drifts() -> None:
    found = search(layered(5), None)
    assert found.step is None and found.runs == 1 and found.case is None
    assert found.summary.startswith(f"nothing drifts: after all {found.steps} steps")


def test_an_error_that_is_allowed_is_none(broken_rule) -> None:
    assert search(layered(5), allowed=10.0).step is None


def test_two_rewrites_that_are_wrong_together(monkeypatch, tmp_path) -> None:
    """The first writes exp as exp2, right; the second takes it for what it is not, there only."""

    def to_exp2(node: Node) -> Node:
        return OPS["exp2"](OPS["mul"](node.inputs[0], lift(1 / math.log(2))))

    def of_exp2(node: Node) -> Node | None:
        under = node.inputs[0]
        return OPS["neg"](under.inputs[0]) if under.op.name == "exp2" else None

    both = [wrong("canonicalize.to-exp2", "exp", to_exp2), wrong("canonicalize.of-exp2", "neg", of_exp2)]
    monkeypatch.setattr(canonicalize, "RULES", [*both, *canonicalize.RULES])
    text = "graph g(x: f32[4, 8]) {\na = mul(x, 1.0)\nb = exp(a)\nc = neg(b)\nd = add(c, 0.5)\ne = mul(d, 1.0)\nreturn e\n}"
    found = search(text)
    assert found.step is not None and found.step.rule == "canonicalize.of-exp2"
    assert reproduces(found, tmp_path)


def test_a_rewrite_that_breaks_a_later_pass(monkeypatch, tmp_path) -> None:
    """What cannot be run is as wrong as what gives wrong results."""

    def out_of_range(node: Node) -> Node:
        seventh = OPS["full"](shape=(4,), value=7, dtype=torch.int64, device="cpu")
        return OPS["embedding"](node.inputs[0], seventh)

    monkeypatch.setattr(canonicalize, "RULES", [wrong("canonicalize.lost", "erf", out_of_range), *canonicalize.RULES])
    found = search("graph g(x: f32[4, 8]) {\na = mul(x, 1.0)\nb = erf(a)\nc = mul(b, 1.0)\nreturn c\n}")
    assert found.step is not None and found.step.rule == "canonicalize.lost" and "IndexError" in found.failure
    assert "it fails: IndexError" in found.summary
    with pytest.raises(IndexError):
        reproduces(found, tmp_path)


def test_a_pass_that_is_wrong_without_a_rule(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(canonicalize, "without_layout", lambda node, inputs: OPS["cos"](*inputs) if node.op.name == "tanh" else None)
    found = search(layered(8))
    assert found.step is not None and (found.step.item, found.step.rule) == ("canonicalize", "")
    assert found.fault == "canonicalize: what it does to every graph"
    assert reproduces(found, tmp_path)


def test_a_rule_that_is_wrong_for_some_weights(monkeypatch, tmp_path) -> None:
    """Seeded weights do not show it: those of the model are written down, as far as they are needed."""

    def negative(node: Node, site: Site) -> Node | None:
        data = node.inputs[1].attrs.get("data")
        return OPS["mul"](node.inputs[0], lift(2.0)) if data is not None and bool((data.value == 5).all()) else None

    monkeypatch.setattr(canonicalize, "RULES", [Rule("canonicalize.fives", ("mul",), negative), *canonicalize.RULES])
    text = 'graph g(x: f32[4, 8]) {\nv = constant "v"\nw = constant "w"\na = mul(x, v)\nb = tanh(a)\nc = mul(b, w)\nreturn c\n}'
    found = search(text, constants={"v": torch.ones(8), "w": torch.full((8,), 5.0)})
    assert found.step is not None and found.step.rule == "canonicalize.fives"
    assert found.case is not None and sorted(found.case.values) == ["input b", "w"]
    assert reproduces(found, tmp_path) and (tmp_path / "case.py.safetensors").stat().st_size < 1000


def test_fusion(monkeypatch, tmp_path) -> None:
    """Steps of `fuse-regions` are merges; here one is wrong if it brings a tanh and a sin together."""
    plain = Builder.body

    def lossy(self, members):
        body = plain(self, members)
        names = [n.op.name for n in order(body)]
        if "tanh" not in names or "sin" not in names:
            return body
        return type(body)(body.name, body.inputs, tuple(OPS["neg"](n) for n in body.outputs), symbols=body.symbols)

    monkeypatch.setattr(Builder, "body", lossy)
    found = search(layered(8, 16), "canonicalize,fuse-regions")
    assert found.step is not None and found.step.item == "fuse-regions" and " into " in found.step.what
    assert "tanh" in found.step.what
    assert reproduces(found, tmp_path)


KERNELS = """graph g(x: f32[4, 8]) {
  w = constant "w"
  a = tanh(x)
  b = linear(a, w)
  s = sum(b, dims=[0], keepdim=true)
  c = cosh(s)
  d = matmul(b, w)
  e = sin(d)
  y = add(e, c)
  return y
}"""


@NATIVE
def test_a_wrong_kernel(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(lower.REDUCE_OPS, "sum", "max")
    found = search(KERNELS, None, constants={"w": torch.randn(8, 8)})
    assert found.step is not None and found.step.item == "code generation" and "sum" in found.step.what
    assert found.case is not None and found.case.program
    assert [n.op.name for n in order(found.case.graph(0))][-1] == "region" and not constants(found.case.graph(0))
    assert reproduces(found, tmp_path)
    monkeypatch.undo()
    assert not reproduces(found, tmp_path)


def test_a_wrong_library_call(monkeypatch, tmp_path) -> None:
    def doubled(host, node):
        host.define(node, f"{host.operand(node.inputs[0])} * 2", Scope.CALL, host.tensors(node.inputs))

    monkeypatch.setitem(steps._CALLS, "matmul", doubled)
    text = "graph g(x: f32[2, 8, 8], z: f32[2, 8, 8]) {\na = tanh(x)\nb = matmul(a, z)\ne = sin(b)\nreturn e\n}"
    found = search(text, None, [torch.randn(2, 8, 8), torch.randn(2, 8, 8)])
    assert found.step is not None and found.fault == "code generation at matmul b"
    assert found.case is not None and [n.op.name for n in order(found.case.graph(0))][-1] == "matmul"
    assert reproduces(found, tmp_path)


def test_a_wrong_plan(monkeypatch, tmp_path) -> None:
    """Two values that live at the same time get the same memory."""
    monkeypatch.setattr(plan_memory, "_best_gap", lambda taken, size: 0)
    found = search(KERNELS, None, constants={"w": torch.randn(8, 8)})
    assert found.step is not None and found.step.item == "plan-memory" and found.step.what
    assert reproduces(found, tmp_path)


def test_two_inputs_a_size_that_varies_and_an_update(broken_rule, tmp_path) -> None:
    text = "graph g(x: f32[n, 8], state: f32[n, 8]) {\na = add(x, state)\nb = mul(a, 1.0)\nc = tanh(b)\nwrite state = c\nreturn a\n}"
    found = search(text, inputs=[torch.randn(3, 8), torch.randn(3, 8)])
    assert found.step is not None and found.step.rule == "canonicalize.broken"
    assert reproduces(found, tmp_path)


# -- the command


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    (tmp_path / "bisected.py").write_text(
        "import torch\n\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return torch.tanh(x * 1.0) + 1\n\n\n"
        "def model():\n    return Model(), (torch.linspace(-1, 1, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bisected", raising=False)
    return "bisected:model"


def test_the_command(model, broken_rule, capsys) -> None:
    assert run(model, command="bisect") == 1
    said = capsys.readouterr().out
    assert "canonicalize, rule canonicalize.broken at tanh" in said and "bisected.py:6" in said and "wrote bisect_model.py" in said
    with pytest.raises(AssertionError):
        runpy.run_path("bisect_model.py", run_name="__main__")


def test_the_command_where_nothing_drifts(model, capsys) -> None:
    assert run(model, command="bisect") == 0
    assert "nothing drifts" in capsys.readouterr().out
    assert not [p for p in os.listdir() if p.startswith("bisect_")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bisected:model", "--passes", "plan-memory"], "needs a graph that is at least fused"),
        (["nowhere.pt2"], "there is no file nowhere.pt2"),
        (["bisected:model", "--passes", "fold"], "there is no pass 'fold'"),
        (["bisected:model", "-o", "."], "cannot write"),
        (["bisected:model", "-i", "y=3:f32"], "the model has no such input"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, model, capsys) -> None:
    assert run(*arguments, command="bisect") == 2
    assert message in sentence(capsys)
