"""Rewriting: equal nodes merge, unused ones vanish, provenance is kept, effects stay apart and in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir import ops
from tilewright.ir.analysis.hashing import equal
from tilewright.ir.graph import Data, Graph, graph_input, make_graph, order, topological, users
from tilewright.ir.interpret import interpret
from tilewright.ir.provenance import NOWHERE, Provenance
from tilewright.ir.rewrite import attr_key, cleaned, inline, rewrite
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify

F4 = TensorType(torch.float32, (4,))


def names(graph: Graph) -> list[str]:
    return [n.op.name for n in order(graph) if n.op.name not in ("input", "scalar")]


def test_equal_nodes_merge_through_several_levels():
    graph = parse("graph f(x: f32[4]) { a = exp(x) b = exp(x) c = add(a, 1.0) d = add(b, 1.0) y = mul(c, d) return y }")
    assert names(cleaned(graph)) == ["exp", "add", "mul"]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("add(x, 1)", "add(x, 1.0)"),
        ("add(x, 0.0)", "add(x, -0.0)"),
        ("add(x, 1)", "add(x, true)"),
        ("softmax(x, dim=0)", "softmax(x, dim=-1)"),
        ("pad(x, low=[0], high=[0], value=0)", "pad(x, low=[0], high=[0], value=0.0)"),
        ("cast(x, dtype=f64)", "cast(x, dtype=f32)"),
        ("full(shape=[4], value=0, dtype=f32)", 'full(shape=[4], value=0, dtype=f32, device="cuda:0")'),
    ],
)
def test_nodes_that_differ_stay_apart(left, right):
    graph = parse(f"graph f(x: f32[4]) {{ a = {left} b = {right} c = {left} return a, b, c }}")
    done = cleaned(graph)
    assert done.outputs[0] is done.outputs[2]
    assert done.outputs[0] is not done.outputs[1]


def test_nan_constants_merge():
    graph = parse("graph f(x: f32[4]) { a = add(x, nan) b = add(x, nan) return a, b }")
    assert len(set(cleaned(graph).outputs)) == 1


def test_constants_merge_by_their_data():
    data = Data("w", torch.ones(4))
    same = [ops.op("constant")(data=d) for d in (data, data, Data("v", torch.ones(4)))]
    done = cleaned(make_graph("f", [], same))
    assert done.outputs[0] is done.outputs[1]
    assert done.outputs[0] is not done.outputs[2]


def test_unused_nodes_vanish_and_inputs_stay():
    graph = parse("graph f(x: f32[4], z: f32[4]) { a = exp(x) b = log(a) c = neg(b) write z = a return a }")
    done = cleaned(graph)
    assert names(done) == ["exp"]
    assert done.inputs == graph.inputs
    assert done.writes[0][1] is done.outputs[0]


def test_merged_nodes_keep_the_origin_of_both():
    graph = parse("graph f(x: f32[4]) {\n a = exp(x)  # m.py:1 enc <r>\n b = exp(x)  # m.py:2 dec\n y = add(a, b)  # m.py:3\n return y }")
    merged = cleaned(graph).outputs[0].inputs[0]
    assert set(merged.prov.sources) == {"m.py:1", "m.py:2"}
    assert set(merged.prov.modules) == {"enc", "dec"}
    assert merged.prov.rules == ("r",)
    assert cleaned(graph).outputs[0].prov == Provenance(("m.py:3",))


def draw(number: int | None):
    return ops.extern(target="aten.rand.default", args=((4,),), types=(F4,), sequence=number)


def test_effects_do_not_merge_and_keep_their_order():
    first, second = draw(0), draw(1)
    graph = cleaned(make_graph("f", [], [ops.sub(second, first)]))
    assert [n.attrs["sequence"] for n in order(graph) if n.op.name == "extern"] == [0, 1]
    pure = cleaned(make_graph("f", [], [ops.sub(draw(None), draw(None))]))
    assert pure.outputs[0].inputs[0] is pure.outputs[0].inputs[1]


def test_random_draws_come_in_program_order():
    first, second = draw(0), draw(1)
    graph = make_graph("f", [], [second, first])
    torch.manual_seed(0)
    expected = [torch.rand(4), torch.rand(4)]
    torch.manual_seed(0)
    found = interpret(cleaned(graph), [])
    assert torch.equal(found[1], expected[0])
    assert torch.equal(found[0], expected[1])


def test_a_rule_sees_new_operands_and_what_it_builds_merges():
    graph = parse("graph f(x: f32[4]) { a = relu(x) b = maximum(x, 0.0) y = add(a, b) return y }")

    def relu(node, inputs):
        return ops.maximum(inputs[0], 0.0) if node.op.name == "relu" else None

    done = rewrite(graph, relu, name="g")
    assert done.name == "g"
    assert names(done) == ["maximum", "add"]
    assert equal(done, parse("graph f(x: f32[4]) { b = maximum(x, 0.0) y = add(b, b) return y }")) is None


def test_types_are_inferred_anew_where_operands_change():
    graph = parse("graph f(x: f32[4]) { a = exp(x) b = neg(a) y = sum(b) return y }")

    def widen(node, inputs):
        return ops.cast(inputs[0], dtype=torch.float64) if node.op.name == "exp" else None

    done = rewrite(graph, widen)
    assert done.outputs[0].dtype == torch.float64
    verify(done)


def test_the_memory_plan_does_not_outlive_a_rewrite():
    graph = parse("graph f(x: f32[4]) { a = exp(x) @ 0+64 return a }")
    assert graph.arena
    assert not cleaned(graph).arena


def test_inline_puts_a_body_in_place():
    body = parse("graph k(p: f32[4], q: f32[4]) { e = exp(p) s = add(e, q) return s, e }")
    x = graph_input("x", F4)
    s, e = inline(body, [x, x])
    done = make_graph("f", [x], [s, e])
    assert equal(done, parse("graph f(x: f32[4]) { e = exp(x) s = add(e, x) return s, e }")) is None
    with pytest.raises(ValueError):
        inline(body, [x])


def test_deep_graphs_are_no_deeper_than_memory():
    x = graph_input("x", F4)
    y = x
    for _ in range(20000):
        y = ops.neg(y)
    graph = make_graph("f", [x], [y])
    assert len(order(cleaned(graph))) == 20001


def test_users_lists_each_reader_once():
    graph = parse("graph f(x: f32[4], z: f32[4]) { a = mul(x, x) b = add(a, x) return b }")
    found = users(graph)
    assert [n.hint for n in found[graph.inputs[0]]] == ["a", "b"]
    assert found[graph.inputs[1]] == []


def test_attribute_keys_tell_types_apart():
    values = [0, 0.0, -0.0, False, None, "0", (0,), (0.0,), torch.float32]
    assert len({attr_key(v) for v in values}) == len(values)


def test_provenance_union_keeps_order_and_drops_repeats():
    a, b = Provenance(("m.py:1",), ("e",)), Provenance(("m.py:2", "m.py:1"), (), ("r",))
    assert a.union(b) == Provenance(("m.py:1", "m.py:2"), ("e",), ("r",))
    assert a.union(NOWHERE) is a
    assert NOWHERE.union(a) == a
    assert b.with_rule("r") is b


# -- generated graphs keep their meaning


@st.composite
def programs(draw):
    """A graph with many repetitions."""
    x, z = graph_input("x", F4), graph_input("z", F4)
    pool = [x, z]
    for _ in range(draw(st.integers(1, 14))):
        a, b = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(["neg", "abs", "add", "mul", "number", "copy"]))
        if kind in ("neg", "abs"):
            pool.append(ops.op(kind)(a))
        elif kind in ("add", "mul"):
            pool.append(ops.op(kind)(a, b))
        elif kind == "number":
            pool.append(ops.sub(a, draw(st.sampled_from([0, 0.0, 1, 2.5]))))
        elif a.inputs:
            pool.append(a.with_inputs(a.inputs))
    outputs = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    return make_graph("f", [x, z], outputs, writes=((x, pool[-1]),) if draw(st.booleans()) else ())


@given(programs())
@settings(max_examples=100, deadline=None)
def test_cleaning_keeps_the_meaning_and_leaves_no_repetition(graph):
    done = cleaned(graph)
    verify(done)
    keys = [(n.op.name, n.inputs, str(dict(n.attrs))) for n in order(done) if n.op.name != "input"]
    assert len(set(keys)) == len(keys)
    inputs = [torch.tensor([1.0, -2.0, 0.0, 3.5]), torch.tensor([-1.0, 2.0, 4.0, 0.5])]
    left_inputs, right_inputs = [t.clone() for t in inputs], [t.clone() for t in inputs]
    for left, right in zip(interpret(graph, left_inputs), interpret(done, right_inputs)):
        assert torch.equal(left, right)
    assert torch.equal(left_inputs[0], right_inputs[0])
    positions = {n: i for i, n in enumerate(topological(done.roots))}
    assert all(positions[i] < positions[n] for n in positions for i in n.inputs)


def test_results_do_not_change_when_inputs_are_written_back():
    graph = parse("graph f(x: f32[4], z: f32[4]) { v = reshape(x, shape=[2, 2]) write x = z write z = x return v, x }")
    x, z = torch.arange(4.0), torch.ones(4)
    view, old = interpret(graph, [x, z])
    assert torch.equal(view.flatten(), torch.arange(4.0))
    assert torch.equal(old, torch.arange(4.0))
    assert torch.equal(x, torch.ones(4))
    assert torch.equal(z, torch.arange(4.0))
