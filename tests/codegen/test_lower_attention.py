"""Lowering of attention, by the reference evaluator: an Attend over the keys around a Dot, views and masks in its scalars."""

from __future__ import annotations

import pytest
import torch
from attentions import CASES, attention, x
from lowering import check, graph_of
from tilewright.codegen.kernel import Attend, Dot, Load, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.ir import ops
from tilewright.ir.reasons import Reason


@pytest.mark.parametrize("name", CASES)
def test_against_the_meaning(name):
    case = CASES[name]
    kernel = check(case.build, *case.tensors, shapes=case.shapes, symbols=case.symbols)
    assert [type(v) for v in scalars(kernel.stores) if isinstance(v, (Dot, Attend))] == [Dot, Attend]


def test_views_of_heads_are_index_expressions():
    case = CASES["grouped heads"]
    kernel = lower(graph_of(case.build, case.tensors), "k")
    assert [a.extent for a in kernel.grid] == [2, 33, 2, 2, 16] and [a.extent for a in kernel.inner] == [33, 16]
    loads = {str(v.index) for v in scalars(kernel.stores) if isinstance(v, Load)}
    assert loads == {"b + 2112*i + 64*j + 32*k1 + 16*k2", "32*a + b + 1056*i + 16*k1", "32*a + 1056*i + k + 16*k1"}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda q: attention(ops.exp(q), q, q), Reason.PROLOGUE),
        (lambda q: attention(q, q, ops.op("cumsum")(q, dim=2)), Reason.SECOND_WALK),
        (lambda q: attention(q, q, attention(q, q, q)), Reason.SECOND_WALK),
        (lambda q: ops.softmax(attention(q, q, q), dim=-1), Reason.SECOND_WALK),
        (lambda q: attention(*(ops.slice(q, dim=1, start=0, stop=1) for _ in range(3))), Reason.NOT_EXPRESSIBLE),
    ],
)
def test_what_is_no_kernel(build, reason):
    with pytest.raises(LoweringError) as error:
        lower(graph_of(build, [torch.ones(2, 8, 16)]), "k")
    assert error.value.reason is reason


def test_columns_stay_one_axis_where_their_levels_are_in_halves():
    for name in ("steps, int4 cache", "columns in pairs"):
        case = CASES[name]
        kernel = lower(graph_of(case.build, case.tensors), "k")
        assert [a.extent for a in kernel.grid][-1] == 32 and [a.extent for a in kernel.inner][-1] == 32


def test_rows_without_keys_are_zero():
    check(lambda q, k, m: attention(q, k, k, m), x(2, 5, 16), x(2, 6, 16), torch.zeros(5, 6, dtype=torch.bool))
