"""Scales of channels: found where some are much larger than others and rounding gains; the order of ways to round that is known."""

from __future__ import annotations

import pytest
import torch
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.passes.quantize import Plan, Quantize
from tilewright.passes.rounding import Grid, rounded
from tilewright.passes.scale_channels import ScaleChannels
from tilewright.search.channels import POWERS, best_scale, candidate_scales, channel_scales, tried
from tilewright.search.metrics import relative_error

WIDTH = 128
TEXT = """graph g(x: f32[b, 128]) {
  v = constant "v"
  w = constant "w"
  g = constant "g"
  n = layer_norm(x, g, axes=1, eps=1e-05)
  a = linear(n, v)
  h = gelu(a)
  y = linear(h, w)
  return y
}"""


def _inputs(outlier: float, rows: int = 1024) -> torch.Tensor:
    """Correlated; two channels are so much larger."""
    mixed = torch.randn(rows, WIDTH) @ (torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH) / 8)
    mixed[:, :2] *= outlier
    return mixed


@pytest.mark.parametrize("seed", range(3))
def test_gptq_awq_nearest_and_whole_rows_in_this_order(seed: int) -> None:
    """Inputs with a correlated pair of large channels: relative squared errors about 1.6e-3, 4.6e-3, 5.9e-3, 8.8e-3."""
    torch.manual_seed(seed)
    x = (torch.randn(512, WIDTH) * torch.where(torch.arange(WIDTH) < 2, 5.0, 1.0)) @ (torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH) / 8)
    x[:, :2] *= 5
    weight, group = torch.randn(96, WIDTH), Grid(4, 32)

    def error(found: torch.Tensor) -> float:
        return relative_error(x @ found.T, x @ weight.T)

    awq = min(error(rounded(weight * s, group).values / s) for s in candidate_scales(weight, x)[: len(POWERS)])
    gptq, nearest, rows = (error(rounded(weight, *how).values) for how in ((group, x.T @ x), (group,), (Grid(4),)))
    assert gptq <= awq <= nearest <= rows


@pytest.mark.parametrize(("name", "gain"), [("int4-g64", 0.85), ("int2-g32", 0.87), ("int8-dynamic", 0.4)])
def test_large_channels_round_better_scaled_with_gptq_too(name: str, gain: float) -> None:
    torch.manual_seed(0)
    x, weight = _inputs(20.0), torch.randn(96, WIDTH)
    scale = best_scale(weight, x, [name])
    assert scale is not None
    text = 'graph g(x: f32[b, 128]) {\n w = constant "w"\n y = linear(x, w)\n return y\n}'
    errors = []
    for s in (torch.ones(WIDTH), scale):
        gram = (x / s).T @ (x / s)
        graph = Quantize(Plan((("w", name),), {"w": gram})).run(parse(text, {"w": weight * s}))
        errors.append(relative_error(interpret(graph, [x / s])[0], x @ weight.T))
    assert errors[1] < gain * errors[0]


def test_like_channels_and_fine_formats_are_left_alone() -> None:
    torch.manual_seed(0)
    assert best_scale(torch.randn(96, WIDTH), torch.randn(512, WIDTH), ["int4-g64", "int8-dynamic"]) is None
    assert tried(("bf16", "int8", "fp8")) == [] and tried(("int4-g32", "int8-dynamic", "int4-g64")) == ["int4-g64", "int8-dynamic"]


@pytest.mark.parametrize("x", [torch.zeros(8, WIDTH), torch.full((8, WIDTH), float("nan")), torch.randn(1, WIDTH)])
def test_inputs_of_no_use(x: torch.Tensor) -> None:
    scale = best_scale(torch.randn(96, WIDTH), x, ["int4-g64"])
    assert scale is None or bool((scale.isfinite() & (scale > 0)).all())


def test_scales_of_a_graph_lower_the_error_of_its_result() -> None:
    torch.manual_seed(0)
    gain = torch.where(torch.arange(WIDTH) % 64 == 0, 30.0, 1.0)
    graph = parse(TEXT, {"v": torch.randn(256, WIDTH) / 40, "w": torch.randn(64, 256) / 16, "g": gain})
    batches = [[torch.randn(256, WIDTH)] for _ in range(2)]
    scales = channel_scales(graph, batches, ["bf16", "int8-dynamic"])
    assert "v" in scales and channel_scales(graph, batches, ["bf16"]) == {}
    scaled = ScaleChannels(scales).run(graph)
    x = torch.randn(256, WIDTH)
    (exact,), (same,) = interpret(graph, [x]), interpret(scaled, [x])
    assert relative_error(same, exact) < 1e-5
    plain, better = (
        relative_error(interpret(Quantize(Plan.parse(f"{name}:int8-dynamic")).run(g), [x])[0], exact)
        for g, name in ((graph, "v"), (scaled, "v.scaled"))
    )
    assert better < 0.5 * plain
