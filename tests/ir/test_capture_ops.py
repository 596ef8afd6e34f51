"""Capture op by op: every function here runs through torch.compile with an interpreting backend and must equal eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_backend import check

GENERATOR = torch.Generator().manual_seed(0)


def f32(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def i64(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=GENERATOR)


def positive(*shape: int) -> torch.Tensor:
    return f32(*shape).abs() + 0.5


# name: function and arguments; all of them must become native ops
NATIVE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "counts": (lambda x: (torch.histc(x.float(), 6, 0, 5), torch.histc((x - 1).float(), 2, 0, 1)), (i64(6, 40),)),
    "grouped_mm": (
        lambda x, w, ends: F.grouped_mm(x, w, offs=ends),
        (f32(9, 16).bfloat16(), f32(3, 16, 8).bfloat16(), torch.tensor([2, 2, 9], dtype=torch.int32)),
    ),
    "add_alpha": (lambda x, y: torch.add(x, y, alpha=2), (f32(3, 4), f32(4))),
    "add_alpha_half": (lambda x, y: torch.add(x, y, alpha=0.3), (f32(3, 4).half(), f32(4).half())),
    "sub_scalar": (lambda x: 1 - x - 2.5, (f32(3),)),
    "int_plus_float": (lambda x: x + 2.5, (i64(9, 3),)),
    "int_div": (lambda x, y: (x / 4, x // 4, x % 3, torch.div(x, 3, rounding_mode="trunc"), x / (y + 1)), (i64(99, 8), i64(5, 8))),
    "negative_int_div": (lambda x: (x // 4, x % 4, torch.fmod(x, 4), torch.div(x, 4, rounding_mode="trunc")), (i64(99, 8) - 50,)),
    "pow": (lambda x: (x**2, 2**x, x**0.5, x**x), (positive(5),)),
    "int_pow": (lambda x: x**3, (i64(5, 6),)),
    "weak_zero_dim": (lambda x, y: x * y, (f32(3).bfloat16(), torch.tensor(2.0, dtype=torch.float64))),
    "bool_arithmetic": (lambda a, b: (a + b, a & ~b, a ^ b, a * b, a.sum()), (f32(6) > 0, f32(6) > 0)),
    "clamp": (lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0.1), x.clamp(max=0.1), x.int().clamp(0.5, 2)), (f32(9),)),
    "clamp_tensor": (lambda x, lo: torch.clamp(x, lo, lo + 1), (f32(9), f32(9))),
    "where": (lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, 1.0, x), torch.where(x > 0, x.double(), y)), (f32(5), f32(5))),
    "masked_fill": (lambda x, m: (x.masked_fill(m, -torch.inf), x.half().masked_fill(m, 1e-3)), (f32(3, 4), f32(4) > 0)),
    "logic": (lambda x: (torch.logical_and(x > 0, x), torch.logical_not(x), x.isnan(), x.isinf(), x.signbit()), (f32(4),)),
    "unary": (lambda x: (x.exp(), x.log(), x.rsqrt(), x.erf(), x.tanh(), x.sigmoid(), x.sin(), x.log1p(), x.floor()), (positive(7),)),
    "unary_int": (lambda x: (x.exp(), x.sqrt(), x.sigmoid(), x.abs(), x.neg(), x.float().round()), (i64(5, 4),)),
    "activations": (
        lambda x: (
            F.gelu(x),
            F.gelu(x, approximate="tanh"),
            F.silu(x),
            F.relu(x),
            F.leaky_relu(x),
            F.elu(x),
            F.mish(x),
            F.softplus(x),
            F.hardtanh(x),
            F.hardswish(x),
            F.hardsigmoid(x),
            F.relu6(x),
            F.selu(x),
            F.logsigmoid(x),
        ),
        (f32(4, 9),),
    ),
    "activations_half": (lambda x: (F.gelu(x), F.silu(x), F.leaky_relu(x), F.glu(x)), (f32(4, 8).bfloat16(),)),
    "addcmul": (lambda x, a, b: (torch.addcmul(x, a, b, value=0.5), torch.addcdiv(x, a, b.abs() + 1)), (f32(3, 4), f32(4), f32(3, 1))),
    "lerp": (lambda x, y, w: (torch.lerp(x, y, 0.3), torch.lerp(x, y, 0.7), torch.lerp(x, y, w)), (f32(6), f32(6), f32(6))),
    "casts": (lambda x: (x.int(), x.half(), x.double(), x.bool(), x.to(torch.uint8), x.bfloat16()), (f32(7).abs(),)),
    "extrema": (
        lambda x, y: (torch.maximum(x, y), torch.fmin(x, y), torch.minimum(x, y)),
        (torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 2.0])),
    ),
    "sum": (lambda x: (x.sum(), x.sum(1), x.sum((0, -1), keepdim=True), x.sum(0, dtype=torch.float64), x.int().sum()), (f32(3, 4, 5),)),
    "mean": (lambda x: (x.mean(), x.mean(-1), x.mean((0, 1)), x.var(), x.std(0), x.var(1, unbiased=False)), (f32(3, 4),)),
    "min_max": (lambda x: (x.amax(1), x.amin(), x.max(), x.max(0), x.min(1, keepdim=True), x.argmax(), x.argmin(-1)), (f32(3, 4),)),
    "max_values_only": (lambda x: x.max(1).values, (f32(3, 4),)),
    "any_all": (lambda x: (x.any(), x.all(1), (x > 0).any(0), x.to(torch.uint8).any(), x.to(torch.uint8).all(0)), (f32(3, 4),)),
    "prod": (lambda x: (x.prod(), x.prod(1), x.int().prod(0)), (f32(3, 4),)),
    "cumsum": (lambda x: (x.cumsum(1), x.int().cumsum(0), x.cumprod(-1), x.cumsum(0, dtype=torch.float64)), (f32(3, 4),)),
    "norms": (lambda x: (torch.linalg.vector_norm(x, dim=1), F.normalize(x), x.norm(), torch.logsumexp(x, 1)), (f32(3, 4),)),
    "softmax": (lambda x: (x.softmax(-1), x.log_softmax(0), F.softmax(x.half(), 1, dtype=torch.float32)), (f32(3, 4),)),
    "views": (
        lambda x: (x.view(4, 6) + 1, x.reshape(-1) + 1, x.flatten(1) * 2, x.unsqueeze(1) + 1, x[:, 0:1].squeeze(1) + 1),
        (f32(2, 3, 4),),
    ),
    "transposes": (lambda x: (x.transpose(0, 1) + 1, x.permute(2, 0, 1) * 2, x.mT + 1, x.movedim(0, 2) + 1), (f32(2, 3, 4),)),
    "expand": (lambda x: (x.expand(3, 4) + 1, x.expand(-1, 4) * 2, x.repeat(2, 3), x.repeat(2, 1, 2), torch.tile(x, (2,))), (f32(3, 1),)),
    "slices": (
        lambda x: (x[1:] + 1, x[:-1] + 1, x[-2:, ::2] + 1, x[5:2] + 1, x[:99] + 1, x[0] + 1, x[-1, 1] + 1, x[..., -3:-1] + 1),
        (f32(4, 6),),
    ),
    "splits": (lambda x: [p + 1 for p in (*x.split(2, 1), *x.chunk(2), *x.unbind(0), *x.split([1, 4], 1))], (f32(4, 5),)),
    "flip_roll": (lambda x: (x.flip(0, 1), x.roll(1, 0), x.roll((1, -2), (0, 1)), x.roll(3), torch.rot90(x)), (f32(4, 5),)),
    "pad": (lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 0, 2, -1), value=3.0), F.pad(x, (-1, -1))), (f32(4, 5),)),
    "reflect": (lambda x: (F.pad(x, (1, 2), mode="reflect"), F.pad(x, (1, 2), mode="replicate")), (f32(1, 4, 5),)),
    "cat": (
        lambda x, y: (torch.cat([x, y], 1), torch.stack([x, x]), torch.cat([x, x.int()]), torch.cat([torch.empty(0), x])),
        (f32(3, 4), f32(3, 2)),
    ),
    "unfold": (lambda x: x.unfold(1, 3, 2) + 1, (f32(2, 9),)),
    "diagonal": (lambda x: (x.diagonal() + 1, torch.diag_embed(x[0]), x.tril(), x.triu(1), torch.trace(x)), (f32(4, 4),)),
    "as_strided": (lambda x: x.as_strided((2, 3), (1, 2), 1) + 1, (f32(12),)),
    "as_strided_view": (lambda x: (x * 2)[1:, 1:].as_strided((3,), (2,), 0) + 1, (f32(4, 4),)),
    "factories": (
        lambda x: (
            torch.zeros(3),
            torch.ones_like(x),
            torch.full((2,), 7),
            torch.arange(5) + x.size(0),
            torch.arange(1, 2, 0.25),
            x.new_zeros(2, dtype=torch.int32),
            torch.eye(3),
            torch.linspace(0, 1, 5),
            torch.scalar_tensor(2.0),
            torch.empty_like(x).shape,
        ),
        (f32(3, 4),),
    ),
    "index": (lambda x, i: (x[i], x[:, i], x[i, i], x[i, :, i], x[-1 - i], x.index_select(1, i)), (f32(5, 4, 5), i64(4, 3))),
    "index_put": (
        lambda x, i, v: (x.index_put((i,), v), torch.index_put(x, (i,), v, accumulate=True), x.index_add(0, i, v)),
        (f32(5, 4), i64(5, 3), f32(3, 4)),
    ),
    "gather": (lambda x, i: (x.gather(1, i), torch.take_along_dim(x, i, 1)), (f32(3, 4), i64(4, 3, 2))),
    "scatter": (
        lambda x, i, s: (x.scatter(1, i, s), x.scatter(1, i, 2.0), x.scatter_add(1, i, s), x.scatter_reduce(1, i, s, "amax")),
        (f32(3, 4), torch.tensor([[0, 1], [2, 3], [1, 0]]), f32(3, 2)),
    ),
    "embedding": (lambda w, i: (F.embedding(i, w), F.embedding(i.int(), w, padding_idx=0)), (f32(9, 4), i64(9, 2, 3))),
    "one_hot": (lambda i: F.one_hot(i, 5), (i64(5, 4),)),
    "matmul": (
        lambda a, b: (a @ b, a[0] @ b, a @ b[0, :, 0], a[0, 0] @ b[0, :, 0], torch.einsum("bij,bjk->bik", a, b)),
        (f32(2, 3, 4), f32(2, 4, 5)),
    ),
    "addmm": (
        lambda c, a, b: (torch.addmm(c, a, b, beta=0.5, alpha=2), torch.addmm(c, a, b, beta=0), torch.baddbmm(c[None], a[None], b[None])),
        (f32(3, 5), f32(3, 4), f32(4, 5)),
    ),
    "addmm_nan_bias": (lambda c, a, b: torch.addmm(c, a, b, beta=0), (torch.full((5,), torch.nan), f32(3, 4), f32(4, 5))),
    "linear": (lambda x, w, b: (F.linear(x, w, b), F.linear(x, w), F.linear(x[0, 0], w, b)), (f32(2, 3, 4), f32(5, 4), f32(5))),
    "conv": (
        lambda x, w, b: (
            F.conv2d(x, w, b, padding=1),
            F.conv2d(x, w, stride=2, dilation=2),
            F.conv2d(x, w[:, :1].repeat(2, 1, 1, 1), groups=4),
        ),
        (f32(2, 4, 8, 8), f32(6, 4, 3, 3), f32(6)),
    ),
    "conv_1d_3d": (
        lambda x, w: (F.conv1d(x, w, padding="same"), F.conv1d(x[0], w), F.conv3d(x[:, :, :, None, None], w[..., None, None])),
        (f32(2, 4, 8), f32(6, 4, 3)),
    ),
    "conv_transpose": (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), (f32(2, 4, 5, 5), f32(4, 3, 3, 3))),
    "pools": (
        lambda x: (
            F.max_pool2d(x, 2),
            F.max_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, 2, ceil_mode=True),
            F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool2d(x, (4, 2)),
            F.max_pool1d(x[0], 3, 2),
            F.avg_pool1d(x[0], 2),
        ),
        (f32(2, 3, 8, 8),),
    ),
    "layer_norm": (
        lambda x, w, b: (F.layer_norm(x, (4,), w, b), F.layer_norm(x, (3, 4)), F.layer_norm(x, (4,), w), F.layer_norm(x, (4,), None, b)),
        (f32(2, 3, 4), f32(4), f32(4)),
    ),
    "group_norm": (lambda x, w, b: (F.group_norm(x, 2, w, b), F.group_norm(x, 4), F.instance_norm(x)), (f32(2, 4, 5), f32(4), f32(4))),
    "rms_norm": (
        lambda x, w: (F.rms_norm(x, (4,), w, 1e-6), F.rms_norm(x, (4,)), F.rms_norm(x.half(), (4,), w.half())),
        (f32(2, 3, 4), f32(4)),
    ),
    "batch_norm": (
        lambda x, m, v, w: (F.batch_norm(x, m, v), F.batch_norm(x, m, v, w, w, eps=0.1), F.batch_norm(x, m, v, None, w)),
        (f32(2, 4, 5), f32(4), positive(4), f32(4)),
    ),
    "attention": (
        lambda q, k: (
            F.scaled_dot_product_attention(q, k, k),
            F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.scaled_dot_product_attention(q, k, k, q[:, :1] @ k[:, :1].mT > 0),
            F.scaled_dot_product_attention(q, k, k, scale=0.3),
        ),
        (f32(2, 2, 3, 8), f32(2, 2, 5, 8)),
    ),
    "losses": (
        lambda x, t, y: (
            F.cross_entropy(x, t),
            F.mse_loss(x, y),
            F.l1_loss(x, y),
            F.binary_cross_entropy_with_logits(x, y.sigmoid()),
            F.smooth_l1_loss(x, y),
        ),
        (f32(4, 5), i64(5, 4), f32(4, 5)),
    ),
    "upsample": (
        lambda x: (
            F.interpolate(x, scale_factor=2),
            F.interpolate(x, size=(7, 5), mode="bilinear"),
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        ),
        (f32(1, 2, 4, 4),),
    ),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (f32(1, 8, 3, 3),)),
    "zero_size": (lambda x: (x + 1, x.sum(), x.sum(0), x.reshape(5, 0), torch.cat([x, x])), (f32(0, 5),)),
    "zero_dim": (lambda x: (x + 1, x.sum(), x.reshape(1), x.expand(3) + 1, x.softmax(0)), (torch.tensor(2.0),)),
}

# these stay with ATen, and still are exact
EXTERN: dict[str, tuple[Callable[..., Any], tuple[Any, ...], set[str]]] = {
    "sort": (lambda x: (x.sort(1), x.topk(2, 1), x.argsort()), (f32(3, 4),), {"aten.sort.default", "aten.topk.default"}),
    "pool_indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), (f32(1, 2, 4, 4),), {"aten.max_pool2d_with_indices.default"}),
    "complex": (lambda x: (torch.view_as_real(torch.view_as_complex(x) * 2j).sum(), torch.fft.rfft(x[0]).abs()), (f32(3, 4, 2),), set()),
    "complex_values": (lambda x: (x * x, x.conj() + 1, x.real, torch.abs(x)), (torch.complex(f32(3), f32(3)),), set()),
    "random": (
        lambda x: (torch.rand(3), torch.randn_like(x), F.dropout(x, 0.3), torch.randint(0, 5, (4,)), torch.bernoulli(x.sigmoid())),
        (f32(50),),
        set(),
    ),
    "linalg": (lambda x: (torch.linalg.qr(x), torch.linalg.svdvals(x)), (f32(4, 3),), set()),
    "bucketize": (lambda x, b: torch.bucketize(x, b), (f32(7), torch.tensor([-1.0, 0.0, 1.0])), set()),
    "small_dtypes": (lambda x: (x.to(torch.uint16).to(torch.int32), x.to(torch.float8_e4m3fn).float()), (f32(5).abs(),), set()),
    "view_dtype": (lambda x: x.view(torch.int32) + 1, (f32(4),), {"aten.view.dtype"}),
    "fmod_cummax": (lambda x: (x.cummax(1), x.logcumsumexp(1), x.kthvalue(2)), (f32(3, 4),), set()),
}


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_native(name: str) -> None:
    function, args = NATIVE[name]
    recorder = check(function, *args)
    assert not recorder.externs


@pytest.mark.parametrize("name", EXTERN)
@torch.no_grad()
def test_extern(name: str) -> None:
    function, args, expected = EXTERN[name]
    recorder = check(function, *args)
    assert recorder.externs and recorder.externs >= expected
