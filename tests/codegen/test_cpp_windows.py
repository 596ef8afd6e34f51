"""Windows through the C++ printer: every attribute, border, tail and dtype against float64, at each level of vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lowering import assert_close, graph_of
from support import NATIVE
from tilewright.codegen.cpp.schedule import CpuTarget, default_schedule, detect_target
from tilewright.codegen.cpp.sliding import find_window
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.lower import lower
from tilewright.codegen.target import Compiled
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.ir.ops import OPS

pytestmark = NATIVE

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
N, H, W = symbol("n"), symbol("h"), symbol("w")
SYMBOLS = {"n": SymbolRange(1), "h": SymbolRange(1), "w": SymbolRange(1)}


@dataclass
class Case:
    """build(x, *more) over a channels-last image; sizes: (n, h, w) one after the other if symbolic, else the first."""

    build: Any
    channels: int
    space: tuple[int, ...]
    more: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype = F32
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    special: bool = False
    slides: bool = True

    def inputs(self, space: tuple[int, ...]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(sum(space))
        x = torch.randn(*space, self.channels, generator=generator)
        if self.special:
            flat = x.view(-1)
            flat[:: max(1, x.numel() // 5)] = float("nan")
            flat[1 :: max(2, x.numel() // 4)] = float("-inf")
        return [t.to(self.dtype) for t in (x, *(torch.randn(s, generator=generator) for s in self.more))]

    def graph(self) -> Any:
        xs = self.inputs(self.space)
        shapes = [(N, H, W, self.channels), *self.more] if self.sizes else None
        return graph_of(self.build, xs, shapes, SYMBOLS if self.sizes else {})


def conv(channels: int, kernel: tuple[int, ...] = (3, 3), after: Any = None, **attrs: Any) -> dict[str, Any]:
    rank = len(kernel)
    full = {"stride": (1,) * rank, "padding": tuple(k // 2 for k in kernel), "dilation": (1,) * rank, **attrs}

    def build(x: Any, w: Any, *rest: Any) -> Any:
        made = OPS["conv"](x, w, *rest[:1], **full, groups=channels, channels_last=True)
        return after(made, *rest[1:]) if after else made

    return {"build": build, "channels": channels, "more": ((channels, 1, *kernel), (channels,))}


def pool(op: str, channels: int, kernel: tuple[int, ...] = (3, 3), before: Any = None, after: Any = None, **attrs: Any) -> dict[str, Any]:
    rank = len(kernel)
    full = {"stride": (2,) * rank, "padding": tuple(k // 2 for k in kernel), **attrs}

    def build(x: Any) -> Any:
        made = OPS[op](before(x) if before else x, kernel=kernel, **full, channels_last=True)
        return after(made) if after else made

    return {"build": build, "channels": channels}


def relu6(x: Any) -> Any:
    return ops.minimum(ops.maximum(x, 0.0), 6.0)


def residual() -> dict[str, Any]:
    made = conv(20, after=lambda y, r: (ops.add(ops.silu(y), r), ops.neg(y)))
    return {**made, "more": (*made["more"], (2, 7, 9, 20))}


def transposed_weight() -> dict[str, Any]:
    made = conv(24, (5, 3))
    inner = made["build"]
    return {**made, "build": lambda x, w, b: inner(x, ops.permute(w, dims=(3, 2, 0, 1)), b), "more": ((5, 3, 1, 24), (24,))}


IMAGES = [(2, 9, 11), (1, 1, 1), (1, 3, 40), (3, 2, 5)]
CASES = {
    "relu6": Case(**conv(32, after=relu6), space=(2, 8, 8)),
    "tails": Case(**conv(37), space=(2, 7, 13)),
    "few_channels": Case(**conv(5), space=(2, 7, 13)),
    "stride": Case(**conv(19, stride=(2, 3)), space=(2, 9, 16)),
    "stride_dilation": Case(**conv(16, stride=(2, 2), dilation=(2, 2), padding=(2, 3)), space=(1, 12, 15)),
    "dilation": Case(**conv(16, dilation=(1, 3), padding=(1, 3)), space=(1, 12, 15)),
    "even_kernel": Case(**conv(16, (2, 4), padding=(1, 2)), space=(1, 6, 9)),
    "no_padding": Case(**conv(16, (3, 5), padding=(0, 0)), space=(1, 6, 12)),
    "wide_padding": Case(**conv(16, (3, 3), padding=(4, 5)), space=(1, 3, 2)),
    "large": Case(**conv(48, (7, 7)), space=(1, 7, 7)),
    "long": Case(**conv(16, (3, 13)), space=(1, 5, 20)),
    "very_large": Case(**conv(16, (13, 13)), space=(1, 5, 20), slides=False),
    "rows_only": Case(**conv(16, (3, 1)), space=(1, 5, 8)),
    "residual": Case(**residual(), space=(2, 7, 9)),
    "transposed_weight": Case(**transposed_weight(), space=(1, 6, 10)),
    "symbolic": Case(**conv(33, (3, 3), stride=(2, 2)), space=IMAGES[0], sizes=IMAGES),
    "symbolic_large": Case(**conv(16, (5, 7)), space=IMAGES[0], sizes=IMAGES),
    "line": Case(**conv(16, (4,), padding=(3,)), space=(1, 300)),
    "volume": Case(**conv(8, (3, 3, 3), stride=(1, 2, 1)), space=(1, 4, 5, 6)),
    "f64": Case(**conv(9, after=relu6), space=(2, 7, 8), dtype=F64),
    "bf16": Case(**conv(40, after=relu6), space=(2, 7, 8), dtype=BF16),
    "f16": Case(**conv(40), space=(2, 7, 8), dtype=F16),
    "max": Case(**pool("max_pool", 64), space=(2, 12, 16), special=True),
    "max_dilated": Case(**pool("max_pool", 21, (3, 2), dilation=(2, 3), stride=(1, 1)), space=(2, 9, 12), special=True),
    "max_ceil": Case(**pool("max_pool", 17, ceil=True), space=(2, 8, 10), special=True),
    "max_bf16": Case(**pool("max_pool", 40), space=(2, 7, 8), dtype=BF16, special=True),
    "max_f64": Case(**pool("max_pool", 12), space=(2, 7, 8), dtype=F64, special=True),
    "max_of_relu": Case(**pool("max_pool", 32, before=ops.relu), space=(2, 8, 8), special=True),
    "max_of_ratios": Case(**pool("max_pool", 20, before=lambda x: ops.square(ops.silu(x))), space=(1, 6, 9)),
    "max_symbolic": Case(**pool("max_pool", 32, after=ops.silu), space=IMAGES[0], sizes=IMAGES, special=True),
    "max_apart": Case(**pool("max_pool", 32, (2, 2), padding=(0, 0)), space=(1, 8, 12)),
    "avg": Case(**pool("avg_pool", 24), space=(2, 9, 12)),
    "avg_apart": Case(**pool("avg_pool", 24, (2, 2), padding=(0, 0)), space=(2, 8, 12)),
    "avg_ceil": Case(**pool("avg_pool", 24, ceil=True), space=(2, 8, 10)),
    "avg_ceil_uncounted": Case(**pool("avg_pool", 24, ceil=True, count_padding=False), space=(2, 8, 10)),
    "avg_divisor": Case(**pool("avg_pool", 24, ceil=True, divisor=7), space=(2, 8, 10)),
    "avg_of_exp": Case(**pool("avg_pool", 24, before=ops.exp), space=(2, 8, 10)),
    "avg_symbolic": Case(**pool("avg_pool", 24, ceil=True, count_padding=False), space=IMAGES[0], sizes=IMAGES),
    "avg_far_apart": Case(**pool("avg_pool", 24, (2, 2), stride=(3, 5), padding=(0, 0)), space=(2, 8, 12), slides=False),
    "avg_whole": Case(**pool("avg_pool", 40, (7, 7), stride=(7, 7), padding=(0, 0)), space=(3, 7, 7), slides=False),
}
LEVELS = {"native": None, "x86-64-v3": CpuTarget(32, level="x86-64-v3"), "x86-64-v2": CpuTarget(16, level="x86-64-v2")}


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request: pytest.FixtureRequest) -> dict[str, object]:
    target = detect_target()
    chosen = LEVELS[request.param] or target
    if request.param != "native" and chosen.vector_bytes >= target.vector_bytes:
        pytest.skip("native is no wider")
    kernels = [lower(case.graph(), f"k_{name}") for name, case in CASES.items()]
    for (name, case), kernel in zip(CASES.items(), kernels):
        assert (find_window(kernel, default_schedule(kernel, chosen).vector) is not None) == case.slides, name
    return dict(zip(CASES, compile_kernels(kernels, chosen)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_windows(name: str, threads: int, compiled: dict[str, object]) -> None:
    case, made = CASES[name], compiled[name]
    assert isinstance(made, Compiled), made.reason  # type: ignore[attr-defined]
    graph = case.graph()
    for space in case.sizes or [case.space]:
        xs = case.inputs(space)
        eager = interpret(graph, xs)
        got = [torch.full(tuple(y.shape), 99, dtype=y.dtype) for y in eager]
        sizes = bind_sizes(graph, xs)
        made.launch(*(t.data_ptr() for t in (*xs, *got)), *(sizes[s] for s in made.kernel.sizes), threads)
        for ours, theirs, exact in zip(got, eager, interpret(graph, xs, torch.float64)):
            assert_close(ours, theirs, exact)
