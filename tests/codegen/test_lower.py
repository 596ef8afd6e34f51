"""Lowering, by the reference evaluator: what a kernel computes is what its body means, over many mixes of ops."""

from __future__ import annotations

import math

import pytest
import torch
from lowering import check, graph_of
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.kernel import Load, Position, Reduce, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.codegen.reference import run
from tilewright.codegen.triton.runtime import run as interpreted
from tilewright.codegen.triton.templates import build
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.reasons import Reason
from triton.runtime.errors import InterpreterError

B, S = symbol("b"), symbol("s")
SIZES = {"b": SymbolRange(1), "s": SymbolRange(1)}


def x(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(-5 if dtype.is_signed else 0, 6, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def extents(kernel):
    return [a.extent for a in kernel.grid], [a.extent for a in kernel.inner]


def loads(kernel):
    return [v for v in scalars(kernel.stores) if isinstance(v, Load)]


# -- axes


def test_contiguous_pointwise_is_one_axis():
    kernel = check(lambda a, b: ops.relu(ops.add(ops.mul(a, 2.0), b)), x(6, 5, 4), x(6, 5, 4))
    assert extents(kernel) == ([120], [])


def test_broadcast_keeps_the_axes_it_needs():
    assert extents(check(ops.add, x(6, 5, 4), x(4))) == ([30, 4], [])
    assert extents(check(ops.add, x(6, 5, 4), x(5, 1))) == ([6, 5, 4], [])
    assert extents(check(ops.add, x(6, 5, 4), x())) == ([120], [])


def test_rows_are_inner_and_merged():
    assert extents(check(lambda a: ops.softmax(a, dim=-1), x(3, 4, 5))) == ([12], [5])
    assert extents(check(lambda a: ops.sum(a, dims=(1, 2)), x(3, 4, 5))) == ([3], [20])
    assert extents(check(lambda a: ops.sum(a, dims=(0, 1)), x(3, 4, 5))) == ([5], [12])


def test_a_chain_of_norm_gelu_residual_softmax_is_one_pass():
    def chain(a, w, b, r):
        return ops.softmax(ops.add(ops.gelu(ops.layer_norm(a, w, b)), r), dim=-1)

    kernel = check(chain, x(7, 16), x(16), x(16), x(7, 16, seed=1))
    assert extents(kernel) == ([7], [16])
    assert len(loads(kernel)) == 4


def test_symbolic_axes_merge():
    kernel = check(lambda a: ops.exp(a), x(3, 5), shapes=[(B, S)], symbols=SIZES)
    assert extents(kernel) == ([B * S], []) and kernel.sizes == ("b", "s")


# -- op mixes


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cumsum", "cumprod"])
def test_along_every_dimension(op, dim):
    check(lambda a: ops.op(op)(a, dim=dim), x(3, 4, 5))


@pytest.mark.parametrize("dims", [(), (0,), (1,), (2,), (0, 2), (-1, -2)])
@pytest.mark.parametrize("op", ["sum", "mean", "prod", "amax", "amin", "any", "all", "var"])
def test_reductions(op, dims):
    check(lambda a: ops.op(op)(a, dims=dims, keepdim=len(dims) == 1), x(3, 4, 5))


@pytest.mark.parametrize("dims", [(), (0,), (2,)])
@pytest.mark.parametrize("op", ["argmax", "argmin"])
def test_positions_of_extrema(op, dims):
    check(lambda a: ops.op(op)(a, dims=dims), x(3, 4, 5))
    check(lambda a: ops.op(op)(a, dims=dims), x(3, 4, 5, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_reductions_over_dtypes(dtype):
    for op in ("sum", "prod", "amax") + (("any", "all") if dtype != torch.uint8 else ()):
        check(lambda a, op=op: ops.op(op)(a, dims=(1,)), x(4, 6, dtype=dtype))
    check(lambda a: ops.cumsum(a, dim=0), x(4, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay_wide_and_casts_round(dtype):
    check(lambda a, b: ops.layer_norm(ops.add(a, b)), x(4, 32, dtype=dtype), x(4, 32, dtype=dtype, seed=1))
    check(lambda a: ops.sub(a, ops.cast(ops.cast(a, dtype=dtype), dtype=torch.float32)), x(4, 32))


def test_promotion_is_that_of_torch():
    check(lambda a, b: ops.add(a, b), x(4, dtype=torch.int32), x(4, dtype=torch.float16))
    check(lambda a, b: ops.mul(a, b), x(4, dtype=torch.uint8), x(4, dtype=torch.int8))
    check(lambda a: ops.div(a, 2), x(4, dtype=torch.int64))
    check(lambda a: ops.add(a, 0.5), x(4, dtype=torch.int64))
    check(lambda a, c: ops.where(c, a, 0), x(4), x(4, dtype=torch.bool))
    check(lambda a, b: ops.add(a, b), x(4, dtype=torch.bool), x(4, dtype=torch.bool))
    check(lambda a: ops.cast(a, dtype=torch.bool), x(4, dtype=torch.int64))
    check(lambda a, c: ops.where(c, -math.inf, a), x(4), x(4, dtype=torch.bool))


@pytest.mark.parametrize("divide", ["floor_divide", "remainder", "fmod", "trunc_divide"])
def test_integer_division_by_literals(divide):
    check(lambda a: ops.op(divide)(a, 3), x(20, dtype=torch.int64))
    with pytest.raises(LoweringError, match="only at run time"):
        lower(graph_of(ops.op(divide), [x(4, dtype=torch.int64), x(4, dtype=torch.int64)]), "k")


def test_views_dissolve():
    check(lambda a: ops.neg(ops.permute(a, dims=(2, 0, 1))), x(3, 4, 5))
    check(lambda a: ops.neg(ops.permute(ops.reshape(a, shape=(12, 5)), dims=(1, 0))), x(3, 4, 5))
    check(lambda a: ops.neg(ops.slice(a, dim=1, start=1, stop=8, step=3)), x(3, 9))
    check(lambda a: ops.neg(ops.select(a, dim=1, index=2)), x(3, 9))
    check(lambda a: ops.neg(ops.flip(a, dims=(0, 1))), x(3, 9))
    check(lambda a: ops.neg(ops.expand(a, shape=(2, 3, 4))), x(3, 1))
    check(lambda a: ops.neg(ops.as_strided(a, shape=(3, 3), strides=(1, 2), offset=1, of=(4, 1))), x(3, 4))
    check(lambda a: ops.flip(a, dims=(0,)), x(3, 9))
    kernel = check(lambda a: ops.reshape(ops.permute(ops.reshape(a, shape=(2, 6, 3, 4)), dims=(0, 2, 1, 3)), shape=(6, 24)), x(12, 12))
    assert all("Mod" not in str(v.index) for v in loads(kernel))


def test_a_region_input_keeps_its_strides():
    check(lambda a: ops.add(a, 1), x(5, 4).t())
    check(lambda a: ops.softmax(a, dim=1), x(5, 4, 3)[:, ::2, :])
    check(lambda a: ops.add(a, 1), x(1, 4).expand(3, 4))


def test_pieces_are_masked_reads():
    kernel = check(lambda a, b: ops.cat(a, ops.exp(b), a, dim=1), x(3, 2), x(3, 4))
    assert sum(v.mask is not None for v in loads(kernel)) == 3
    check(lambda a, b: ops.cat(a, b, dim=0), x(3, 2), x(2, 2, dtype=torch.int32))
    check(lambda a, b: ops.cat(a, b, dim=0), x(0, 2), x(2, 2))
    check(lambda a: ops.pad(a, low=(1, 0), high=(2, 3), value=7.0), x(3, 4))
    check(lambda a: ops.pad(a, low=(-1, 2), high=(0, -1)), x(3, 4))
    check(lambda a, b: ops.slice_scatter(a, b, dim=1, start=1, stop=8, step=3), x(2, 9), x(2, 3))
    kernel = check(lambda a, b: ops.slice(ops.cat(a, b, dim=1), dim=1, start=0, stop=2), x(3, 2), x(3, 4))
    assert [v.mask for v in loads(kernel)] == [None]


def test_rope_after_a_norm_is_one_kernel():
    for interleaved in (False, True):
        check(lambda a, c, s, i=interleaved: ops.rope(ops.rms_norm(a), c, s, interleaved=i), x(2, 3, 8), x(3, 8), x(3, 8, seed=1))


def test_a_row_reduction_inside_a_piece_of_a_concatenation_is_safe():
    def half(a):
        normal = ops.softmax(a, dim=-1)
        return ops.cat(ops.slice(normal, dim=1, start=3, stop=6), ops.slice(normal, dim=1, start=0, stop=3), dim=1)

    kernel = lower(graph_of(lambda a: (half(a), ops.sum(a, dims=(1,))), [x(4, 6)]), "k")
    assert len([v for v in scalars(kernel.stores) if isinstance(v, Reduce)]) == 3
    check(lambda a: (half(a), ops.sum(a, dims=(1,))), x(4, 6))


def test_computed_positions():
    ids = torch.tensor([[0, 3], [6, 2], [1, 1]])
    check(lambda w, i: ops.embedding(w, i), x(7, 5), ids)
    check(lambda w, i: ops.layer_norm(ops.embedding(w, i)), x(7, 5), ids)
    check(lambda a, i: ops.gather(a, i, dim=1), x(3, 7), ids)
    check(lambda a, i: ops.index(a, i, dims=(0,)), x(7, 5), ids - 7)
    check(lambda a, i, j: ops.index(a, i, j, dims=(0, 2)), x(7, 5, 4), ids, torch.tensor([3, -1]))
    check(lambda a, i, j: ops.index(a, i, j, dims=(1, 2)), x(5, 7, 4), ids, torch.tensor([3, -1]))
    check(lambda w, i: ops.cat(ops.embedding(w, i), ops.embedding(w, i), dim=0), x(7, 5), ids)
    check(lambda w, u, i: ops.index(ops.cat(w, u, dim=0), i, dims=(0,)), x(4, 5), x(3, 5), ids)


EMBEDDED = (
    lambda table, at: ops.relu(ops.embedding(table, ops.add(at, 0))),
    lambda table, at: ops.relu(ops.index(table, ops.add(at, 0), dims=(0,))),
    lambda table, at: ops.relu(ops.gather(table, ops.expand(ops.reshape(ops.add(at, 0), shape=(20, 1)), shape=(20, 4)), dim=0)),
)


@pytest.mark.parametrize("build", EMBEDDED, ids=("embedding", "index", "gather"))
@pytest.mark.parametrize("wrong", [7, -1, -8, 1 << 40])
def test_positions_out_of_range_are_faults(build, wrong):
    """In the reference, in C++ and in Triton's interpreter; negative ones count from the end in `index` only."""
    table, at = torch.randn(7, 4), torch.arange(20) % 7
    kernel = lower(graph_of(build, (table, at)), "k")
    for k in (0, 13, 19):
        bad = at.clone()
        bad[k] = wrong
        fails = kernel.faults != ("index",) or wrong != -1
        assert _faults(kernel, table, at) == (False, False, False)
        assert _faults(kernel, table, bad) == (fails, fails, fails)


def test_positions_of_pieces_that_are_not_read_do_not_count():
    def build(table, at):
        return ops.cat(ops.embedding(table, ops.sub(at, 5)), ops.relu(table), dim=0)

    table, at = torch.randn(7, 4), 5 + torch.arange(20) % 7
    kernel = lower(graph_of(build, (table, at)), "k")
    assert _faults(kernel, table, at) == (False, False, False)
    at[3] = 4
    assert _faults(kernel, table, at) == (True, True, True)


def _faults(kernel, table, at):
    """Whether (reference, C++, Triton) report a fault."""
    memory = {b.name: x for b, x in zip(kernel.inputs, (table.reshape(-1), at))}
    found = []
    for how in (lambda: run(kernel, list(memory.values()), {}), lambda: interpreted(build(kernel), memory)):
        try:
            how()
            found.append(False)
        except (IndexError, AssertionError, InterpreterError):
            found.append(True)
    (compiled,) = compile_kernels([kernel])
    outputs = [torch.empty(b.size, dtype=b.dtype) for b in kernel.outputs]
    met = compiled.launch(*(x.data_ptr() for x in (*memory.values(), *outputs)), 2)
    assert met in (0, 1)
    return found[0], met == 1, found[1]


def test_ranges_and_fills():
    check(lambda a: ops.add(a, ops.iota(length=5)), x(3, 5))
    check(lambda a: ops.add(a, ops.iota(length=5, start=0.5, step=0.25, dtype=torch.float32)), x(3, 5))
    check(lambda a: ops.add(a, ops.iota(length=5, start=2, step=3, dtype=torch.int32)), x(3, 5, dtype=torch.int32))
    check(lambda a: ops.mul(a, ops.full(shape=(5,), value=2.5, dtype=torch.float32)), x(3, 5))

    def causal(a):
        keep = ops.ge(ops.reshape(ops.iota(length=5), shape=(5, 1)), ops.iota(length=5))
        return ops.softmax(ops.where(keep, a, -math.inf), dim=-1)

    check(causal, x(2, 5, 5))


def test_symbolic_shapes():
    def heads(a):
        split = ops.permute(ops.reshape(a, shape=(B, S, 3, 4)), dims=(0, 2, 1, 3))
        return ops.mul(split, 2.0)

    kernel = check(heads, x(2, 5, 12), shapes=[(B, S, 12)], symbols=SIZES)
    assert all("Mod" not in str(v.index) and "Floor" not in str(v.index) for v in loads(kernel))
    check(lambda a: ops.mean(a, dims=(1,)), x(2, 5, 12), shapes=[(B, S, 12)], symbols=SIZES)
    check(lambda a: ops.var(ops.reshape(a, shape=(B * S, 12)), dims=(0,)), x(2, 5, 12), shapes=[(B, S, 12)], symbols=SIZES)
    check(lambda a: ops.layer_norm(ops.add(a, ops.mul(a, S))), x(2, 5, 12), shapes=[(B, S, 12)], symbols=SIZES)
    check(lambda a, b: ops.softmax(ops.cat(a, b, dim=1), dim=1), x(2, 5), x(2, 3), shapes=[(B, S), (B, 3)], symbols=SIZES)
    check(lambda a: ops.reshape(ops.exp(a), shape=(B * S, 12)), x(2, 5, 12), shapes=[(B, S, 12)], symbols=SIZES)


def test_norms():
    check(lambda a, w, b: ops.group_norm(a, w, b, groups=2), x(3, 4, 5, 6), x(4), x(4, seed=1))
    check(lambda a, m, v, w, b: ops.batch_norm(a, m, v, w, b), x(3, 4, 5, 6), x(4), x(4).abs(), x(4), x(4))
    check(lambda a, w: ops.layer_norm(a, w, axes=2), x(3, 4, 5), x(4, 5))


def test_statistics_of_batch_norm_and_its_output_share_a_kernel():
    def train(a):
        mean = ops.mean(a, dims=(0, 2, 3), keepdim=True)
        var = ops.var(a, dims=(0, 2, 3), correction=0, keepdim=True)
        return ops.mul(ops.sub(a, mean), ops.rsqrt(ops.add(var, 1e-5))), mean, var

    kernel = check(train, x(3, 4, 5, 6))
    assert extents(kernel) == ([4], [3, 30])


def test_bias_gradient_sums_columns():
    kernel = check(lambda a: ops.sum(ops.mul(a, 2.0), dims=(0, 1)), x(4, 6, 8))
    assert extents(kernel) == ([8], [24])


def test_logsumexp_like_chain():
    def chain(a):
        top = ops.amax(a, dims=(1,), keepdim=True)
        safe = ops.where(ops.eq(ops.abs(top), math.inf), 0.0, top)
        total = ops.log(ops.sum(ops.exp(ops.sub(a, safe)), dims=(1,), keepdim=True))
        return ops.add(total, safe)

    a = x(4, 6)
    a[1] = -math.inf
    check(chain, a)


# -- ordinary corner cases


def test_zero_sizes():
    for op in ("sum", "prod", "any", "all"):
        check(lambda a, op=op: ops.op(op)(a, dims=(1,)), x(3, 0))
        check(lambda a, op=op: ops.op(op)(a, dims=(1,)), x(0, 3))
    check(lambda a: ops.softmax(a, dim=1), x(3, 0))
    check(lambda a: ops.softmax(a, dim=1), x(0, 3))
    check(lambda a: ops.add(ops.reshape(a, shape=(0, 7)), 1), x(3, 0))
    check(lambda a: ops.sum(a, dims=()), x(0, 3))
    check(lambda a: ops.mean(a, dims=()), x(0, 3))


def test_zero_dimensions():
    check(lambda a: ops.exp(a), x())
    for op in ("sum", "mean", "amax", "argmax", "any"):
        check(lambda a, op=op: ops.op(op)(a), x())
    check(lambda a: ops.softmax(a, dim=0), x())
    check(lambda a: ops.cumsum(a, dim=0), x())
    check(lambda a, b: ops.mul(ops.sum(a), b), x(3, 4), x())


def test_sizes_of_one():
    check(lambda a: ops.softmax(a, dim=1), x(3, 1))
    check(lambda a: ops.argmax(a, dims=(1,)), x(3, 1))
    check(lambda a: ops.cumsum(a, dim=1), x(3, 1))
    check(lambda a: ops.sum(a, dims=(0,)), x(1, 1))


def test_nan_and_infinity():
    a = torch.tensor([[math.nan, 1, math.inf], [-math.inf, 0, -0.0]])
    for op in ("amax", "amin", "argmax", "argmin", "sum", "any"):
        check(lambda v, op=op: ops.op(op)(v, dims=(1,)), a)
    check(lambda v: (ops.relu(v), ops.clamp(v, -0.5, 0.5), ops.maximum(v, 0.0)), a)


# -- refusals


def refusal(build, *xs):
    with pytest.raises(LoweringError) as error:
        lower(graph_of(build, xs), "k")
    return error.value.reason


def test_refuses_a_reduction_over_a_tiled_axis():
    assert refusal(lambda a: ops.add(a, ops.sum(ops.softmax(a, dim=1), dims=(0,))), x(3, 3)) is Reason.TILED_AXIS


def test_refuses_different_spaces():
    assert refusal(lambda a, b: (ops.exp(a), ops.exp(b)), x(3), x(4)) is Reason.DIFFERENT_SPACE
    assert refusal(lambda a, b: (ops.sum(a, dims=(1,)), ops.sum(b, dims=(1,))), x(3, 4), x(3, 5)) is Reason.DIFFERENT_SPACE


def test_refuses_what_has_no_scalar_form():
    assert refusal(lambda a, i: ops.scatter(a, i, a, dim=0), x(3), x(3, dtype=torch.int64).abs() % 3) is Reason.NOT_EXPRESSIBLE
    assert refusal(lambda a: ops.cat(a, a), x(3).to(torch.complex64)) is Reason.UNSUPPORTED_DTYPE
    assert refusal(lambda a: ops.neg(ops.as_strided(a, shape=(2,), strides=(1,), of=(8, 1))), x(3, 4)) is Reason.LAYOUT


# -- the kernel itself


def test_equal_values_are_shared():
    kernel = check(lambda a: (ops.exp(a), ops.add(ops.exp(a), ops.exp(a))), x(5))
    assert len(scalars(kernel.stores)) == 3


def test_names_are_readable_and_distinct():
    graph = graph_of(lambda a, b: ops.op("add")(a, b, hint="x0"), [x(3), x(3)])
    kernel = lower(graph, "k")
    assert [b.name for b in (*kernel.inputs, *kernel.outputs)] == ["x0", "x1", "x0_2"]


def test_masks_and_distances_have_one_form():
    """where(drop, -inf, x) is where(keep, x, -inf) where what keeps can be said as plainly; a distance of positions is one position."""

    def masked(scores, *more):
        i = ops.iota(length=6)
        away = ops.sub(i, ops.reshape(i, shape=(6, 1)))
        return ops.where(ops.logical_or(ops.gt(away, 0), *more or (ops.le(away, -3),)), -math.inf, scores)

    (store,) = check(masked, x(6, 6)).stores
    assert store.value.op == "where" and store.value.args[0].op == "and" and store.value.args[2].value == -math.inf
    assert {str(v.index) for v in scalars([store]) if isinstance(v, Position)} == {"-i + j"}
    (store,) = check(masked, x(6, 6), x(6, 6, dtype=torch.bool)).stores
    assert store.value.args[1].value == -math.inf
