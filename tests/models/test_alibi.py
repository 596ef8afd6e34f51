"""ALiBi as users write it: the bias is computed from positions in the attention's kernel, on both printers; none lies in memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tilewright.codegen.cpp.attention import print_attention
from tilewright.codegen.cpp.schedule import CpuTarget
from tilewright.codegen.kernel import Kernel
from tilewright.codegen.lower import lower
from tilewright.driver.compile import Options, compile_graph, rewritten
from tilewright.driver.pipeline import passes_from
from tilewright.driver.targets import retargeted
from tilewright.ir.capture.export import from_module
from tilewright.ir.dims import product
from tilewright.ir.graph import Graph, order
from tilewright.passes.base import Notes
from torch import nn

HEADS, LENGTH, WIDTH = 4, 300, 16


class Mpt(nn.Module):
    """MPT: the bias of keys alone is added, then what comes later is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)]))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = k.shape[-2]
        alibi = torch.arange(1 - n, 1, dtype=torch.int32).view(1, 1, 1, n) * self.slopes.view(1, HEADS, 1, 1)
        scores = q @ k.transpose(-1, -2) * 0.25 + alibi
        later = torch.ones(q.shape[-2], n, dtype=torch.bool).triu(1)
        return torch.softmax(scores.masked_fill(later, torch.finfo(scores.dtype).min), -1) @ v


class Added(Mpt):
    """Slopes by distances as the mask of SDPA, -inf where a key comes later."""

    def bias(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        away = torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]
        return (self.slopes.view(HEADS, 1, 1) * away).masked_fill(away > 0, -math.inf)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.bias(q, k)[None].to(q.dtype), scale=0.25)


class Window(Added):
    """The same, of the last 40 keys only."""

    def bias(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        away = torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]
        return torch.where((away <= 0) & (away > -40), self.slopes.view(HEADS, 1, 1) * -away.abs(), -math.inf)


class Bloom(Mpt):
    """BLOOM: heads beside the batch, the bias is what their products are added to, masks come after a view."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (b, h, m, _), n = q.shape, k.shape[-2]
        alibi = (torch.arange(n)[None, None, :] * self.slopes.view(1, HEADS, 1)).expand(b, h, n).reshape(b * h, 1, n)
        flat = [t.reshape(b * h, *t.shape[2:]) for t in (q, k.transpose(-1, -2), v)]
        scores = alibi.baddbmm(flat[0], flat[1], beta=1.0, alpha=0.25).view(b, h, m, n)
        later = torch.arange(n)[None, :] > torch.arange(m)[:, None]
        weights = F.softmax(scores.masked_fill(later, torch.finfo(scores.dtype).min), -1)
        return torch.bmm(weights.view(b * h, m, n), flat[2]).view(b, h, m, -1)


class Layers(Added):
    """One bias, which is read by several layers."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = self.bias(q, k)[None].to(q.dtype)
        for _ in range(3):
            v = F.scaled_dot_product_attention(q, k, v, mask, scale=0.25)
        return v


MODELS = (Mpt, Added, Window, Bloom, Layers)


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, LENGTH, WIDTH, generator=generator).to(dtype) for _ in range(3)]


def captured(model: type[Mpt]) -> Graph:
    return from_module(model(), tuple(operands())).graph


def attention_kernels(graph: Graph) -> list[Kernel]:
    """Those of the graph; nothing in it has an element per query and key."""
    nodes = order(graph)
    large = [n for n in nodes if not isinstance(n.type, tuple) and hasattr(n.type, "shape") and product(n.shape) >= LENGTH * LENGTH]
    assert not large, large[0]
    bodies = [n.attrs["body"] for n in nodes if n.op.name == "region"]
    return [lower(body, "k") for body in bodies if any(n.op.name == "attention" for n in order(body))]


@pytest.mark.parametrize("model", MODELS)
def test_on_a_cpu_the_bias_is_computed_and_bounds_the_keys(model: type[Mpt]) -> None:
    graph = rewritten(captured(model), Options(), passes_from(None), Notes(), {})
    kernels = attention_kernels(graph)
    assert len(kernels) == (3 if model is Layers else 1)
    text = print_attention(kernels[0], CpuTarget(32, level="x86-64-v3"))
    (bounds,) = [line for line in text.splitlines() if "tile::Bounds{" in line]
    assert ("Bounds{0," in bounds) == (model is not Window) and f", {LENGTH}}}" not in bounds, bounds


@pytest.mark.parametrize("model", MODELS)
def test_on_a_gpu_the_bias_is_computed_and_bounds_the_keys(model: type[Mpt]) -> None:
    pytest.importorskip("triton")
    from tilewright.codegen.triton.templates import build

    graph = rewritten(captured(model), Options(), retargeted(passes_from(None)), Notes(), {})
    kernels = attention_kernels(graph)
    assert len(kernels) == (3 if model is Layers else 1)
    text = build(kernels[0]).source
    assert "    end = tl.minimum(" in text and ("    begin = " in text) == (model is Window), text


@pytest.mark.parametrize("model", MODELS)
def test_results_are_those_of_eager(model: type[Mpt]) -> None:
    exact = model().double()(*operands(torch.float64))
    eager = model()(*operands())
    (ours,) = compile_graph(captured(model)).program(operands())
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6
