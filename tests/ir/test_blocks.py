"""Cut points are where everything passes through one tensor; repeated layers are found and aligned node by node."""

import pytest
import torch
from tilewright.ir.analysis.blocks import Block, blocks, cut_points, isomorphic_regions
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse


def layer(i: int, x: str, width: int = 16, order_of_add: bool = True) -> list[str]:
    """One encoder layer with a mask from outside; the residual is added in an order that varies."""
    residual = f"{x}, o{i}" if order_of_add else f"o{i}, {x}"
    return [
        f'qw{i} = constant "{i}.q" : f32[{width}, {width}]',
        f'kw{i} = constant "{i}.k" : f32[{width}, {width}]',
        f"q{i} = linear({x}, qw{i})  # model.py:10 layer.{i}.q",
        f"k{i} = linear({x}, kw{i})",
        f"t{i} = permute(k{i}, dims=[0, 2, 1])",
        f"a{i} = matmul(q{i}, t{i})",
        f"m{i} = where(keep, a{i}, -inf)",
        f"p{i} = softmax(m{i}, dim=-1)",
        f"o{i} = matmul(p{i}, {x})",
        f"r{i} = add({residual})",
        f'g{i} = constant "{i}.norm" : f32[{width}]',
        f"n{i} = layer_norm(r{i}, g{i})",
        f'fw{i} = constant "{i}.fc" : f32[{width}, {width}]',
        f"f{i} = linear(n{i}, fw{i})",
        f"h{i} = gelu(f{i})",
        f"s{i} = add(h{i}, n{i})",
        f'e{i} = constant "{i}.end" : f32[{width}]',
        f"x{i + 1} = layer_norm(s{i}, e{i})",
    ]


def encoder(layers: int, odd: int | None = None) -> Graph:
    """`odd`: a layer that differs from the others (tanh instead of gelu)."""
    lines = [
        'table = constant "table" : f32[100, 16]',
        "raw = embedding(table, ids)",
        'start = constant "start" : f32[16]',
        "x0 = layer_norm(raw, start)",
        "keep = reshape(mask, shape=[b, 1, s])",
    ]
    for i in range(layers):
        body = layer(i, f"x{i}", order_of_add=i % 2 == 0)
        lines += [line.replace("gelu(", "tanh(") for line in body] if i == odd else body
    lines += ['head = constant "head" : f32[5, 16]', f"y = linear(x{layers}, head)"]
    return parse("graph encoder(ids: i64[b, s], mask: bool[b, s]) where b in 1..8, s in 1..128 {\n" + "\n".join(lines) + "\nreturn y }")


def hints(nodes) -> list[str]:
    return [n.hint for n in nodes]


def without_digits(names: list[str]) -> list[str]:
    return [n.rstrip("0123456789") for n in names]


def test_cut_points_of_a_chain_with_a_skip():
    graph = parse("""graph f(x: f32[4]) {
      a = exp(x)
      b = neg(a)
      c = tanh(b)
      d = add(c, a)
      e = relu(d)
      return e
    }""")
    assert hints(cut_points(graph)) == ["a", "d"]


def test_a_value_read_beside_is_no_cut_point():
    graph = parse("graph f(x: f32[4]) { a = exp(x) b = neg(a) c = tanh(b) d = add(c, x) return d }")
    assert cut_points(graph) == []


def test_constants_do_not_go_around_a_cut():
    graph = parse('graph f(x: f32[4]) { w = constant "w" : f32[4] a = mul(x, w) b = exp(a) c = mul(b, w) return c }')
    assert hints(cut_points(graph)) == ["a", "b"]


def test_every_output_counts_unless_one_is_chosen():
    graph = parse("graph f(x: f32[4]) { a = exp(x) b = neg(a) c = tanh(b) d = relu(b) e = abs(d) return c, e }")
    assert hints(cut_points(graph)) == ["a", "b"]
    assert hints(cut_points(graph, output=graph.outputs[1])) == ["a", "b", "d"]
    other = parse("graph f(x: f32[4]) { a = exp(x) b = neg(a) c = tanh(b) return a, c }")
    assert hints(cut_points(other)) == ["a"]
    assert hints(cut_points(other, output=other.outputs[1])) == ["a", "b"]


def test_write_backs_count_as_outputs():
    graph = parse("graph f(x: f32[4], z: f32[4]) { a = exp(x) b = neg(a) c = tanh(b) write x = a return c }")
    assert hints(cut_points(graph)) == ["a"]


def test_a_value_with_several_results_is_no_single_tensor():
    graph = parse("""graph f(x: f32[4]) {
      t = extern[aten.sort.default](x) : (f32[4], i64[4])
      v = item(t, index=0)
      y = exp(v)
      return y
    }""")
    assert hints(cut_points(graph)) == ["v"]


def test_cut_points_as_one_input_sees_them():
    graph = encoder(3)
    assert hints(cut_points(graph)) == ["r2", "n2", "s2", "x3"]
    seen = hints(cut_points(graph, source=graph.inputs[0]))
    assert [n for n in seen if n.startswith("x")] == ["x0", "x1", "x2", "x3"]


def test_a_graph_without_paths_has_no_cut_points():
    assert cut_points(parse("graph f(x: f32[4]) { y = full(shape=[4], value=0, dtype=f32) return y }")) == []
    assert cut_points(parse("graph f() { return }")) == []


def test_the_layers_of_an_encoder_are_one_class():
    graph = encoder(6)
    (layers,) = blocks(graph)
    assert len(layers) == 6
    nodes = {n for block in layers for n in block.nodes}
    assert len(nodes) == 6 * 18
    for i, block in enumerate(layers):
        assert hints(block.results) == [f"x{i + 1}"]
        assert set(hints(block.operands)) == {"keep", f"x{i}"}
        assert without_digits(hints(block.nodes)) == without_digits(hints(layers[0].nodes))
        assert without_digits(hints(block.operands)) == without_digits(hints(layers[0].operands))


def test_aligned_blocks_compute_the_same_function():
    """Block i, rebuilt with the weights of block j through the correspondence, computes block j."""
    first, second = blocks(encoder(2))[0]
    ids = [n.op.name for n in first.nodes]
    assert ids == [n.op.name for n in second.nodes]
    for left, right in zip(first.nodes, second.nodes):
        places = dict(zip((*first.nodes, *first.operands), (*second.nodes, *second.operands)))
        expected = [places.get(n) for n in left.inputs if n.op.name != "scalar"]
        actual = [n for n in right.inputs if n.op.name != "scalar"]
        assert sorted(map(id, expected)) == sorted(map(id, actual)) if left.op.commutative else expected == actual


def test_a_layer_that_differs_splits_the_run():
    """Layers of the first kind on both sides of it are still one class, also where one stands alone."""
    for odd, expected in ((2, ["x1", "x2", "x4", "x5"]), (3, ["x1", "x2", "x3", "x5"])):
        (layers,) = blocks(encoder(5, odd=odd))
        assert [hints(b.results)[0] for b in layers] == expected


def test_no_repetition_no_blocks():
    graph = parse("graph f(x: f32[4]) { a = exp(x) b = neg(a) c = tanh(b) return c }")
    assert blocks(graph) == []
    assert isomorphic_regions(graph) == []
    assert blocks(parse("graph f() { return }")) == []


def test_isomorphic_regions_need_not_touch():
    graph = parse("""graph f(x: f32[4]) {
      a1 = exp(x)
      b1 = mul(a1, a1)
      c = tanh(b1)
      a2 = exp(c)
      b2 = mul(a2, a2)
      d = relu(b2)
      a3 = exp(d)
      return a3
    }""")
    classes = {tuple(n.op.name for n in run[0].nodes): [hints(b.nodes) for b in run] for run in isomorphic_regions(graph)}
    assert classes[("mul",)] == [["b1"], ["b2"]]
    assert classes[("exp",)] == [["a1"], ["a2"], ["a3"]] or classes[("exp",)] == [["a2"], ["a3"]]
    assert ("tanh",) not in classes


@pytest.mark.parametrize("shared", [True, False])
def test_sharing_weights_between_layers_is_seen(shared):
    """A weight that two layers share is an operand of both, not part of either."""
    name = "w" if shared else "{i}.w"
    lines = ['w = constant "w" : f32[4, 4]'] if shared else []
    for i in range(2):
        weight = "w" if shared else f"w{i}"
        lines += [] if shared else [f'{weight} = constant "{name.format(i=i)}" : f32[4, 4]']
        lines += [f"l{i} = linear(x{i}, {weight})", f"t{i} = tanh(l{i})", f"x{i + 1} = add(t{i}, x{i})"]
    graph = parse("graph f(v: f32[3, 4]) { x0 = relu(v) " + "\n".join(lines) + " y = exp(x2) return y }")
    ((first, second),) = blocks(graph)
    assert ("w" in hints(first.operands)) is shared
    assert len(first.nodes) == len(second.nodes) == (3 if shared else 4)


def test_inputs_and_results_of_the_graph_belong_to_no_block():
    """Each layer has a mask of its own and a table that is returned."""
    lines = ["x0 = relu(v)"]
    for i in range(2):
        lines += [f'w{i} = constant "{i}.w" : f32[4]', f"a{i} = mul(x{i}, m{i})", f"b{i} = mul(a{i}, w{i})", f"x{i + 1} = add(b{i}, x{i})"]
    graph = parse("graph f(v: f32[4], m0: f32[4], m1: f32[4]) {\n" + "\n".join(lines) + "\ny = exp(x2) return y, w0, w1 , y }")
    ((first, second),) = blocks(graph)
    assert set(hints(first.operands)) == {"x0", "m0", "w0"}
    assert set(hints(second.operands)) == {"x1", "m1", "w1"}
    assert not {"input", "constant"} & {n.op.name for n in first.nodes}


def test_two_stacks_are_two_classes():
    """An encoder whose result each layer of a decoder reads."""
    lines = ["e0 = relu(src)"]
    for i in range(3):
        lines += [f"a{i} = exp(e{i})", f"e{i + 1} = add(a{i}, e{i})"]
    lines += ["d0 = abs(tgt)"]
    for i in range(3):
        lines += [f"c{i} = mul(d{i}, e3)", f"b{i} = tanh(c{i})", f"d{i + 1} = add(b{i}, d{i})"]
    graph = parse("graph f(src: f32[4], tgt: f32[4]) {\n" + "\n".join(lines) + "\ny = neg(d3) return y }")
    found: list[list[Block]] = blocks(graph)
    assert sorted((len(run), len(run[0].nodes)) for run in found) == [(3, 2), (3, 3)]
    decoder = next(run for run in found if len(run[0].nodes) == 3)
    assert all("e3" in hints(b.operands) for b in decoder)


def test_state_between_the_outputs_does_not_hide_the_layers():
    """A prefill graph returns each layer's keys beside its logits."""
    lines = ["x0 = relu(v)"]
    for i in range(4):
        lines += [f"k{i} = exp(x{i})", f"t{i} = tanh(k{i})", f"x{i + 1} = add(t{i}, x{i})"]
    graph = parse("graph f(v: f32[4]) {\n" + "\n".join(lines) + "\ny = neg(x4) return y, k0, k1, k2, k3 }")
    (layers,) = blocks(graph)
    assert [hints(b.results) for b in layers] == [[f"k{i}", f"x{i + 1}"] for i in range(4)]


def test_the_encoder_of_these_tests_runs():
    graph = encoder(2)
    weights = {n.attrs["data"].name: torch.randn([int(d) for d in n.shape]) for n in order(graph) if n.op.name == "constant"}
    graph = parse(str(graph), weights)
    (y,) = interpret(graph, [torch.randint(0, 100, (2, 7)), torch.ones(2, 7, dtype=torch.bool)])
    assert y.shape == (2, 7, 5)
    assert y.isfinite().all()
