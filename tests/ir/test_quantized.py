"""Low-bit values: unpack, dequantize, quantize_rows and int_linear against their definitions, expansions against eager, 8-bit floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tilewright.ir import ops
from tilewright.ir.analysis.primitives import expanded
from tilewright.ir.errors import TypeInferenceError
from tilewright.ir.graph import Data, Graph, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.op import Category
from tilewright.ir.ops import tensor_type
from tilewright.ir.text import parse, print_graph
from tilewright.ir.types import FLOAT8, TensorType
from tilewright.ir.verify import verify

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def graph_of(name: str, *tensors: torch.Tensor, **attrs: Any) -> Graph:
    """One op on inputs like these tensors, each of its results an output."""
    inputs = [graph_input(f"x{i}", tensor_type(t)) for i, t in enumerate(tensors)]
    node = ops.op(name)(*inputs, **attrs)
    results = [ops.item(node, index=i) for i in range(len(node.type))] if isinstance(node.type, tuple) else [node]
    return make_graph("g", inputs, results)


def run(name: str, *tensors: torch.Tensor, **attrs: Any) -> list[torch.Tensor]:
    """By `interpret`; the expansion gives the same bits, and types are those that are inferred."""
    graph = graph_of(name, *tensors, **attrs)
    whole = interpret(graph, tensors)
    primitive = expanded(graph)
    verify(primitive)
    assert not [n for n in order(primitive) if n.op.category is Category.COMPOSITE]
    for a, b, node in zip(whole, interpret(primitive, tensors), graph.outputs):
        assert tensor_type(a) == tensor_type(b) == node.type
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    return whole


def randoms(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(*shape: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# -- unpack


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unpack(bits: int) -> None:
    per = 8 // bits
    for shape in [(3, 5), (5,), (2, 3, 4), (0, 4), (3, 0)]:
        values = integers(*shape[:-1], shape[-1] * per, low=0, high=1 << bits, dtype=torch.uint8)
        packed = sum(values[..., j::per].int() << j * bits for j in range(per))
        assert isinstance(packed, torch.Tensor)
        (got,) = run("unpack", packed.to(torch.uint8), bits=bits)
        assert torch.equal(got, values)
    (turned,) = run("unpack", integers(4, 6, low=0, high=256, dtype=torch.uint8).t(), bits=bits)
    assert turned.shape == (6, 4 * per)


def test_six_bits_are_two_planes() -> None:
    values = integers(4, 16, low=0, high=64, dtype=torch.uint8)
    low, high = values & 15, values >> 4
    planes = low[:, ::2] | low[:, 1::2] << 4, high[:, ::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
    a, b = (graph_input(n, tensor_type(t)) for n, t in zip("ab", planes))
    both = ops.bitwise_or(ops.unpack(a, bits=4), ops.bitwise_left_shift(ops.unpack(b, bits=2), 4))
    assert torch.equal(interpret(make_graph("g", (a, b), (both,)), planes)[0], values)


# -- dequantize


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_dequantize(groups: int, dtype: torch.dtype) -> None:
    q = integers(6, 16, low=0, high=16, dtype=torch.uint8)
    scale, zero = randoms(6, groups, dtype=torch.float32), integers(6, groups, low=0, high=16, dtype=torch.uint8)
    wide = [t.double().repeat_interleave(16 // groups, 1) for t in (scale, zero)]
    (got,) = run("dequantize", q, scale, zero, dtype=dtype)
    torch.testing.assert_close(got.double(), (q - wide[1]) * wide[0], rtol=2 * torch.finfo(dtype).eps, atol=0)
    (plain,) = run("dequantize", q, scale, dtype=dtype)
    torch.testing.assert_close(plain.double(), q * wide[0], rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("q", [torch.int8, torch.uint8, torch.int16, torch.int32, *sorted(FLOAT8, key=str)], ids=str)
def test_dequantize_of_every_storage(q: torch.dtype) -> None:
    values = integers(3, 8, low=-8 if q != torch.uint8 else 0, high=8, dtype=torch.int64).to(torch.float32).to(q)
    for scale in (randoms(3, 2, dtype=torch.float32), randoms(1, 1, dtype=torch.bfloat16), randoms(1, 8, dtype=torch.float64)):
        (got,) = run("dequantize", values, scale, dtype=torch.float32)
        spread = scale.double().expand(3, -1).repeat_interleave(8 // scale.shape[1], 1)
        torch.testing.assert_close(got.double(), values.double() * spread, rtol=1e-6, atol=0)
    (zeros,) = run("dequantize", values, randoms(3, 1, dtype=torch.float32), randoms(3, 1, dtype=torch.float16), dtype=torch.float16)
    assert zeros.dtype == torch.float16


def test_dequantize_of_odd_shapes() -> None:
    one = torch.tensor([2.0])
    run("dequantize", integers(8, low=-9, high=9, dtype=torch.int8), one, dtype=torch.float32)
    run("dequantize", integers(0, 8, low=-9, high=9, dtype=torch.int8), one.reshape(1, 1), dtype=torch.float32)
    run("dequantize", integers(3, 0, low=-9, high=9, dtype=torch.int8), one.reshape(1, 1), dtype=torch.float32)
    run("dequantize", integers(2, 3, 8, low=-9, high=9, dtype=torch.int8), randoms(2, 1, 4, dtype=torch.float32), dtype=torch.float32)
    run("dequantize", integers(8, 4, low=-9, high=9, dtype=torch.int8).t(), randoms(4, 2, dtype=torch.float32), dtype=torch.float32)


def test_nan_and_inf_of_8_bit_floats_and_scales_stay() -> None:
    q = torch.tensor([[1.0, math.nan, -0.0], [2.0, 3.0, 4.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0], [math.inf]])
    (got,) = run("dequantize", q, scale, dtype=torch.float32)
    assert got[0].isnan().tolist() == [False, True, False] and got[1].isinf().all()
    (wide,) = run("dequantize", torch.tensor([[math.inf, 1.0]]).to(torch.float8_e5m2), scale[:1], dtype=torch.bfloat16)
    assert wide[0].isinf().tolist() == [True, False]


# -- quantize_rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_rows(dtype: torch.dtype) -> None:
    for x in (randoms(5, 16, dtype=dtype), randoms(2, 3, 8, dtype=dtype) * 100, randoms(4, dtype=dtype), randoms(8, 4, dtype=dtype).t()):
        q, scale = run("quantize_rows", x)
        assert q.dtype == torch.int8 and scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (q.abs().amax(-1) == 127).all()
        assert ((q * scale - x.to(scale.dtype)).abs() <= scale * 0.5001).all()
    for shape in [(0, 8), (3, 0), (2, 0, 4)]:
        run("quantize_rows", torch.empty(shape, dtype=dtype))


def test_quantize_rows_rounds_half_to_even() -> None:
    q, scale = run("quantize_rows", torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert scale.item() == 1 and q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_rows_of_zeros_and_of_what_is_no_number() -> None:
    tiny = 2.0**-149
    rows = [[0.0, -0.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, math.inf], [tiny, -tiny], [190 * tiny, 0.0], [3e38, -3e38]]
    q, scale = run("quantize_rows", torch.tensor(rows))
    assert scale[0].item() == 1 and not q[0].any()
    assert scale[1:4].isnan().all() and not q[1:4].any()
    assert scale[4].item() == 1 and not q[4].any(), "a scale that underflows"
    assert q[5].tolist() == [127, 0] and scale[5] > 0
    assert q[6].tolist() == [127, -127] and scale[6].isfinite()


# -- int_linear


def test_int_linear() -> None:
    for shape, n in [((4, 16), 8), ((2, 3, 16), 5), ((16,), 3), ((0, 16), 4), ((3, 0), 4), ((3, 16), 0)]:
        q, w = (integers(*s, low=-128, high=128, dtype=torch.int8) for s in (shape, (n, shape[-1])))
        (got,) = run("int_linear", q, w)
        assert torch.equal(got, (q.long() @ w.long().t()).int())
    (largest,) = run("int_linear", torch.full((1, 100000), -128, dtype=torch.int8), torch.full((1, 100000), -128, dtype=torch.int8))
    assert largest.item() == 100000 * 128 * 128


def test_a_layer_of_8_bits() -> None:
    x, w = randoms(6, 64, dtype=torch.float32), randoms(8, 64, dtype=torch.float32)
    step = w.abs().amax(1) / 127
    a, b, s = (graph_input(n, t) for n, t in (("x", tensor_type(x)), ("w", TensorType(torch.int8, (8, 64))), ("s", tensor_type(step))))
    rows = ops.quantize_rows(a)
    y = ops.mul(ops.mul(ops.cast(ops.int_linear(ops.item(rows, index=0), b), dtype=torch.float32), ops.item(rows, index=1)), s)
    graph = make_graph("g", (a, b, s), (y,))
    given = (x, (w / step[:, None]).round().to(torch.int8), step)
    for dtype in (None, torch.float64):
        (got,) = interpret(graph, given, dtype)
        assert (got - x @ w.t()).abs().max() < 0.02 * (x @ w.t()).abs().max()
        assert torch.equal(got, interpret(expanded(graph), given, dtype)[0])


# -- 8-bit floats


@pytest.mark.parametrize("dtype", sorted(FLOAT8, key=str), ids=str)
def test_8_bit_floats_are_stored_printed_and_cast(dtype: torch.dtype) -> None:
    w = randoms(4, 8, dtype=torch.float32).to(dtype)
    x, scale = graph_input("x", TensorType(torch.float32, (3, 8))), graph_input("scale", TensorType(torch.float32, (4, 1)))
    weight = ops.constant(data=Data("w", w))
    product = ops.linear(x, ops.dequantize(ops.permute(ops.permute(weight, dims=(1, 0)), dims=(1, 0)), scale, dtype=torch.float32))
    graph = make_graph("g", (x, scale), (product, ops.cast(x, dtype=dtype), ops.cast(weight, dtype=torch.float32)))
    verify(graph)
    text = print_graph(graph)
    assert print_graph(parse(text)) == text and str(weight.type) in text
    given = (randoms(3, 8, dtype=torch.float32), randoms(4, 1, dtype=torch.float32))
    y, stored, wide = interpret(graph, given)
    assert stored.dtype == dtype and torch.equal(wide, w.float())
    exact = given[0].double() @ (w.double() * given[1].double()).t()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(interpret(graph, given, torch.float64)[0], exact)


# -- what is refused


def given(*shape: Any, dtype: torch.dtype = torch.uint8) -> Any:
    return graph_input("x", TensorType(dtype, shape))


F32, I8 = torch.float32, torch.int8


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ops.unpack(given(4), bits=3), "bits must be 1, 2 or 4"),
        (lambda: ops.unpack(given(4, dtype=I8), bits=4), "takes uint8"),
        (lambda: ops.unpack(given(), bits=4), "with dimensions"),
        (lambda: ops.dequantize(given(4, 8), given(4, 3, dtype=F32), dtype=F32), "3 groups do not divide 8"),
        (lambda: ops.dequantize(given(4, 8), given(4, 0, dtype=F32), dtype=F32), "0 groups do not divide 8"),
        (lambda: ops.dequantize(given(4, 8), given(3, 1, dtype=F32), dtype=F32), "do not go with values"),
        (lambda: ops.dequantize(given(1, 8), given(4, 1, dtype=F32), dtype=F32), "do not go with values"),
        (lambda: ops.dequantize(given(4, 8), given(1, dtype=F32), dtype=F32), "as many dimensions"),
        (lambda: ops.dequantize(given(), given(dtype=F32), dtype=F32), "as many dimensions"),
        (lambda: ops.dequantize(given(4, 8), given(4, 2, dtype=F32), given(4, 1), dtype=F32), "2 groups of scales, 1 of zeros"),
        (lambda: ops.dequantize(given(4, 8), given(4, 1), dtype=F32), "floating-point"),
        (lambda: ops.dequantize(given(4, 8), given(4, 1, dtype=F32), dtype=I8), "floating-point"),
        (lambda: ops.dequantize(given(4, 8, dtype=F32), given(4, 1, dtype=F32), dtype=F32), "integers of at most 32 bits"),
        (lambda: ops.dequantize(given(4, 8, dtype=torch.bool), given(4, 1, dtype=F32), dtype=F32), "integers of at most 32 bits"),
        (lambda: ops.dequantize(given(4, 8), given(4, 1, dtype=torch.float8_e5m2), dtype=F32), "left to ATen"),
        (lambda: ops.quantize_rows(given(4, 8)), "floating-point"),
        (lambda: ops.quantize_rows(given(dtype=F32)), "with dimensions"),
        (lambda: ops.int_linear(given(4, 8, dtype=I8), given(3, 8)), "takes int8"),
        (lambda: ops.int_linear(given(4, 8, dtype=I8), given(3, 7, dtype=I8)), "columns of w"),
        (lambda: ops.add(given(4, dtype=torch.float8_e4m3fn), 1.0), "left to ATen"),
    ],
)  # fmt: skip
def test_what_is_no_low_bit_value_is_refused(build: Any, reason: str) -> None:
    with pytest.raises(TypeInferenceError, match=reason):
        build()
