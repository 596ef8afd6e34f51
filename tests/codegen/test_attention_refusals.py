"""Kernels with an attention that the C++ template does not walk: each is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from attentions import attention, x
from lowering import graph_of
from tilewright.codegen.attentions import find_attention
from tilewright.codegen.errors import Unsupported
from tilewright.codegen.kernel import Attend, Dot, Kernel, Load, Reduce, scalars
from tilewright.codegen.lower import lower
from tilewright.ir.scalar import Const, Scalar


def made(width: int = 16) -> Kernel:
    return lower(graph_of(attention, (x(2, 9, width), x(2, 20, width), x(2, 20, width))), "k")


def attend(kernel: Kernel) -> Attend:
    (found,) = (v for v in scalars(kernel.stores) if isinstance(v, Attend))
    return found


def storing(kernel: Kernel, value: Scalar) -> Kernel:
    return replace(kernel, stores=(replace(kernel.stores[0], value=value),))


def with_a_sum(kernel: Kernel) -> Kernel:
    found = attend(kernel)
    assert isinstance(found.value, Load)
    return storing(kernel, found + Reduce(torch.float32, "sum", found.value, (found.axis,)))


def with_two_products(kernel: Kernel) -> Kernel:
    (dot,) = (v for v in scalars(kernel.stores) if isinstance(v, Dot))
    return storing(kernel, replace(attend(kernel), score=attend(kernel).score + replace(dot)))


ZERO = Const(torch.float32, 0.0)

CASES: dict[str, Callable[[Kernel], Kernel]] = {
    "other axes than queries, keys and columns": lambda k: storing(k, replace(attend(k), value=ZERO)),
    "wide heads": lambda k: made(260),
    "several contractions": lambda k: storing(k, attend(k) + replace(attend(k))),
    "a softmax over several products": with_two_products,
    "a reduction beside": with_a_sum,
    "an attention in torch.int64": lambda k: storing(k, replace(attend(k), dtype=torch.int64)),
    "other points than those": lambda k: replace(k, stores=(*k.stores, replace(k.stores[0], index=sympy.Integer(0), value=ZERO))),
    "an output over an operand": lambda k: replace(k, inplace=((k.outputs[0].name, k.inputs[0].name),)),
}  # fmt: skip


def test_the_plain_one_is_walked() -> None:
    assert find_attention(made())


@pytest.mark.parametrize("reason", CASES)
def test_refused(reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        find_attention(CASES[reason](made()))
