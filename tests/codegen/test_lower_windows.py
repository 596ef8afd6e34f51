"""Lowering of pooling and depthwise convolutions, by the reference evaluator: reductions over axes of their own, and their epilogues."""

from __future__ import annotations

import pytest
import torch
from lowering import check, graph_of
from tilewright.codegen.kernel import Kernel, Reduce, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.ops import OPS
from tilewright.ir.reasons import Reason


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def images(last: bool, *shape: int) -> torch.Tensor:
    value = x(*shape)
    return value.permute(0, *range(2, len(shape)), 1).contiguous() if last else value


def reductions(kernel: Kernel) -> list[Reduce]:
    return [v for v in scalars(kernel.stores) if isinstance(v, Reduce)]


CONVS = [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (2, 3, 2, 3), (1, 1, 1, 2)]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("stride", "padding", "dilation", "multiplier"), CONVS)
def test_depthwise(last, stride, padding, dilation, multiplier):
    attrs = {"stride": (stride, 1), "padding": (padding, 1), "dilation": (dilation, 1), "groups": 4, "channels_last": last}
    kernel = check(
        lambda a, w, b: ops.relu(OPS["conv"](a, w, b, **attrs)), images(last, 2, 4, 7, 6), x(4 * multiplier, 1, 3, 2), x(4 * multiplier)
    )
    (total,) = reductions(kernel)
    assert total.op == "sum" and total.axes == tuple(a.name for a in kernel.inner) == ("a", "b")


@pytest.mark.parametrize("space", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_depthwise_in_other_dimensions(space, last):
    attrs = {"stride": (1,) * space, "padding": (1,) * space, "dilation": (1,) * space, "groups": 3, "channels_last": last}
    check(lambda a, w: OPS["conv"](a, w, **attrs), images(last, 2, 3, *(5, 4, 3)[:space]), x(3, 1, *(3, 2, 2)[:space]))


POOLS = [
    {},
    {"padding": (1, 1)},
    {"padding": (1, 1), "ceil": True},
    {"kernel": (2, 3), "stride": (3, 1), "padding": (1, 0)},
    {"kernel": (1, 1), "stride": (2, 2)},
    {"kernel": (7, 6), "stride": (7, 6)},
]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("attrs", POOLS)
def test_max_pool(last, attrs):
    attrs = {"kernel": (3, 3), "stride": (2, 2), "padding": (0, 0), **attrs, "channels_last": last}
    image = images(last, 2, 4, 7, 6)
    image[0, 1, 2, 3] = float("nan")
    image[1] = float("-inf")
    check(lambda a: OPS["max_pool"](ops.neg(ops.neg(a)), **attrs), image)


def test_dilated_max_pool():
    check(lambda a: OPS["max_pool"](a, kernel=(3, 2), stride=(1, 1), padding=(1, 1), dilation=(2, 3)), x(2, 3, 9, 8))
    check(lambda a: OPS["max_pool"](a, kernel=(3,), stride=(2,), padding=(1,), dilation=(2,)), x(3, 9))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("attrs", [*POOLS, {"divisor": 5}, {"padding": (1, 1), "ceil": True, "divisor": 3}])
@pytest.mark.parametrize("count", [True, False])
def test_avg_pool(last, attrs, count):
    attrs = {"kernel": (3, 3), "stride": (2, 2), "padding": (0, 0), **attrs, "count_padding": count, "channels_last": last}
    check(lambda a: ops.exp(OPS["avg_pool"](a, **attrs)), images(last, 2, 4, 7, 6))


@pytest.mark.parametrize("op", ["max_pool", "avg_pool"])
@pytest.mark.parametrize("shape", [(2, 3, 9), (3, 9), (2, 3, 4, 5, 6), (3, 4, 5, 6)])
def test_pools_in_other_dimensions(op, shape):
    space = 1 if len(shape) < 4 else 3
    check(lambda a: OPS[op](a, kernel=(3,) * space, stride=(2,) * space, padding=(1,) * space, ceil=True), x(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 4, "channels_last": True}
    check(lambda a, w: OPS["conv"](a, w, **attrs), x(1, 5, 5, 4, dtype=dtype), x(4, 1, 3, 3, dtype=dtype))
    check(lambda a: OPS["max_pool"](a, kernel=(3, 3), stride=(1, 1), padding=(1, 1)), x(1, 5, 5, 4, dtype=dtype))
    check(lambda a: OPS["avg_pool"](a, kernel=(3, 3), stride=(1, 1), padding=(1, 1)), x(1, 5, 5, 4, dtype=dtype))


def test_symbolic_sizes():
    n, h = symbol("n"), symbol("h")
    attrs = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 4, "channels_last": True}
    pool = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil": True, "channels_last": True}
    for build in (
        lambda a, w: ops.relu(OPS["conv"](a, w, **attrs)),
        lambda a, w: OPS["max_pool"](a, **pool),
        lambda a, w: OPS["avg_pool"](a, **pool, count_padding=False),
    ):
        shapes = [(n, h, h, 4), (4, 1, 3, 3)]
        kernel = check(build, x(2, 9, 9, 4), x(4, 1, 3, 3), shapes=shapes, symbols={"n": SymbolRange(1), "h": SymbolRange(2)})
        assert set(kernel.sizes) == {"n", "h"}


def test_a_pad_other_than_zero_is_read_by_the_load():
    """No select around what is read with -inf in its place."""
    attrs = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    kernel = lower(graph_of(lambda a: OPS["max_pool"](a, **attrs), [x(1, 3, 8, 8)]), "k")
    (largest,) = reductions(kernel)
    assert largest.value.other == float("-inf")  # type: ignore[attr-defined]


@pytest.mark.parametrize("groups", [1, 4])
def test_padding_around_an_upsampled_image(groups):
    """Computed positions are always inside, so the load that reads there asks for no mask: the padding still counts as zero."""
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups, "channels_last": True}
    rows = torch.arange(8) // 2

    def build(a, w, i):
        return OPS["conv"](ops.index(a, ops.reshape(i, shape=(8, 1)), i, dims=(1, 2)), w, **attrs)

    check(build, x(1, 4, 4, 4), x(4, 4 // groups, 3, 3), rows)


def test_refused():
    attrs = {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0)}
    twice = graph_of(lambda a: OPS["max_pool"](OPS["avg_pool"](a, **attrs), **attrs), [x(1, 3, 8, 8)])
    with pytest.raises(LoweringError) as error:
        lower(twice, "k")
    assert error.value.reason is Reason.SECOND_WALK
