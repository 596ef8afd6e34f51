"""Every way to break a graph is caught, and the error shows where."""

from dataclasses import replace

import pytest
import torch
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.errors import VerificationError
from tilewright.ir.graph import Data, Graph, Node, Slot, Stage, graph_input, make_graph, order
from tilewright.ir.op import Category, Op
from tilewright.ir.provenance import Provenance
from tilewright.ir.text import parse
from tilewright.ir.types import ScalarType, TensorType
from tilewright.ir.verify import LEGAL, verify

F4 = TensorType(torch.float32, (4,))
B4 = TensorType(torch.float32, (symbol("b"), 4))


def x_input(kind=F4, name="x"):
    return graph_input(name, kind)


def broken(graph: Graph, reason: str) -> str:
    with pytest.raises(VerificationError, match=reason) as caught:
        verify(graph)
    return str(caught.value)


def test_a_good_graph_passes():
    verify(
        parse("""graph f(x: f32[b, 4], n: int) where b in 1..8 {
          w = constant "w" : f32[4]
          y = mul(x, w)
          z = add(y, n)
          write x = z
          return z, n
        }""")
    )


def test_an_input_bound_twice():
    x = x_input()
    broken(make_graph("f", [x, x], [x]), "input 'x' is bound twice")


def test_an_input_that_is_none():
    x = x_input()
    y = ops.exp(x, hint="y")
    broken(make_graph("f", [y], [y]), "exp 'y' is bound as an input")


def test_an_input_of_another_graph():
    x, stranger = x_input(), x_input(name="stranger")
    broken(make_graph("f", [x], [ops.add(x, stranger)]), "input 'stranger' is read but not bound")


def test_a_cycle():
    x = x_input()
    first = ops.add(x, x, hint="first")
    second = ops.exp(first, hint="second")
    object.__setattr__(first, "inputs", (x, second))
    broken(make_graph("f", [x], [second]), "before it is defined: the graph has a cycle")


@pytest.mark.parametrize(
    "kind",
    [TensorType(torch.float32, (5,)), TensorType(torch.float64, (4,)), TensorType(torch.float32, (4,), "cuda:0"), (F4, F4)],
)
def test_a_wrong_type(kind):
    x = x_input()
    text = broken(make_graph("f", [x], [replace(ops.exp(x, hint="y", prov=Provenance(("m.py:7",))), type=kind)]), "but yields")
    assert "m.py:7" in text
    assert "-> y = exp(x)" in text


def test_operands_the_op_is_not_defined_for():
    x, y = x_input(), x_input(TensorType(torch.float32, (5,)), "y")
    node = replace(ops.add(x, x), inputs=(x, y))
    broken(make_graph("f", [x, y], [node]), "add cannot take")


def test_attributes_too_many_and_too_few():
    x = x_input()
    good = ops.softmax(x, dim=0)
    broken(make_graph("f", [x], [replace(good, attrs={})]), "lacks its attribute 'dim'")
    broken(make_graph("f", [x], [replace(good, attrs={"dim": 0, "axis": 1})]), "no attribute 'axis'")
    broken(make_graph("f", [x], [replace(good, attrs={"dim": 3})]), "out of range")


def test_an_op_that_is_not_in_the_catalogue():
    x = x_input()
    double = Op("exp", Category.POINTWISE, lambda x: x, torch.exp)
    broken(make_graph("f", [x], [Node(double, (x,), {}, F4)]), "op 'exp' is not in the catalogue")


def test_sizes_are_told_by_inputs_and_declared():
    x = x_input(B4)
    broken(make_graph("f", [x], [ops.exp(x)]), "size b of input 'x' is not declared")
    y = x_input(TensorType(torch.float32, (2 * symbol("b"), 4)))
    broken(make_graph("f", [y], [y], symbols={"b": SymbolRange()}), "size b of input 'x' is told by no input")
    z = x_input()
    full = ops.full(shape=(symbol("s"),), value=0, dtype=torch.float32)
    broken(make_graph("f", [z], [full], symbols={"s": SymbolRange()}), "size s of full is told by no input")
    n = graph_input("n", ScalarType(torch.int64, symbol("s")))
    verify(make_graph("f", [z, n], [full], symbols={"s": SymbolRange()}))


@pytest.mark.parametrize("known", [SymbolRange(-1), SymbolRange(5, 4), SymbolRange(0, 4, 0)])
def test_impossible_ranges(known):
    x = x_input(B4)
    broken(make_graph("f", [x], [x], symbols={"b": known}), "impossible range")


def test_sizes_have_names():
    x = x_input(TensorType(torch.float32, (symbol("f32"),)))
    broken(make_graph("f", [x], [x], symbols={"f32": SymbolRange()}), "cannot name a size")


def test_writes_fit_inputs():
    x, y = x_input(), ops.cast(x_input(), dtype=torch.float64, hint="y")
    x = y.inputs[0]
    broken(make_graph("f", [x], [], writes=((x, y),)), r"f64\[4\] is written to input 'x' of type f32\[4\]")
    broken(make_graph("f", [x], [], writes=((y, y),)), "cast 'y' is written but is no input")
    e = ops.exp(x)
    broken(make_graph("f", [x], [], writes=((x, e), (x, e))), "written twice")


def test_one_name_for_two_constants():
    a, b = (ops.op("constant")(data=Data("w"), type=F4) for _ in range(2))
    broken(make_graph("f", [], [ops.add(a, b)]), "two different constants are named 'w'")


def test_one_number_for_two_draws():
    a, b = (ops.extern(target="aten.rand.default", args=(), types=(F4,), sequence=0, kwargs=(("k", i),)) for i in range(2))
    broken(make_graph("f", [], [ops.add(a, b)]), "number 0 of the effects")


def test_slots_hold_their_values():
    x = x_input()
    y = ops.exp(x, hint="y")
    broken(make_graph("f", [x], [y], arena={y: Slot(0, 8)}), "does not fit its slot")
    broken(make_graph("f", [x], [y], arena={y: Slot(-64, 64)}), "does not fit its slot")
    broken(make_graph("f", [x], [y], arena={ops.exp(x): Slot(0, 64)}), "not in the graph")
    verify(make_graph("f", [x], [y], arena={y: Slot(64, 16)}))


REGION = "graph f(x: f32[b, 4]) where b in 1..8 stage fused { y = region(x) body k(p: f32[b, 4]) { e = exp(p) return e } return y }"


def test_bodies_are_verified():
    graph = parse(REGION)
    verify(graph)
    region = graph.outputs[0]
    body = region.attrs["body"]
    bad = replace(body, outputs=(replace(body.outputs[0], type=B4.with_dtype(torch.float64)),))
    broken(replace(graph, outputs=(replace(region, attrs={"body": bad, "label": "", "schedule": ""}),)), "but yields")
    stranger = replace(body, outputs=(ops.exp(graph.inputs[0]),))
    broken(replace(graph, outputs=(replace(region, attrs={"body": stranger, "label": "", "schedule": ""}),)), "read but not bound")


def test_a_body_must_fit_its_operands():
    graph = parse(REGION)
    other = parse("graph k(p: f32[7]) { e = exp(p) return e }")
    broken(replace(graph, outputs=(replace(graph.outputs[0], attrs={"body": other, "label": "", "schedule": ""}),)), "is bound to p")


@pytest.mark.parametrize(
    ("line", "stage", "reason"),
    [
        ("y = region(x) body k(p: f32[4]) { e = exp(p) return e }", "captured", "region 'y' .* not legal in a captured graph"),
        ("y = region(x) body k(p: f32[4]) { e = exp(p) return e }", "planned", "not legal in a planned graph"),
        ("y = region(x) body k(p: f32[4]) { e = region(p) body i(p: f32[4]) { return p } return e }", "fused", "inside a region"),
        ("y = cast(x, dtype=f32)", "canonical", "casts to the dtype its operand already has"),
        ("l = layout(x, strides=[1]) y = exp(l)", "canonical", "only outputs have"),
        ("y = softmax(x, dim=0)", "fused", "softmax 'y' .composite. is not legal in a fused graph"),
        ("l = layout(x, strides=[1]) y = exp(l)", "fused", "only outputs have"),
    ],
)
def test_legality_by_stage(line, stage, reason):
    broken(parse(f"graph f(x: f32[4]) stage {stage} {{ {line} return y }}"), reason)


@pytest.mark.parametrize("stage", Stage)
def test_every_stage_has_a_row_and_takes_inputs(stage):
    assert stage in LEGAL
    verify(parse("graph f(x: f32[4, 4]) { p = permute(x, dims=[1, 0]) y = matmul(p, x) return y }"), stage)


def test_the_error_shows_ten_lines_around_the_fault():
    lines = "".join(f"  v{i} = exp({'x' if i == 0 else f'v{i - 1}'})\n" for i in range(40))
    graph = parse(f"graph f(x: f32[4]) {{\n{lines}  return v39\n}}")
    bad = replace(graph.outputs[0], type=F4.with_dtype(torch.float64))
    top = replace(graph, outputs=(bad,))
    shown = broken(top, "recorded as").splitlines()[1:]
    assert len(shown) == 10
    assert shown[-1] == "-> v39 = exp(v38) : f64[4]"
    middle = order(graph)[20]
    object.__setattr__(middle, "type", F4.with_dtype(torch.float64))
    shown = broken(graph, "recorded as").splitlines()[1:]
    assert len(shown) == 10
    assert sum(line.startswith("-> ") for line in shown) == 1
