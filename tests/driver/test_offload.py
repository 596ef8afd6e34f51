"""options={"freeze": True, "offload": True}: what a frozen graph needs packed only is in a file, and the module works as before."""

import copy
import warnings

import pytest
import torch
from support import NATIVE
from tilewright.driver import offload as offloading
from tilewright.driver.backend import checked_options
from tilewright.driver.errors import BadOption

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), NATIVE]


class Net(torch.nn.Module):
    """Two weights that are merged and packed, one that is packed, a table that is read as it is."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(512, 256)
        self.norm = torch.nn.LayerNorm(256)
        self.a, self.b = torch.nn.Linear(256, 512), torch.nn.Linear(256, 512)
        self.c = torch.nn.Linear(512, 256)

    def forward(self, at):
        h = self.norm(self.table(at))
        return self.c(self.a(h) * self.b(h))


WEIGHTS = ("a.weight", "b.weight", "c.weight")


def offloaded(net, **options):
    return torch.compile(net, backend="tilewright", options={"freeze": True, "offload": True, **options})


def positions(count=32):
    return torch.arange(count) % 512


def in_file(tensor):
    """Whether the memory of the tensor is that of a file, which has no name any more."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return line.rstrip().endswith("(deleted)")
    return False


def places(net):
    return {name: p.data_ptr() for name, p in net.named_parameters()}


@torch.no_grad()
def test_weights_move_to_files_and_the_module_works_as_before():
    net, at = Net().eval(), positions()
    twin, parameters = copy.deepcopy(net), dict(net.named_parameters())
    run = offloaded(net)
    torch.testing.assert_close(run(at), twin(at))
    assert {name for name, p in net.named_parameters() if in_file(p)} == set(WEIGHTS)
    assert all(p is parameters[name] and p.requires_grad for name, p in net.named_parameters())
    assert torch.equal(net(at), twin(at)), "eager"
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in net.state_dict().items())
    assert torch.equal(copy.deepcopy(net).c.weight, twin.c.weight)
    torch.testing.assert_close(run(at), twin(at))


@torch.no_grad()
def test_other_shapes_are_compiled_from_the_files():
    net = Net().eval()
    twin = copy.deepcopy(net)
    run = torch.compile(net, backend="tilewright", dynamic=False, options={"freeze": True, "offload": True})
    run(positions())
    first = places(net)
    for count in (16, 64, 32):
        torch.testing.assert_close(run(positions(count)), twin(positions(count)))
    assert places(net) == first, "nothing is moved twice"


@torch.no_grad()
def test_changes_are_seen():
    net, at = Net().eval(), positions()
    run = offloaded(net)
    for change in (
        lambda: net.a.weight.mul_(2),
        lambda: net.load_state_dict(Net().state_dict()),
        lambda: setattr(net, "c", torch.nn.Linear(512, 256)),
    ):
        torch.testing.assert_close(run(at), net(at))
        change()
        torch.testing.assert_close(run(at), net(at))
    assert in_file(net.c.weight)


@torch.no_grad()
def test_training_goes_on_with_what_was_moved():
    net, at = Net().eval(), positions()
    offloaded(net)(at)
    before = net.a.weight.clone()
    with torch.enable_grad():
        net(at).square().mean().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    torch.testing.assert_close(net.a.weight, before - 0.1 * net.a.weight.grad)


@torch.no_grad()
def test_what_shares_its_memory_stays():
    net, at = Net().eval(), positions()
    view, array = net.a.weight.view(-1), net.c.weight.detach().numpy()
    run = offloaded(net)
    torch.testing.assert_close(run(at), net(at))
    assert {name for name, p in net.named_parameters() if in_file(p)} == {"b.weight"}
    assert view.data_ptr() == net.a.weight.data_ptr() and array.ctypes.data == net.c.weight.data_ptr()


@torch.no_grad()
def test_without_room_on_the_disk_weights_stay(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offloading, "_written", full)
    net, at = Net().eval(), positions()
    with pytest.warns(RuntimeWarning, match="No space left"):
        out = offloaded(net)(at)
    torch.testing.assert_close(out, net(at))
    assert not any(in_file(p) for p in net.parameters())


@torch.no_grad()
def test_gradients_keep_parameters_in_memory():
    net, at = Net(), positions()
    with torch.enable_grad():
        offloaded(net)(at).sum().backward()
    assert net.a.weight.grad is not None and not any(in_file(p) for p in net.parameters())


@torch.no_grad()
def test_after_tuning():
    net, at = Net().eval(), positions()
    twin = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run = offloaded(net, max_autotune=True, tuning_seconds=0.0)
        torch.testing.assert_close(run(at), twin(at), rtol=1e-4, atol=1e-5)
    assert torch.equal(net(at), twin(at))


def test_it_needs_freezing():
    with pytest.raises(BadOption, match="it needs options\\['freeze'\\]"):
        checked_options(None, {"offload": True})
