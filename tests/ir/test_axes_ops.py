"""The axis analysis op by op: places and labels, each judged by numbers, and graphs for other sizes."""

import pytest
import torch
from axis_oracle import judged, values_of
from tilewright.ir.analysis.axes import Along, CannotResize, How, Label, axis_of, resized
from tilewright.ir.graph import Data, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import OPS
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify

S = 6
HEAD = "x: f32[2, 6, 8]"
OF_TOKENS = "t: i64[2, 6]"
OF_HEADS = "q: f32[2, 3, 6, 4], k: f32[2, 3, 6, 4]"
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
BAND = CAUSAL & ~CAUSAL.tril(-3)
AROUND = (torch.arange(S)[:, None] - torch.arange(S)).abs() <= 1
GENERATOR = torch.Generator().manual_seed(2)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR)


CONSTANTS = {
    "w": randn(8, 8), "table": randn(9, 8), "rows": randn(6, 8), "causal": CAUSAL, "band": BAND, "around": AROUND,
    "low": torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min),
    "big": randn(9, 8), "coarse": randn(8, 3), "sink": randn(3, 1, 1), "slopes": randn(3, 1, 6), "first": randn(2, 1, 8),
    "kernel": randn(8, 8, 3), "thin": randn(8, 1, 4), "u": randn(8, 2), "state": randn(2, 2),
}  # fmt: skip
TURNED = "p = permute(x, dims=[0, 2, 1])"
THIN = "c = conv(p, thin, stride=[1], padding=[3], dilation=[1], groups=8)"
SCORES = "t = permute(k, dims=[0, 1, 3, 2])\ns = matmul(q, t)"
SINK = "e = expand(sink, shape=[2, 3, 6, 1])"  # a key that is none of the tokens
PREFIX, MIXING, PARALLEL = Label(How.PREFIX), How.MIXING, Label(How.PARALLEL)


def window(before, after):
    return Label(How.WINDOW, before, after)


def constant(name):
    x = CONSTANTS[name]
    kind = "bool" if x.dtype == torch.bool else "f32"
    return f'{name} = constant "{name}" : {kind}[{", ".join(map(str, x.shape))}]'


def built(header, *lines):
    """The graph of these lines, whose last value is y; words that name constants are."""
    body = [constant(name) for name in CONSTANTS if any(f"{sep}{name}{end}" in line for line in lines for sep in "( " for end in ",)")]
    return parse(f"graph g({header}) {{\n" + "\n".join([*body, *lines]) + "\nreturn y\n}", CONSTANTS)


def runs(graph):
    """Two sets of inputs."""
    generator = torch.Generator().manual_seed(3)

    def random(kind):
        integer = kind.dtype == torch.int64
        return torch.randint(0, 6, kind.shape, generator=generator) if integer else torch.randn(kind.shape, generator=generator)

    return [[random(n.tensor) for n in graph.inputs] for _ in range(2)]


def last(graph):
    return graph.outputs[0]


def without_reason(label):
    return Label(label.how, label.before, label.after)


PLAIN = (None, Along(), None)
CASES = [
    # lines, label of y, where the axis is in y
    ("y = relu(x)", PARALLEL, PLAIN),
    ("y = add(x, rows)", PARALLEL, PLAIN),
    ("y = linear(x, w)", PARALLEL, PLAIN),
    ("y = layer_norm(x)", PARALLEL, PLAIN),
    ("y = layer_norm(x, axes=2)", MIXING, PLAIN),
    ("y = softmax(x, dim=2)", PARALLEL, PLAIN),
    ("y = softmax(x, dim=1)", MIXING, PLAIN),
    ("y = sum(x, dims=[2])", PARALLEL, (None, Along())),
    ("y = sum(x, dims=[0, 2], keepdim=true)", PARALLEL, PLAIN),
    ("y = amax(x, dims=[1])", MIXING, None),
    ("y = cumsum(x, dim=1)", PREFIX, PLAIN),
    ("y = cumprod(x, dim=2)", PARALLEL, PLAIN),
    ("y = permute(x, dims=[2, 0, 1])", PARALLEL, (None, None, Along())),
    ("y = reshape(x, shape=[12, 2, 4])", PARALLEL, (Along(outer=2), None, None)),
    ("y = reshape(x, shape=[2, 48])", PARALLEL, (None, Along(inner=8))),
    ("y = reshape(x, shape=[2, 2, 24])", MIXING, None),
    ("y = flip(x, dims=[1])", MIXING, None),
    ("y = flip(x, dims=[2])", PARALLEL, PLAIN),
    ("y = select(x, dim=1, index=0)", MIXING, None),
    ("y = select(x, dim=0, index=1)", PARALLEL, (Along(), None)),
    ("y = cat(x, x, dim=2)", PARALLEL, PLAIN),
    ("y = cat(x, x, dim=1)", MIXING, None),
    ("y = slice(x, dim=1, start=1, stop=6)", window(0, 0), (None, Along(start=1, extra=-1), None)),
    ("y = slice(x, dim=1, start=0, stop=6, step=2)", window(0, 0), (None, Along(stride=2, extra=1), None)),
    ("y = pad(x, low=[0, 1, 0], high=[0, -1, 0])", window(0, 0), (None, Along(start=-1), None)),
    ("y = cat(first, x, dim=1)", window(0, 0), (None, Along(start=-1, extra=1), None)),
    ("p = pad(x, low=[0, 1, 0], high=[0, -1, 0])\ny = sub(x, p)", window(1, 0), PLAIN),
    ("a = slice(x, dim=1, start=0, stop=2)\nb = slice(x, dim=1, start=2, stop=6)\ny = cat(a, b, dim=1)", window(0, 0), PLAIN),
    ("a = slice(x, dim=1, start=0, stop=2)\nb = slice(x, dim=1, start=2, stop=6)\ny = cat(b, a, dim=1)", MIXING, None),
    ("t = permute(x, dims=[0, 2, 1])\ny = matmul(x, t)", PARALLEL, (None, Along(), Along())),
    ("t = permute(x, dims=[0, 2, 1])\ny = matmul(t, x)", MIXING, None),
    ("y = rope(x, rows, rows)", PARALLEL, PLAIN),
    (f"{TURNED}\ny = conv(p, kernel, stride=[1], padding=[1], dilation=[1])", window(1, 1), (None, None, Along())),
    (f"{TURNED}\ny = conv(p, kernel, stride=[1], padding=[2], dilation=[2])", window(2, 2), (None, None, Along())),
    (f"{TURNED}\ny = conv(p, kernel, stride=[1], padding=[0], dilation=[1])", window(0, 2), (None, None, Along(extra=-2))),
    (
        f"{TURNED}\ny = conv(p, kernel, stride=[2], padding=[1], dilation=[1])",
        window(1, 1),
        (None, None, Along(stride=2, extra=1)),
    ),
    (
        f"{TURNED}\n{THIN}\ny = slice(c, dim=2, start=0, stop=6)",
        window(0, 0),
        (None, None, Along()),
    ),
    (f"{TURNED}\ny = max_pool(p, kernel=[2], stride=[2], padding=[0])", window(0, 1), (None, None, Along(stride=2))),
    (f"{TURNED}\ny = avg_pool(p, kernel=[3], stride=[1], padding=[1])", window(1, 1), (None, None, Along())),
    (
        f"{TURNED}\na = avg_pool(p, kernel=[2], stride=[2], padding=[0])\ny = max_pool(a, kernel=[3], stride=[1], padding=[1])",
        window(2, 2),
        (None, None, Along(stride=2)),
    ),
    ("l = lstm_layer(x, state, state, u, batch_first=true)\ny = item(l, index=0)", PARALLEL, (Along(), None, None)),
    ("l = lstm_layer(x, state, state, u, batch_first=true)\ny = item(l, index=1)", MIXING, None),
    ("r = quantize_rows(x)\nq = item(r, index=0)\nz = item(r, index=1)\ny = dequantize(q, z, dtype=f32)", PARALLEL, PLAIN),
    ("e = extern[aten.topk.default](x, args=[$0, 2]) : (f32[2, 6, 2], i64[2, 6, 2])\ny = item(e, index=1)", PARALLEL, PLAIN),
    ("y = extern[aten.argsort.default](x, args=[$0, 1]) : i64[2, 6, 8]", MIXING, None),
    ("y = extern[aten.special_bessel_j0.default](x, args=[$0]) : f32[2, 6, 8]", PARALLEL, PLAIN),
    ("y = extern[aten.logcumsumexp.default](x, args=[$0, 1]) : f32[2, 6, 8]", PREFIX, PLAIN),
    (
        "r = reshape(x, shape=[2, 6, 4, 2])\nc = extern[aten.view_as_complex.default](r, args=[$0]) : c64[2, 6, 4]\n"
        "s = extern[aten.mul.Tensor](c, c, args=[$0, $1]) : c64[2, 6, 4]\n"
        "y = extern[aten.view_as_real.default](s, args=[$0]) : f32[2, 6, 4, 2]",
        PARALLEL,
        (None, Along(), None, None),
    ),
    ("y = extern[aten.fft_fft2.default](x, args=[$0]) : c64[2, 6, 8]", MIXING, None),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "label", "places"), CASES)
def test_label_and_place(lines, label, places):
    graph = built(HEAD, *lines.split("\n"))
    found = axis_of(graph, graph.inputs[0], 1)
    y = last(graph)
    if label is MIXING:
        assert found.labels[y].how is MIXING
        assert found.labels[y].reason
    else:
        assert without_reason(found.labels[y]) == label
    assert found.everywhere(y) == places
    one, other = (values_of(graph, given) for given in runs(graph))
    assert not list(judged(found, one, other))


ATTENTIONS = [
    ("y = attention(q, k, k, causal=true, scale=0.5)", PREFIX),
    ("y = attention(q, k, k, causal, scale=0.5)", PREFIX),
    ("y = attention(q, k, k, low, scale=0.5)", PREFIX),
    ("y = attention(q, k, k, band, scale=0.5)", Label(How.PREFIX, before=2)),
    ("y = attention(q, k, k, around, scale=0.5)", window(1, 1)),
    ("y = attention(q, k, k, slopes, scale=0.5)", MIXING),
    ("y = attention(q, k, k, slopes, causal=true, scale=0.5)", PREFIX),
    ("y = attention(q, k, k, scale=0.5)", MIXING),
    ("y = attention(q, k, k, scale=0.5, causal=true, weights=\"sigmoid\")", PREFIX),
    ("wide = expand(causal, shape=[2, 3, 6, 6])\ny = attention(q, k, k, wide, scale=0.5)", PREFIX),
    ("n = logical_not(around)\nm = where(n, -inf, slopes)\ny = attention(q, k, k, m, scale=0.5)", window(1, 1)),
    ("m = add(slopes, low)\ny = attention(q, k, k, m, scale=0.5)", PREFIX),
    ("c = cast(causal, dtype=f32)\no = sub(1.0, c)\nm = mul(o, -1e30)\ny = attention(q, k, k, m, scale=0.5)", PREFIX),
    ("m = logical_and(causal, around)\ny = attention(q, k, k, m, scale=0.5)", Label(How.PREFIX, before=1)),
    ("m = logical_or(causal, around)\ny = attention(q, k, k, m, scale=0.5)", MIXING),  # back to the first token, and one ahead
    (f"{SCORES}\na = add(s, low)\np = softmax(a, dim=3)\ny = matmul(p, k)", PREFIX),
    (f"{SCORES}\na = add(s, low)\np = softmax(a, dim=1)\ny = matmul(p, k)", MIXING),  # over heads: none of them is lower than the others
    (f"{SCORES}\na = add(s, low)\nb = mul(a, 0.125)\np = softmax(b, dim=3)\ny = matmul(p, k)", PREFIX),
    (f"{SCORES}\na = add(s, low)\nb = div(a, 2.5)\np = softmax(b, dim=3)\ny = matmul(p, k)", PREFIX),
    (f"{SCORES}\na = add(s, low)\n{SINK}\nc = cat(a, e, dim=3)\np = softmax(c, dim=3)\n"
     f"r = slice(p, dim=3, start=0, stop=6)\ny = matmul(r, k)", PREFIX),
    (f"{SCORES}\na = add(s, low)\n{SINK}\nc = cat(e, a, dim=3)\np = softmax(c, dim=3)\n"
     f"r = slice(p, dim=3, start=1, stop=7)\ny = matmul(r, k)", PREFIX),
    (f"{SCORES}\n{SINK}\nc = cat(s, e, dim=3)\np = softmax(c, dim=3)\nr = slice(p, dim=3, start=0, stop=6)\ny = matmul(r, k)", MIXING),
    (f"{SCORES}\na = where(band, s, -inf)\np = softmax(a, dim=3)\ny = matmul(p, k)", Label(How.PREFIX, 2)),
    ("t = permute(q, dims=[0, 1, 3, 2])\ns = matmul(k, t)\nc = permute(low, dims=[1, 0])\na = add(s, c)\np = softmax(a, dim=2)\n"
     "r = permute(p, dims=[0, 1, 3, 2])\ny = matmul(r, k)", PREFIX),
    (f"{SCORES}\ne = exp(s)\na = where(causal, e, 0.0)\nn = sum(a, dims=[3], keepdim=true)\n"
     "p = div(a, n)\ny = matmul(p, k)", PREFIX),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "label"), ATTENTIONS)
def test_attention_by_its_mask(lines, label):
    graph = built(OF_HEADS, *lines.split("\n"))
    graph = made_of_tokens(graph)
    found = axis_of(graph, graph.inputs[0], 1)
    label = Label(MIXING) if label is MIXING else label
    assert without_reason(found.labels[last(graph)]) == label
    one, other = (values_of(graph, given) for given in runs(graph))
    assert not list(judged(found, one, other))


def made_of_tokens(graph):
    """The graph with q and k as products of one input x [2, 6, 8]."""
    x = graph_input("x", TensorType(torch.float32, (2, 6, 8)))
    generator = torch.Generator().manual_seed(5)
    new = {}
    for node in order(graph):
        if node.op.name == "input":
            w = OPS["constant"](data=Data(node.hint, torch.randn(12, 8, generator=generator)))
            heads = OPS["reshape"](OPS["linear"](x, w), shape=(2, 6, 3, 4))
            new[node] = OPS["permute"](heads, dims=(0, 2, 1, 3))
        else:
            new[node] = node.with_inputs(tuple(new[n] for n in node.inputs)) if node.inputs else node
    return make_graph("g", [x], [new[n] for n in graph.outputs])


PADDED = [
    # how a mask over tokens is made of [2, 6] inputs, given with them
    "r = reshape(m, shape=[2, 1, 1, 6])\nmask = logical_and(r, around)",
    "r = reshape(m, shape=[2, 1, 1, 6])\nmask = expand(r, shape=[2, 1, 6, 6])",
    "r = reshape(m, shape=[2, 1, 1, 6])\nc = cast(r, dtype=f32)\no = sub(1.0, c)\nmask = mul(o, -1e30)",
    "r = reshape(m, shape=[2, 1, 6, 1])\nc = reshape(m, shape=[2, 1, 1, 6])\nmask = logical_and(r, c)",
]


@pytest.mark.parametrize("lines", PADDED)
@pytest.mark.parametrize("computed", [False, True])
def test_masks_over_keys_that_inputs_tell(lines, computed):
    """The mask is an input, which the tokens find; or it is computed from the tokens."""
    head = "x: f32[2, 6, 8], t: i64[2, 6]" if not computed else "t: i64[2, 6]"
    embedded = ["x = embedding(table, t)"] if computed else []
    text = [*embedded, "m = ne(t, 0)", *lines.split("\n"), "h = reshape(x, shape=[2, 6, 2, 4])", "q = permute(h, dims=[0, 2, 1, 3])"]
    graph = built(head, *text, "y = attention(q, q, q, mask, scale=0.5)")
    found = axis_of(graph, graph.inputs[0], 1)
    assert set(found.sources) == set(graph.inputs)
    y = last(graph)
    assert found.everywhere(y.inputs[3])[3] == Along()
    assert found.keys[y.inputs[3]][3] == Along()
    one, other = (values_of(graph, given) for given in runs(graph))
    assert not list(judged(found, one, other))
    given = runs(graph)[0]
    small = interpret(resized(graph, found, 4), [x[:, :4] for x in given])[0]
    assert small.shape == (2, 2, 4, 4)


def test_another_length_is_another_axis():
    head = "x: f32[2, 6, 8], z: f32[2, 6, 8]"
    graph = built(head, "a = linear(x, w)", "b = linear(z, w)", "y = attention(a, b, b, scale=1.0)")
    found = axis_of(graph, graph.inputs[0], 1)
    assert set(found.sources) == {graph.inputs[0]}
    assert found.labels[last(graph)].how is How.PARALLEL
    assert axis_of(graph, graph.inputs[1], 1).labels[last(graph)].how is MIXING
    assert set(axis_of(graph, graph.inputs[1], 0).sources) == set(graph.inputs)


def test_one_row_of_each_sequence():
    lines = ["i = iota(length=2)", "at = argmax(t, dims=[1])", "y = index(x, i, at, dims=[0, 1])"]
    graph = built(f"{HEAD}, {OF_TOKENS}", *lines)
    assert axis_of(graph, graph.inputs[0], 0).labels[last(graph)].how is How.PARALLEL
    assert axis_of(graph, graph.inputs[0], 0).sources.keys() == set(graph.inputs)
    assert axis_of(graph, graph.inputs[0], 1).labels[last(graph)].how is MIXING


RESIZED = [
    # lines that hold the axis in other places, and whether the result on a part of x is a part of the result (else: of the model, remade)
    "y = slice(x, dim=1, start=1, stop=6)",
    "p = pad(x, low=[0, 1, 0], high=[0, -1, 0])\ny = sub(x, p)",
    f"{TURNED}\ny = conv(p, kernel, stride=[2], padding=[1], dilation=[1])",
    f"{TURNED}\ny = max_pool(p, kernel=[2], stride=[2], padding=[0], ceil=true)",
    f"{TURNED}\n{THIN}\ny = slice(c, dim=2, start=0, stop=6)",
    "y = cat(first, x, dim=1)",
    "l = lstm_layer(x, state, state, u, batch_first=true)\ny = item(l, index=0)",
    "r = reshape(x, shape=[12, 8])\na = add(r, r)\ny = reshape(a, shape=[2, 6, 2, 4])",
    "a = slice(big, dim=0, start=0, stop=6)\ny = add(x, a)",
    "y = layout(x, strides=[48, 1, 6])",
    "i = iota(length=6)\nc = reshape(i, shape=[6, 1])\ny = mul(x, c)",
]


@pytest.mark.parametrize("lines", RESIZED)
def test_a_smaller_graph_is_what_would_have_been_written_for_that_size(lines):
    graph = built(HEAD, *lines.split("\n"))
    small = resized(graph, axis_of(graph, graph.inputs[0], 1), 4)
    verify(small)
    x = runs(graph)[0][0]
    written = {
        "[2, 6, 2, 4]": "[2, 4, 2, 4]",
        "[12, 8]": "[8, 8]",
        "stop=6": "stop=4",
        "1, 6]": "1, 4]",
        "[48, 1, 6]": "[32, 1, 4]",
        "[6, 1]": "[4, 1]",
        "length=6": "length=4",
    }
    for old, new in written.items():
        lines = lines.replace(old, new)
    by_hand = built("x: f32[2, 4, 8]", *lines.split("\n"))
    assert str(by_hand.outputs[0].type) == str(small.outputs[0].type)
    torch.testing.assert_close(interpret(small, [x[:, :4]])[0], interpret(by_hand, [x[:, :4]])[0])


def test_a_table_along_a_coarser_axis_is_cut_to_it():
    graph = built(HEAD, TURNED, "c = max_pool(p, kernel=[2], stride=[2], padding=[0])", "y = mul(c, coarse)")
    small = resized(graph, axis_of(graph, graph.inputs[0], 1), 4)
    verify(small)
    x = runs(graph)[0][0]
    torch.testing.assert_close(interpret(small, [x[:, :4]])[0], interpret(graph, [x])[0][:, :, :2])


@pytest.mark.parametrize("lines", ["y = slice(x, dim=1, start=0, stop=5)", "y = reshape(x, shape=[2, 3, 16])"])
def test_what_has_no_form_for_another_size(lines):
    graph = built(HEAD, *lines.split("\n"))
    with pytest.raises(CannotResize, match="y cannot be made for size 4"):
        resized(graph, axis_of(graph, graph.inputs[0], 1), 4)
