"""The text form: what is printed parses back to an equal graph, and what is wrong is refused with its line."""

import contextlib
import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir import ops
from tilewright.ir.analysis.hashing import equal
from tilewright.ir.dims import FloorDiv, Mod, SymbolRange, dim, symbol
from tilewright.ir.errors import ParseError
from tilewright.ir.graph import Data, Graph, Slot, Stage, graph_input, lift, make_graph, order
from tilewright.ir.ops import Ref
from tilewright.ir.provenance import Provenance
from tilewright.ir.text import parse, print_graph, value_source
from tilewright.ir.types import ScalarType, TensorType
from tilewright.ir.verify import verify


def round_trip(graph: Graph) -> Graph:
    text = print_graph(graph)
    again = parse(text)
    assert equal(graph, again, exact=True) is None, f"{equal(graph, again, exact=True)}\n{text}"
    assert print_graph(again) == text
    return again


MLP = """graph mlp(x: f32[b, 384]) where b in 1..4096 {
  w1 = constant "fc.weight"        : f32[1536, 384]
  b1 = constant "fc.bias"          : f32[1536]
  h  = linear(x, w1, b1)           : f32[b, 1536]    # model.py:41 fc
  g  = gelu(h, approximate="tanh") : f32[b, 1536]
  return g
}
"""


def test_the_layout_of_the_text_is_fixed():
    assert print_graph(parse(MLP)) == MLP


def test_what_the_text_says_is_what_the_graph_holds():
    graph = parse(MLP, {"fc.weight": torch.zeros(1536, 384)})
    assert graph.symbols == {"b": SymbolRange(1, 4096)}
    gelu = graph.outputs[0]
    assert gelu.attrs == {"approximate": "tanh"}
    linear = gelu.inputs[0]
    assert linear.prov == Provenance(("model.py:41",), ("fc",))
    assert linear.type == TensorType(torch.float32, (symbol("b"), 1536))
    assert linear.inputs[1].attrs["data"].value.shape == (1536, 384)
    assert linear.inputs[2].attrs["data"].value is None


def test_types_may_be_left_out():
    short = "graph f(x: f32[b, 4]) { h = exp(x) y = sum(h, dims=[-1]) return y }"
    assert parse(short).outputs[0].type == TensorType(torch.float32, (symbol("b"),))
    assert parse(short).symbols == {"b": SymbolRange()}


EVERYTHING = """
graph "my net"(
  x: f32[b, 8] strides [1, b],  # net.py:1
  n: int, m: int = 2*n + 1, alpha: float=none, flag: bool=none,
  z: c64[]@cuda:0,
) where b in 8..512, b % 8 == 0, n in 0.. stage fused {
  c  = constant "w\\"\\n.1" : f32[8, 8]
  m  = matmul(x, c)                   @ 1024+4096   # net.py:7,net.py:8 a.b,c <rule-one> <two>
  k  = region(m, x, label="two things") : f32[b, 8] # net.py:9
    body k_add(p: f32[b, 8], q: f32[b, 8]) {
      s = add(p, q) : f32[b, 8]  # net.py:10
      inner = region(s)
        body deep(s: f32[b, 8]) { e = exp(s) return e }
      return inner
    }
  t = extern[aten.topk.default](m, n,
        args=[$0, $1, -1, [true, none, "s", f32, device("cpu"), torch.strided]],
        kwargs=[["largest", false]]) : (f32[b, n], i64[b, n]@cuda)
  i = item(t, index=1)
  r = extern["odd name"](i, sequence=3) : i64[b, n]
  f = full(shape=[b // 2, max(b, n) % 7], value=-inf, dtype=f64)
  write x = k
  return f, r, b*n, 1, true, -0.0
}
"""


def test_every_feature_survives():
    with pytest.raises(ParseError, match="defined twice"):
        parse(EVERYTHING)
    text = EVERYTHING.replace("  m  = matmul(x, c) ", "  mm = matmul(x, c) ").replace("region(m, x", "region(mm, x")
    graph = round_trip(parse(text))
    assert graph.name == "my net"
    assert graph.stage is Stage.FUSED
    assert graph.symbols == {"b": SymbolRange(8, 512, 8), "n": SymbolRange()}
    assert [n.hint for n in graph.inputs] == ["x", "n", "m", "alpha", "flag", "z"]
    assert graph.inputs[0].attrs["strides"] == (1, symbol("b"))
    assert graph.inputs[0].prov == Provenance(("net.py:1",))
    assert graph.inputs[1].type == ScalarType(torch.int64, symbol("n"))
    assert graph.inputs[3].type == ScalarType(torch.float64)
    assert graph.inputs[5].type == TensorType(torch.complex64, (), "cuda:0")
    by_name = {n.hint: n for n in order(graph)}
    assert dict(graph.arena) == {by_name["mm"]: Slot(1024, 4096)}
    assert by_name["mm"].prov == Provenance(("net.py:7", "net.py:8"), ("a.b", "c"), ("rule-one", "two"))
    assert by_name["c"].attrs["data"].name == 'w"\n.1'
    extern = by_name["t"].attrs
    assert extern["args"] == (Ref(0), Ref(1), -1, (True, None, "s", torch.float32, torch.device("cpu"), torch.strided))
    assert extern["kwargs"] == (("largest", False),)
    assert by_name["r"].attrs["args"] == (Ref(0),)
    assert by_name["f"].attrs["value"] == -math.inf
    b, n = symbol("b"), symbol("n")
    assert by_name["f"].attrs["shape"] == (FloorDiv(b, 2), Mod(sympy.Max(b, n), 7))
    assert graph.writes == ((graph.inputs[0], by_name["k"]),)
    assert [o.attrs["value"] for o in graph.outputs[2:5]] == [b * n, 1, True]
    assert math.copysign(1, graph.outputs[5].attrs["value"]) == -1


@pytest.mark.parametrize(
    "value",
    [0, -3, 10**30, 0.5, -0.0, 1e-45, 1e300, 0.1 + 0.2, math.inf, -math.inf, True, False, 2j, complex(-0.0, math.inf), complex(1e-5, -0.0)],
)
def test_numbers_are_exact(value):
    x = graph_input("x", TensorType(torch.complex128, (3,)))
    graph = round_trip(make_graph("f", [x], [ops.extern(x, value, target="aten.add.Tensor", args=(Ref(0), Ref(1)), types=(x.tensor,))]))
    found = graph.outputs[0].inputs[1].attrs["value"]
    assert (type(found), repr(found)) == (type(value), repr(value))


def test_equal_numbers_of_different_kinds_stay_apart():
    numbers = ["1", "1.0", "true", "0.0", "-0.0", "0", "false"]
    lines = " ".join(f"v{i} = add(x, {n})" for i, n in enumerate(numbers))
    graph = round_trip(parse(f"graph f(x: f64[3]) {{ {lines} return {', '.join(f'v{i}' for i in range(len(numbers)))} }}"))
    assert [repr(n.inputs[1].attrs["value"]) for n in graph.outputs] == ["1", "1.0", "True", "0.0", "-0.0", "0", "False"]


def test_nan_is_a_number():
    graph = parse("graph f(x: f32[3]) { y = add(x, nan) return y }")
    assert math.isnan(graph.outputs[0].inputs[1].attrs["value"])
    round_trip(graph)


def test_attributes_tell_integers_floats_and_bools_apart():
    texts = [
        str(parse(f"graph f(x: f32[3]) {{ y = pad(x, low=[0], high=[1], value={v}) return y }}")) for v in ("1", "1.0", "true", "0", "0.0")
    ]
    assert len(set(texts)) == 5
    assert "value" not in texts[3]
    assert "value=0.0" in texts[4]


def test_a_size_input_that_is_an_operand_keeps_apart_from_its_symbol():
    n = graph_input("n", ScalarType(torch.int64, symbol("n")))
    x = graph_input("x", TensorType(torch.float32, (symbol("n"),)))
    graph = make_graph("f", [n, x], [ops.add(x, n), ops.mul(x, symbol("n")), n], symbols={"n": SymbolRange(2, 9)})
    again = round_trip(graph)
    assert again.outputs[0].inputs[1] is again.inputs[0]
    assert again.outputs[1].inputs[1].op.name == "scalar"
    assert again.outputs[2] is again.inputs[0]


def test_names_are_made_valid_and_distinct():
    x = graph_input("x", TensorType(torch.float32, (symbol("b"), 3)))
    y = graph_input("x", TensorType(torch.float32, (symbol("b"), 3)))
    hints = ["b", "f32", "1st", "a.b-c", "", "ünï", "x", "return", "nan", "exp", "x_1", "true", "max"]
    values = [ops.exp(x, hint=h) for h in hints]
    graph = make_graph("f", [x, y], values, symbols={"b": SymbolRange()})
    again = round_trip(graph)
    names = [n.hint for n in order(again)]
    assert len(set(names)) == len(names) == len(hints) + 2
    assert all(n.isidentifier() and n.isascii() and n not in ("b", "f32", "return", "nan", "true", "max") for n in names)


@pytest.mark.parametrize(
    "prov",
    [
        Provenance(("my file.py:3", "a.py:4"), ("x:7", "a,b", "<s>"), ("a b", "ok")),
        Provenance((), ("encoder.layer.3",), ()),
        Provenance(("nothing", 'quo"te\\.py:1'), (), ("r",)),
        Provenance(("a=b.py:3",), ("k=v",), ("<x>",)),
        Provenance(("line\nbreak:1",), ("#",), ()),
    ],
)
def test_provenance_of_any_spelling_survives(prov):
    assert Provenance.read(str(prov)) == prov
    x = graph_input("x", TensorType(torch.float32, (2,)), prov=prov)
    assert round_trip(make_graph("f", [x], [ops.exp(x, prov=prov)])).outputs[0].prov == prov


def test_constants_take_their_data_by_name():
    text = 'graph f() { a = constant "a" b = constant "a" return a, b }'
    weight = torch.arange(6.0).reshape(2, 3)
    graph = parse(text, {"a": weight})
    assert graph.outputs[0].type == TensorType(torch.float32, (2, 3))
    assert graph.outputs[0].attrs["data"] is graph.outputs[1].attrs["data"]
    with pytest.raises(ParseError, match=r"declared f32\[3, 2\] but is f32\[2, 3\]"):
        parse('graph f() {\n a = constant "a" : f32[3, 2]\n return a }', {"a": weight})


def test_comments_on_lines_of_their_own_are_ignored():
    graph = parse("# a test\ngraph f(x: f32[2]) {\n  # nothing\n  y = exp(x)\n  return y\n}\n# end\n")
    assert graph.outputs[0].prov == Provenance()


WRONG = [
    ("graph f(x: f32[2]) {\n y = expo(x)\n return y }", 2, "no op named 'expo'"),
    ("graph f(x: f32[2]) {\n y = exp(z)\n return y }", 2, "undefined name 'z'"),
    ("graph f(x: f32[2]) {\n\n y = exp(x) : f32[3]\n return y }", 3, r"declared f32\[3\] but is f32\[2\]"),
    ("graph f(x: f32[2]) {\n y = exp(x, dim=1)\n return y }", 2, "no attribute 'dim'"),
    ("graph f(x: f32[2]) {\n y = softmax(x, dim=0, dim=0)\n return y }", 2, "given twice"),
    ("graph f(x: f32[2]) {\n y = softmax(x)\n return y }", 2, "'dim'.*required"),
    ("graph f(x: f32[2], y: f32[3]) {\n z = add(x, y)\n return z }", 2, "broadcast"),
    ("graph f(x: f32[2]) {\n x = exp(x)\n return x }", 2, "defined twice"),
    ("graph f(x: f32[2]) {\n f32 = exp(x)\n return f32 }", 2, "reserved"),
    ("graph f(x: f32[2]) {\n return x\n y = exp(x) }", 3, "'return' must be the last line"),
    ("graph f(x: f32[2]) {\n write y = x\n return x }", 2, "'y' is not an input"),
    ("graph f(x: f32[2]) {\n y = extern[aten.foo.default](x)\n return y }", 2, "type of an extern must be given"),
    ("graph f(x: f32[2]) {\n y = exp(x)\n", 3, "end of text"),
    ("graph f(x: f32[2]) { return x } graph", 1, "expected the end"),
    ("graph f(x: f32[2.5]) { return x }", 1, "expected a size"),
    ("graph f(x: f77[2]) { return x }", 1, "unknown type 'f77'"),
    ("graph f(x: f32[b // 0]) { return x }", 1, "division by zero"),
    ("graph f(x: f32[b]) where b % 0 == 0 { return x }", 1, "declared divisible"),
    ("graph f(x: f32[b]) where b in 1..2 stage done { return x }", 1, "unknown stage 'done'"),
    ("graph f(x: f32[2]) { y = add(x, \"a\") return y }", 1, "neither a value nor a number"),
    ("graph f(x: f32[2]) { y = add(x, 2.0 + 1) return y }", 1, "combines sizes only"),
    ("graph f(x: f32[2]) { y = add(x, -true) return y }", 1, "have a sign"),
    ("graph f(x: f32[2]) { y = input(type=f32[2]) return y }", 1, "no op named 'input'"),
    ("graph f(x: f32[2]) { y = add(x, $) return y }", 1, "unexpected character"),
    ("graph f(x: f32[2]) { y = add(x, " + "(" * 500 + "1" + ")" * 500 + ") return y }", 1, "nested more than"),
    ("graph f(x: f32[2]) { y = add(x, " + "-" * 5000 + "9" * 9000 + ") return y }", 1, "too long"),
    ("graph f(x: f32[2]) { y = exp(x, __class__=1) return y }", 1, "no attribute '__class__'"),
    ("", 1, "expected 'graph'"),
    ("node", 1, "expected 'graph'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "reason"), WRONG, ids=[w[2][:24] for w in WRONG])
def test_wrong_text_is_refused_with_its_line(text, line, reason):
    with pytest.raises(ParseError, match=reason) as caught:
        parse(text)
    assert caught.value.fields["line"] == line


@given(st.text(alphabet='graph f(x:32[b])={}"#.,@-$\n', max_size=60), st.integers(0, len(MLP)))
@settings(max_examples=150, deadline=None)
def test_damaged_text_never_raises_anything_else(noise, at):
    with contextlib.suppress(ParseError):
        parse(MLP[:at] + noise + MLP[at:])


def test_what_has_no_text_form_is_an_error():
    with pytest.raises(TypeError, match="object has no text form"):
        value_source(object())


# -- generated graphs

UNARY = ["exp", "neg", "relu", "sigmoid", "tanh", "abs", "square"]
BINARY = ["add", "sub", "mul", "maximum"]
SYMBOLS = {"b": SymbolRange(1, 64), "s": SymbolRange(0, None, 4), "k": SymbolRange()}
WORD = st.text(alphabet='abx_. 1<>",:#=é\n', max_size=6)


def dims_strategy():
    atoms = st.one_of(st.integers(-9, 99), st.sampled_from([symbol(s) for s in SYMBOLS]))

    def grow(inner):
        positive = st.one_of(st.integers(1, 9), st.just(symbol("b") + 1))
        return st.one_of(
            st.builds(lambda a, b: dim(sympy.sympify(a) + b), inner, inner),
            st.builds(lambda a, b: dim(sympy.sympify(a) * b), inner, inner),
            st.builds(lambda a, b: dim(FloorDiv(sympy.sympify(a), sympy.sympify(b))), inner, positive),
            st.builds(lambda a, b: dim(Mod(sympy.sympify(a), sympy.sympify(b))), inner, positive),
            st.builds(lambda a, b: dim(sympy.Max(a, b)), inner, inner),
            st.builds(lambda a, b: dim(sympy.Min(a, b)), inner, inner),
        )

    return st.recursive(atoms, grow, max_leaves=4)


@st.composite
def provenances(draw):
    word = st.lists(WORD.filter(bool), max_size=2, unique=True).map(tuple)
    return Provenance(draw(word), draw(word), draw(word))


@st.composite
def graphs(draw, depth=1):
    b, s = symbol("b"), symbol("s")
    kind = TensorType(
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), (b, s, 8), draw(st.sampled_from(["cpu", "cuda:1"]))
    )
    pool = [graph_input(draw(WORD), kind, prov=draw(provenances())) for _ in range(draw(st.integers(1, 3)))]
    inputs = [*pool, graph_input("k", ScalarType(torch.int64, symbol("k")))]
    for _ in range(draw(st.integers(1, 8))):
        pool.append(draw(nodes(pool, depth)))
    values = [*pool, lift(draw(dims_strategy())), inputs[-1]]
    outputs = draw(st.lists(st.sampled_from(values), max_size=3))
    writes = ((pool[0], draw(st.sampled_from(pool))),) if draw(st.booleans()) and depth else ()
    graph = make_graph(draw(WORD), inputs, outputs, writes=writes, symbols=SYMBOLS, stage=draw(st.sampled_from(Stage)))
    slots = {n: Slot(draw(st.integers(0, 4096)), 64) for n in order(graph) if n.op.name == "exp"}
    return Graph(graph.name, graph.inputs, graph.outputs, graph.writes, graph.symbols, graph.stage, slots)


@st.composite
def nodes(draw, pool, depth):
    x, y = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
    fields = {"hint": draw(WORD), "prov": draw(provenances())}
    number = draw(st.one_of(st.floats(), st.integers(-5, 5), st.booleans(), dims_strategy()))
    kinds = [
        lambda: ops.op(draw(st.sampled_from(UNARY)))(x, **fields),
        lambda: ops.op(draw(st.sampled_from(BINARY)))(x, y, **fields),
        lambda: ops.add(x, number, **fields),
        lambda: ops.softmax(x, dim=draw(st.integers(-3, 2)), **fields),
        lambda: ops.full(shape=x.shape, value=draw(st.floats()), dtype=x.dtype, device=x.tensor.device, **fields),
        lambda: ops.op("constant")(data=Data(draw(WORD)), type=x.tensor, **fields),
        lambda: ops.extern(x, number, target=draw(st.sampled_from(["aten.a.b", "odd one"])), types=(x.tensor,),
                           args=(Ref(1), (Ref(0), draw(WORD), draw(dims_strategy()))), kwargs=(("k", None),), **fields),
    ]  # fmt: skip
    if depth and draw(st.booleans()):
        body = draw(bodies(x.tensor))
        return ops.region(x, body=body, label=draw(WORD), **fields)
    return draw(st.sampled_from(kinds))()


@st.composite
def bodies(draw, kind):
    x = graph_input("x", kind)
    pool = [x]
    for _ in range(draw(st.integers(1, 3))):
        pool.append(draw(nodes(pool, 0)))
    return make_graph("body", [x], [pool[-1]])


@given(graphs())
@settings(max_examples=80, deadline=None)
def test_generated_graphs_survive(graph):
    constants = [n.attrs["data"].name for n in order(graph) if n.op.name == "constant"]
    if len(set(constants)) < len(constants):
        return  # two constants of one name are no valid graph
    round_trip(graph)


def test_the_verifier_accepts_what_is_parsed():
    verify(parse(MLP))
