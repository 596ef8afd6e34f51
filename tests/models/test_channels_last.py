"""Convolutional nets through torch.compile: channels last inside, what the caller sees as in eager; training too."""

import pytest
import tilewright
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))


def trunk(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.MaxPool2d(2), Block(width), Block(width), nn.Upsample(scale_factor=2))


def classifier() -> nn.Sequential:
    return nn.Sequential(trunk(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, with the statistics of one batch."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def assert_as_eager(model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False) -> None:
    compiled = torch.compile(model, backend="tilewright", dynamic=dynamic or None)
    with torch.no_grad():
        for x in inputs:
            got, want, exact = compiled(x), model(x), model.double()(x.double())
            model.float()
            assert got.stride() == want.stride()
            assert (got - exact).abs().max() <= 2 * (want - exact).abs().max() + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("make", [trunk, classifier])
def test_inference(make):
    assert_as_eager(settled(make()), torch.randn(4, 3, 64, 64))
    receipt = tilewright.receipts()[-1]
    assert any(a.rule == "choose-layouts" for a in receipt.applied) and not receipt.failure


def test_a_model_that_is_channels_last_already():
    model = settled(trunk()).to(memory_format=torch.channels_last)
    assert_as_eager(model, torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.randn(2, 3, 64, 64))


def test_dynamic_sizes():
    assert_as_eager(settled(classifier()), torch.randn(4, 3, 64, 64), torch.randn(2, 3, 48, 64), dynamic=True)


def test_training():
    torch._dynamo.reset()
    model, x = classifier(), torch.randn(4, 3, 32, 32)
    reference = classifier()
    reference.load_state_dict(model.state_dict())
    torch.compile(model, backend="tilewright")(x).square().sum().backward()
    reference(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3 * float(q.grad.abs().max())), name
        assert p.grad.stride() == q.grad.stride()


class Inverted(nn.Module):
    """A depthwise block as in MobileNetV2, with a squeeze-excitation and a group norm."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(width, 4 * width, 1, bias=False), nn.Conv2d(4 * width, width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, stride, 1, groups=4 * width, bias=False)
        self.norm_a, self.norm_b, self.norm_c = nn.BatchNorm2d(4 * width), nn.BatchNorm2d(4 * width), nn.GroupNorm(4, width)
        squeeze, excite = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, 4 * width, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.SiLU(), excite, nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.relu6(self.norm_a(self.wide(x)))
        h = nn.functional.hardswish(self.norm_b(self.depthwise(h)))
        return nn.functional.silu(self.norm_c(self.narrow(h * self.gate(h))))


def depthwise_net() -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.MaxPool2d(3, 2, 1), Inverted(16, 1), Inverted(16, 2), head, nn.AdaptiveAvgPool2d(1))


def test_windows_are_kernels_of_ours():
    assert_as_eager(settled(depthwise_net()), torch.randn(4, 3, 96, 96))
    receipt = tilewright.receipts()[-1]
    assert not receipt.failure and not receipt.fallbacks
    assert not [entry for entry in receipt.library if "pool" in str(entry)]


def test_windows_of_any_size():
    assert_as_eager(settled(depthwise_net()), *(torch.randn(n, 3, h, h + 8) for n, h in ((4, 96), (2, 64), (3, 70))), dynamic=True)
