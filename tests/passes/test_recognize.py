"""recognize: each composite from its primitive form, and why some forms stay."""

from __future__ import annotations

import math

import pytest
import torch
from pass_checks import assert_same_values, body, refusals, run
from tilewright.ir.graph import Graph, graph_input, make_graph, order
from tilewright.ir.ops import OPS
from tilewright.ir.retarget import retarget
from tilewright.ir.types import TensorType
from tilewright.passes.base import Notes, Reason
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.recognize import Recognize


def _ops(graph: Graph) -> list[str]:
    return [n.op.name for n in order(graph) if n.op.name not in ("input", "scalar", "constant")]


def _recognized(text: str, inputs: list[torch.Tensor], tolerance: float = 1e-5, constants: dict = {}) -> tuple[Graph, Notes]:  # noqa: B006
    """After canonicalize and recognize, checked against the text."""
    old, canonical, _ = run(Canonicalize(), text, constants)
    notes = Notes()
    new = Recognize().run(canonical, notes)
    assert_same_values(old, new, inputs, tolerance)
    return new, notes


SOFTMAX = ["m = amax(x, dims=[-1], keepdim=true)", "s = sub(x, m)", "e = exp(s)", "t = sum(e, dims=[-1], keepdim=true)"]
RMS = ["p = pow(x, 2)", "m = mean(p, dims=[-1], keepdim=true)", "a = add(m, 1e-06)", "r = rsqrt(a)", "y = mul(x, r)"]
LAYER = ["m = mean(x, dims=[-1], keepdim=true)", "c = sub(x, m)", "p = mul(c, c)", "v = mean(p, dims=[-1], keepdim=true)"]
GELU = ["u = div(x, 1.4142135623730951)", "v = erf(u)", "w = add(v, 1)"]
TANH = ["p = pow(x, 3.0)", "q = mul(p, 0.044715)", "r = add(x, q)", "s = mul(r, 0.7978845608028654)", "t = tanh(s)", "w = add(1.0, t)"]

FORMS = [
    ([*SOFTMAX, "y = div(e, t)"], "softmax"),
    ([*SOFTMAX, "l = log(t)", "y = sub(s, l)"], "log_softmax"),
    (RMS, "rms_norm"),
    ([*LAYER, "a = add(v, 1e-05)", "r = rsqrt(a)", "y = mul(c, r)"], "layer_norm"),
    ([*LAYER, "a = add(v, 1e-05)", "r = sqrt(a)", "y = div(c, r)"], "layer_norm"),
    ([*LAYER[:2], "v = var(x, dims=[-1], correction=0.0, keepdim=true)", "a = add(v, 1e-05)", "r = rsqrt(a)", "y = mul(c, r)"],
     "layer_norm"),
    ([*GELU, "h = mul(x, 0.5)", "y = mul(h, w)"], "gelu"),
    ([*GELU, "h = mul(x, w)", "y = mul(h, 0.5)"], "gelu"),
    ([*GELU, "h = mul(w, 0.5)", "y = mul(x, h)"], "gelu"),
    (["u = mul(x, 0.7071067811865476)", *GELU[1:], "h = mul(0.5, x)", "y = mul(w, h)"], "gelu"),
    ([*TANH, "h = mul(0.5, x)", "y = mul(h, w)"], "gelu"),
    (["n = neg(x)", "e = exp(n)", "a = add(e, 1)", "y = reciprocal(a)"], "sigmoid"),
    (["s = sigmoid(x)", "y = mul(x, s)"], "silu"),
    (["n = neg(x)", "e = exp(n)", "a = add(e, 1)", "y = div(x, a)"], "silu"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "wanted"), FORMS)
def test_form(lines: list[str], wanted: str) -> None:
    new, notes = _recognized(body("x: f32[b, 3, 8]", *lines, "y"), [torch.randn(2, 3, 8)])
    assert _ops(new) == [wanted]
    assert notes.applied[-1].rule.startswith("recognize.")


@pytest.mark.parametrize(("lines", "wanted"), FORMS)
def test_refused_because_an_inner_value_is_shared(lines: list[str], wanted: str) -> None:
    inner = lines[-2].split(" = ")[0]
    new, notes = _recognized(body("x: f32[b, 3, 8]", *lines, f"y, {inner}"), [torch.randn(2, 3, 8)])
    assert wanted not in _ops(new) or wanted == "sigmoid"
    assert Reason.SHARED in {reason for _, reason in refusals(notes)}


def test_llama_norm_in_bf16() -> None:
    lines = ["x = cast(h, dtype=f32)", *RMS[:-1], "n = mul(x, r)", "c = cast(n, dtype=bf16)", "y = mul(w, c)", "y"]
    inputs = [torch.randn(2, 3, 16).bfloat16(), torch.randn(16).bfloat16()]
    new, _ = _recognized(body("h: bf16[b, s, 16], w: bf16[16]", *lines), inputs, 2e-2)
    assert _ops(new) == ["rms_norm"] and len(new.outputs[0].inputs) == 2


def test_layer_norm_takes_scale_and_shift() -> None:
    lines = [*LAYER, "a = add(v, 1e-05)", "r = rsqrt(a)", "n = mul(c, r)", "k = mul(w, n)", "y = add(k, h)", "y"]
    new, _ = _recognized(body("x: f32[2, 8], w: f32[8], h: f32[8]", *lines), [torch.randn(2, 8), torch.randn(8), torch.randn(8)])
    assert _ops(new) == ["layer_norm"] and len(new.outputs[0].inputs) == 3


def test_a_scale_over_rows_is_no_norm_scale() -> None:
    new, notes = _recognized(body("x: f32[8, 8], w: f32[8, 1]", *RMS, "z = mul(y, w)", "z"), [torch.randn(8, 8), torch.randn(8, 1)])
    assert _ops(new) == ["rms_norm", "mul"]
    assert ("recognize.norm-scale", Reason.SHAPE_MISMATCH) in refusals(notes)


def test_softmax_of_widened_16_bit_values() -> None:
    lines = ["w = cast(x, dtype=f32)", "s = softmax(w, dim=-1)", "y = cast(s, dtype=bf16)", "y"]
    new, _ = _recognized(body("x: bf16[3, 8]", *lines), [torch.randn(3, 8).bfloat16()], 1e-2)
    assert _ops(new) == ["softmax"]
    _, notes = _recognized(body("x: f32[3, 8]", "w = cast(x, dtype=f64)", *lines[1:2], "y = cast(s, dtype=f32)", "y"), [torch.randn(3, 8)])
    assert refusals(notes) == {("recognize.narrow", Reason.ROUNDING)}


def test_rounded_constants_make_another_function_in_float64() -> None:
    lines = ["u = div(x, 1.4142135381698608)", *GELU[1:], "h = mul(x, 0.5)", "y = mul(h, w)", "y"]
    assert _ops(_recognized(body("x: f32[8]", *lines), [torch.randn(8)])[0]) == ["gelu"]
    _, notes = _recognized(body("x: f64[8]", *lines), [torch.randn(8).double()], 1e-12)
    assert ("recognize.gelu", Reason.ROUNDING) in refusals(notes)


ROPE = ["n = neg(c)", "r = cat(n, a, dim=-1)", "p = mul(x, cos)", "q = mul(r, sin)", "y = add(p, q)", "y"]


@pytest.mark.parametrize("partial", [False, True])
def test_rope(partial: bool) -> None:
    whole = ["x = slice(h, dim=-1, start=4, stop=20)"] if partial else []
    name, size = ("h", 24) if partial else ("x", 16)
    halves = ["a = slice(x, dim=-1, start=0, stop=8)", "c = slice(x, dim=-1, start=8, stop=16)"]
    text = body(f"{name}: f32[b, s, 2, {size}], cos: f32[s, 1, 16], sin: f32[s, 1, 16]", *whole, *halves, *ROPE)
    new, _ = _recognized(text, [torch.randn(2, 3, 2, size), torch.randn(3, 1, 16), torch.randn(3, 1, 16)])
    assert _ops(new)[-1] == "rope"


def test_halves_of_another_dimension_are_no_rope() -> None:
    halves = ["a = slice(x, dim=0, start=0, stop=2)", "c = slice(x, dim=0, start=2, stop=4)"]
    text = body("x: f32[4, 16], cos: f32[4, 16], sin: f32[4, 16]", *halves, ROPE[0], "r = cat(n, a, dim=0)", *ROPE[2:])
    new, notes = _recognized(text, [torch.randn(4, 16) for _ in range(3)])
    assert "rope" not in _ops(new) and refusals(notes) == {("recognize.rope", Reason.SHAPE_MISMATCH)}


def test_uneven_parts_are_no_rope() -> None:
    halves = ["a = slice(x, dim=-1, start=0, stop=6)", "c = slice(x, dim=-1, start=6, stop=16)"]
    text = body("x: f32[3, 16], cos: f32[3, 16], sin: f32[3, 16]", *halves, *ROPE)
    new, notes = _recognized(text, [torch.randn(3, 16) for _ in range(3)])
    assert "rope" not in _ops(new) and ("recognize.rope", Reason.SHAPE_MISMATCH) in refusals(notes)


def test_group_norm() -> None:
    lines = ["x = reshape(h, shape=[2, 4, 18])", *LAYER, "a = add(v, 1e-05)", "r = rsqrt(a)", "n = mul(c, r)"]
    lines += ["k = reshape(n, shape=[2, 8, 3, 3])", "w3 = reshape(w, shape=[8, 1, 1])", "b3 = reshape(o, shape=[1, 8, 1, 1])"]
    text = body("h: f32[2, 8, 3, 3], w: f32[8], o: f32[8]", *lines, "y = mul(k, w3)", "z = add(y, b3)", "z")
    new, _ = _recognized(text, [torch.randn(2, 8, 3, 3), torch.randn(8), torch.randn(8)])
    assert _ops(new) == ["group_norm"]


# -- attention

QKV = "q: f32[b, 4, s, 8], k: f32[b, 4, s, 8], v: f32[b, 4, s, 8]"
LOGITS = ["kt = permute(k, dims=[0, 1, 3, 2])", "l = matmul(q, kt)"]
TAIL = ["p = softmax(a, dim=-1)", "y = matmul(p, v)", "y"]


def _qkv(heads: int = 4, groups: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, 5, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8)]


def test_picture() -> None:
    text = body(QKV + ", mask: f32[b, 1, s, s]", *LOGITS, "c = mul(l, 0.125)", "a = add(c, mask)", *TAIL)
    mask = torch.where(torch.ones(5, 5).tril() > 0, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 5, 5)
    new, _ = _recognized(text, [*_qkv(), mask])
    assert _ops(new) == ["attention"] and new.outputs[0].attrs["scale"] == 0.125


def test_scale_folded_into_q_and_k() -> None:
    lines = ["qs = mul(q, 0.5)", "ks = div(k, 3.0)", "kt = permute(ks, dims=[0, 1, 3, 2])", "a = matmul(qs, kt)", *TAIL]
    new, _ = _recognized(body(QKV, *lines), _qkv())
    assert _ops(new) == ["attention"] and math.isclose(new.outputs[0].attrs["scale"], 0.5 / 3)


def test_grouped_heads() -> None:
    def repeat(x: str) -> list[str]:
        return [f"{x}5 = reshape({x}, shape=[b, 2, 1, s, 8])", f"{x}e = expand({x}5, shape=[b, 2, 2, s, 8])",
                f"{x}4 = reshape({x}e, shape=[b, 4, s, 8])"]  # fmt: skip

    lines = [*repeat("k"), *repeat("v"), "kt = permute(k4, dims=[0, 1, 3, 2])", "l = matmul(q, kt)", "a = mul(l, 0.25)"]
    signature = "q: f32[b, 4, s, 8], k: f32[b, 2, s, 8], v: f32[b, 2, s, 8]"
    new, _ = _recognized(body(signature, *lines, "p = softmax(a, dim=3)", "y = matmul(p, v4)", "y"), _qkv(4, 2))
    assert _ops(new) == ["attention"] and [n.hint for n in new.outputs[0].inputs] == ["q", "k", "v"]


CAUSAL = ["i = iota(length=s)", "r = reshape(i, shape=[s, 1])"]


@pytest.mark.parametrize("mask", ["ge(r, i)", "le(i, r)"])
def test_causal_mask_is_seen(mask: str) -> None:
    new, _ = _recognized(body(QKV, *LOGITS, *CAUSAL, f"m = {mask}", "a = where(m, l, -inf)", *TAIL), _qkv())
    assert _ops(new) == ["attention"] and new.outputs[0].attrs["causal"]


def test_causal_mask_in_a_constant_or_negated() -> None:
    value = torch.full((5, 5), -1e38).triu(1)
    signature = QKV.replace("s,", "5,")
    new, _ = _recognized(body(signature, 'm = constant "m"', *LOGITS, "a = add(l, m)", *TAIL), _qkv(), constants={"m": value})
    assert _ops(new) == ["attention"] and new.outputs[0].attrs["causal"]
    new, _ = _recognized(body(QKV, *LOGITS, *CAUSAL, "m = lt(r, i)", "a = where(m, -inf, l)", *TAIL), _qkv())
    assert _ops(new) == ["attention"] and new.outputs[0].attrs["causal"]


@pytest.mark.parametrize(("mask", "causal"), [(torch.zeros(2, 1, 5, 5), False), (torch.ones(2, 1, 5, 5).tril() > 0, True)])
def test_constant_masks_that_say_something_simpler(mask: torch.Tensor, causal: bool) -> None:
    text = body(QKV.replace("s,", "5,").replace("b,", "2,"), 'm = constant "m"', "y = attention(q, k, v, m, scale=0.5)", "y")
    new, _ = _recognized(text, _qkv(), constants={"m": mask})
    assert len(new.outputs[0].inputs) == 3 and new.outputs[0].attrs["causal"] == causal
    text = body(QKV + ", m: bool[s, s]", "y = attention(q, k, v, m, scale=0.5)", "y")
    _, notes = _recognized(text, [*_qkv(), torch.ones(5, 5) > 0])
    assert ("recognize.no-mask", Reason.NOT_CONSTANT) in refusals(notes)


def test_finite_fill_becomes_an_added_mask_also_for_rows_masked_everywhere() -> None:
    keep = torch.rand(5, 5) > 0.3
    keep[2] = False
    text = body(QKV + ", m: bool[s, s]", *LOGITS, "a = where(m, l, -3.4028234663852886e+38)", *TAIL)
    new, _ = _recognized(text, [*_qkv(), keep])
    assert "attention" in _ops(new) and "softmax" not in _ops(new)


def test_refused_because_masked_rows_would_lose_their_nan() -> None:
    new, notes = _recognized(body(QKV + ", m: bool[s, s]", *LOGITS, "a = where(m, l, -inf)", *TAIL), [*_qkv(), torch.zeros(5, 5) > 0])
    assert "softmax" in _ops(new) and refusals(notes) == {("recognize.attention", Reason.NOT_FINITE)}


def test_refused_because_the_weights_are_returned() -> None:
    new, notes = _recognized(body(QKV, *LOGITS, "a = mul(l, 0.25)", *TAIL[:-1], "y, p"), _qkv())
    assert "softmax" in _ops(new) and refusals(notes) == {("recognize.attention", Reason.SHARED)}


def test_refused_because_softmax_is_over_queries() -> None:
    new, notes = _recognized(body(QKV, *LOGITS, "p = softmax(l, dim=2)", "y = matmul(p, v)", "y"), _qkv())
    assert "softmax" in _ops(new) and refusals(notes) == {("recognize.attention", Reason.SHAPE_MISMATCH)}


NO_ATTENTION = {
    "the mask has more dimensions": ("m: f32[3, b, 4, s, s]", [*LOGITS, "a = add(l, m)"], torch.randn(3, 2, 4, 5, 5)),
    "the mask is one row": ("m: f32[s]", [*LOGITS, "a = add(l, m)"], torch.randn(5)),
    "the condition is one row": ("m: bool[s]", [*LOGITS, "a = where(m, l, -1e38)"], torch.rand(5) > 0.3),
    "what is masked keeps weight": ("m: bool[s, s]", [*LOGITS, "a = where(m, l, -2.0)"], torch.rand(5, 5) > 0.3),
    "no product": ("m: f32[b, 4, s, s]", ["a = add(m, m)"], torch.randn(2, 4, 5, 5)),
    "a sum without product": ("m: f32[b, 4, s, s]", ["n = exp(m)", "a = add(m, n)"], torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("why", NO_ATTENTION)
def test_refused_because_it_is_no_attention(why: str) -> None:
    mask, lines, value = NO_ATTENTION[why]
    new, notes = _recognized(body(f"{QKV}, {mask}", *lines, *TAIL), [*_qkv(), value])
    assert "softmax" in _ops(new) and refusals(notes) == {("recognize.attention", Reason.SHAPE_MISMATCH)}


# -- attention with a bias of positions (ALiBi)

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)
BIAS = ["n = iota(length=s)", "f = cast(n, dtype=f32)", "g = reshape(f, shape=[1, 1, 1, s])", "bias = mul(slopes, g)", "c = mul(l, 0.25)",
        "b1 = add(c, bias)"]  # fmt: skip


@pytest.mark.parametrize("drop", ["gt(i, r)", "lt(r, i)", "ge(d, 1)", "lt(e, 0)", "le(e, -1)", "gt(d, 0)"])
def test_a_bias_of_positions_under_a_causal_mask(drop: str) -> None:
    """As in MPT: the bias is added, what comes later is filled with the least number."""
    away = ["d = sub(i, r)", "e = sub(r, i)", f"m = {drop}", "a = where(m, -3.4028234663852886e+38, b1)"]
    text = body(QKV + ", slopes: f32[1, 4, 1, 1]", *LOGITS, *BIAS, *CAUSAL, *away, *TAIL)
    new, _ = _recognized(text, [*_qkv(), SLOPES])
    (attention,) = [n for n in order(new) if n.op.name == "attention"]
    assert attention.attrs["causal"] and attention.inputs[3].op.name == "mul" and "softmax" not in _ops(new)


def test_two_masks_are_added() -> None:
    text = body(QKV + ", slopes: f32[1, 4, 1, 1], mask: f32[b, 1, s, s]", *LOGITS, *BIAS, "a = add(b1, mask)", *TAIL)
    mask = torch.where(torch.ones(5, 5).tril() > 0, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 5, 5)
    new, _ = _recognized(text, [*_qkv(), SLOPES, mask])
    assert "attention" in _ops(new) and "softmax" not in _ops(new)


def test_a_mask_under_a_causal_fill_stays_one() -> None:
    """A row may be masked wherever causality lets it attend: then the fill decides, as it does in eager."""
    fill = "a = where(m, b1, -3.4028234663852886e+38)"
    text = body(QKV + ", mask: f32[1, 1, s, s]", *LOGITS, *CAUSAL, "m = ge(r, i)", "b1 = add(l, mask)", fill, *TAIL)
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., :2] = -3e38
    new, _ = _recognized(text, [*_qkv(), mask])
    (attention,) = [n for n in order(new) if n.op.name == "attention"]
    assert not attention.attrs["causal"]


# -- sigmoid attention

SIGMOID = ["p = sigmoid(a)", "y = matmul(p, v)", "y"]
SIGMOID_FORMS = {
    "plain": ("", ["a = mul(l, 0.25)"]),
    "a bias": ("", ["c = mul(l, 0.25)", "a = add(c, -1.6)"]),
    "a bias of each head": (", t: f32[4, 1, 1]", ["c = mul(l, 0.25)", "a = add(c, t)"]),
    "a mask": (", t: bool[s, s]", ["a = where(t, l, -inf)"]),
    "a bias and a mask": (", t: bool[s, s]", ["c = add(l, -1.6)", "a = where(t, c, -inf)"]),
    "a mask and a bias": (", t: bool[s, s]", ["c = where(t, l, -1e38)", "a = add(c, -1.6)"]),
    "causal, a bias": ("", [*CAUSAL, "m = ge(r, i)", "c = add(l, -1.6)", "a = where(m, c, -inf)"]),
}


@pytest.mark.parametrize("name", SIGMOID_FORMS)
def test_sigmoid_attention(name: str) -> None:
    operand, lines = SIGMOID_FORMS[name]
    keep = torch.rand(5, 5) > 0.3
    keep[2] = False
    more = [] if not operand else [keep] if "bool" in operand else [torch.randn(4, 1, 1)]
    new, _ = _recognized(body(QKV + operand, *LOGITS, *lines, *SIGMOID), [*_qkv(), *more])
    (attention,) = [n for n in order(new) if n.op.name == "attention"]
    assert attention.attrs["weights"] == "sigmoid" and "sigmoid" not in _ops(new)
    assert attention.attrs["causal"] == ("causal" in name)


NO_SIGMOID_ATTENTION = {
    "its weights are returned": (QKV, [*LOGITS, "a = mul(l, 0.25)", *SIGMOID[:-1], "y, p"], Reason.SHARED),
    "it is no kernel in float64": (QKV.replace("f32", "f64"), [*LOGITS, "a = mul(l, 0.25)", *SIGMOID], Reason.UNSUPPORTED_DTYPE),
    "its heads are too wide": (QKV.replace("8]", "300]"), [*LOGITS, "a = mul(l, 0.25)", *SIGMOID], Reason.LIBRARY_CALL),
    "the logits are no product": (QKV + ", m: f32[b, 4, s, s]", ["a = mul(m, 0.25)", *SIGMOID], Reason.SHAPE_MISMATCH),
    "a gate, no attention": ("x: f32[b, s, s], v: f32[b, s, 8]", ["p = sigmoid(x)", "y = matmul(p, v)", "y"], Reason.SHAPE_MISMATCH),
}


@pytest.mark.parametrize("why", NO_SIGMOID_ATTENTION)
def test_no_sigmoid_attention_because(why: str) -> None:
    signature, lines, reason = NO_SIGMOID_ATTENTION[why]
    _, canonical, _ = run(Canonicalize(), body(signature, *lines))
    notes = Notes()
    assert "sigmoid" in _ops(Recognize().run(canonical, notes)) and refusals(notes) == {("recognize.attention", reason)}


def test_sigmoid_attention_is_the_kernels_of_this_device() -> None:
    lines = ["a = mul(l, 0.25)", *SIGMOID]
    _, canonical, _ = run(Canonicalize(), body(QKV, *LOGITS, *lines))
    notes = Notes()
    assert "sigmoid" in _ops(Recognize().run(retarget(canonical, "mps"), notes))
    assert refusals(notes) == {("recognize.attention", Reason.OTHER_DEVICE)}


def test_refused_because_a_scale_widens_the_norm() -> None:
    new, notes = _recognized(body("x: f32[2, 8], g: f32[3, 2, 8]", *RMS, "z = mul(y, g)", "z"), [torch.randn(2, 8), torch.randn(3, 2, 8)])
    assert _ops(new) == ["rms_norm", "mul"] and refusals(notes) == {("recognize.norm-scale", Reason.SHAPE_MISMATCH)}


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "layer_norm", "rms_norm"])
def test_expansions_are_recognized(name: str) -> None:
    x = graph_input("x", TensorType(torch.float32, (3, 8)))
    attrs = {"dim": 1} if "softmax" in name else {"axes": 1, "eps": 1e-5}
    expand = OPS[name].expand
    assert expand is not None
    canonical = Canonicalize().run(make_graph("g", [x], [expand(x, **attrs)]))
    assert _ops(Recognize().run(canonical)) == [name]
