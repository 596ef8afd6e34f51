"""plan-memory: no two values that live at the same time overlap; what leaves the graph is never in the arena."""

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir.analysis.memory import Lifetime, Owner, lifetimes, owners
from tilewright.ir.dims import SymbolRange, evaluate, symbol
from tilewright.ir.graph import Stage, graph_input, make_graph, order
from tilewright.ir.ops import OPS
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.passes.base import Notes
from tilewright.passes.plan_memory import ALIGNMENT, PlanMemory, place

B = symbol("b")
SQUARE = TensorType(torch.float32, (16, 16))


def region(name, *operands, **attrs):
    """An op as a region of its own."""
    inner = [graph_input(f"x{i}", n.type) for i, n in enumerate(operands)]
    return OPS["region"](*operands, body=make_graph(name, inner, [OPS[name](*inner, **attrs)]), label=name)


def rows(x):
    """A region that reads elements after others are written."""
    return region("softmax", x, dim=-1)


def planned(inputs, outputs, **fields):
    graph = make_graph("g", inputs, outputs, stage=Stage.FUSED, **fields)
    return PlanMemory().run(graph)


def assert_apart(graph, env):
    """The checker: slots of values alive at the same step are disjoint, aligned and large enough; or one is written over the other."""
    steps = order(graph)
    owned, lives = owners(steps), lifetimes(graph, steps)
    slots = []
    for node, slot in graph.arena.items():
        (owner,) = owned[node]
        start, size = evaluate(slot.offset, env), evaluate(slot.size, env)
        assert start % ALIGNMENT == 0 and size >= evaluate(node.tensor.nbytes, env)
        slots.append((lives[owner], start, start + size, node))
    for i, (life, start, end, node) in enumerate(slots):
        for other, low, high, neighbour in slots[:i]:
            over = (start, end) == (low, high) and other.end == life.start and neighbour in life.owner.node.inputs
            apart = end <= low or high <= start
            assert not life.overlaps(other) or apart or over, f"{node} and {neighbour} overlap"


def test_a_chain_needs_two_places():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    b = rows(a)
    c = rows(b)
    graph = planned([x], [rows(c)])
    assert [graph.arena[n].offset for n in (a, b, c)] == [0, 1024, 0]
    assert_apart(graph, {})


def test_elementwise_results_lie_where_their_operand_dies():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    b = region("mul", a, x)
    c = region("exp", b)
    graph = planned([x], [rows(c), rows(region("sin", x))])
    assert len({graph.arena[n].offset for n in (a, b, c)}) == 1
    assert_apart(graph, {})


def test_nothing_is_written_over_what_is_read_later():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    view = OPS["permute"](a, dims=(1, 0))
    for later in (region("mul", a, x), view):  # read again, or seen through a view
        b = region("exp", a)
        graph = planned([x], [rows(b), rows(later)])
        assert graph.arena[a].offset != graph.arena[b].offset
    inner = [graph_input("p", SQUARE), graph_input("q", SQUARE)]
    both = OPS["region"](a, view, body=make_graph("both", inner, [OPS["add"](*inner)]))
    graph = planned([x], [rows(both)])
    assert graph.arena[a].offset != graph.arena[both].offset  # its other operand is a view of the first


def test_each_operand_takes_one_result():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    inner = graph_input("p", SQUARE)
    both = OPS["region"](a, body=make_graph("both", [inner], [OPS["sin"](inner), OPS["cos"](inner)]))
    first, second = OPS["item"](both, index=0), OPS["item"](both, index=1)
    graph = planned([x], [rows(first), rows(second)])
    assert graph.arena[first].offset == graph.arena[a].offset != graph.arena[second].offset
    assert_apart(graph, {})


def test_outputs_and_what_they_view_are_not_in_the_arena():
    x = graph_input("x", SQUARE)
    a, b = region("exp", x), region("sin", x)
    graph = planned([x], [OPS["reshape"](a, shape=(256,)), region("add", a, b)])
    assert set(graph.arena) == {b}


def test_a_view_keeps_its_operand_alive():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    view = OPS["permute"](a, dims=(1, 0))
    b = region("sin", x)
    graph = planned([x], [OPS["matmul"](OPS["matmul"](b, b), view)])
    assert_apart(graph, {})


def test_what_torch_allocates_is_not_in_the_arena():
    x = graph_input("x", TensorType(torch.float32, (1, 4, 8, 8)))
    w = graph_input("w", TensorType(torch.float32, (4, 4, 3, 3)))
    y = OPS["conv"](x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    assert not planned([x, w], [region("exp", y)]).arena


def test_an_aliasing_extern_keeps_its_operand_alive_and_a_fresh_one_does_not():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    for target, kept in (("aten.diagonal.default", True), ("aten.nonzero_static.default", False)):
        types = (TensorType(torch.float32, (16,)),)
        out = OPS["extern"](a, target=target, args=(), types=types)
        assert (a not in planned([x], [out]).arena) is kept


def test_written_values_live_to_the_end():
    x = graph_input("x", SQUARE)
    a = region("exp", x)
    b = region("sin", a)
    c = rows(b)
    graph = planned([x], [rows(c)], writes=((x, a),))
    assert_apart(graph, {})
    assert graph.arena[a].offset not in {graph.arena[n].offset for n in (b, c)}


def test_symbolic_sizes_share_slots_of_the_same_expression():
    x = graph_input("x", TensorType(torch.float32, (B, 16)))
    a = region("exp", x)
    b = rows(a)
    c = rows(b)
    graph = planned([x], [rows(c)], symbols={"b": SymbolRange(1, 64)})
    assert graph.arena[a].offset == graph.arena[c].offset
    assert isinstance(graph.arena[b].offset, sympy.Expr)
    for size in (1, 3, 64):
        assert_apart(graph, {"b": size})
    assert str(parse(str(graph))) == str(graph)


def test_the_arena_is_on_one_device():
    x, y = graph_input("x", SQUARE), graph_input("y", TensorType(torch.float32, (16, 16), "cuda:0"))
    a, b = region("exp", x), region("exp", y)
    assert set(planned([x, y], [region("exp", a), region("exp", b)]).arena) == {a}


def test_the_note_says_what_was_saved():
    x = graph_input("x", SQUARE)
    notes = Notes()
    y = rows(region("exp", rows(region("exp", x))))
    PlanMemory().run(make_graph("g", [x], [y], stage=Stage.FUSED), notes)
    assert [a.rule for a in notes.applied] == ["plan-memory"]
    assert "3 values in 2.0 KiB, 3.0 KiB if each had its own" in notes.applied[0].what


@st.composite
def lifetimes_and_sizes(draw):
    x = graph_input("x", SQUARE)
    values = []
    for i in range(draw(st.integers(0, 25))):
        start = draw(st.integers(0, 30))
        life = Lifetime(Owner(x, i), start, start + draw(st.integers(0, 8)))
        values.append((life, ALIGNMENT * draw(st.integers(1, 9))))
    return values


@settings(max_examples=200, deadline=None)
@given(lifetimes_and_sizes())
def test_placement_never_overlaps(values):
    offsets, peak = place(values)
    for i, (life, size) in enumerate(values):
        start = offsets[life.owner]
        assert start >= 0 and start + size <= peak
        for other, width in values[:i]:
            low = offsets[other.owner]
            assert not life.overlaps(other) or start + size <= low or low + width <= start
    least = max((sum(s for v, s in values if v.start <= t <= v.end) for t in range(40)), default=0)
    assert least <= peak <= sum(s for _, s in values)


@st.composite
def random_graphs(draw):
    symbolic = draw(st.booleans())
    x = graph_input("x", TensorType(torch.float32, (B, 16) if symbolic else (16, 16)))
    values = [x]
    for _ in range(draw(st.integers(1, 20))):
        pick = st.sampled_from(values)
        kind = draw(st.sampled_from(["exp", "add", "sub", "softmax", "view"]))
        if kind == "view":
            values.append(OPS["reshape"](OPS["reshape"](draw(pick), shape=(16 * x.shape[0],)), shape=x.shape))
        else:
            attrs = {"dim": 0} if kind == "softmax" else {}
            values.append(region(kind, *(draw(pick) for _ in range(1 if kind in ("exp", "softmax") else 2)), **attrs))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return planned([x], outputs, symbols={"b": SymbolRange(1, 64)} if symbolic else {})


@settings(max_examples=100, deadline=None)
@given(random_graphs(), st.integers(1, 64))
def test_plans_of_random_graphs_never_overlap(graph, size):
    assert_apart(graph, {"b": size})
