"""Pooling and depthwise convolutions in fuse-regions and choose-layouts: kernels of ours where their channels lie last."""

import pytest
import torch
from pass_checks import assert_same_values, body, run
from tilewright.ir.graph import graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType
from tilewright.passes.base import Reason
from tilewright.passes.choose_layouts import ChooseLayouts
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.group_norms import group_norm_last

PLAIN = "stride=[1, 1], padding=[1, 1], dilation=[1, 1]"
DEPTHWISE = f"conv(x, w, b, {PLAIN}, groups=16, channels_last=true)"
IMAGE = "x: f32[2, 32, 32, 16], w: f32[16, 1, 3, 3], b: f32[16]"
POOL = "kernel=[3, 3], stride=[2, 2], padding=[1, 1], channels_last=true"


def fused(text):
    before, after, notes = run(FuseRegions(), text)
    torch.manual_seed(0)
    assert_same_values(before, after, [torch.randn(tuple(n.shape)).to(n.dtype) for n in before.inputs], 1e-5)
    return after, notes


def labels(graph):
    return [n.attrs["label"] for n in order(graph) if n.op.name == "region"]


def test_a_depthwise_convolution_takes_its_epilogue():
    after, _ = fused(body(f"{IMAGE}, r: f32[2, 32, 32, 16]", f"c = {DEPTHWISE}", "h = silu(c)", "y = add(h, r)", "y"))
    assert len(labels(after)) == 1 and labels(after)[0].startswith("conv")


@pytest.mark.parametrize("op", ["max_pool", "avg_pool"])
def test_a_pool_takes_what_is_cheap_before_and_what_is_after(op):
    after, _ = fused(body("x: f32[2, 32, 32, 16]", "r = relu(x)", f"p = {op}(r, {POOL})", "y = silu(p)", "y"))
    assert len(labels(after)) == 1


def test_a_dear_value_is_not_computed_for_each_window():
    after, notes = fused(body("x: f32[2, 32, 32, 16]", "a = tanh(x)", "b = exp(a)", "c = erf(b)", f"y = max_pool(c, {POOL})", "y"))
    assert len(labels(after)) == 2
    assert Reason.RECOMPUTE in {d.reason for d in notes.declined}


@pytest.mark.parametrize("window", [DEPTHWISE.replace("(x", "(j"), f"max_pool(j, {POOL})"])
def test_a_window_does_not_join_what_it_reads(window):
    """Each element would be picked out of the pieces once for every window it is in."""
    lines = ["a = relu(x)", "j = cat(a, z, dim=1)", f"y = {window}", "y"]
    after, notes = fused(body(f"{IMAGE}, z: f32[2, 8, 32, 16]", *lines))
    assert len(labels(after)) == 2
    assert Reason.PROLOGUE in {d.reason for d in notes.declined}


def test_one_kernel_walks_one_window():
    after, notes = fused(body(IMAGE, f"c = {DEPTHWISE}", "y = " + f"max_pool(c, {POOL})".replace("[1, 1]", "[0, 0]"), "y"))
    assert len(labels(after)) == 2
    assert Reason.SECOND_WALK in {d.reason for d in notes.declined}


def test_a_window_is_not_computed_anew_for_each_reader():
    """Upsampling reads each result four times: it stays a kernel of its own."""
    lines = [
        f"c = {DEPTHWISE}",
        "i = iota(length=64)",
        "j = floor_divide(i, 2)",
        "k = reshape(j, shape=[64, 1])",
        "y = index(c, k, j, dims=[1, 2])",
    ]
    after, notes = fused(body(IMAGE, *lines, "y"))
    assert len(labels(after)) == 2
    assert Reason.RECOMPUTE in {d.reason for d in notes.declined}


@pytest.mark.parametrize(
    "line",
    [
        f"c = conv(x, w, {PLAIN}, groups=16)",
        f"c = conv(x, v, {PLAIN}, groups=8, channels_last=true)",
        f"c = conv(x, u, {PLAIN}, groups=16, channels_last=true)",
        f"c = conv(x, w, {PLAIN}, groups=16, transposed=true, channels_last=true)",
        f"c = conv(x, l, {PLAIN}, groups=16, channels_last=true)",
        "c = conv(x, l, stride=[32, 32], padding=[0, 0], dilation=[1, 1], groups=16, channels_last=true)",
        "c = max_pool(x, kernel=[3, 3], stride=[2, 2], padding=[1, 1])",
    ],
)
def test_the_library_keeps_the_others(line):
    """Channels first, grouped, with several results per channel, transposed, with long sides."""
    image = "x: f32[2, 16, 32, 16], w: f32[16, 1, 3, 3], v: f32[16, 2, 3, 3], u: f32[32, 1, 3, 3], l: f32[16, 1, 13, 13]"
    after, _ = fused(body(image, line, "y = relu(c)", "y"))
    assert any(n.op.name in ("conv", "max_pool") for n in order(after))


def test_channels_are_turned_for_a_depthwise_convolution():
    """Between products by pixel, as in MobileNet: none of the three reorders anything."""
    signature = "x: f32[2, 16, 32, 32], w: f32[64, 16, 1, 1], d: f32[64, 1, 3, 3], v: f32[16, 64, 1, 1]"
    one = "stride=[1, 1], padding=[0, 0], dilation=[1, 1]"
    depthwise = f"c = conv(r, d, {PLAIN}, groups=64)"
    lines = [f"a = conv(x, w, {one})", "r = relu(a)", depthwise, "s = relu(c)", f"y = conv(s, v, {one})", "m = mean(y, dims=[2, 3])"]
    text = body(signature, *lines, "m")
    before, after, _ = run(ChooseLayouts(), text)
    assert_same_values(before, after, [torch.randn(tuple(n.shape)) for n in before.inputs], 1e-4)
    assert sum(n.op.name == "permute" for n in order(after)) == 1
    assert all(n.attrs["channels_last"] for n in order(after) if n.op.name == "conv")


@pytest.mark.parametrize("shape", [(2, 24, 6, 5), (2, 24, 7), (2, 24, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_group_norm_keeps_channels_last(shape, dtype, parameters):
    """As near to float64 as torch, far from zero too, where a mean of 20 standard deviations is taken away after scaling, as in torch."""
    torch.manual_seed(0)
    space = len(shape) - 2
    x = graph_input("x", TensorType(dtype, shape))
    weights = [graph_input(name, TensorType(dtype, (24,))) for name in "wb"[:parameters]]
    norm = OPS["group_norm"](x, *weights, groups=4)
    last = OPS["permute"](x, dims=(0, *range(2, space + 2), 1))
    made = group_norm_last(norm, last, *weights, *[None] * (2 - parameters), "rule")  # type: ignore[arg-type]
    graph = make_graph("g", [x, *weights], [norm, OPS["permute"](made, dims=(0, space + 1, *range(1, space + 1)))])
    inputs = [torch.randn(shape).add(20).to(dtype), *(torch.randn(24).to(dtype) for _ in weights)]
    eager, ours = interpret(graph, inputs)
    exact = interpret(graph, inputs, torch.float64)[0]
    budget = 2 * (eager.double() - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
    budget += 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 20
    assert (ours.double() - exact).abs().max() <= budget


def test_group_norm_between_convolutions_turns_nothing():
    signature = ", ".join(["x: f32[2, 64, 32, 32]", "w: f32[64, 64, 3, 3]", "v: f32[64, 64, 3, 3]", "g: f32[64]", "h: f32[64]"])
    norm = ["n = group_norm(c, g, h, groups=8)", "s = silu(n)"]
    text = body(signature, f"c = conv(x, w, {PLAIN})", *norm, f"y = conv(s, v, {PLAIN})", "m = mean(y, dims=[2, 3])", "m")
    before, after, _ = run(ChooseLayouts(), text)
    assert_same_values(before, after, [torch.randn(tuple(n.shape)) for n in before.inputs], 1e-4)
    assert sum(n.op.name == "permute" for n in order(after)) == 1
    fused = [n.attrs["label"] for n in order(FuseRegions().run(after)) if n.op.name == "region"]
    assert len(fused) == 5, fused  # rows, channels, groups, the norm with its activation, the mean
