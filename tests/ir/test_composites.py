"""Every composite: its expansion into primitives against its eager meaning, by the float64 rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tilewright.ir import ops
from tilewright.ir.errors import TypeInferenceError
from tilewright.ir.graph import graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.op import Category
from tilewright.ir.ops import OPS, tensor_type
from tilewright.ir.types import TensorType

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check(name: str, *tensors: torch.Tensor, **attrs: Any) -> torch.Tensor:
    """expand == eager on these tensors; returns what the expansion gives."""
    op = ops.op(name)
    inputs = [graph_input(f"x{i}", tensor_type(t)) for i, t in enumerate(tensors)]
    full = op.complete(attrs)
    whole = op(*inputs, **attrs)
    assert op.expand is not None
    expanded = op.expand(*inputs, **full)
    graph = make_graph("g", inputs, [expanded])
    assert not [n for n in order(graph) if n.op.category is Category.COMPOSITE]
    assert expanded.type == whole.type, f"expand yields {expanded.type}, the op {whole.type}"
    (ours,) = interpret(graph, tensors)
    eager = op.eager(*tensors, **full)
    assert tensor_type(eager) == whole.type
    exact = op.eager(*(t.double() if t.is_floating_point() else t for t in tensors), **full)
    assert tensor_type(ours) == tensor_type(eager)
    assert_error_rule(ours, eager, exact)
    return ours


def assert_error_rule(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    a, e, x = ours.double(), eager.double(), exact.double()
    assert torch.equal(a.isnan(), e.isnan())
    known = x.isfinite() & a.isfinite()
    assert torch.equal(a[~known].nan_to_num(), e[~known].nan_to_num())
    if not known.any():
        return
    scale = x[known].abs().max().item()
    error, eager_error = (a - x)[known].abs().max().item(), (e - x)[known].abs().max().item()
    assert error <= max(2 * eager_error, 4 * torch.finfo(eager.dtype).eps * scale), (error, eager_error, scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name: str, dtype: torch.dtype) -> None:
    for shape, dim in [((4, 7), -1), ((4, 7), 0), ((2, 3, 5), 1), ((), 0), ((), -1), ((0, 3), 0), ((3, 0), 1), ((0, 3), 1), ((1,), 0)]:
        check(name, values(*shape, dtype=dtype) * 5, dim=dim)
    check(name, values(6, 4, dtype=dtype).t(), dim=-1)
    edge = torch.tensor([[-math.inf, 0.0, 1.0], [-math.inf] * 3, [math.inf, 0.0, 1.0], [math.nan, 0.0, 1.0], [3e4, -3e4, 0.0]], dtype=dtype)
    check(name, edge, dim=1)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms(dtype: torch.dtype) -> None:
    x, w, b = values(3, 4, 8, dtype=dtype) * 3 + 1, values(8, dtype=dtype, seed=1), values(8, dtype=dtype, seed=2)
    for parameters in [(), (w,), (w, b)]:
        check("layer_norm", x, *parameters, axes=1, eps=1e-5)
    check("layer_norm", x, values(4, 8, dtype=dtype), axes=2, eps=1e-6)
    check("layer_norm", x.transpose(0, 1), w, b)
    check("layer_norm", x[:0], w, b)
    check("rms_norm", x, axes=1)
    check("rms_norm", x, w, axes=1, eps=1e-6)
    check("rms_norm", x, values(4, 8, dtype=dtype), axes=2)
    if dtype.itemsize == 2:
        check("layer_norm", x, w.float(), b.float())
        check("rms_norm", x, w.float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channel_norms(dtype: torch.dtype) -> None:
    w, b, mean, var = (values(6, dtype=dtype, seed=i) for i in range(4))
    for space in [(), (5,), (4, 4), (2, 3, 2)]:
        x = values(2, 6, *space, dtype=dtype)
        check("batch_norm", x, mean, var.abs(), w, b)
        check("batch_norm", x, mean, var.abs())
        for groups in (1, 2, 6) if space else ():  # eager wants more than one value per group
            check("group_norm", x, w, b, groups=groups)
            check("group_norm", x, groups=groups)
    check("group_norm", values(0, 6, 4, dtype=dtype), groups=2)
    if dtype.itemsize == 2:
        check("batch_norm", x, mean.float(), var.abs().float(), w.float(), b.float())


def attention(
    dtype: torch.dtype, h: int, g: int, m: int, n: int, mask: torch.Tensor | None = None, lead: Any = (2,), **attrs: Any
) -> torch.Tensor:
    q, k, v = values(*lead, h, m, 8, dtype=dtype), values(*lead, g, n, 8, dtype=dtype, seed=1), values(*lead, g, n, 4, dtype=dtype, seed=2)
    return check("attention", q, k, v, *([] if mask is None else [mask]), **{"scale": 8**-0.5, **attrs})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention(dtype: torch.dtype) -> None:
    attention(dtype, 4, 4, 5, 7)
    attention(dtype, 4, 2, 5, 7, scale=0.7)
    attention(dtype, 4, 1, 5, 7)
    attention(dtype, 2, 2, 3, 3, lead=())
    attention(dtype, 2, 2, 3, 3, lead=(2, 3))
    for m, n in [(5, 5), (7, 5), (5, 7), (1, 4)]:
        attention(dtype, 2, 2, m, n, causal=True)
    keep = values(5, 7, dtype=torch.float64) > 0
    attention(dtype, 2, 2, 5, 7, keep)
    attention(dtype, 4, 2, 5, 7, keep.expand(2, 1, 5, 7))
    attention(dtype, 2, 2, 5, 7, keep, causal=True)
    attention(dtype, 2, 2, 5, 7, values(2, 1, 5, 7, dtype=dtype))
    attention(dtype, 2, 2, 5, 7, values(5, 7, dtype=torch.float32), causal=True)
    attention(dtype, 2, 2, 0, 7)
    attention(dtype, 2, 2, 5, 7, lead=(0,))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sigmoid_attention(dtype: torch.dtype) -> None:
    keep = values(5, 7, dtype=torch.float64) > 0
    keep[1] = False
    for mask, causal in [(None, False), (None, True), (keep, False), (values(2, 1, 5, 7, dtype=dtype), True)]:
        out = attention(dtype, 4, 2, 5, 7, mask, causal=causal, weights="sigmoid")
        assert mask is not keep or not out[:, :, 1].any()  # of what attends to nothing
    assert not attention(dtype, 2, 2, 4, 0, weights="sigmoid").any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_to_nothing_is_zero(dtype: torch.dtype) -> None:
    keep = torch.tensor([[True, False, True], [False, False, False]])
    additive = torch.zeros(2, 3).masked_fill(~keep, -math.inf)
    for mask in (keep, additive, additive.to(dtype)):
        out = attention(dtype, 2, 2, 2, 3, mask)
        assert not out.isnan().any() and not out[..., 1, :].any()
    assert not attention(dtype, 2, 2, 4, 0).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype: torch.dtype, interleaved: bool) -> None:
    x, angle = values(2, 4, 5, 8, dtype=dtype), values(5, 8, dtype=torch.float64)
    check("rope", x, angle.cos().to(dtype), angle.sin().to(dtype), interleaved=interleaved)
    check("rope", x[:, :, :0], angle[:0].cos().to(dtype), angle[:0].sin().to(dtype), interleaved=interleaved)
    check("rope", x, angle.cos().float(), angle.sin().float(), interleaved=interleaved)


def test_every_composite_is_checked() -> None:
    checked = {"softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm", "attention", "rope"}
    checked |= {"attention_gradient"}  # test_attention_gradients.py
    checked |= {"unpack", "dequantize", "quantize_rows"}  # test_quantized.py
    assert {op.name for op in OPS.values() if op.category is Category.COMPOSITE} == checked


def given(*shape: Any, dtype: torch.dtype = torch.float32) -> Any:
    return graph_input("x", TensorType(dtype, shape))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ops.softmax(given(2, 3), dim=2), "dimension 2 is out of range for rank 2"),
        (lambda: ops.softmax(given(2, dtype=torch.int64), dim=0), "it takes a floating-point tensor"),
        (lambda: ops.layer_norm(given(2, 3), given(2)), "weight and bias must have the shape of the normalized dimensions"),
        (lambda: ops.layer_norm(given(2, 3), given(3, dtype=torch.bfloat16)), "bfloat16 parameters do not go with torch.float32"),
        (lambda: ops.group_norm(given(2, 6, 3), groups=4), "6 channels do not divide into 4 groups"),
        (lambda: ops.batch_norm(given(2, 6), given(5), given(6)), "does not have one entry for each of the 6 channels"),
        (lambda: ops.attention(given(6, 2, 4), given(4, 2, 4), given(4, 2, 4), scale=1.0), "6 query heads do not group over 4 key heads"),
        (lambda: ops.attention(given(2, 2, 4), given(2, 3, 4), given(2, 3, 4), given(2, 2), scale=1.0), "do not broadcast"),
        (lambda: ops.attention(given(2, 4), given(3, 4), given(3, 4), scale=1.0, weights="relu"), "by softmax or by sigmoid"),
        (lambda: ops.rope(given(2, 3), given(2, 3), given(2, 3)), "the last dimension must be even"),
    ],
)
def test_errors_name_the_reason(build: Any, reason: str) -> None:
    with pytest.raises(TypeInferenceError, match=reason):
        build()
