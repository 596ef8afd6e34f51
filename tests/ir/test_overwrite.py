"""Which operands a region's results may be written over, and which not."""

import pytest
import torch
from tilewright.ir.analysis.overwrite import overwritable
from tilewright.ir.dims import symbol
from tilewright.ir.graph import graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType

S = symbol("s")


def pairs(*outputs, inputs):
    return set(overwritable(make_graph("body", inputs, outputs)))


def tensor(name, *shape, dtype=torch.float32, strides=None):
    return graph_input(name, TensorType(dtype, shape), strides)


@pytest.mark.parametrize("rows", [4, S])
def test_elementwise(rows):
    x, y, bias = tensor("x", rows, 6), tensor("y", rows, 6), tensor("bias", 6)
    assert pairs(OPS["gelu"](OPS["add"](x, bias)), inputs=[x, bias]) == {(0, 0)}
    assert pairs(OPS["mul"](x, y), OPS["exp"](x), inputs=[x, y]) == {(0, 0), (0, 1), (1, 0)}
    assert pairs(OPS["cast"](OPS["cast"](x, dtype=torch.int32), dtype=torch.float32), inputs=[x]) == {(0, 0)}


def test_refused_because():
    x, y, square = tensor("x", 4, 6), tensor("y", 4, 6), tensor("square", 6, 6)
    assert not pairs(OPS["softmax"](x, dim=-1), inputs=[x])  # other elements are read
    assert not pairs(OPS["add"](square, OPS["permute"](square, dims=(1, 0))), inputs=[square])
    assert not pairs(OPS["flip"](x, dims=(0,)), inputs=[x])
    assert not pairs(OPS["mul"](x, OPS["amax"](x, dims=(1,), keepdim=True)), inputs=[x])
    assert pairs(OPS["mul"](x, OPS["amax"](y, dims=(1,), keepdim=True)), inputs=[x, y]) == {(0, 0)}
    row = tensor("row", 1, 6)
    assert pairs(OPS["add"](row, x), OPS["exp"](row), inputs=[row, x]) == {(0, 1)}  # a row is read for every row
    assert not pairs(OPS["lt"](x, y), inputs=[x, y])  # another dtype
    turned = tensor("turned", 4, 6, strides=(1, 4))
    assert not pairs(OPS["exp"](turned), inputs=[turned])
    assert pairs(OPS["add"](OPS["matmul"](x, square), y), inputs=[x, square, y]) == set()  # products write in an order of their own
