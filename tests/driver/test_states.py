"""Memory of a state: what is not used takes none, and behind what a step writes there are zeros."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tilewright.driver.states import State, zeros
from tilewright.ir.types import TensorType

LENGTH = 16


def state(batch: int = 2, width: int = 3) -> State:
    """Tokens in dimension 2 of one tensor, and in dimension 1 of another."""
    kinds = [TensorType(torch.float32, (batch, 2, LENGTH, width)), TensorType(torch.uint8, (batch, LENGTH, width))]
    return State([zeros(k) for k in kinds], (2, 1), (), [0] * batch)


def written(some: State) -> list[list[bool]]:
    """Of each row, which tokens hold anything; the tensors agree."""
    first, second = (t.movedim(d, 1).flatten(2).ne(0).any(2) for t, d in zip(some.tensors, some.dims))
    assert torch.equal(first, second)
    return first.tolist()


def write(some: State, starts: list[int], count: int) -> None:
    """What a step does: all of its tokens, as far as there is place."""
    some.reach(starts, count)
    for tensor, d in zip(some.tensors, some.dims):
        for row, start in enumerate(starts):
            tensor[row].narrow(d - 1, start, min(count, LENGTH - start)).fill_(float("nan") if tensor.is_floating_point() else 255)


def test_behind_a_step_there_are_zeros():
    some = state()
    for starts, count in (([0, 3], 5), ([5, 8], 8), ([13, 2], 3), ([4, 5], 1), ([0, 6], 2), ([15, 15], 4)):
        write(some, starts, count)
        for row, start in zip(written(some), starts):
            assert not any(row[start + count :])
    assert some.ends == [LENGTH, LENGTH]


@pytest.mark.parametrize("width", [3, 40_000], ids=["few", "many"])
def test_what_is_expected_is_not_cleared_and_what_follows_is(width):
    some = state(1, width)
    before = [t.data_ptr() for t in some.tensors]
    some.expect(LENGTH // 2 - 1)
    assert [t.data_ptr() for t in some.tensors] == before, "pages that come as the text grows"
    some.expect(LENGTH - 2)
    assert [t.data_ptr() for t in some.tensors] != before
    for tensor, d in zip(some.tensors, some.dims):
        tensor.narrow(d, 0, LENGTH - 2).fill_(1)
    assert written(some) == [[True] * (LENGTH - 2) + [False] * 2]
    write(some, [3], 2)
    assert written(some) == [[True] * 5 + [False] * (LENGTH - 5)], "a text may go on from any position"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_memory_that_is_not_used_is_not_there():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    tensor = zeros(TensorType(torch.bfloat16, (4, 8, 65536, 64)))
    tensor[:, :, :100].fill_(1)
    assert tensor.nbytes == 256 << 20 and resident() - before < 16 << 20
    assert not bool(tensor[3, 7, 100:200].any())
