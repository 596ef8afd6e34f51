"""Blocks reused from step to step: threshold 0 computes all, what changed little is left out and counted, and nothing aliases."""

from __future__ import annotations

import pytest
import tilewright
import torch
from tilewright.driver.errors import BadOption, CannotOptimize
from tilewright.driver.iterated import changed
from tilewright.search.metrics import relative_error
from torch import nn


class Block(nn.Module):
    """An attention and an MLP, both modulated by the step (as in DiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, step):
        first, second = self.modulation(step)[:, None].chunk(2, -1)
        h = self.norm1(x) * (1 + first)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x) * (1 + second))


class Denoiser(nn.Module):
    """x [b, 16, 2] and the step [b] -> what to take away."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        self.step = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, t):
        step = torch.nn.functional.silu(self.step(t[:, None]))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, step)
        return self.leave(h)


STEPS = 20


def _loop(model, x):
    """Denoising: every step takes away a little."""
    with torch.no_grad():
        for i in range(STEPS):
            x = x - 0.05 * model(x, torch.full((len(x),), 1 - i / STEPS))
    return x


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return Denoiser().eval(), torch.randn(2, 16, 2)


def _reusing(denoiser, threshold):
    model, x = denoiser
    return tilewright.reuse_blocks(model, (x, torch.ones(2)), threshold=threshold)


def test_threshold_zero_is_the_model_to_the_bit(denoiser) -> None:
    model, x = denoiser
    exact = _reusing(denoiser, 0.0)
    optimized = tilewright.optimize(model, (x, torch.ones(2)), tuning_seconds=0)
    found = _loop(exact, x)
    assert torch.equal(found, _loop(optimized, x)) and torch.equal(found, _loop(exact, x)) and exact.reused == 0
    assert relative_error(found, _loop(model, x)) < 1e-5


def test_a_threshold_that_nothing_is_below(denoiser) -> None:
    """What is remembered changes nothing that is computed."""
    model, x = denoiser
    tiny = _reusing(denoiser, 1e-30)
    found = _loop(tiny, x)
    assert tiny.reused == 0 and tiny.computed == STEPS * 6
    tiny.reset()
    assert torch.equal(_loop(tiny, x), found) and relative_error(found, _loop(model, x)) < 1e-5


def test_more_is_reused_the_higher_the_threshold(denoiser) -> None:
    model, x = denoiser
    expected = _loop(model, x)
    reused, errors = [], []
    for threshold in (0.02, 0.1, 0.5):
        cached = _reusing(denoiser, threshold)
        errors.append(relative_error(_loop(cached, x), expected))
        reused.append(cached.reused)
        assert cached.computed + cached.reused == STEPS * 6 and cached.computed >= 6
    assert 0 < reused[0] < reused[1] <= reused[2] <= (STEPS - 1) * 6
    assert errors[0] < 0.01 and errors == sorted(errors)


def test_statistics_by_branch_and_reset(denoiser) -> None:
    _, x = denoiser
    cached = _reusing(denoiser, 0.1)
    _loop(cached, x)
    names = [line.name for line in cached.statistics]
    assert names == [f"blocks.{i}.{part}" for i in range(3) for part in ("attention", "mlp.2")]
    assert sum(line.reused for line in cached.statistics) == cached.reused > 0
    before = [(line.computed, line.reused) for line in cached.statistics]
    cached.reset()
    assert cached.computed == cached.reused == 0
    _loop(cached, x)
    assert [(line.computed, line.reused) for line in cached.statistics] == before


def test_the_same_input_is_reused_and_another_is_not(denoiser) -> None:
    _, x = denoiser
    cached, t = _reusing(denoiser, 1e-3), torch.ones(2)
    first = cached(x, t)
    assert torch.equal(cached(x, t), first) and (cached.computed, cached.reused) == (6, 6)
    cached(x + 10, t)
    assert cached.computed > 6


def test_what_the_caller_writes_to_is_not_what_is_remembered(denoiser) -> None:
    _, x = denoiser
    cached, t = _reusing(denoiser, 1e-3), torch.ones(2)
    mine = x.clone()
    expected = cached(mine, t).clone()
    cached(mine, t).zero_()
    assert torch.equal(cached(mine, t), expected)
    mine.mul_(-3)
    fresh = _reusing(denoiser, 1e-30)
    assert torch.equal(cached(mine, t), fresh(mine, t))


class Bare(nn.Module):
    """The branch starts at the input, and what it gives is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        added = self.linear(x)
        return x + added, added


def test_results_and_inputs_of_branches_at_the_border() -> None:
    x = torch.randn(2, 4)
    model = Bare().eval()
    cached = tilewright.reuse_blocks(model, (x,), threshold=0.1)
    one, added = cached(x)
    added.zero_()
    x0 = x.clone()
    again, given = cached(x)
    assert cached.reused == 1 and torch.equal(again, one) and given.abs().sum() > 0
    x.zero_()
    assert torch.equal(cached(x)[1], model.linear(torch.zeros(2, 4)).detach()) and torch.equal(cached(x0)[0], one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_values_of_which_a_change_says_nothing(value) -> None:
    x = torch.full((2, 4), value)
    cached = tilewright.reuse_blocks(Bare().eval(), (x,), threshold=0.5)
    cached(x)
    cached(x)
    assert (cached.computed, cached.reused) == (2, 0)


def test_changes() -> None:
    a = torch.tensor([1.0, -3.0])
    assert changed(a, a) == 0.0 and changed(torch.tensor([2.0, -3.0]), a) == 0.25
    assert changed(a.bfloat16(), a.bfloat16()) == 0.0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize("kind,words", [(Counting, "it updates .*calls"), (Noisy, "it draws random numbers")])
def test_refused(kind, words) -> None:
    with pytest.raises(CannotOptimize, match=words):
        tilewright.reuse_blocks(kind().eval(), (torch.randn(2, 4),), threshold=0.1)


def test_a_threshold_is_a_number_from_zero_on() -> None:
    for wrong in (-0.1, float("nan"), "5%", None):
        with pytest.raises(BadOption, match="relative change, a number from 0 on"):
            tilewright.reuse_blocks(nn.Linear(4, 4), (torch.randn(2, 4),), threshold=wrong)


def test_calls_are_checked(denoiser) -> None:
    _, x = denoiser
    with pytest.raises(TypeError, match="argument 'x' must be"):
        _reusing(denoiser, 0.1)(x[:1], torch.ones(2))


def test_a_model_without_branches_is_refused() -> None:
    with pytest.raises(CannotOptimize, match="no branch to reuse"):
        tilewright.reuse_blocks(nn.Linear(4, 4), (torch.ones(2, 4),), threshold=0.1)
    assert tilewright.reuse_blocks(nn.Linear(4, 4), (torch.ones(2, 4),), threshold=0)(torch.ones(2, 4)).shape == (2, 4)
