"""Convolutions with channels last through the C++ printer: windows that are read where they lie, against the slow reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from handmade import TARGETS, Case, inputs_of, kernel, launch, load, target_for
from support import NATIVE
from test_cpp_contractions import dot
from tilewright.codegen import reference
from tilewright.codegen.cpp.contraction import print_any
from tilewright.codegen.cpp.schedule import CpuTarget
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.kernel import Kernel, Position
from tilewright.codegen.target import Compiled, Failed
from tilewright.ir.dims import FloorDiv, Mod, symbol
from tilewright.ir.scalar import apply

pytestmark = NATIVE

F32, F64, I64, BF16 = torch.float32, torch.float64, torch.int64, torch.bfloat16
n, h, w, y, x, o, s, t, c = (symbol(name) for name in "nhwyxostc")


def convolution(
    channels: int,
    out: int,
    size: tuple[object, object],
    window: tuple[int, int] = (3, 3),
    *,
    step: int = 1,
    pad: int = 1,
    dilation: int = 1,
    images: object = 2,
    width: int = 48,
    dtype: torch.dtype = F32,
    sizes: str = "",
) -> Kernel:
    """relu(conv(x, w) + bias) + residual; x [images, *size, channels], w in panels [kh, kw, channels, width]."""
    height, columns = (sympy.expand(d) for d in size)
    kh, kw = window
    down, across = ((d + 2 * pad - dilation * (k - 1) - 1) // step + 1 for d, k in ((height, kh), (columns, kw)))
    row, column = step * y + dilation * s - pad, step * x + dilation * t - pad
    inside = [Position(I64, row) >= 0, Position(I64, row) < Position(I64, height), Position(I64, column) >= 0,
              Position(I64, column) < Position(I64, columns)]  # fmt: skip
    mask = (inside[0] & inside[1]) & (inside[2] & inside[3]) if pad else None
    wide = torch.float64 if dtype == F64 else F32
    left = load("x", channels * (columns * (height * n + row) + column) + c, wide, mask=mask)
    depth = kh * kw * channels
    at = FloorDiv(o, width) * width * depth + width * (channels * (kw * s + t) + c) + Mod(o, width)
    place = out * (across * (down * n + y) + x) + o
    value = apply("max", dot(left, load("w", at, wide), "s", "t", "c") + load("bias", o, wide), 0.0) + load("residual", place, wide)
    total = images * down * across * out  # type: ignore[operator]
    inputs = {"x": (dtype, images * height * columns * channels), "w": (dtype, -(-out // width) * width * depth),  # type: ignore[operator]
              "bias": (dtype, out), "residual": (dtype, total)}  # fmt: skip
    grid = {"n": images, "y": down, "x": across, "o": out}
    return kernel(grid, {"s": kh, "t": kw, "c": channels}, inputs, {"out": (place, value, total, dtype)}, sizes)


big, b, i, j = symbol("big"), symbol("b"), symbol("i"), symbol("j")
CASES: dict[str, tuple[Kernel, list[dict[str, int]]]] = {
    "padded": (convolution(16, 20, (9, 9)), [{}]),
    "tails_of_rows": (convolution(20, 48, (5, 7), images=1), [{}]),
    "strided": (convolution(32, 50, (14, 11), step=2), [{}]),
    "dilated": (convolution(17, 64, (12, 12), dilation=2, pad=2, width=64), [{}]),
    "border_only": (convolution(16, 16, (2, 1), (5, 5), pad=2, images=9, width=16), [{}]),
    "wide_border": (convolution(24, 40, (4, 4), pad=3), [{}]),
    "no_border": (convolution(24, 40, (8, 8), pad=0), [{}]),
    "many_channels": (convolution(300, 64, (5, 5), width=64), [{}]),
    "longer_than_registers": (convolution(1000, 100, (4, 4), width=32), [{}]),
    "point": (convolution(40, 70, (7, 7), (1, 1), pad=0), [{}]),
    "strided_point": (convolution(40, 70, (7, 8), (1, 1), pad=0, step=2), [{}]),
    "deep_point": (convolution(900, 48, (5, 5), (1, 1), pad=0), [{}]),
    "stem": (convolution(3, 64, (17, 19), (7, 7), pad=3, step=2, width=64), [{}]),
    "one_channel": (convolution(1, 16, (9, 9), (5, 5), pad=2, width=16), [{}]),
    "few_channels": (convolution(8, 32, (9, 10), width=32), [{}]),
    "few_channels_dilated": (convolution(8, 32, (9, 10), dilation=2, pad=2, width=32), [{}]),
    "patches": (convolution(3, 48, (16, 16), (4, 4), pad=0, step=4), [{}]),
    "narrow_image": (convolution(3, 48, (12, 2), (7, 7), pad=3), [{}]),
    "doubles": (convolution(16, 50, (7, 7), dtype=F64), [{}]),
    "bfloat16": (convolution(16, 50, (7, 7), dtype=BF16), [{}]),
    "any_batch": (convolution(16, 50, (7, 7), images=b, sizes="b"), [{"b": 1}, {"b": 0}, {"b": 5}]),
    "any_image": (convolution(16, 50, (i, j), sizes="ij"), [{"i": 5, "j": 9}, {"i": 1, "j": 1}, {"i": 16, "j": 2}]),
    "any_image_stem": (convolution(3, 50, (i, j), (7, 7), pad=3, sizes="ij"), [{"i": 5, "j": 9}, {"i": 1, "j": 1}, {"i": 16, "j": 12}]),
    "several_blocks": (convolution(16, 24, (24, 24), width=32), [{}]),
    "tiles": (convolution(16, 32, (24, 24), width=32), [{}]),
    "tiles_beyond_the_image": (convolution(21, 100, (33, 15)), [{}]),
    "no_tiles_without_border": (convolution(24, 50, (30, 21), pad=0, images=1), [{}]),
    "tiles_of_doubles": (convolution(20, 64, (25, 24), images=1, dtype=F64, width=64), [{}]),
    "tiles_in_blocks": (convolution(256, 40, (24, 24), pad=2, images=1), [{}]),
    "no_tiles_of_strides": (convolution(16, 40, (48, 48), step=2), [{}]),
    "no_tiles_of_dilated": (convolution(16, 40, (24, 24), dilation=2, pad=2), [{}]),
}  # fmt: skip
COPIED = {"bfloat16"}
"""What is widened when it is read."""


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> dict[str, Compiled | Failed]:
    kernels = [replace(k, name=f"k_{name}") for name, (k, _) in CASES.items()]
    return dict(zip(CASES, compile_kernels(kernels, target_for(request.param))))


@pytest.mark.parametrize("name", CASES)
def test_convolution_computes_what_the_reference_does(name: str, compiled: dict[str, Compiled | Failed]) -> None:
    function = compiled[name]
    assert isinstance(function, Compiled), function.reason
    made, size_sets = CASES[name]
    for number, sizes in enumerate(size_sets):
        case = Case(made, sizes, {})
        inputs = inputs_of(case, number)
        (expected,) = reference.run(made, inputs, sizes)
        (actual,) = launch(function, case, inputs)
        tolerance = {BF16: 1e-2, F64: 1e-12}.get(expected.dtype, 1e-4)
        note = f"at sizes {sizes}\n{function.source}"
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=4 * tolerance, msg=lambda m, note=note: f"{m}\n{note}")
        for threads in (1, 3, 8):
            assert torch.equal(actual, launch(function, case, inputs, threads)[0]), f"{threads} threads differ"


@pytest.mark.parametrize("name", CASES)
def test_windows_are_not_copied(name: str) -> None:
    text = print_any(CASES[name][0], CpuTarget(64))
    assert ("winograd" in text) == name.startswith("tiles")
    assert ("product_of_runs" in text or "winograd" in text) == (name not in COPIED)


def test_what_lies_outside_of_the_image_is_not_read() -> None:
    """The image stands at the end of a larger buffer of NaN; infinities at the border meet no zero weight of another point."""
    made = replace(convolution(16, 48, (5, 5), images=1), name="k_outside")
    (function,) = compile_kernels([made])
    assert isinstance(function, Compiled), function.reason
    inputs = inputs_of(Case(made, {}, {}), 0)
    memory = torch.full((3 * inputs[0].numel(),), float("nan"))
    middle = memory[inputs[0].numel() : 2 * inputs[0].numel()]
    middle.copy_(inputs[0])
    out = torch.empty(made.outputs[0].size)  # type: ignore[arg-type]
    function.launch(*(v.data_ptr() for v in (middle, *inputs[1:], out)), 2)
    assert out.isfinite().all()
    torch.testing.assert_close(out, reference.run(made, inputs, {})[0], rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_stays_where_it_is() -> None:
    """Points of a tile share what is computed; numbers near the largest are finite in the windows that they belong to alone."""
    made = replace(convolution(16, 48, (24, 24), images=1), name="k_special")
    (function,) = compile_kernels([made])
    assert isinstance(function, Compiled) and "winograd" in function.source
    image, weight, *rest = inputs_of(Case(made, {}, {}), 0)
    points = image.view(24, 24, 16)
    points[3, 4, 5], points[10, 11, 2], points[23, 23, 0] = float("inf"), float("nan"), -float("inf")
    points[16:18, 6:8, 3] = 3e38 * torch.tensor([[1, -1], [-1, 1]])
    inputs = [image, weight * 1e-2, *rest]
    actual, expected = launch(function, Case(made, {}, {}), inputs)[0], reference.run(made, inputs, {})[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not expected.isfinite().all() and expected.isfinite().sum() > 0.9 * expected.numel()


@pytest.mark.parametrize("size", [6, 24])
def test_long_sums_are_as_exact_as_the_library(size: int) -> None:
    """More terms than are summed up at once; and tiles."""
    channels, out = 512, 64
    made = replace(convolution(channels, out, (size, size), images=1, width=64), name="k_long")
    (function,) = compile_kernels([made])
    assert isinstance(function, Compiled), function.reason
    image, weight, *_ = inputs_of(Case(made, {}, {}), 0)
    zeros = [torch.zeros(x.size) for x in made.inputs[2:]]  # type: ignore[arg-type]
    ours = launch(function, Case(made, {}, {}), [image, weight, *zeros])[0].view(size, size, out).double()
    operands = image.view(1, size, size, channels).permute(0, 3, 1, 2), weight.view(3, 3, channels, out).permute(3, 2, 0, 1)
    exact, theirs = (torch.conv2d(*(v.to(d) for v in operands), padding=1).relu()[0].permute(1, 2, 0).double() for d in (F64, F32))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (ours - exact).square().mean() <= 4 * (theirs - exact).square().mean()
