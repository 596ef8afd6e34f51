"""Real architectures through torch.compile, two shapes each, by the float64 rule; fallbacks are bounded. Training of six."""

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")

import tilewright
from support import ON_GPU
from tilewright.driver.accuracy import check, reference_outputs
from zoo import ZOO

SHAPES = ((2, 12), (3, 17))
TRAINED = ("bert", "gpt2", "llama", "t5", "vit", "resnet")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def exact(model, given):
    """What the model returns in float64, in which experts are called one by one: torch has no grouped product for it."""
    twin = copy.deepcopy(model)
    twin.config._experts_implementation = "eager"
    return reference_outputs(twin, (), given)


HERE = [*((name, "cpu") for name in ZOO), *(pytest.param(name, "cuda", marks=ON_GPU) for name in TRAINED)]


@pytest.mark.parametrize(("name", "device"), HERE)
def test_forward_matches_eager_on_two_shapes(name, device):
    model, inputs = ZOO[name]()
    model.to(device)
    start = len(tilewright.receipts())
    compiled = torch.compile(model, backend="tilewright")
    with torch.no_grad():
        for shape in SHAPES:
            given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs(*shape).items()}
            eager = dict(model(**given).items())
            ours = dict(compiled(**given).items())
            result = check(ours, eager, dict(exact(model, given).items()))
            assert result.ok, f"{shape}: {result}"
    made = tilewright.receipts()[start:]
    assert made, "nothing was compiled"
    nodes = sum(r.coverage.nodes.total for r in made)
    fell_back = sum(r.coverage.nodes.fallback for r in made)
    listed = [str(f) for r in made for f in r.fallbacks]
    assert fell_back <= 0.05 * nodes, f"{fell_back} of {nodes} nodes fell back: {listed}"


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_match_eager(name):
    model, inputs = ZOO[name]()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    given = inputs(2, 12)
    twins = {"ours": copy.deepcopy(model), "eager": model, "reference": copy.deepcopy(model).double()}
    gradients = {}
    for kind, twin in twins.items():
        run = torch.compile(twin, backend="tilewright") if kind == "ours" else twin
        values = {
            k: v.double() if kind == "reference" and torch.is_floating_point(v) else v for k, v in given.items() if torch.is_tensor(v)
        }
        output = run(**(given | values))
        sum(v.square().mean() for v in output.values() if torch.is_tensor(v) and v.requires_grad).backward()
        gradients[kind] = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert gradients["ours"].keys() == gradients["eager"].keys()
    # one gradient at a time may be all cancellation (a key bias under softmax); the whole is what a training step sees
    whole = {kind: torch.cat([g.flatten().double() for g in grads.values()]) for kind, grads in gradients.items()}
    result = check(whole["ours"], whole["eager"], whole["reference"])
    assert result.ok, str(result)
