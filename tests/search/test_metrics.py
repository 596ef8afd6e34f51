"""Error metrics: zero for equals, known values, everything that is not finite, and no silent NaN."""

from __future__ import annotations

import math

import pytest
import torch
from tilewright.search.metrics import METRICS, UnknownMetric, metric

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "value",
    [LOGITS, torch.zeros(2, 3), torch.empty(0, 3), torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor(1.5)],
    ids=["logits", "zeros", "empty", "integers", "bools", "scalar"],
)
def test_equal_results_have_no_error(name: str, value: torch.Tensor) -> None:
    assert metric(name)([value], [value.clone()]) == 0


@pytest.mark.parametrize("name", METRICS)
def test_another_shape_is_infinitely_far(name: str) -> None:
    assert metric(name)([LOGITS], [LOGITS[:1]]) == math.inf


@pytest.mark.parametrize("name", ["relative", "max-abs", "cosine", "kl"])
def test_nan_is_never_near(name: str) -> None:
    wrong = LOGITS.clone()
    wrong[0, 0] = math.nan
    assert metric(name)([wrong], [LOGITS]) == math.inf


@pytest.mark.parametrize("name", ["relative", "max-abs"])
def test_equal_infinities_are_equal(name: str) -> None:
    value = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert metric(name)([value], [value.clone()]) == 0
    assert metric(name)([-value], [value]) == math.inf


def test_values() -> None:
    other = LOGITS + torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.0, 0.4]])
    assert metric("relative")([other], [LOGITS]) == pytest.approx(0.5 / math.sqrt(15), rel=1e-6)
    assert metric("max-abs")([other], [LOGITS]) == pytest.approx(0.4, rel=1e-6)
    kl = torch.nn.functional.kl_div(other.log_softmax(-1), LOGITS.log_softmax(-1), log_target=True, reduction="batchmean")
    assert metric("kl")([other], [LOGITS]) == pytest.approx(kl.item(), rel=1e-5)
    assert metric("cosine")([-LOGITS], [LOGITS]) == pytest.approx(2.0)
    assert metric("argmax")([LOGITS.flip(-1)], [LOGITS]) == 0.5


def test_the_worst_output_counts_and_integers_must_be_equal() -> None:
    near, far = LOGITS * 1.01, LOGITS * 2
    assert metric("relative")([near, far], [LOGITS, LOGITS]) == pytest.approx(1.0)
    assert metric("relative")([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == math.inf
    assert metric("relative")([], []) == 0


def test_unknown() -> None:
    with pytest.raises(UnknownMetric, match="there is no error metric 'mse'; there are relative, max-abs"):
        metric("mse")
