"""Lowering of contractions, by the reference evaluator: a Dot over axes of its own, views in its indices, the epilogue around it."""

from __future__ import annotations

import pytest
import torch
from lowering import check, graph_of
from tilewright.codegen.kernel import Dot, Kernel, Load, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
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


def test_refused_because_an_operand_is_computed():
    assert refusal(lambda a, w: ops.linear(ops.gelu(a), w), x(3, 4), x(5, 4)) is Reason.PROLOGUE


def test_refused_because_a_kernel_walks_one_contraction():
    assert refusal(lambda a, w: ops.softmax(ops.linear(a, w), dim=-1), x(3, 4), x(5, 4)) is Reason.SECOND_WALK
    assert refusal(lambda a, w, v: ops.add(ops.linear(a, w), ops.linear(a, v)), x(3, 4), x(5, 4), x(5, 4)) is Reason.SECOND_WALK


def test_refused_because_of_its_kind():
    settings = {"stride": (1,), "padding": (0,), "dilation": (1,), "transposed": True}
    assert refusal(lambda a, w: ops.conv(a, w, **settings), x(1, 2, 5), x(2, 3, 3)) is Reason.NOT_EXPRESSIBLE
    integers = torch.ones(2, 2, dtype=torch.int64)
    assert refusal(ops.matmul, integers, integers) is Reason.UNSUPPORTED_DTYPE
    assert refusal(lambda a, w: ops.cat(ops.linear(a, w), a, dim=1), x(3, 4), x(5, 4)) is Reason.TILED_AXIS
