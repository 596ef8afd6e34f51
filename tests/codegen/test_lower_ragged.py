"""Lowering of contractions of uneven parts: a Dot of the terms within limits that are loaded."""

from __future__ import annotations

import pytest
import torch
from lowering import check, graph_of
from ragged import CASES, ends, grouped, plain, sparse, x
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.kernel import Dot, Kernel, Load, free_axes, scalars
from tilewright.codegen.lower import LoweringError, lower
from tilewright.codegen.target import Failed
from tilewright.ir import ops


def dot(kernel: Kernel) -> Dot:
    (found,) = (v for v in scalars(kernel.stores) if isinstance(v, Dot))
    return found


@pytest.mark.parametrize("name", CASES)
def test_lowered(name: str) -> None:
    case = CASES[name]
    check(case.build, *case.tensors, shapes=case.shapes, symbols=case.symbols)


def test_rows_of_groups() -> None:
    kernel = check(grouped, x(20, 24), x(3, 24, 33), ends(4, 9, 20))
    found = dot(kernel)
    at, begin, end = found.within
    assert found.axes == ("a", "b") and free_axes(kernel)[found] == {"i", "j"}
    assert [free_axes(kernel)[v] for v in (at, begin, end)] == [{"i"}, {"a"}, {"a"}]
    loads = [v for v in scalars(kernel.stores) if isinstance(v, Load) and v.buffer == "x2"]
    assert {str(v.index) for v in loads} == {"a", "a - 1"}


def test_blocks_of_rows() -> None:
    kernel = check(plain, x(20, 64), *sparse((64, 64), (16, 16), [0, 3], [], [1], [2]))
    found = dot(kernel)
    assert [free_axes(kernel)[v] for v in found.within] == [{"a"}, {"j1"}, {"j1"}]
    assert kernel.faults == (), "a matrix promises that its columns are right"


def refused(build, *xs) -> str:
    with pytest.raises(LoweringError) as caught:
        lower(graph_of(build, xs), "k")
    return str(caught.value)


def test_what_is_no_contraction_of_parts_is_refused() -> None:
    some = (x(20, 24), x(3, 24, 33), ends(4, 9, 20))
    other = torch.arange(20).flip(0)
    assert "not read in order" in refused(lambda a, w, e, o: ops.index(ops.grouped_matmul(a, w, e), o, dims=(0,)), *some, other)
    assert "not read in order" in refused(lambda a, w, e: ops.slice(ops.grouped_matmul(a, w, e), dim=0, start=2, stop=9, step=1), *some)
    assert "not read in order" in refused(lambda a, w, e: ops.flip(ops.grouped_matmul(a, w, e), dims=(0,)), *some)
    assert "an operand of a contraction is computed" in refused(lambda a, w, e: ops.grouped_matmul(a, w, ops.add(e, 1)), *some)
    several = torch.tensor([0, 4, 9, 20], dtype=torch.int32)
    assert "not all of a dimension" in refused(
        lambda a, w, e: ops.grouped_matmul(a, w, ops.slice(e, dim=0, start=1, stop=4, step=1)), *some[:2], several
    )
    assert "a single part" in refused(grouped, x(20, 24), x(1, 24, 33), ends(20))
    assert "a single part" in refused(plain, x(20, 64), *sparse((32, 64), (16, 16), [1], []))
    assert "dtype" in refused(grouped, x(20, 24).to(torch.int32), x(3, 24, 33).to(torch.int32), ends(4, 9, 20))


@pytest.mark.parametrize("name", ["grouped_f32", "blocks_f32"])
def test_not_on_a_cpu(name: str) -> None:
    """There each group, or block row, is a product of the library."""
    case = CASES[name]
    (result,) = compile_kernels([lower(graph_of(case.build, case.tensors), "k")])
    assert isinstance(result, Failed) and result.reason == "a contraction within limits that are read"
