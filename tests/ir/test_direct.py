"""Inference graphs are called without AOTAutograd's wrappers where these would do nothing, and only there."""

import pytest
import torch
from capture_backend import check
from tilewright.ir.capture import aot

X, Y = torch.randn(4, 6), torch.randn(4, 6)


def views(x, y):
    total = x + y
    return total[1:], total.t(), total


PLAIN = {
    "pointwise": (lambda x, y: torch.relu(x * y + 1), X, Y),
    "several": (lambda x, y: (x + y, None, (x - y).sum()), X, Y),
    "views of one result": (views, X, Y),
    "an input": (lambda x, y: (x, x + y), X, Y),  # Dynamo returns it by itself
}
NOT_PLAIN = {
    "a view of an input": (lambda x, y: (x.t(), x + y), X, Y),
    "a written input": (lambda x, y: x.add_(y), X, Y),
}


@pytest.fixture
def found(monkeypatch):
    """What `direct` answered."""
    answers = []

    def recorded(*arguments):
        answers.append(original(*arguments))
        return answers[-1]

    original = aot.direct
    monkeypatch.setattr(aot, "direct", recorded)
    return answers


@pytest.mark.parametrize("function, x, y", PLAIN.values(), ids=PLAIN)
def test_plain_graphs_are_called_directly(function, x, y, found):
    check(function, x, y)
    assert len(found) == 1 and found[0] is not None


@pytest.mark.parametrize("function, x, y", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_the_wrappers_do_is_done(function, x, y, found):
    check(function, x.clone(), y.clone())
    assert found == [None]


def test_training_has_its_wrappers(found):
    check(lambda x, y: (x * y).sum(), X.clone().requires_grad_(), Y)
    assert found == []


def test_parameters_without_gradients_recorded_are_plain_inputs(found):
    layer = torch.nn.Linear(6, 3)
    with torch.no_grad():
        check(lambda x: layer(x).relu(), X)
    assert len(found) == 1 and found[0] is not None


def test_what_could_not_be_compiled_runs_with_its_wrappers(found):
    def refuse(*arguments):
        raise ValueError("no")

    torch._dynamo.reset()
    run = torch.compile(lambda x, y: x * y + 1, backend=lambda gm, inputs: aot.compile_fx(gm, inputs, refuse))
    torch.testing.assert_close(run(X, Y), X * Y + 1)
    assert found == []
