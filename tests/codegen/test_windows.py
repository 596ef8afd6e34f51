"""Convolutions and poolings of the host program with their channels last: right for every size, no copies between them."""

import pytest
import torch
from tilewright.codegen.program import compile_program
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Data, graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType

N, H = symbol("n"), symbol("h")
PLAIN = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def constant(name, value):
    return OPS["constant"](data=Data(name, value))


def channels_last(x):
    return x.permute(0, 2, 3, 1).contiguous()


def images(c):
    return graph_input("x", TensorType(torch.float32, (N, H, H, c)))


def program(x, out):
    return compile_program(make_graph("g", [x], [out], symbols={"n": SymbolRange(), "h": SymbolRange(1)}))


@pytest.mark.parametrize("channels, out", [(64, 64), (1, 300), (300, 1), (3, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_constant_weights_serve_every_size(channels, out, bias):
    """Large weights are packed once, small ones only ordered."""
    torch.manual_seed(0)
    w, b = torch.randn(out, channels, 3, 3), torch.randn(out)
    x = images(channels)
    made = program(x, OPS["conv"](x, constant("w", w), *([constant("b", b)] if bias else []), **PLAIN, channels_last=True))
    assert ("packed" in made.source) == (w.nbytes >= 64 * 1024)
    for n, h in ((2, 9), (1, 1), (0, 4), (5, 17)):
        image = torch.randn(n, channels, h, h)
        (got,) = made([channels_last(image)])
        want = torch.convolution(image.double(), w.double(), b.double() if bias else None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        assert got.is_contiguous() and got.shape == (n, h, h, out)
        torch.testing.assert_close(got.permute(0, 3, 1, 2).double(), want, rtol=1e-4, atol=1e-3)


def test_large_constant_weights_with_padding_behind():
    torch.manual_seed(0)
    w, x = torch.randn(64, 64, 3, 3), images(64)
    attrs = {**PLAIN, "padding": (0, 1), "padding_after": (1, 0)}
    (got,) = program(x, OPS["conv"](x, constant("w", w), **attrs, channels_last=True))([channels_last(image := torch.randn(2, 64, 9, 9))])
    want = torch.nn.functional.conv2d(torch.nn.functional.pad(image, (1, 0, 0, 1)), w)
    torch.testing.assert_close(got, channels_last(want), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "w, attrs",
    [
        ((32, 1, 3, 3), {"groups": 32}),
        ((32, 8, 3, 3), {"groups": 4}),
        ((16, 32, 3, 3), {"stride": (2, 2), "dilation": (2, 2)}),
        ((16, 32, 3, 3), {"padding": (1, 0), "padding_after": (0, 2)}),
        ((32, 16, 3, 3), {"transposed": True, "stride": (2, 2), "output_padding": (1, 1)}),
    ],
)
def test_weights_that_are_inputs(w, attrs):
    torch.manual_seed(0)
    x, weight = images(32), graph_input("w", TensorType(torch.float32, w))
    out = OPS["conv"](x, weight, **{**PLAIN, **attrs}, channels_last=True)
    made = compile_program(make_graph("g", [x, weight], [out], symbols={"n": SymbolRange(), "h": SymbolRange(5)}))
    image, values = torch.randn(3, 32, 12, 12), torch.randn(w)
    first = OPS["conv"].complete({**PLAIN, **attrs})
    want = OPS["conv"].eager(image.double(), values.double(), **first)
    (got,) = made([channels_last(image), values])
    assert got.is_contiguous()
    torch.testing.assert_close(got.permute(0, 3, 1, 2).double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op", ["max_pool", "avg_pool"])
@pytest.mark.parametrize("border", [{"ceil": True}, {"padding_after": (0, 1)}])
def test_pools(op, border):
    x = images(5)
    attrs = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), **border}
    made = program(x, OPS[op](x, **attrs, channels_last=True))
    image = torch.randn(2, 5, 8, 8)
    image[0, 0, 3, 3] = float("nan")
    (got,) = made([channels_last(image)])
    want = OPS[op].eager(image, **OPS[op].complete(attrs))
    assert got.is_contiguous()
    torch.testing.assert_close(got, channels_last(want), equal_nan=True)


def test_no_copies_between_windows():
    """The operand of the first may come in any order; what follows is a view each time."""
    w = constant("w", torch.randn(16, 16, 3, 3))
    x = images(16)
    y = x
    for _ in range(3):
        y = OPS["conv"](y, w, **PLAIN, channels_last=True)
    made = program(x, OPS["max_pool"](y, kernel=(2, 2), stride=(2, 2), padding=(0, 0), channels_last=True))
    assert made.copies == ("x",)
    image = torch.randn(2, 16, 8, 8).permute(0, 2, 3, 1)
    torch.testing.assert_close(made([image])[0], made([image.contiguous()])[0])
