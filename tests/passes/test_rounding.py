"""Rounding weights: the grids, GPTQ against the nearest, clusters, low rank; every code of every width packed and unpacked."""

from __future__ import annotations

import pytest
import torch
from tilewright.ir import ops
from tilewright.passes.clusters import clusters
from tilewright.passes.formats import FORMATS, packed
from tilewright.passes.low_rank import factors, rank_for
from tilewright.passes.rounding import Grid, rounded


def _correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs that depend on each other, with two channels that are much larger."""
    x = torch.randn(rows, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    x[:, [3, columns // 2]] *= 20
    return x


def _output_error(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    exact = x.double() @ weight.double().T
    return ((x.double() @ other.double().T - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("grid", [Grid(8, symmetric=True), Grid(4), Grid(4, 32), Grid(4, 128), Grid(2, 32)])
def test_nearest_is_within_half_a_step_or_clipped_for_less(grid: Grid) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 256)
    found = rounded(weight, grid)
    assert found.codes.min() >= grid.lowest and found.codes.max() <= grid.highest and torch.equal(found.codes, found.codes.round())
    step = found.scale.repeat_interleave(256 // found.scale.shape[1], 1)
    inside = (found.codes > grid.lowest) & (found.codes < grid.highest)
    assert ((found.values - weight).abs() <= 0.5001 * step)[inside].all()
    widest = (weight.amax(1) - weight.amin(1)).max() / (grid.highest - grid.lowest)
    assert (found.values - weight).square().mean() <= widest**2 / 12 * 1.2  # no worse than evenly spread errors of the whole range


@pytest.mark.parametrize("grid", [Grid(8, symmetric=True), Grid(4, 32), Grid(4)])
def test_gptq_of_independent_inputs_is_the_nearest(grid: Grid) -> None:
    torch.manual_seed(1)
    weight = torch.randn(16, 256)
    near, gptq = rounded(weight, grid), rounded(weight, grid, torch.eye(256) * 3)
    assert torch.equal(near.codes, gptq.codes) and torch.equal(near.scale, gptq.scale) and torch.equal(near.zero, gptq.zero)


def test_gptq_keeps_outputs_better_than_the_nearest_and_groups_better_than_rows() -> None:
    torch.manual_seed(2)
    x, weight = _correlated(1024, 160), torch.randn(96, 160)
    gram = x.T @ x
    error = {g: [_output_error(x, weight, rounded(weight, Grid(4, g), m).values) for m in (None, gram)] for g in (32, None)}
    assert error[32][1] < 0.9 * error[32][0] and error[None][1] < 0.9 * error[None][0]
    assert error[32][0] < error[None][0]


def test_inputs_that_are_always_zero_do_not_stop_gptq() -> None:
    x, weight = torch.randn(64, 32), torch.randn(8, 32)
    x[:, 5] = 0
    for inputs in (x, torch.zeros(64, 32)):
        assert rounded(weight, Grid(4, 32), inputs.T @ inputs).values.isfinite().all()


@pytest.mark.parametrize("value", [0.0, -1.5, 3.0, 1e-40, 1e38])
def test_constant_rows(value: float) -> None:
    weight = torch.full((3, 32), value)
    for grid in (Grid(8, symmetric=True), Grid(4, 32), Grid(2)):
        found = rounded(weight, grid).values
        assert found.isfinite().all() and (found - weight).abs().max() <= max(abs(value) / 100, 1e-37)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_all_codes_survive_packing(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(3, 8 // bits * 5)[:, : 8 // bits * 5]
    assert torch.equal(ops.unpack.eager(packed(codes, bits), bits=bits), codes)


def test_clusters_cover_their_weights_and_spare_the_rest() -> None:
    torch.manual_seed(3)
    weight = torch.randn(16, 400)
    weight[:, ::200] *= 15
    found = clusters(weight)
    ids = found.ids.long()
    assert (found.low.gather(1, ids) <= weight).all() and (weight <= found.high.gather(1, ids)).all()
    plain = Grid(4)
    split = FORMATS["int4-split3"].encode(weight, None)
    codes = ops.unpack.eager(split["weight"], bits=4)
    values = split["low"].float().gather(1, ids) + codes * split["step"].float().gather(1, ids)
    assert (values - weight).square().mean() < (rounded(weight, plain).values - weight).square().mean() / 4


@pytest.mark.parametrize("weight", [torch.full((2, 8), -3.0), torch.zeros(2, 8), torch.arange(1.0, 5.0).repeat(2, 1), torch.ones(2, 1)])
def test_clusters_of_few_values(weight: torch.Tensor) -> None:
    found = clusters(weight)
    assert found.ids.max() <= 2 and found.low.isfinite().all() and found.high.isfinite().all()


def test_low_rank_is_the_best_of_its_rank() -> None:
    """The optimum by Eckart and Young: the singular values of the outputs that are left out."""
    torch.manual_seed(4)
    x, weight = _correlated(512, 64), torch.randn(48, 64)
    out, into = factors(weight, 16, x.double().T @ x.double())
    exact = x.double() @ weight.double().T
    best = torch.linalg.svdvals(exact)[16:].norm() / exact.norm()
    assert _output_error(x, weight, out @ into) == pytest.approx(best.item(), rel=1e-5)
    plain, inner = factors(weight, 16)
    assert _output_error(x, weight, plain @ inner) > 1.2 * best


def test_rank_for_has_the_share_of_numbers() -> None:
    assert rank_for(384, 384, 0.5) * (384 + 384) <= 384 * 384 / 2 and rank_for(2, 2, 0.1) == 1


@pytest.mark.parametrize(
    ("columns", "width", "padded"), [(384, 128, 384), (288, 96, 288), (320, 80, 320), (130, 130, 130), (77, 77, 78), (134, 128, 256)]
)
def test_rows_that_are_no_whole_groups(columns: int, width: int, padded: int) -> None:
    grid = Grid(4, 128) if columns != 130 else Grid(4, 256)
    assert (grid.width(grid.padded(columns)), grid.padded(columns)) == (width if columns != 77 else 78, padded)
    weight = torch.nn.functional.pad(torch.randn(8, columns), (0, padded - columns))
    x = torch.randn(64, padded)
    for found in (rounded(weight, grid), rounded(weight, grid, x.T @ x)):
        assert found.scale.shape == (8, padded // grid.width(padded)) and found.values.shape == weight.shape
