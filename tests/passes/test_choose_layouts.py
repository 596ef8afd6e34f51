"""choose-layouts: convolutions with their channels last, permutes only at the ends, refused where it does not pay."""

import random
import re

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import order
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Reason
from tilewright.passes.choose_layouts import ChooseLayouts, with_channels_last
from tilewright.passes.layout_rules import turn_rule

CONV = "stride=[1, 1], padding=[1, 1], dilation=[1, 1]"
X = "x: f32[2, 16, 32, 32]"
W = ("w: f32[16, 16, 3, 3]", "v: f32[16, 16, 3, 3]", "u: f32[16, 16, 3, 3]", "t: f32[16, 16, 3, 3]")
ALL = "x, w, v, u, t"


def convs(name: str, *weights: str) -> list[str]:
    """A chain of convolutions c0, c1, ... starting at `name`."""
    return [f"c{i} = conv({name if i == 0 else f'c{i - 1}'}, {w}, {CONV})" for i, w in enumerate(weights)]


def net(*lines: str, first: str = X, extra: str = "") -> str:
    return body(", ".join([first, *W, *([extra] if extra else [])]), *lines)


def values(graph) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tuple(d if isinstance(d, int) else 5 for d in n.shape)).to(n.dtype) for n in graph.inputs]


def check(text: str, tolerance: float = 1e-4):
    before, after, notes = run(ChooseLayouts(), text)
    verify(after)
    assert_same_values(before, after, values(before), tolerance)
    return after, notes


def permutes(graph) -> list[tuple[int, ...]]:
    return [n.attrs["dims"] for n in order(graph) if n.op.name == "permute"]


def last(graph) -> int:
    return sum(bool(n.attrs.get("channels_last")) for n in order(graph))


def test_the_picture():
    after, _ = check(net(*convs("x", "w", "v", "u", "t"), "r = relu(c3)", "m = mean(r, dims=[2, 3])", "m"))
    last_conv = CONV + ", channels_last=true"
    chain = [line.replace(CONV, last_conv) for line in convs("p", "w", "v", "u", "t")]
    assert_becomes(after, net("p = permute(x, dims=[0, 2, 3, 1])", *chain, "r = relu(c3)", "m = mean(r, dims=[1, 2])", "m"))


def test_what_leaves_is_laid_out_as_before():
    after, _ = check(net(*convs("x", "w", "v", "u", "t"), "q = conv(c3, w, " + CONV + ")", "z = conv(q, v, " + CONV + ")", "z"))
    assert last(after) == 6
    out = after.outputs[0]
    assert out.op.name == "layout" and out.attrs["strides"] == (16384, 1024, 32, 1) and out.inputs[0].op.name == "permute"


@pytest.mark.parametrize(
    "middle",
    [
        "m = add(c3, x)",
        "m = mul(c3, s)",
        "m = batch_norm(c3, s1, s1)",
        "m = batch_norm(c3, s1, s2, s1, s1)",
        "m = max_pool(c3, kernel=[3, 3], stride=[2, 2], padding=[1, 1])",
        "m = avg_pool(c3, kernel=[2, 2], stride=[2, 2], padding=[0, 0], count_padding=false)",
        "m = pad(c3, low=[0, 0, 1, 2], high=[0, 1, 3, 4], value=0.5)",
        "m = cat(c3, x, dim=1)",
        "m = slice(c3, dim=1, start=2, stop=9)",
        "g = mean(c3, dims=[2, 3], keepdim=true)\nm = mul(c3, g)",
        "g = amax(c3, dims=[3])\nh = reshape(g, shape=[2, 16, 32, 1])\nm = add(c3, h)",
        "g = argmax(c3, dims=[1], keepdim=true)\nm = add(c3, g)",
        "m = softmax(c3, dim=1)",
        "m = flip(c3, dims=[1, 3])",
        "m = cumsum(c3, dim=1)",
        "m = group_norm(c3, s1, s1, groups=4)",
        "m = add(c3, row)",
        "m = where(gt(c3, 0.0), c3, s)",
        "m = conv(c3, w, stride=[2, 2], padding=[1, 1], dilation=[1, 1], transposed=true, output_padding=[1, 1])",
        "m = conv(c3, k, s1, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=16)",
        "g = iota(length=32)\nh = reshape(g, shape=[32, 1])\nm = index(c3, h, g, dims=[2, 3])",
        "m = expand(mean(c3, dims=[2], keepdim=true), shape=[2, 16, 5, 32])",
        "m = reshape(c3, shape=[2, 16, 1024])",
        "m = reshape(c3, shape=[2, 16384])",
        "m = cast(c3, dtype=f64)",
    ],
)  # fmt: skip
def test_permutes_sink_through(middle):
    extra = "s: f32[16, 1, 1], s1: f32[16], s2: f32[16], row: f32[32, 1], k: f32[16, 1, 3, 3]"
    lines = [line.replace("gt(c3, 0.0)", "cond").replace("mean(c3, dims=[2], keepdim=true)", "flat") for line in middle.split("\n")]
    before = ["cond = gt(c3, 0.0)"] * ("where" in middle) + ["flat = mean(c3, dims=[2], keepdim=true)"] * ("expand" in middle)
    text = net(*convs("x", "w", "v", "u", "t"), *before, *lines, "z = sum(m, dims=[0])", "z", extra=extra)
    graph = parse(text)
    torch.manual_seed(0)
    inputs = [torch.rand(tuple(n.shape)) for n in graph.inputs]
    _, after, _ = run(ChooseLayouts(), text)
    verify(after)
    assert_same_values(graph, after, inputs, 1e-3)
    assert last(after) >= 4


def test_a_net_around_channels_last_blocks():
    """As in ConvNeXt: layer norm and linears want what the convolution yields."""
    after, _ = check(net(
        *convs("x", "w", "v"), "p = permute(c1, dims=[0, 2, 3, 1])", "n = layer_norm(p, g, g)", "y = linear(n, a)",
        "q = permute(y, dims=[0, 3, 1, 2])", "r = add(q, c0)", f"z = conv(r, u, {CONV})", "m = mean(z, dims=[2, 3])", "m",
        extra="g: f32[16], a: f32[16, 16]",
    ))  # fmt: skip
    assert permutes(after) == [(0, 2, 3, 1)] and last(after) == 3


def test_patches_become_tokens_without_a_copy():
    text = body("x: f32[4, 3, 64, 64], w: f32[64, 3, 4, 4]", "c = conv(x, w, stride=[4, 4], padding=[0, 0], dilation=[1, 1])",
                "f = reshape(c, shape=[4, 64, 256])", "t = permute(f, dims=[0, 2, 1])", "t")  # fmt: skip
    after, _ = check(text)
    assert permutes(after) == [(0, 2, 3, 1)]
    assert after.outputs[0].op.name == "reshape"


def test_symbolic_sizes():
    lines = [*convs("x", "w", "v", "u", "t"), "m = max_pool(c3, kernel=[2, 2], stride=[2, 2], padding=[0, 0])", "z = mean(m, dims=[2, 3])"]
    text = net(*lines, "z", first="x: f32[n, 16, h, 32]").replace(" {", " where n in 1..64, h in 4..512 {", 1)
    before, after, _ = run(ChooseLayouts(), text)
    verify(after)
    assert last(after) == 5
    for n, h in ((1, 4), (3, 17)):
        inputs = [torch.randn(n, 16, h, 32), *values(before)[1:]]
        assert_same_values(before, after, inputs, 1e-4)


def test_it_is_done_once():
    after, _ = check(net(*convs("x", "w", "v", "u", "t"), "m = mean(c3, dims=[2, 3])", "m"))
    assert_becomes(ChooseLayouts().run(after), after)


def test_the_notes_name_each_convolution():
    _, notes = check(net(*convs("x", "w", "v", "u", "t"), "m = mean(c3, dims=[2, 3])", "m"))
    assert [a.what for a in notes.applied] == ["conv c0", "conv c1", "conv c2", "conv c3"]
    assert all(a.rule == "choose-layouts" and a.bytes_saved > 0 for a in notes.applied)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (net(*convs("x", "w"), "c0"), Reason.NO_GAIN),  # two permutes for one convolution
        (net(*convs("x", "w", "v", "u"), "m = mean(c2, dims=[2, 3])", "m", first="x: f32[1, 16, 2, 2]"), Reason.NO_GAIN),  # tiny
        (net(*convs("x", "w", "v"), "m = mean(c1, dims=[2, 3])", "m").replace("f32", "f64"), Reason.NO_GAIN),
        (body("x: f32[2, 16, 4096], w: f32[16, 16, 3]", "c = conv(x, w, stride=[1], padding=[1], dilation=[1])",
              "m = mean(c, dims=[2])", "m"), Reason.NO_GAIN),
    ],
)  # fmt: skip
def test_refused(text, reason):
    before, after, notes = run(ChooseLayouts(), text)
    assert after is before and refusals(notes) == {("choose-layouts", reason)}


def test_a_net_without_convolutions_stays():
    text = body("x: f32[2, 4, 64, 64], m: f32[64, 64]", "a = attention(x, x, x, m, scale=0.125)", "r = relu(a)", "r")
    before, after, notes = run(ChooseLayouts(), text)
    assert after is before and not notes.applied and not notes.declined


def test_other_devices_stay():
    text = re.sub(r"(f32\[[^]]*\])", r"\1@cuda:0", net(*convs("x", "w", "v", "u", "t"), "m = mean(c3, dims=[2, 3])", "m"))
    before, after, notes = run(ChooseLayouts(), text)
    assert after is before and {d.value for d in notes.declined} == {"cuda:0"}


@pytest.mark.parametrize("seed", range(20))
def test_any_choice_computes_the_same(seed):
    """The cut decides what is fast, not what is right."""
    graph = parse(net(
        *convs("x", "w", "v"), "a = mul(c1, s)", "b = relu(a)", "p = max_pool(b, kernel=[3, 3], stride=[1, 1], padding=[1, 1])",
        "d = cat(p, c0, dim=1)", "e = slice(d, dim=1, start=3, stop=19)", "g = amax(e, dims=[2, 3], keepdim=true)", "h = sub(e, g)",
        "i = permute(h, dims=[0, 2, 3, 1])", "j = softmax(i, dim=3)", "k = permute(j, dims=[0, 3, 1, 2])", "l = add(k, c0)",
        f"o = conv(l, u, {CONV})", "q = reshape(o, shape=[2, 16, 1024])", "r = permute(q, dims=[0, 2, 1])", "y = sum(o, dims=[1])",
        "z = argmax(o, dims=[2])", "r, y, z, o, k", extra="s: f32[16, 1, 1]",
    ))  # fmt: skip
    chance = random.Random(seed)
    chosen = {n for n in order(graph) if turn_rule(n) and chance.random() < 0.5}
    after = with_channels_last(graph, chosen)
    verify(after)
    assert_same_values(graph, after, values(graph), 1e-4)
