"""Curvature scores: traces against the whole matrix of second derivatives, and how much a loss grows against what is measured."""

from __future__ import annotations

import pytest
import torch
from tilewright.ir.capture import from_exported
from tilewright.ir.interpret import interpret
from tilewright.passes.base import Notes
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.formats import FORMATS
from tilewright.passes.layers import layers
from tilewright.passes.manager import run_passes
from tilewright.passes.quantize import Encoded, encoded, requantized
from tilewright.search.cost import spearman
from tilewright.search.curvature import Curvature, traces
from tilewright.search.database import Database
from tilewright.search.metrics import METRICS
from tilewright.search.sensitivity import Sensitivity


class Net(torch.nn.Module):
    def __init__(self, width: int, deep: int, out: int) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(width, deep), torch.nn.Linear(deep, out)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def canonical(net, x):
    return run_passes(from_exported(torch.export.export(net.eval(), (x,))).graph, [Canonicalize()], Notes())


def made(width=4, deep=5, out=3, rows=20):
    torch.manual_seed(0)
    net, x = Net(width, deep, out), torch.randn(rows, width)
    graph = canonical(net, x)
    labels = torch.randint(0, out, (rows,))
    return net, x, labels, graph


def loss_of(graph, x, labels):
    return lambda known: torch.nn.functional.cross_entropy(interpret(graph, [x], known=known)[0], labels)


def test_traces_are_those_of_the_exact_second_derivatives() -> None:
    net, x, labels, graph = made()
    found = layers(graph)
    estimated = traces(found, loss_of(graph, x, labels), draws=3000)
    assert estimated is not None and len(estimated) == 2
    for name, weight in (("a.weight", net.a.weight), ("b.weight", net.b.weight)):

        def loss(w, name=name):
            return torch.nn.functional.cross_entropy(torch.func.functional_call(net, {name: w}, (x,)), labels)

        exact = torch.autograd.functional.hessian(loss, weight.detach()).reshape(weight.numel(), -1).trace()
        assert estimated[name] == pytest.approx(float(exact), rel=0.06), name


def test_one_probe_is_exact_where_second_derivatives_are_diagonal() -> None:
    """Least squares over inputs at right angles: v . H v is the same for all signs."""
    x = torch.eye(4).repeat(3, 1)
    torch.manual_seed(0)
    graph = canonical(torch.nn.Sequential(torch.nn.Linear(4, 2)), x)
    for draws in (2, 5):
        found = traces(layers(graph), lambda known: interpret(graph, [x], known=known)[0].square().sum(), draws)
        assert list(found.values()) == pytest.approx([2 * 3 * 4 * 2])


def test_attention_is_differentiated_twice() -> None:
    class Attends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.norm = torch.nn.Linear(8, 24), torch.nn.LayerNorm(8)

        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(*self.into(self.norm(x)).chunk(3, -1), is_causal=True)

    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 8)
    graph = canonical(Attends(), x)
    found = traces(layers(graph), lambda known: interpret(graph, [x], known=known)[0].square().mean())
    assert found is not None and all(trace > 0 for trace in found.values())


def test_losses_without_second_derivatives() -> None:
    _, x, _, graph = made()
    found = layers(graph)
    assert traces(found, lambda known: 0.5) is None
    assert traces(found, lambda known: interpret(graph, [x])[0].sum().detach()) is None
    assert traces(found, lambda known: interpret(graph, [x], known=known)[0]) is None, "no scalar"
    assert traces(found, lambda known: known[found[0].weight].sum()) is None, "linear: nothing bends"
    assert traces(found, lambda known: known[found[0].weight].square().sum()) == {"a.weight": pytest.approx(40.0), "b.weight": 0.0}
    with pytest.warns(RuntimeWarning, match=r"nothing is foretold of the loss \(Can't call numpy\(\)"):
        assert traces(found, lambda known: float(interpret(graph, [x], known=known)[0].numpy().sum())) is None


def test_what_is_foretold_is_what_a_trained_model_loses(tmp_path) -> None:
    net, x, _, _ = made(64, 96, 8, 512)
    labels = (x @ torch.randn(64, 8)).argmax(-1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        value = torch.nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    graph = canonical(net, x)
    found, loss = layers(graph), loss_of(graph, x, labels)
    sensitivity = Sensitivity(graph, found, [[x]], METRICS["relative"], Database(tmp_path / "d.sqlite"))
    score = Curvature(graph, sensitivity.replays, sensitivity.grams, traces(found, loss))
    foretold, measured = [], []
    for layer in found:
        for name in ("int4-g32", "int4-g64", "int2-g32", "int2-split3", "int8-dynamic", "int4-g32-bf16"):
            one = encoded(layer, FORMATS[name], sensitivity.grams.get(layer.name))
            if not isinstance(one, Encoded):
                continue
            with torch.no_grad():
                grown = torch.nn.functional.cross_entropy(interpret(requantized(graph, [one]), [x])[0], labels) - loss({})
            foretold.append(score.error(one))
            measured.append(abs(float(grown)))
    assert len(foretold) >= 10 and min(foretold) > 0 and spearman(foretold, measured) > 0.8
    assert 0.2 < sum(foretold) / sum(measured) < 2, "found: 0.36"
