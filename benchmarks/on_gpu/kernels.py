"""Kernels against what moves or multiplies as fast as it can be done: a copy of as many bytes, the vendor's product, torch's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tilewright.ir import ops
from tilewright.ir.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .clock import Answer, Call, race
from .place import Build, Kind, Place, op

F32, F16, BF16, I8, U8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8
OURS = "tilewright"


# -- what memory sets the time of


def chain(x: Node, y: Node) -> Node:
    return ops.add(ops.mul(ops.gelu(x), 0.5), y)


def norm(x: Node, w: Node, b: Node) -> Node:
    return ops.layer_norm(x, w, b)


def residual_norm(x: Node, y: Node, w: Node) -> Node:
    return ops.rms_norm(ops.add(x, y), w)


def soft(x: Node) -> Node:
    return ops.softmax(x, dim=-1)


EAGER: dict[Build, Callable[..., torch.Tensor]] = {
    chain: lambda x, y: F.gelu(x) * 0.5 + y,
    norm: lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    residual_norm: lambda x, y, w: F.rms_norm(x + y, x.shape[-1:], w, 1e-6),
    soft: lambda x: x.softmax(-1),
}
VECTORS = {chain: 0, norm: 2, residual_norm: 1, soft: 0}
"""Operands that are as long as a row."""
MATRICES = {chain: 2, norm: 1, residual_norm: 2, soft: 1}


def bandwidth(build: Build, dtype: torch.dtype, rows: int, columns: int, place: Place) -> Answer:
    """A kernel that reads and writes matrices, and a copy that moves as many bytes."""
    shape = (place.size(rows, 4), place.size(columns, 64))
    kinds: list[Kind] = [(dtype, shape)] * MATRICES[build] + [(dtype, shape[1:])] * VECTORS[build]
    kernel, inputs = place.kernel(build, kinds), place.tensors(kinds)
    nbytes = sum(x.nbytes for x in inputs) + inputs[0].nbytes
    source, target = (torch.ones(nbytes // 2, dtype=U8, device=place.device) for _ in range(2))
    calls: dict[str, Call] = {
        OURS: lambda: kernel.run(list(inputs)), "copy": lambda: target.copy_(source), "eager": lambda: EAGER[build](*inputs)
    }  # fmt: skip
    return {"nbytes": nbytes, "peers": race(place, {name: [call] for name, call in calls.items()})}


# -- products


def product(place: Place, m: int, n: int, k: int, dtype: torch.dtype, follows: str = "") -> Answer:
    """A linear layer, alone or with bias and GELU, against the vendor's product and the same with what follows by eager."""
    m, n, k = (place.size(full, small) for full, small in ((m, 32), (n, 16), (k, 48)))
    kinds: list[Kind] = [(dtype, (m, k)), (dtype, (n, k))] + ([(dtype, (n,))] if follows else [])
    inputs = place.tensors(kinds)
    kernel = place.kernel(_gelu_layer if follows else lambda x, w: ops.linear(x, w), kinds)
    calls: dict[str, Call] = {OURS: lambda: kernel.run(list(inputs)), "cublas": lambda: F.linear(*inputs[:2])}
    if follows:
        calls["cublas, then gelu"] = lambda: F.gelu(F.linear(*inputs))
    return {"flops": 2 * m * n * k, "peers": race(place, {name: [call] for name, call in calls.items()})}


def _gelu_layer(x: Node, w: Node, b: Node) -> Node:
    return ops.gelu(ops.linear(x, w, b))


COPIES = 16
"""Of a weight, read one after the other: together they are in no cache."""


def vector_product(place: Place, bits: int, size: int = 4096, group: int = 128) -> Answer:
    """One row by a weight of few bits: against the bandwidth of a copy, and against the same weight in bfloat16."""
    n = k = place.size(size, 64)
    group = place.size(group, 16) if bits == 4 else k
    kinds: list[Kind] = [(BF16, (1, k)), (U8, (n, k // 2)) if bits == 4 else (I8, (n, k)), (BF16, (n, k // group))]
    kernel = place.kernel(partial(_dequantized, bits), kinds)
    count = place.size(COPIES, 2)
    series = [place.tensors(kinds) for _ in range(count)]
    wide = [(place.tensor(BF16, (1, k)), place.tensor(BF16, (n, k))) for _ in range(count)]
    nbytes = sum(x.nbytes for x in series[0][1:])
    calls: dict[str, list[Call]] = {
        OURS: [partial(_run, kernel, inputs) for inputs in series],
        "bfloat16": [partial(F.linear, x, w) for x, w in wide],
    }
    return {"nbytes": nbytes, "bandwidth": copy_rate(place), "peers": race(place, calls, flush=False, recorded=True)}


@functools.cache
def copy_rate(place: Place) -> float:
    """Bytes per second that a large copy reads and writes."""
    source, target = (torch.ones(place.size(512 << 20, 1 << 10), dtype=U8, device=place.device) for _ in range(2))
    return 2 * source.nbytes / race(place, {"copy": [lambda: target.copy_(source)]})["copy"]["seconds"]


def _dequantized(bits: int, x: Node, w: Node, scale: Node) -> Node:
    unpacked = op("unpack")(w, bits=4) if bits == 4 else w
    return ops.linear(x, op("dequantize")(unpacked, scale, dtype=BF16))


def _run(kernel: Any, inputs: Sequence[torch.Tensor]) -> Any:
    return kernel.run(list(inputs))


def integer_product(place: Place, size: int = 4096) -> Answer:
    """int8 by int8, with the scale of each row and column, against torch's int8 product and bfloat16."""
    n = place.size(size, 32)
    kinds: list[Kind] = [(I8, (n, n)), (I8, (n, n)), (F32, (n, 1)), (F32, (n,))]
    kernel, inputs = place.kernel(_scaled, kinds), place.tensors(kinds)
    wide = [x.to(BF16) for x in inputs[:2]]
    calls: dict[str, Call] = {
        OURS: lambda: kernel.run(list(inputs)),
        "cublas": lambda: torch._int_mm(inputs[0], inputs[1].t()),
        "cublas, then scale": lambda: torch._int_mm(inputs[0], inputs[1].t()) * inputs[2] * inputs[3],
        "bfloat16": lambda: F.linear(*wide),
    }
    return {"flops": 2 * n**3, "peers": race(place, {name: [call] for name, call in calls.items()})}


def _scaled(q: Node, w: Node, rows: Node, columns: Node) -> Node:
    return ops.mul(ops.mul(ops.cast(op("int_linear")(q, w), dtype=F32), rows), columns)


# -- attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip


def attention(place: Place, batch: int, heads: int, shared: int, queries: int, keys: int, head: int, causal: bool) -> Answer:
    """Attention in bfloat16 against torch's backends. shared: heads of keys and values, each for several of queries."""
    queries, keys = place.size(queries, min(queries, 48)), place.size(keys, 48)
    batch, heads, shared = (batch, heads, shared) if place.on_gpu else (1, max(1, heads // shared), 1)
    q, kv = (batch, heads, queries, head), (batch, shared, keys, head)
    kinds: list[Kind] = [(BF16, q), (BF16, kv), (BF16, kv)]
    kernel = place.kernel(lambda q, k, v: ops.op("attention")(q, k, v, causal=causal, scale=head**-0.5), kinds)
    inputs = place.tensors(kinds)
    calls: dict[str, Call] = {OURS: lambda: kernel.run(list(inputs))}
    for name, backend in BACKENDS.items():
        if name != "math" or queries * keys <= 1 << 16:
            calls[name] = partial(_torch_attention, backend, inputs, causal, heads != shared)
    seen = (queries + 1) / 2 / keys if causal else 1.0  # of each query: those before it, and itself
    return {
        "bandwidth": copy_rate(place),
        "flops": int(4 * batch * heads * queries * keys * head * seen),
        "nbytes": sum(x.nbytes for x in inputs) + inputs[0].nbytes,
        "peers": race(place, {name: [call] for name, call in calls.items()}),
    }


def _torch_attention(backend: SDPBackend, inputs: Sequence[torch.Tensor], causal: bool, grouped: bool) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=grouped)
