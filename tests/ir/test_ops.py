"""Every op that is neither pointwise nor composite: inferred type against the eager result over dtypes, sizes, layouts; costs; errors."""

from __future__ import annotations

import math
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir import ops
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.errors import TypeInferenceError, UnknownOpError
from tilewright.ir.graph import Data, graph_input, make_graph, scalar_value
from tilewright.ir.interpret import interpret
from tilewright.ir.op import Category
from tilewright.ir.ops import OPS, Ref, tensor_type
from tilewright.ir.ops.contractions import window_count
from tilewright.ir.types import NATIVE_DTYPES, TensorType, scalar_type

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.bool]
I64 = torch.int64


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n = math.prod(shape)
    return ((torch.arange(n) * 7) % 5 - (0 if dtype in (torch.uint8, torch.bool) else 2)).reshape(shape).to(dtype)


def index(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


def type_of(value: Any) -> Any:
    return tensor_type(value) if isinstance(value, torch.Tensor) else scalar_type(value)


def run(name: str, *operands: Any, **attrs: Any) -> torch.Tensor:
    """The op on these operands by `interpret`; checks that the inferred type is that of the result."""
    op = ops.op(name)
    nodes = [graph_input(f"x{i}", tensor_type(x)) if isinstance(x, torch.Tensor) else x for i, x in enumerate(operands)]
    inputs = [n for n, x in zip(nodes, operands) if isinstance(x, torch.Tensor)]
    node = op(*nodes, **attrs)
    (out,) = interpret(make_graph("g", inputs, [node]), [x for x in operands if isinstance(x, torch.Tensor)])
    assert tensor_type(out) == node.type, f"{name} infers {node.type}, eager gives {tensor_type(out)}"
    return out


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def refused(name: str, x: torch.Tensor, **attrs: Any) -> bool:
    try:
        ops.op(name).infer(tensor_type(x), **ops.op(name).complete(attrs))
    except (ValueError, IndexError):
        return True
    return False


REDUCTIONS: dict[str, Any] = {
    name: getattr(torch, name) for name in ("sum", "mean", "amax", "amin", "any", "all", "argmax", "argmin", "var", "prod")
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, dtype: torch.dtype) -> None:
    one_dim = name in ("argmax", "argmin", "prod")
    for x in (
        t(2, 3, 4, dtype=dtype),
        t(4, 3, 2, dtype=dtype).permute(2, 1, 0),
        t(3, 0, dtype=dtype),
        t(dtype=dtype),
        t(5, dtype=dtype)[::2],
    ):
        for dims in [(), (-1,), (0,), *([] if one_dim or x.dim() < 2 else [(0, 1), (-1, 0)])]:
            for keepdim in (False, True):
                try:
                    dim = dims[0] if one_dim and dims else dims or (None if one_dim else tuple(range(x.dim())))
                    kept = {"keepdim": keepdim} if not (name == "prod" and not dims) else {}
                    expected = REDUCTIONS[name](x, dim, **kept) if kept else torch.prod(x)
                except (RuntimeError, IndexError):
                    assert refused(name, x, dims=dims, keepdim=keepdim), f"{name}{dims} of {tensor_type(x)}"
                    continue
                if refused(name, x, dims=dims, keepdim=keepdim):
                    assert (name, dtype) in {("any", torch.uint8), ("all", torch.uint8)}
                    continue
                ours = run(name, x, dims=dims, keepdim=keepdim)
                torch.testing.assert_close(
                    ours.reshape(expected.shape), expected, rtol=1e-2 if name == "prod" else 0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cumsum", "cumprod"])
def test_scans(name: str, dtype: torch.dtype) -> None:
    for x in (t(2, 3, dtype=dtype), t(3, 2, dtype=dtype).t(), t(0, 2, dtype=dtype), t(dtype=dtype)):
        for dim in (0, -1):
            same(run(name, x, dim=dim), getattr(torch, name)(x, dim))


def test_reductions_of_nan_and_inf() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0], [math.inf, -math.inf, 0.0], [-0.0, 0.0, -0.0]])
    for name in REDUCTIONS:
        same(run(name, x, dims=(1,)), REDUCTIONS[name](x, 1))
    assert run("argmax", x[0], dims=(0,)).item() == 1 and run("argmax", torch.tensor([1, 3, 3]), dims=(0,)).item() == 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_views(dtype: torch.dtype) -> None:
    real = t(2, 3, 4, dtype=torch.float32 if dtype.is_complex else dtype).to(dtype)
    for x in (real, real.permute(2, 0, 1).contiguous().permute(1, 2, 0), real[:, :, ::2], real[:0]):
        n = x.shape[0]
        same(run("reshape", x, shape=(n, 3 * x.shape[2])), x.reshape(n, 3 * x.shape[2]))
        same(run("permute", x, dims=(2, 0, 1)), x.permute(2, 0, 1))
        same(run("expand", x[:, :1], shape=(5, *x.shape)), x[:, :1].expand(5, *x.shape))
        same(run("slice", x, dim=1, start=1, stop=3), x[:, 1:3])
        same(run("slice", x, dim=-2, start=0, stop=3, step=2), x[:, ::2])
        same(run("slice", x, dim=1, start=2, stop=2), x[:, 2:2])
        same(run("select", x, dim=-1, index=1), x[..., 1])
        same(run("flip", x, dims=(0, -1)), x.flip(0, -1))
        strides = (1, max(n, 1), 3 * max(n, 1))
        out = run("layout", x, strides=strides)
        same(out, x)
        assert out.stride() == strides or not x.numel()
    zero_d = real[0, 0, 0]
    same(run("reshape", zero_d, shape=(1, 1)), zero_d.reshape(1, 1))
    same(run("expand", zero_d, shape=(2, 0)), zero_d.expand(2, 0))
    same(run("permute", zero_d, dims=()), zero_d)
    same(run("layout", zero_d.expand(2, 3), strides=(0, 0)), zero_d.expand(2, 3))
    same(run("as_strided", real, shape=(2, 2), strides=(1, 4), offset=1, of=(12, 4, 1)), real.as_strided((2, 2), (1, 4), 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers(dtype: torch.dtype) -> None:
    x, y = t(3, 4, dtype=dtype), t(2, 4, dtype=dtype)
    same(run("cat", x, y, dim=0), torch.cat([x, y]))
    same(run("cat", x, x[:, :0], t(3, 1), dim=-1), torch.cat([x, x[:, :0], t(3, 1)], -1))
    same(run("pad", x, low=(1, 0), high=(0, 2), value=1), F.pad(x, (0, 2, 1, 0), value=1))
    same(run("pad", x, low=(-1, 2), high=(0, -3)), F.pad(x, (2, -3, -1, 0)))
    same(run("gather", x, index((0, 3), (1, 2)), dim=1), torch.gather(x, 1, index((0, 3), (1, 2))))
    same(run("index", x, index(0, 2, -1), dims=(0,)), x[[0, 2, -1]])
    same(run("index", x, index((0,), (2,)), index(1, 3), dims=(0, 1)), x[index((0,), (2,)), index(1, 3)])
    cube = t(2, 3, 4, dtype=dtype)
    same(run("index", cube, torch.tensor(1), index(0, 3), dims=(0, 2)), torch.ops.aten.index(cube, [torch.tensor(1), None, index(0, 3)]))
    same(run("index", cube, index(0, 1), index(0, 3), dims=(1, 2)), cube[:, index(0, 1), index(0, 3)])
    same(run("embedding", x, index((0, 2), (1, 1)).to(torch.int32)), x[index((0, 2), (1, 1))])
    same(run("scatter", x, index((0,), (1,)), y[:, :1].clone(), dim=1), x.scatter(1, index((0,), (1,)), y[:, :1]))
    same(run("scatter", x, index((0,)), 1, dim=1), x.scatter(1, index((0,)), 1))
    same(run("index_put", x, y[:1], index(1, 0), dims=(0,)), x.index_put((index(1, 0),), y[:1]))
    same(run("slice_scatter", x, y, dim=0, start=0, stop=3, step=2), x.slice_scatter(y, 0, 0, 3, 2))
    for position in (1, torch.tensor(1)):
        same(run("cache_update", x, y, position, dim=0), torch.cat([x[:1], y]))
    written = cube.clone()
    written[0, 1], written[1, 2] = y[0], y[1]
    same(run("cache_update", cube, y.reshape(2, 1, 4), index(1, 2), dim=1), written)
    written[0, 2], written[1, 2] = y[0], y[0]  # of the second, what lies beyond the end is left out
    rows = torch.stack([torch.stack([written[0, 1], y[0]]), torch.stack([y[0], y[1]])])
    same(run("cache_update", cube, rows, index(1, 2), dim=1), written)
    if dtype != torch.bool:
        for reduce, theirs in [("sum", "sum"), ("prod", "prod"), ("amax", "amax"), ("amin", "amin"), ("mean", "mean")]:
            expected = x.scatter_reduce(1, index((0, 0), (1, 1)), y[:, :2], theirs)
            same(run("scatter", x, index((0, 0), (1, 1)), y[:, :2], dim=1, reduce=reduce), expected)


def convolutions() -> Iterator[tuple[Any, ...]]:
    for space in (1, 2, 3):
        yield t(2, 4, *(7,) * space), t(6, 2, *(3,) * space), (2,) * space, (1,) * space, (2,) * space, 2, False, ()
        yield t(0, 4, *(7,) * space), t(6, 4, *(3,) * space), (1,) * space, (0,) * space, (1,) * space, 1, False, ()
        yield t(2, 4, *(5,) * space), t(4, 3, *(3,) * space), (2,) * space, (1,) * space, (1,) * space, 2, True, (1,) * space


@pytest.mark.parametrize("case", list(convolutions()))
def test_convolutions(case: Any) -> None:
    x, w, stride, padding, dilation, groups, transposed, extra = case
    space = x.dim() - 2
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        expected = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1](
            x, w, None, stride, padding, extra, groups, dilation
        )
    else:
        expected = (F.conv1d, F.conv2d, F.conv3d)[space - 1](x, w, None, stride, padding, dilation, groups)
    torch.testing.assert_close(run("conv", x, w, transposed=transposed, output_padding=extra, **attrs), expected)
    bias = t(expected.shape[1])
    with_bias = run("conv", x, w, bias, transposed=transposed, output_padding=extra, **attrs)
    torch.testing.assert_close(with_bias, expected + bias.reshape(-1, *(1,) * space))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8], ids=str)
def test_products(dtype: torch.dtype) -> None:
    for a, b in [
        ((2, 3), (3, 4)),
        ((3,), (3,)),
        ((3,), (2, 3, 4)),
        ((5, 2, 3), (3,)),
        ((5, 1, 2, 3), (4, 3, 2)),
        ((2, 0), (0, 3)),
        ((0, 3), (3, 2)),
    ]:
        same(run("matmul", t(*a, dtype=dtype), t(*b, dtype=dtype)), torch.matmul(t(*a, dtype=dtype), t(*b, dtype=dtype)))
    if dtype.is_floating_point:
        x, w, b = t(2, 5, 3, dtype=dtype), t(4, 3, dtype=dtype), t(4, dtype=dtype)
        for lead in (x, x[0, 0], x[:0], x.transpose(0, 1)):
            same(run("linear", lead, w), F.linear(lead, w))
            same(run("linear", lead, w, b), F.linear(lead, w, b))


@pytest.mark.parametrize("ends", [[2, 5, 7], [0, 7, 7], [7, 7, 7], [0, 0, 0], [1, 1, 4]])
def test_grouped_matmul(ends: list[int]) -> None:
    x, w = t(7, 4), t(3, 4, 5)
    rows = [x[a:b] @ w[g] for g, (a, b) in enumerate(zip([0, *ends], ends))]
    same(run("grouped_matmul", x, w, torch.tensor(ends, dtype=torch.int32)), torch.cat([*rows, torch.zeros(7 - ends[-1], 5)]))


@pytest.mark.parametrize("rows", [([0, 2], [], [1]), ([], []), ([1], [0, 1, 2])])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_block_sparse_linear(rows: tuple[list[int], ...], index: torch.dtype) -> None:
    counts = torch.tensor([0, *map(len, rows)])
    columns = torch.tensor([c for row in rows for c in row], dtype=index)
    values, starts = t(len(columns), 2, 4), counts.cumsum(0).to(index)
    dense = torch.zeros(len(rows), 2, 3, 4)
    places = [(row, column) for row, found in enumerate(rows) for column in found]
    for (row, column), block in zip(places, values):
        dense[row, :, column] = block
    dense = dense.reshape(2 * len(rows), 12)
    for x in (t(5, 12), t(2, 3, 12), t(12), t(0, 12)):
        same(run("block_sparse_linear", x, values, columns, starts), F.linear(x, dense))
    holes = t(3, 12)
    holes[:, 4:8] = float("nan")
    got = run("block_sparse_linear", holes, values, columns, starts)
    assert torch.isnan(got).any(0).unflatten(0, (-1, 2)).all(1).tolist() == [1 in row for row in rows], "absent blocks read nothing"


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((5, 13), (3, 2, 4), (3,), (4,)), "whole blocks"),
        (((5, 12), (3, 2, 4), (2,), (4,)), "one column for each block"),
        (((5, 12), (3, 2, 4), (3,), (0,)), "a start for each block row"),
        (((5, 12), (3, 2, 0), (3,), (4,)), "blocks with elements"),
    ],
)
def test_block_sparse_linear_refuses(shapes: Any, reason: str) -> None:
    x, values, columns, starts = (sym(*shape, dtype=kind) for shape, kind in zip(shapes, (torch.float32, torch.float32, I64, I64)))
    with pytest.raises(TypeInferenceError, match=reason):
        ops.op("block_sparse_linear")(x, values, columns, starts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_pooling(space: int, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> None:
    x = t(2, 3, *(size,) * space)
    attrs: dict[str, Any] = {"kernel": (kernel,) * space, "stride": (stride,) * space, "padding": (padding,) * space, "ceil": ceil}
    theirs = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[space - 1]
    try:
        expected = theirs(x, kernel, stride, padding, dilation, ceil)
    except RuntimeError:
        assert refused("max_pool", x, dilation=(dilation,) * space, **attrs)
        return
    same(run("max_pool", x, dilation=(dilation,) * space, **attrs), expected)
    if dilation == 1 and (space < 3 or kernel <= size):
        same(run("avg_pool", x, **attrs), (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[space - 1](x, kernel, stride, padding, ceil))
    s = symbol("s")
    count = window_count(s, kernel, stride, padding, padding, dilation, ceil)
    assert evaluate(count, {"s": size}) == expected.shape[-1]


@pytest.mark.parametrize("last", [False, True])
def test_padding_behind(last: bool) -> None:
    """As much as the op puts there itself: zeros to a convolution and a mean, nothing to a maximum."""
    x, w = t(2, 4, 9, 8) - 5, t(3, 4, 3, 2)
    x = x.permute(0, 2, 3, 1) if last else x
    image = x.permute(0, 3, 1, 2) if last else x
    attrs: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "padding_after": (0, 1), "channels_last": last}

    def filled(value: float) -> torch.Tensor:
        return F.pad(image, (0, 1, 1, 0), value=value)

    found = [
        run("conv", x, w, dilation=(1, 1), **attrs),
        run("max_pool", x, kernel=(3, 2), **attrs),
        run("avg_pool", x, kernel=(3, 2), **attrs),
    ]
    expected = [
        F.conv2d(filled(0), w, stride=(2, 1)),
        F.max_pool2d(filled(-torch.inf), (3, 2), (2, 1)),
        F.avg_pool2d(filled(0), (3, 2), (2, 1)),
    ]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1) if last else theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants(dtype: torch.dtype) -> None:
    same(run("full", shape=(2, 0, 3), value=1, dtype=dtype), torch.full((2, 0, 3), 1, dtype=dtype))
    same(run("full", shape=(), value=2, dtype=dtype), torch.full((), 2, dtype=dtype))
    if dtype != torch.bool:
        same(run("iota", length=5, start=3, step=2, dtype=dtype), torch.arange(3, 13, 2, dtype=dtype))
        same(run("iota", length=0, dtype=dtype), torch.arange(0, dtype=dtype))
    value = t(2, 3, dtype=dtype)
    same(run("constant", data=Data("w", value)), value)


def test_structure() -> None:
    x = t(3, 4)
    types = (tensor_type(x), TensorType(I64, (3, 4)))
    node = ops.extern(graph_input("x", tensor_type(x)), target="aten.sort.default", args=(Ref(0), 1), types=types)
    assert node.type == types
    values, positions = node.op.eager(x, **node.attrs)
    same(ops.item.eager((values, positions), index=1), x.sort(1).indices)
    assert ops.item(node, index=1).type == types[1]
    a = graph_input("a", tensor_type(x))
    body = make_graph("body", [a], [ops.mul(a, 2.0)])
    same(run("region", x, body=body), x * 2)


S, N = symbol("s"), symbol("n")


def sym(*shape: Any, dtype: torch.dtype = torch.float32) -> Any:
    return graph_input("x", TensorType(dtype, shape))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: ops.add(sym(S, 4), sym(1, 4)), (S, 4)),
        (lambda: ops.add(sym(S, N), sym(N)), (S, N)),
        (lambda: ops.reshape(sym(S, N, 8), shape=(S * N, 8)), (S * N, 8)),
        (lambda: ops.reshape(sym(S, N, 8), shape=(S, N, 2, 4)), (S, N, 2, 4)),
        (lambda: ops.reshape(sym(S, 2 * N + 2), shape=(S, N + 1, 2)), (S, N + 1, 2)),
        (lambda: ops.expand(sym(1, 4), shape=(S, 4)), (S, 4)),
        (lambda: ops.slice(sym(S, 4), dim=0, start=1, stop=S), (S - 1, 4)),
        (lambda: ops.slice(sym(S, 4), dim=0, start=S - 2, stop=S), (2, 4)),
        (lambda: ops.select(sym(S, 4), dim=0, index=S - 1), (4,)),
        (lambda: ops.cat(sym(S, 4), sym(N, 4), sym(3, 4), dim=0), (S + N + 3, 4)),
        (lambda: ops.pad(sym(S), low=(1,), high=(N,)), (S + N + 1,)),
        (lambda: ops.sum(sym(S, 4), dims=(1,)), (S,)),
        (lambda: ops.matmul(sym(S, 1, 4, N), sym(3, N, 5)), (S, 3, 4, 5)),
        (lambda: ops.linear(sym(S, N, 8), sym(4, 8), sym(4)), (S, N, 4)),
        (lambda: ops.grouped_matmul(sym(S, 8), sym(3, 8, 4), sym(3, dtype=I64)), (S, 4)),
        (lambda: ops.op("block_sparse_linear")(sym(S, 8), sym(N, 2, 4), sym(N, dtype=I64), sym(4, dtype=I64)), (S, 6)),
        (lambda: ops.conv(sym(S, 3, N), sym(8, 3, 3), stride=(1,), padding=(1,), dilation=(1,)), (S, 8, N)),
        (lambda: ops.layer_norm(sym(S, N, 8), sym(8), sym(8)), (S, N, 8)),
        (lambda: ops.group_norm(sym(S, 8, N), groups=2), (S, 8, N)),
        (lambda: ops.attention(sym(S, 4, N, 8), sym(S, 2, N, 8), sym(S, 2, N, 8), sym(S, 1, N, N), scale=1.0), (S, 4, N, 8)),
        (lambda: ops.embedding(sym(10, 4), sym(S, N, dtype=I64)), (S, N, 4)),
        (lambda: ops.index(sym(S, 4), sym(N, dtype=I64), dims=(0,)), (N, 4)),
        (lambda: ops.gather(sym(S, 4), sym(S, 1, dtype=I64), dim=1), (S, 1)),
        (lambda: ops.iota(length=S + 1), (S + 1,)),
        (lambda: ops.full(shape=(S, 2), value=S, dtype=I64), (S, 2)),
        (lambda: ops.mul(sym(S), S), (S,)),
    ],
)
def test_symbolic_sizes(build: Any, shape: Any) -> None:
    node = build()
    assert node.shape == shape, f"{node.shape} is not {shape}"
    if node.op.expand is not None:
        assert node.op.expand(*node.inputs, **node.attrs).shape == shape


def test_symbolic_strided_convolution_matches_torch() -> None:
    node = ops.conv(sym(1, 3, N), sym(8, 3, 3), stride=(2,), padding=(1,), dilation=(1,))
    for n in (3, 8, 9, 31):
        assert evaluate(node.shape[2], {"n": n}) == F.conv1d(t(1, 3, n), t(8, 3, 3), None, 2, 1).shape[2]


@pytest.mark.parametrize(
    ("build", "flops", "moved"),
    [
        (lambda: ops.add(sym(8, 16), sym(16)), 128, 4 * (128 + 16 + 128)),
        (lambda: ops.exp(sym(8, 16, dtype=torch.bfloat16)), 1280, 2 * 256),
        (lambda: ops.sum(sym(8, 16), dims=(1,)), 128, 4 * (128 + 8)),
        (lambda: ops.reshape(sym(8, 16), shape=(128,)), 0, 0),
        (lambda: ops.matmul(sym(2, 8, 16), sym(16, 4)), 2 * 2 * 8 * 16 * 4, 4 * (256 + 64 + 64)),
        (lambda: ops.linear(sym(8, 16), sym(4, 16), sym(4)), 2 * 8 * 16 * 4, 4 * (128 + 64 + 4 + 32)),
        (lambda: ops.conv(sym(1, 4, 10), sym(6, 2, 3), stride=(1,), padding=(1,), dilation=(1,), groups=2), 2 * 60 * 6, 4 * (40 + 36 + 60)),
        (lambda: ops.embedding(sym(1000, 16), sym(5, dtype=I64)), 0, 4 * (80 + 80) + 40),
        (lambda: ops.gather(sym(50, 16), sym(5, 16, dtype=I64), dim=0), 0, 80 * (4 + 4 + 8)),
        (lambda: ops.cat(sym(5, 4), sym(3, 4), dim=0), 0, 4 * 64),
        (lambda: ops.mul(sym(S, 4), 2.0), 4 * S, 32 * S),
        (lambda: ops.full(shape=(8,), value=0, dtype=I64), 0, 0),
    ],
)
def test_costs(build: Any, flops: Any, moved: Any) -> None:
    node = build()
    cost = node.op.cost(tuple(n.type for n in node.inputs), node.type, node.attrs)
    assert (cost.flops, cost.bytes) == (flops, moved)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ops.reshape(sym(2, 3), shape=(4,)), "6 elements do not fit shape"),
        (lambda: ops.permute(sym(2, 3), dims=(0, 0)), "dims must be a permutation of 0..1"),
        (lambda: ops.expand(sym(2, 3), shape=(4, 3)), "size 2 does not expand to 4"),
        (lambda: ops.slice(sym(2, 3), dim=0, start=0, stop=3), "bounds 0:3 are not clamped into 0..2"),
        (lambda: ops.select(sym(2, 3), dim=0, index=2), "index 2 is outside 0..2"),
        (lambda: ops.flip(sym(2, 3), dims=(0, -2)), "a dimension appears twice"),
        (lambda: ops.sum(sym(2, 3), dims=(2,)), "dimension 2 is out of range for rank 2"),
        (lambda: ops.amax(sym(2, 0), dims=(1,)), "no largest or smallest element"),
        (lambda: ops.mean(sym(2, dtype=I64)), "it takes a floating-point tensor"),
        (lambda: ops.cat(sym(2, 3), sym(2, 4), dim=0), "does not continue"),
        (lambda: ops.gather(sym(2, 3), sym(2, 3), dim=0), "an index must be int64 or int32"),
        (lambda: ops.matmul(sym(2, 3), sym(2, 3)), "inner sizes 3 and 2 differ"),
        (lambda: ops.matmul(sym(2, 3), sym(3, 2, dtype=torch.float64)), "operands must have one dtype"),
        (lambda: ops.linear(sym(2, 3), sym(4, 2)), "x must end in the columns of w"),
        (lambda: ops.conv(sym(1, 3, 2), sym(4, 3, 5), stride=(1,), padding=(0,), dilation=(1,)), "no window fits"),
        (lambda: ops.conv(sym(1, 3, 9), sym(4, 2, 5), stride=(1,), padding=(0,), dilation=(1,)), "x has 3 channels, w takes 2"),
        (lambda: ops.max_pool(sym(1, 3, 9), kernel=(2,), stride=(2,), padding=(2,)), "padding may be at most half"),
        (lambda: ops.max_pool(sym(1, 3, 9), kernel=(2,), stride=(2,), padding=(0,), padding_after=(1, 1)), "one entry for each spatial"),
        (lambda: ops.max_pool(sym(1, 3, 9), kernel=(2,), stride=(2,), padding=(0,), padding_after=(1,), ceil=True), "counts whole windows"),
        (lambda: ops.avg_pool(sym(1, 3, 9), kernel=(2,), stride=(2,), padding=(0,), padding_after=(1,), count_padding=False), "as many"),
        (
            lambda: ops.conv(sym(1, 3, 9), sym(3, 4, 5), stride=(1,), padding=(0,), padding_after=(1,), dilation=(1,), transposed=True),
            "one padding",
        ),
        (lambda: ops.index_put(sym(4, 3), sym(5), sym(2, dtype=I64), dims=(0,)), "do not broadcast"),
        (lambda: ops.item(sym(2), index=0), "it takes a value with several results"),
        (lambda: ops.reshape(sym(2)), "that attribute is required"),
    ],
)
def test_errors_name_the_reason(build: Any, reason: str) -> None:
    with pytest.raises(TypeInferenceError, match=reason) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_unknown_op() -> None:
    with pytest.raises(UnknownOpError, match="frobnicate"):
        ops.op("frobnicate")
    with pytest.raises(AttributeError):
        ops.frobnicate  # noqa: B018


def test_float64_run_of_regions_and_externs() -> None:
    """`interpret(..., float64)` computes inside regions and externs in float64; random draws keep their numbers."""
    x = torch.rand(64, dtype=torch.float32)
    a = graph_input("a", tensor_type(x))
    half = ops.cast(ops.exp(a), dtype=torch.float16)
    body = make_graph("body", [a], [half])
    inside = ops.region(a, body=body)
    digamma = ops.extern(a, target="aten.digamma.default", args=(Ref(0),), types=(tensor_type(x),))
    draw = ops.extern(a, target="aten.rand_like.default", args=(Ref(0),), types=(tensor_type(x),), sequence=0)
    graph = make_graph("g", [a], [inside, digamma, draw])
    torch.manual_seed(0)
    exact = interpret(graph, [x], torch.float64)
    torch.manual_seed(0)
    same(exact[0], x.double().exp())
    same(exact[1], torch.digamma(x.double()))
    same(exact[2], torch.rand_like(x).double())


def test_building_a_node_is_fast() -> None:
    """Under 20 us on an idle machine; the bound here leaves room for a busy one."""
    x, y = sym(8, 128, 384), sym(8, 128, 384)
    for build in (
        lambda: ops.add(x, y),
        lambda: ops.add(x, 1.0),
        lambda: ops.reshape(x, shape=(8, 128, 6, 64)),
        lambda: ops.softmax(x, dim=-1),
    ):
        assert min(timeit.repeat(build, number=100, repeat=5)) / 100 < 60e-6


def test_every_op_is_covered() -> None:
    here = {*REDUCTIONS, "cumsum", "cumprod", "input", "scalar", "constant", "full", "iota", "extern", "region", "item"}
    here |= {"reshape", "permute", "expand", "slice", "select", "flip", "as_strided", "layout"}
    here |= {"cat", "pad", "gather", "index", "embedding", "scatter", "index_put", "slice_scatter", "cache_update"}
    here |= {"matmul", "linear", "grouped_matmul", "block_sparse_linear", "conv", "max_pool", "avg_pool"}
    here |= {"int_linear"}  # test_quantized.py
    elsewhere = {op.name for op in OPS.values() if op.category in (Category.POINTWISE, Category.COMPOSITE, Category.RECURRENCE)}
    assert here == set(OPS) - elsewhere
    assert set(DTYPES) == NATIVE_DTYPES and scalar_value(sym(2)) is None


def test_the_table_of_ops_is_current() -> None:
    from tilewright.ir.ops.__main__ import table

    committed = Path(__file__).parents[2] / "docs" / "ops.md"
    assert committed.read_text() == table(), "run: python -m tilewright.ir.ops > docs/ops.md"
