"""Lowering of contractions, by the reference evaluator: a Dot over axes of its own, views in its indices, the epilogue around it."""

from __future__ import annotations

import pytest
import torch
from lowering import check, graph_of
from tilewright.codegen.kernel import Dot, Kernel, Load, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.ir import ops
from tilewright.ir.dims import FloorDiv, SymbolRange, symbol
from tilewright.ir.graph import Node
from tilewright.ir.reasons import Reason


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def dot(kernel: Kernel) -> Dot:
    (found,) = (v for v in scalars(kernel.stores) if isinstance(v, Dot))
    return found


def unpacked(panels: Node, columns: int) -> Node:
    """[p, k, 16] as the weight [columns, k] that it holds."""
    count, depth, width = panels.shape
    rows = ops.reshape(ops.permute(panels, dims=(0, 2, 1)), shape=(count * width, depth))
    return ops.slice(rows, dim=0, start=0, stop=columns, step=1)


def test_linear_is_one_dot_and_its_epilogue():
    kernel = check(lambda a, w, b, r: ops.add(ops.gelu(ops.linear(a, w, b)), r), x(2, 5, 24), x(40, 24), x(40), x(2, 5, 40))
    assert [(a.extent, a.inner) for a in kernel.axes] == [(10, False), (40, False), (24, True)]
    assert dot(kernel).axes == ("a",)


def test_packed_weights_are_read_panel_by_panel():
    kernel = check(lambda a, p: ops.relu(ops.linear(a, unpacked(p, 40))), x(3, 24), x(3, 24, 16))
    right = dot(kernel).right
    assert isinstance(right, Load) and str(right.index) == "16*a + 384*FloorDiv(j, 16) + Mod(j, 16)"


def test_the_result_may_be_stored_as_a_view():
    def heads(a, w):
        return ops.exp(ops.permute(ops.reshape(ops.linear(a, w), shape=(2, 5, 4, 6)), dims=(0, 2, 1, 3)))

    check(heads, x(2, 5, 8), x(24, 8))


@pytest.mark.parametrize(("a", "b"), [((4, 5), (5, 6)), ((2, 4, 5), (5, 6)), ((3, 1, 4, 5), (2, 5, 6)), ((5,), (5, 6)), ((4, 5), (5,))])
def test_matmul(a, b):
    check(lambda p, q: ops.neg(ops.matmul(p, q)), x(*a), x(*b))


WINDOWS = [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2), (1, 1, 1, 4)]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), WINDOWS)
def test_convolution(last, stride, padding, dilation, groups):
    def build(a, w, b):
        settings = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2, "groups": groups}
        return ops.relu(ops.conv(a, w, b, channels_last=last, **settings))

    image = x(2, 7, 6, 4) if last else x(2, 4, 7, 6)
    check(build, image, x(8, 4 // groups, 3, 3), x(8))


def test_a_padded_operand_and_a_cast_are_read_in_place():
    check(lambda a, w: ops.relu(ops.linear(ops.pad(a, low=(0, 1), high=(0, 2), value=1.5), w)), x(3, 5), x(4, 8))
    check(lambda a, w: ops.relu(ops.linear(ops.cast(a, dtype=torch.float32), w)), x(3, 5, dtype=torch.bfloat16), x(4, 5))


def test_narrow_floats_and_sizes_of_one():
    check(lambda a, w, b: ops.relu(ops.linear(a, w, b)), x(3, 1), x(4, 1), x(4))
    check(lambda a, w: ops.relu(ops.linear(a, w)), x(1, 5, dtype=torch.bfloat16), x(1, 5, dtype=torch.bfloat16))
    check(lambda a, w: ops.relu(ops.linear(a, w)), x(3, 0), x(4, 0))


def test_symbolic_rows():
    b = symbol("b")
    check(lambda a, w: ops.relu(ops.linear(a, w)), x(2, 5, 8), x(6, 8), shapes=[(b, 5, 8), (6, 8)], symbols={"b": SymbolRange(1)})


def refusal(build, *xs):
    with pytest.raises(LoweringError) as error:
        lower(graph_of(build, xs), "k")
    return error.value.reason


def test_operands_are_computed_point_by_point():
    kernel = check(lambda a, w: ops.relu(ops.linear(ops.gelu(a), ops.mul(w, 2.0))), x(3, 4), x(5, 4))
    assert len(kernel.axes) == 3 and not isinstance(dot(kernel).left, Load)
    check(lambda a, w, s: ops.matmul(ops.mul(a, s), ops.permute(ops.neg(w), dims=(0, 2, 1))), x(2, 3, 4), x(2, 5, 4), x(3, 1))


def integers(*shape: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_weight_of_four_bits_is_computed_where_it_is_multiplied(dtype, groups):
    def build(a, packed, scale, zero):
        values = ops.unpack(packed, bits=4)
        return ops.relu(ops.linear(a, ops.dequantize(values, scale, ops.unpack(zero, bits=4), dtype=dtype)))

    packed, zero = (integers(6, n, low=0, high=256, dtype=torch.uint8) for n in (32, -(-groups // 2)))
    scale = x(6, 2 * zero.shape[1])
    kernel = check(build, x(5, 64, dtype=dtype), packed, scale, zero)
    (load,) = (v for v in scalars(kernel.stores) if isinstance(v, Load) and v.buffer == "x1")
    assert not load.index.atoms(FloorDiv) and kernel.axes[-1].extent == 2, "the depth is groups, their bytes, and what a byte holds"
    assert len(kernel.inputs) == 4


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_weight_of_eight_bits_is_computed_where_it_is_multiplied(storage):
    def build(a, w, scale):
        return ops.add(ops.linear(a, ops.dequantize(w, scale, dtype=torch.float32)), 1.0)

    check(build, x(5, 64), integers(6, 64, low=-16, high=17, dtype=storage), x(6, 1))
    check(lambda w: ops.cast(w, dtype=torch.float16), integers(6, 64, low=-16, high=17, dtype=storage))


def test_a_product_of_integers():
    def build(q, w, s, t):
        return ops.mul(ops.mul(ops.cast(ops.int_linear(q, w), dtype=torch.float32), s), t)

    q, w = (integers(*shape, low=-128, high=128, dtype=torch.int8) for shape in ((5, 64), (6, 64)))
    kernel = check(build, q, w, x(5, 1), x(6))
    assert dot(kernel).dtype == torch.int32
    check(ops.int_linear, q, w)


def test_refused_because_an_operand_is_summed():
    assert refusal(lambda a, w: ops.linear(ops.softmax(a, dim=-1), w), x(3, 4), x(5, 4)) is Reason.DIFFERENT_SPACE
    assert refusal(lambda a, w: ops.linear(ops.cumsum(a, dim=1), w), x(3, 4), x(4, 4)) is Reason.SECOND_WALK
    assert refusal(lambda a, w, v: ops.linear(ops.linear(a, w), v), x(3, 4), x(5, 4), x(6, 5)) is Reason.SECOND_WALK
    assert refusal(lambda a, w: ops.linear(ops.relu(ops.linear(a, w)), w), x(3, 4), x(4, 4)) is Reason.SECOND_WALK
    assert refusal(lambda a, w: ops.linear(ops.sum(a, dims=(1,)), w), x(3, 1, 4), x(4, 4)) is Reason.PROLOGUE


def test_refused_because_8_bit_floats_are_only_read():
    def stored(a):
        return ops.cast(a, dtype=torch.float8_e4m3fn)

    assert refusal(lambda a: ops.cast(stored(ops.relu(a)), dtype=torch.float32), x(3, 4)) is Reason.UNSUPPORTED_DTYPE
    assert refusal(stored, x(3, 4)) is Reason.UNSUPPORTED_DTYPE


def test_refused_because_a_kernel_walks_one_contraction():
    assert refusal(lambda a, w: ops.softmax(ops.linear(a, w), dim=-1), x(3, 4), x(5, 4)) is Reason.SECOND_WALK
    assert refusal(lambda a, w, v: ops.add(ops.linear(a, w), ops.linear(a, v)), x(3, 4), x(5, 4), x(5, 4)) is Reason.SECOND_WALK


def test_refused_because_of_its_kind():
    settings = {"stride": (1,), "padding": (0,), "dilation": (1,), "transposed": True}
    assert refusal(lambda a, w: ops.conv(a, w, **settings), x(1, 2, 5), x(2, 3, 3)) is Reason.NOT_EXPRESSIBLE
    integers = torch.ones(2, 2, dtype=torch.int64)
    assert refusal(ops.matmul, integers, integers) is Reason.UNSUPPORTED_DTYPE
    assert refusal(lambda a, w: ops.cat(ops.linear(a, w), a, dim=1), x(3, 4), x(5, 4)) is Reason.TILED_AXIS
