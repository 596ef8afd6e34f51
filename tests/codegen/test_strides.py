"""The strides of views that are known before there is a tensor are those that torch finds."""

import itertools

import pytest
import torch
from tilewright.codegen.strides import reshaped

BASES = {
    "row-major": torch.empty(2, 3, 4, 6),
    "turned": torch.empty(2, 3, 4, 6).permute(0, 2, 1, 3),
    "a part of rows": torch.empty(2, 3, 4, 9)[..., 2:8],
    "of size 1": torch.empty(1, 6, 1, 4)[:, 1:4],
    "every other": torch.empty(2, 6, 4)[:, ::2],
    "empty": torch.empty(0, 3, 4),
}
SHAPES = [s for n in range(1, 5) for s in itertools.product((1, 2, 3, 4, 6, 12, 24, 144), repeat=n)]


@pytest.mark.parametrize("name", BASES)
def test_every_view(name):
    x = BASES[name]
    for shape in (s for s in SHAPES if torch.Size(s).numel() == x.numel()):
        try:
            expected = x.view(shape).stride()
        except RuntimeError:
            expected = None
        found = reshaped(x.shape, x.stride(), shape)
        assert (found is None) == (expected is None), shape
        if found is not None and expected is not None:
            assert [s for s, n in zip(found, shape) if n > 1] == [s for s, n in zip(expected, shape) if n > 1], shape
