"""split-space: patches compute the same to the bit, take what arithmetic was foretold, and less memory; refused with reasons."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_checks import assert_becomes, body, refusals
from support import NATIVE
from tilewright.driver.compile import build_program
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.pipeline import FINISHING, PREPARING
from tilewright.ir.analysis.footprint import peak_bytes
from tilewright.ir.analysis.halo import Stage
from tilewright.ir.graph import Graph, Node, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes, Reason
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.manager import parse_passes, run_passes
from tilewright.passes.space_plans import Planner, divided, graph_flops
from tilewright.passes.split_space import SplitSpace, first_stage, with_patches
from torch import nn

CONV = "stride=[1, 1], padding=[1, 1], dilation=[1, 1]"
HALF = "stride=[2, 2], padding=[1, 1], dilation=[1, 1]"
POINT = "stride=[1, 1], padding=[0, 0], dilation=[1, 1]"
ASKEW = "stride=[1, 1], padding=[0, 2], padding_after=[2, 0], dilation=[1, 1]"
FLAT = "stride=[1], padding=[1], dilation=[1]"


def numbers(graph: Graph) -> list[torch.Tensor]:
    """Small whole numbers, of which any order of summation gives the same sum."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-2, 3, n.shape, generator=generator).to(n.dtype) for n in graph.inputs]


def stage_in(graph: Graph) -> Stage:
    found = first_stage(graph)
    assert found is not None
    return found


def end_of(stage: Stage, hint: str = "y") -> Node:
    return next(n for n in stage.readings if n.hint == hint)


def check(graph: Graph, parts: Sequence[int], hint: str = "y") -> Graph:
    """The graph in patches: the same to the bit, and as much arithmetic as foretold."""
    stage = stage_in(graph)
    end = end_of(stage, hint)
    after = with_patches(graph, stage, end, parts)
    verify(after)
    for x, y in zip(interpret(graph, numbers(graph)), interpret(after, numbers(graph)), strict=True):
        assert x.shape == y.shape and torch.equal(x, y)
    plan = Planner(graph, stage, 0.0).plan(end, parts)
    assert plan is not None and plan.flops == graph_flops(after)
    return after


def overhead(graph: Graph, after: Graph) -> float:
    return graph_flops(after) / graph_flops(graph)


# -- exact


def test_four_layers_in_one_dimension():
    """The more patches the more is computed twice."""
    layers = [f"v{k} = conv({'x' if k == 0 else f'v{k - 1}'}, w, {FLAT})" for k in range(3)]
    graph = parse(body("x: f64[1, 4, 64], w: f64[4, 4, 3]", *layers, f"y = conv(v2, w, {FLAT})", "y"))
    found = [overhead(graph, check(graph, [n])) for n in (1, 2, 4, 8)]
    halo = [(n - 1) * 2 * (1 + 2 + 3) / (4 * 64) for n in (1, 2, 4, 8)]  # rows beside each cut, of the second layer from the end on
    assert found == pytest.approx([1 + h for h in halo])


def test_the_picture():
    graph = parse(body("x: f32[1, 2, 16], w: f32[2, 2, 3], v: f32[2, 2, 3]", f"c = conv(x, w, {FLAT})", f"d = conv(c, v, {FLAT})", "d"))
    after = with_patches(graph, stage_in(graph), graph.outputs[0], [2])
    low, high = "stride=[1], padding=[1], padding_after=[0], dilation=[1]", "stride=[1], padding=[0], padding_after=[1], dilation=[1]"
    assert_becomes(after, body(
        "x: f32[1, 2, 16], w: f32[2, 2, 3], v: f32[2, 2, 3]",
        "x0 = slice(x, dim=2, start=0, stop=10)", f"c0 = conv(x0, w, {low})", f"d0 = conv(c0, v, {low})",
        "x1 = slice(x, dim=2, start=6, stop=16)", f"c1 = conv(x1, w, {high})", f"d1 = conv(c1, v, {high})",
        "d = cat(d0, d1, dim=2)", "d",
    ))  # fmt: skip


NETS = {
    "strides": (f"a = conv(x, w, {HALF})", "r = relu(a)", f"y = conv(r, w, {HALF})"),
    "strides without overlap": ("a = conv(x, k, stride=[2, 2], padding=[0, 0], dilation=[1, 1])", f"y = conv(a, w, {CONV})"),
    "dilation": ("a = conv(x, w, stride=[1, 1], padding=[2, 2], dilation=[2, 2])", f"y = conv(a, w, {CONV})"),
    "even kernels": ("a = conv(x, e, stride=[1, 1], padding=[1, 1], dilation=[1, 1])", f"y = conv(a, e, {HALF})"),
    "a residual": (f"a = conv(x, w, {CONV})", "r = relu(a)", f"b = conv(r, w, {CONV})", "y = add(b, x)"),
    "a shortcut": (f"a = conv(x, w, {HALF})", f"b = conv(a, w, {CONV})", "s = conv(x, k, stride=[2, 2], padding=[0, 0], dilation=[1, 1])",
                   "y = add(b, s)"),
    "depthwise": (f"a = conv(x, k, {POINT})", f"b = conv(a, d, {HALF}, groups=2)", "y = clamp(b, 0.0, 6.0)"),
    "max pooling": (f"a = conv(x, w, {HALF})", "y = max_pool(a, kernel=[3, 3], stride=[2, 2], padding=[1, 1])"),
    "max pooling to the ceiling": (f"a = conv(x, w, {CONV})", "y = max_pool(a, kernel=[3, 3], stride=[2, 2], padding=[0, 0], ceil=true)"),
    "mean pooling": (f"a = conv(x, w, {CONV})", "y = avg_pool(a, kernel=[2, 2], stride=[2, 2], padding=[1, 1])"),
    "a divisor": (f"a = conv(x, w, {CONV})", "y = avg_pool(a, kernel=[3, 3], stride=[1, 1], padding=[1, 1], divisor=4)"),
    "pooling of max by pooling": ("a = max_pool(x, kernel=[2, 2], stride=[1, 1], padding=[1, 1])", f"y = conv(a, w, {CONV})"),
    "dense": (f"a = conv(x, w, {CONV})", "b = cat(a, x, dim=1)", f"c = conv(b, j, {CONV})", "y = cat(c, b, dim=1)"),
    "padding of its own": ("p = pad(x, low=[0, 0, 1, 2], high=[0, 0, 2, 1], value=3)", f"y = conv(p, w, {CONV})"),
    "crops": ("p = slice(x, dim=2, start=1, stop=24, step=2)", f"a = conv(p, w, {CONV})", "y = slice(a, dim=3, start=2, stop=20)"),
    "normalized input": ("m = sub(x, 1.0)", f"a = conv(m, w, {CONV})", f"y = conv(a, w, {HALF})"),
    "a map beside it": (f"a = conv(x, w, {CONV})", "b = add(a, o)", f"y = conv(b, w, {HALF})"),
    "padding on one side": (f"a = conv(x, w, {ASKEW})", f"y = conv(a, w, {CONV})"),
    "another order": (f"a = conv(x, w, {CONV})", "t = permute(a, dims=[0, 2, 3, 1])", "s = mul(t, t)", "y = amax(s, dims=[3])"),
}  # fmt: skip
SIGNATURE = (
    "x: f64[2, 2, 27, 24], w: f64[2, 2, 3, 3], e: f64[2, 2, 2, 2], k: f64[2, 2, 1, 1], d: f64[2, 1, 3, 3], j: f64[2, 4, 3, 3], "
    "o: f64[2, 27, 24]"
)


@pytest.mark.parametrize("name", NETS)
def test_patches_are_exact(name):
    graph = parse(body(SIGNATURE, *NETS[name], "y"))
    for parts in ([1, 1], [2, 1], [1, 3], [2, 2], [3, 4]):
        check(graph, parts)


def test_pads_are_none_but_what_ops_have_themselves():
    """What is missing at the border of the image is padding of the op, which its kernel does not read."""
    graph = parse(body(SIGNATURE, *NETS["a residual"], "y"))
    assert all(n.op.name != "pad" for n in order(check(graph, [3, 3])))


def test_three_dimensions():
    cube = "stride=[1, 1, 1], padding=[1, 1, 1], dilation=[1, 1, 1]"
    graph = parse(body("x: f64[1, 2, 8, 6, 7], w: f64[2, 2, 3, 3, 3]", f"a = conv(x, w, {cube})", f"y = conv(a, w, {cube})", "y"))
    check(graph, [2, 1, 3])


def test_channels_last():
    last = f"{CONV}, channels_last=true"
    graph = parse(body("x: f64[1, 16, 16, 2], w: f64[2, 2, 3, 3]", f"a = conv(x, w, {last})", f"y = conv(a, w, {last})", "y"))
    check(graph, [2, 3])


def test_what_follows_reads_the_whole():
    pools = "m = mean(y, dims=[2, 3])", "n = amax(y, dims=[2, 3])", "z = add(m, n)"
    graph = parse(body("x: f64[1, 2, 16, 16], w: f64[2, 2, 3, 3]", f"y = conv(x, w, {CONV})", *pools, "z"))
    check(graph, [2, 2])


def test_parts_differ_by_one_and_the_longer_ones_are_outside():
    assert [s.size for s in divided(30, 4)] == [8, 7, 7, 8]
    assert [s.size for s in divided(31, 4)] == [8, 8, 7, 8]
    assert [s.size for s in divided(28, 4)] == [7, 7, 7, 7]
    for size in range(1, 40):
        for parts in range(1, size + 1):
            spans = divided(size, parts)
            assert spans[0].start == 0 and spans[-1].stop == size and all(a.stop == b.start for a, b in zip(spans, spans[1:]))
            assert max(s.size for s in spans) - min(s.size for s in spans) <= 1


@st.composite
def nets(draw: st.DrawFn) -> tuple[str, int]:
    """(a graph of random layers that ends in y, how many axes it has)."""
    axes = draw(st.integers(1, 2))
    sizes = {"x": tuple(draw(st.integers(7, 24)) for _ in range(axes))}
    weights, lines, last = [], [], "x"

    def listed(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(axes)]

    for k in range(draw(st.integers(1, 5))):
        name, size = f"v{k}", sizes[last]
        kind = draw(st.sampled_from(["conv", "depthwise", "max", "mean", "relu", "add"]))
        same = [n for n, s in sizes.items() if s == size]
        if kind in ("conv", "depthwise"):
            kernel, stride, dilation = listed(1, 4), listed(1, 3), listed(1, 2)
            padding = [draw(st.integers(0, e - 1)) for e in kernel]
            extent = [(e - 1) * d + 1 for e, d in zip(kernel, dilation)]
            weights.append(f"w{k}: f64[2, {1 if kind == 'depthwise' else 2}, {', '.join(map(str, kernel))}]")
            groups = ", groups=2" if kind == "depthwise" else ""
            text = f"conv({last}, w{k}, stride={stride}, padding={padding}, dilation={dilation}{groups})"
        elif kind in ("max", "mean"):
            exact = [draw(st.sampled_from([1, 2, 4])) for _ in range(axes)]  # sides by which means of whole numbers have no rounding
            kernel = listed(1, 3) if kind == "max" else exact
            stride, padding = listed(1, 3), [draw(st.integers(0, e // 2)) for e in kernel]
            extent = kernel
            text = f"{'max_pool' if kind == 'max' else 'avg_pool'}({last}, kernel={kernel}, stride={stride}, padding={padding})"
        else:
            other = draw(st.sampled_from(same))
            text = f"relu({last})" if kind == "relu" else f"add({last}, {other})"
            stride, padding, extent = [1] * axes, [0] * axes, [1] * axes
        made = tuple((s + 2 * p - e) // t + 1 for s, p, e, t in zip(size, padding, extent, stride))
        if min(made) < 1 or any(s + 2 * p < e for s, p, e in zip(size, padding, extent)):
            continue
        lines.append(f"{name} = {text}")
        sizes[name], last = made, name
    shape = ", ".join(map(str, sizes["x"]))
    return body(", ".join([f"x: f64[1, 2, {shape}]", *weights]), *lines, f"y = add({last}, 1.0)", "y"), axes


@settings(max_examples=60, deadline=None)
@given(nets(), st.data())
def test_generated_nets(net, data):
    text, axes = net
    graph = parse(text)
    stage = first_stage(graph)
    if stage is None:  # no window in it
        return
    parts = [data.draw(st.integers(1, min(5, size))) for size in stage.sizes(end_of(stage))][:axes]
    if Planner(graph, stage, 0.0).plan(end_of(stage), parts) is None:
        with pytest.raises(ValueError, match="are too many"):
            with_patches(graph, stage, end_of(stage), parts)
        return
    check(graph, parts)


# -- which plan


WIDE = (
    f"a = conv(x, w, {HALF})", "r = relu(a)", f"b = conv(r, v, {HALF})", "s = relu(b)", f"c = conv(s, u, {HALF})", "y = relu(c)",
    "m = mean(y, dims=[2, 3])", "m",
)  # fmt: skip
WIDE_SIGNATURE = "x: f32[1, 3, 128, 128], w: f32[32, 3, 3, 3], v: f32[16, 32, 3, 3], u: f32[16, 16, 3, 3]"


def test_the_peak_falls_within_the_arithmetic_allowed():
    graph = parse(body(WIDE_SIGNATURE, *WIDE))
    notes = Notes()
    after = SplitSpace(overhead=0.25).run(graph, notes)
    verify(after)
    assert peak_bytes(after) < 0.4 * peak_bytes(graph)
    assert 1 <= overhead(graph, after) <= 1.25
    torch.testing.assert_close(interpret(after, numbers(graph))[0], interpret(graph, numbers(graph))[0])
    assert [a.rule for a in notes.applied] == ["split-space"]
    assert refusals(notes) == {("split-space", Reason.WHOLE_IMAGE)}


def test_less_arithmetic_takes_more_memory():
    graph = parse(body(WIDE_SIGNATURE, *WIDE))
    some, more = (SplitSpace(overhead=o).run(graph) for o in (0.03, 0.5))
    assert peak_bytes(more) < peak_bytes(some) < peak_bytes(graph)
    assert overhead(graph, some) <= 1.03 < overhead(graph, more) <= 1.5


def test_a_limit_takes_no_more_arithmetic_than_it_needs():
    graph = parse(body(WIDE_SIGNATURE, *WIDE))
    half = peak_bytes(graph) // 2
    least, enough = SplitSpace(overhead=0.5).run(graph), SplitSpace(overhead=0.5, limit=half).run(graph)
    assert peak_bytes(least) < peak_bytes(enough) <= half
    assert graph_flops(enough) < graph_flops(least)


def test_the_foretold_peak_is_that_of_the_graph_it_makes():
    graph = parse(body(WIDE_SIGNATURE, *WIDE))
    stage = stage_in(graph)
    for parts in ([1, 2], [2, 2], [4, 1], [4, 4]):
        plan = Planner(graph, stage, 0.0).plan(end_of(stage), parts)
        assert plan is not None
        assert plan.peak == pytest.approx(peak_bytes(with_patches(graph, stage, end_of(stage), parts)), rel=0.1)


# -- refused


def declined(text: str) -> list[tuple[Reason, str]]:
    graph, notes = parse(text), Notes()
    assert SplitSpace().run(graph, notes) is graph
    return [(d.reason, d.value) for d in notes.declined]


def test_refused_because_nothing_is_convolved():
    assert declined(body("x: f32[4, 8], w: f32[8, 8]", "y = linear(x, w)", "y")) == [
        (Reason.SHAPE_MISMATCH, "no convolution of an image starts it")
    ]
    assert declined(body("x: f32[4, 8, 8, 8]", "y = relu(x)", "y"))[0][0] is Reason.SHAPE_MISMATCH


def test_refused_because_it_gains_nothing():
    text = body("x: f32[1, 2, 16, 16], w: f32[2, 2, 3, 3]", f"y = conv(x, w, {CONV})", "y")
    ((reason, value),) = declined(text)
    assert reason is Reason.NO_GAIN and value.startswith("no patches within 25% more arithmetic take less than")


def test_refused_because_the_limit_is_kept():
    graph, notes = parse(body(WIDE_SIGNATURE, *WIDE)), Notes()
    assert SplitSpace(limit=peak_bytes(graph)).run(graph, notes) is graph
    assert [(d.reason, d.value) for d in notes.declined] == [(Reason.NO_GAIN, "576.0 KiB are within the limit")]


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ("g = group_norm(a, groups=4)", "it normalizes over the whole image"),
        ("p = mean(a, dims=[2, 3], keepdim=true); q = sigmoid(p); g = mul(a, q)", "it takes the mean of the whole image"),
        ("f = reshape(a, shape=[1, 32, 4096]); h = relu(f); g = reshape(h, shape=[1, 32, 64, 64])", "it flattens the image"),
        ("p = amax(a, dims=[2, 3], keepdim=true); g = sub(a, p)", "it takes the amax of the whole image"),
    ],
)
def test_a_stage_ends_before_what_needs_the_whole_image(ends, why):
    """Here it is the first layer's result, all of which is needed, so that nothing is gained."""
    lines = (f"a = conv(x, w, {HALF})", *ends.split("; "), f"b = conv(g, v, {HALF})", "y = mean(b, dims=[2, 3])", "y")
    found = declined(body(WIDE_SIGNATURE.replace(", u: f32[16, 16, 3, 3]", ""), *lines))
    assert any(reason is Reason.WHOLE_IMAGE and why in value for reason, value in found)
    assert found[-1][0] is Reason.NO_GAIN


def test_a_value_that_is_returned_ends_it():
    graph = parse(body(WIDE_SIGNATURE, *WIDE[:-1], "r, m"))
    stage = stage_in(graph)
    assert {n.hint for n in Planner(graph, stage, 0.5).ends()} == {"r"}


def test_options_are_read_from_text():
    assert parse_passes("split-space{overhead=0.1, limit=4096}") == [SplitSpace(0.1, 4096)]


# -- compiled


def prepared(model: nn.Module, *inputs: torch.Tensor) -> Graph:
    return run_passes(captured_of(export_module("m", model.eval(), Example(inputs, {}, {}))).graph, PREPARING, Notes())


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6())


class Inverted(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        inner = 4 * c_in
        self.body = nn.Sequential(conv_bn(c_in, inner, 1), conv_bn(inner, inner, 3, stride, inner), nn.Conv2d(inner, c_out, 1))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(c_in, c_out, 3, stride), conv_bn(c_out, c_out, 3))
        self.short = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Net(nn.Module):
    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body((x - 0.5) / 0.25).mean((2, 3)))


def mobilenet() -> Net:
    layers = conv_bn(3, 16, 3, 2), Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 32, 2)
    return Net(*layers, conv_bn(32, 64, 1), width=64)


def resnet() -> Net:
    return Net(conv_bn(3, 32, 7, 2), nn.MaxPool2d(3, 2, 1), Residual(32, 32, 1), Residual(32, 64, 2), width=64)


def test_kernels_of_patches_run_one_after_the_other():
    """What patches do first to the image is not joined, though it would save starts: it would lie in memory until the last patch."""
    lines = ("s = sub(x, 0.5)", f"a = conv(s, w, {HALF}, channels_last=true)", "r = relu(a)", f"b = conv(r, v, {HALF}, channels_last=true)")
    signature = "x: f32[1, 128, 128, 3], w: f32[32, 3, 3, 3], v: f32[16, 32, 3, 3]"
    graph = parse(body(signature, *lines, "y = relu(b)", "m = mean(y, dims=[1, 2])", "m"))
    after = with_patches(graph, stage_in(graph), end_of(stage_in(graph)), [8, 1])
    fused = FuseRegions().run(after, Notes())
    steps = [n.attrs["label"] if n.op.name == "region" else n.op.name for n in order(fused) if n.op.name in ("region", "conv")]
    patch = ["sub", "conv", "relu", "conv"]
    assert steps[: 8 * len(patch)] == 8 * patch


@NATIVE
@pytest.mark.parametrize("make", [mobilenet, resnet])
def test_a_compiled_model_holds_less(make):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 128, 128)
    graph, notes = prepared(make(), x), Notes()
    split = SplitSpace(overhead=0.25).run(graph, notes)
    exact, patched = (build_program(run_passes(g, FINISHING, Notes())) for g in (graph, split))
    assert not patched.fallbacks
    wanted = interpret(graph, [x.double()], dtype=torch.float64)[0]
    tolerance = 4 * float((exact.run([x])[0] - wanted).abs().max()) + 1e-6
    assert float((patched.run([x])[0] - wanted).abs().max()) <= tolerance
    assert patched.arena_bytes < 0.5 * exact.arena_bytes
    plan = Planner(graph, stage_in(graph), 0.25)
    assert exact.arena_bytes == pytest.approx(plan.exact, rel=0.15)
    assert patched.arena_bytes == pytest.approx(peak_bytes(split), rel=0.15)
