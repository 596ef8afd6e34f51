"""options={"freeze": True}: parameters become constants, in inference, and a changed parameter is never missed."""

import copy
import gc
import weakref

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.driver.accuracy import check
from tilewright.driver.freeze import CHANGES
from tilewright.ir.graph import constants

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)
        self.register_buffer("scale", torch.rand(16))

    def forward(self, x):
        return self.norm(self.a(x) * self.b(x) * self.scale)


def frozen(function, **options):
    return torch.compile(function, backend="tilewright", options={"freeze": True, **options})


def new_receipts(run):
    start = len(tilewright.receipts())
    result = run()
    return result, tilewright.receipts()[start:]


def notes(receipt):
    """What the receipt says of freezing: what was done, and reasons of what was not."""
    return [a.what for a in receipt.applied if a.rule == "freeze"], [r.reason for r in receipt.refused if r.rule == "freeze"]


@torch.no_grad()
def test_parameters_become_constants_and_what_folds_is_folded():
    net, x = Net().eval(), torch.randn(4, 8)
    out, (receipt,) = new_receipts(lambda: frozen(net)(x))
    torch.testing.assert_close(out, net(x))
    done, refused = notes(receipt)
    assert done == ["9 parameters and buffers (0.0 MB) are constants"] and not refused
    assert "merge-linears" in {a.rule for a in receipt.applied}


def test_without_recording_gradients_parameters_freeze_with_gradients_enabled():
    net, x = Net().eval().requires_grad_(False), torch.randn(4, 8)
    _, (receipt,) = new_receipts(lambda: frozen(net)(x))
    assert notes(receipt)[0]


def test_training_is_not_frozen_and_says_so():
    net, x = Net(), torch.randn(4, 8)
    twin = copy.deepcopy(net)
    out, made = new_receipts(lambda: frozen(net)(x))
    want = twin(x)
    torch.testing.assert_close(out, want)
    out.square().sum().backward(), want.square().sum().backward()
    torch.testing.assert_close(net.a.weight.grad, twin.a.weight.grad, rtol=1e-3, atol=1e-3)
    (forward,) = (r for r in made if r.graph == "model_forward")
    assert notes(forward) == ([], ["gradients are recorded"])


@torch.no_grad()
def test_buffers_that_are_updated_stay_inputs():
    net, x = Net().train(), torch.randn(4, 8)
    twin = copy.deepcopy(net)
    run = frozen(net)
    for _ in range(3):
        out, made = new_receipts(lambda: run(x))
        torch.testing.assert_close(out, twin(x))
    torch.testing.assert_close(net.norm.running_var, twin.norm.running_var)
    receipt = tilewright.receipts()[-1]
    assert not made and notes(receipt)[1] == ["the graph writes to it"]


@torch.no_grad()
def test_a_returned_parameter_stays_itself():
    net = torch.nn.Linear(4, 4)
    run = frozen(lambda x: (net(x), net.weight, net.weight.t(), net.bias))
    for _ in range(2):
        out, weight, turned, bias = run(torch.ones(2, 4))
    assert weight.data_ptr() == turned.data_ptr() == net.weight.data_ptr() and bias.data_ptr() == net.bias.data_ptr()
    torch.testing.assert_close(out, net(torch.ones(2, 4)))


@torch.no_grad()
def test_equal_layers_share_code_but_not_parameters():
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    for layer in layers:
        layer.compile(backend="tilewright", options={"freeze": True})
    x = torch.randn(2, 8)
    for _ in range(2):
        for layer in layers:
            torch.testing.assert_close(layer(x), x @ layer.weight.t() + layer.bias)


CHANGED = {
    "in place": lambda net: net.a.weight.mul_(2),
    "loaded": lambda net: net.load_state_dict(Net().state_dict()),
    "assigned": lambda net: net.load_state_dict(Net().state_dict(), assign=True),
    "new memory": lambda net: setattr(net.a.weight, "data", torch.randn(16, 8)),
    "new parameter": lambda net: setattr(net, "a", torch.nn.Linear(8, 16)),
}


@pytest.mark.parametrize("how", CHANGED)
@torch.no_grad()
def test_a_parameter_that_changes_is_seen(how):
    net, x = Net().eval(), torch.randn(4, 8)
    run = frozen(net)
    run(x)
    for _ in range(CHANGES + 3):
        CHANGED[how](net)
        torch.testing.assert_close(run(x), net(x))
    _, none = new_receipts(lambda: run(x))
    assert not none


@torch.no_grad()
def test_what_changes_all_the_time_is_no_constant_in_the_end():
    net, x = Net().eval(), torch.randn(4, 8)
    run = frozen(net)
    run(x)
    _, made = new_receipts(lambda: [(net.a.weight.mul_(2), run(x)) for _ in range(20)])
    assert len(made) == CHANGES + 1 and notes(made[-1]) == ([], ["it changes between calls"])


@torch.no_grad()
def test_dynamic_shapes_tied_weights_and_inference_mode():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(16, 8)
            self.head = torch.nn.Linear(8, 16, bias=False)
            self.head.weight = self.table.weight

        def forward(self, at):
            return self.head(self.table(at))

    with torch.inference_mode():
        net = Tied()  # its parameters are inference tensors
        run = torch.compile(net, backend="tilewright", dynamic=True, options={"freeze": True})
        for n in (3, 5, 9):
            at = torch.arange(n)
            torch.testing.assert_close(run(at), net(at))
    assert notes(tilewright.receipts()[-1])[0] == ["1 parameters and buffers (0.0 MB) are constants"]


@torch.no_grad()
def test_a_weight_that_was_replaced_is_not_kept():
    """The merged weight takes the place of the two it is made of; ours are the only references that could keep them."""
    net, x = Net().eval(), torch.randn(4, 8)
    optimized = tilewright.optimize(net, (x,))
    weight, scale = weakref.ref(net.a.weight.untyped_storage()), net.scale.data_ptr()
    assert scale in {d.value.data_ptr() for d in constants(optimized.graph).values() if d.value is not None}, "others are not copied"
    del net
    gc.collect()
    assert weight() is None
    optimized(x)


@NATIVE
@torch.no_grad()
def test_a_real_encoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    out, made = new_receipts(lambda: frozen(model)(input_ids=ids).last_hidden_state)
    want = copy.deepcopy(model).double()(input_ids=ids).last_hidden_state
    result = check(out, model(input_ids=ids).last_hidden_state, want)
    assert result.ok, result
    assert all(notes(r)[0] and not r.failure for r in made)
    assert any(a.rule == "merge-linears" for r in made for a in r.applied)
