"""Attentions as they stand in models: what the lowering and the C++ tests check, name -> (build, tensors, shapes with sizes)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lowering import Cases, x
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Graph, Node, graph_input
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType
from tilewright.passes.kv_formats import KV_FORMATS

INF = float("inf")

CASES = Cases()
add = CASES.add


def kept(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) > 0.3


def attention(q: Node, k: Node, v: Node, mask: Node | None = None, causal: bool = False, **attrs: Any) -> Node:
    return ops.op("attention")(q, k, v, *([mask] if mask is not None else []), causal=causal, scale=0.3, **attrs)


def causal(q: Node, k: Node, v: Node, mask: Node | None = None) -> Node:
    return attention(q, k, v, mask, causal=True)


def heads(value: Node, count: int) -> Node:
    """[b, s, h*d] as [b, h, s, d]."""
    b, s, width = value.shape
    return ops.permute(ops.reshape(value, shape=(b, s, count, width // count)), dims=(0, 2, 1, 3))


def joined(value: Node) -> Node:
    b, h, s, d = value.shape
    return ops.reshape(ops.permute(value, dims=(0, 2, 1, 3)), shape=(b, s, h * d))


def positions(count: Any) -> tuple[Node, Node]:
    i = ops.iota(length=count)
    return ops.reshape(i, shape=(count, 1)), i


def merged(qkv: Node) -> Node:
    """One projection of everything, and a residual afterwards."""
    q, k, v = (heads(ops.slice(qkv, dim=2, start=32 * n, stop=32 * n + 32), 2) for n in range(3))
    return ops.add(joined(causal(q, k, v)), ops.slice(qkv, dim=2, start=0, stop=32))


def grouped(q: Node, k: Node, v: Node) -> Node:
    return joined(causal(heads(q, 4), heads(k, 2), heads(v, 2)))


def sigmoid(q: Node, k: Node, v: Node, mask: Node | None = None, causal: bool = False) -> Node:
    return attention(q, k, v, mask, causal, weights="sigmoid")


def biased(q: Node, k: Node, v: Node, causal: bool = True) -> Node:
    """FlashSigmoid: a bias of -log(keys), so that the weights of a row are about 1 together."""
    return sigmoid(q, k, v, ops.op("full")(shape=(), value=-math.log(k.shape[-2]), dtype=torch.float32, device="cpu"), causal)


def decoded(q: Node, k: Node, v: Node) -> Node:
    return biased(q, k, v, causal=False)


def window(q: Node, k: Node, v: Node) -> Node:
    rows, keys = positions(q.shape[-2])
    away = ops.sub(rows, keys)
    return attention(q, k, v, ops.logical_and(ops.ge(away, 0), ops.lt(away, 20)))


def sigmoid_window(q: Node, k: Node, v: Node) -> Node:
    rows, keys = positions(q.shape[-2])
    away = ops.sub(rows, keys)
    return sigmoid(q, k, v, ops.logical_and(ops.ge(away, 0), ops.lt(away, 20)))


def alibi(q: Node, k: Node, v: Node, slopes: Node) -> Node:
    rows, keys = positions(q.shape[-2])
    away = ops.cast(ops.sub(keys, rows), dtype=torch.float32)
    bias = ops.where(ops.ge(rows, keys), ops.mul(away, slopes), -INF)
    return attention(q, k, v, bias)


def filled(cache: Node, q: Node, v: Node, length: Node) -> Node:
    """A step of decoding over a cache of which `length` keys are filled."""
    keys = cache.shape[-2]
    return attention(q, cache, v, ops.lt(ops.reshape(ops.iota(length=keys), shape=(1, keys)), length))


def stepped(q: Node, k: Node, v: Node, position: Node, window: int = 0) -> Node:
    """Rows of a batch that stand at positions of their own in a cache; each query sees the keys up to its own."""
    b, n, keys = position.shape[0], q.shape[-2], k.shape[-2]
    own = ops.add(ops.reshape(position, shape=(b, 1, 1, 1)), ops.reshape(ops.iota(length=n), shape=(1, 1, n, 1)))
    key = ops.iota(length=keys)
    keep = ops.ge(own, key)
    if window:
        keep = ops.logical_and(keep, ops.lt(ops.sub(own, key), window))
    return attention(q, k, v, keep)


def stepped_window(q: Node, k: Node, v: Node, position: Node) -> Node:
    return stepped(q, k, v, position, 20)


def cache(kv: str, *shape: int) -> tuple[torch.Tensor, ...]:
    """Keys, then values, as they are kept in a format."""
    value = graph_input("x", TensorType(torch.float32, shape))
    body = Graph("kept", (value,), KV_FORMATS[kv].encode(value))
    return tuple(t for n in range(2) for t in interpret(body, [x(*shape).roll(n)]))


def read(kv: str, parts: Sequence[Node], dtype: torch.dtype = torch.float32) -> tuple[Node, Node]:
    half = len(parts) // 2
    k, v = (KV_FORMATS[kv].decode(tuple(p), dtype) for p in (parts[:half], parts[half:]))
    return k, v


def cached(kv: str) -> Callable[..., Node]:
    """Steps at positions over a cache in a format."""
    return lambda q, *parts: stepped(q, *read(kv, parts[:-1], q.dtype), parts[-1])


def sigmoid_cached(q: Node, *parts: Node) -> Node:
    return decoded(q, *read("int8", parts))


def tokens_first(q: Node, *parts: Node) -> Node:
    """A cache with the heads of a token side by side."""
    return attention(q, *read("int8", [ops.permute(p, dims=(0, 2, 1, 3)) for p in parts]))


def interleaved(q: Node, packed: Node, scale: Node, zero: Node) -> Node:
    """Neighbouring columns in one byte, and zeros that are read."""
    kept = ops.op("dequantize")(ops.op("unpack")(packed, bits=4), scale, zero, dtype=torch.float32)
    return attention(q, kept, kept)


def packed(q: Node, k: Node, v: Node, first: Node, last: Node) -> Node:
    """Sequences of several lengths one after the other: each token knows where its own begins and ends."""
    keys = ops.iota(length=k.shape[-2])
    first, last = (ops.reshape(t, shape=(q.shape[-2], 1)) for t in (first, last))
    return attention(q, k, v, ops.logical_and(ops.ge(keys, first), ops.lt(keys, last)))


def packed_causal(q: Node, k: Node, v: Node, first: Node, last: Node) -> Node:
    rows, keys = positions(q.shape[-2])
    first, last = (ops.reshape(t, shape=(q.shape[-2], 1)) for t in (first, last))
    own = ops.logical_and(ops.ge(keys, first), ops.lt(keys, last))
    return attention(q, k, v, ops.logical_and(own, ops.ge(rows, keys)))


def packed_window(q: Node, k: Node, v: Node, first: Node, last: Node) -> Node:
    """Documents in no order, each row with a window of its own in them."""
    rows, keys = positions(q.shape[-2])
    first, last = (ops.reshape(t, shape=(q.shape[-2], 1)) for t in (first, last))
    near = ops.logical_and(ops.lt(ops.sub(rows, keys), 9), ops.gt(keys, ops.sub(last, 300)))
    return attention(q, k, v, ops.logical_and(ops.logical_and(ops.ge(keys, first), ops.lt(keys, last)), near))


def limits_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row of sequences one after the other: where its own begins and ends."""
    count, ends = torch.tensor(lengths), torch.tensor(lengths).cumsum(0)
    return (ends - count).repeat_interleave(count), ends.repeat_interleave(count)


def padded(q: Node, k: Node, v: Node, keep: Node) -> Node:
    """A mask of batch and key, as numbers."""
    b, n = keep.shape
    wide = ops.reshape(keep, shape=(b, 1, 1, n))
    return attention(q, k, v, ops.where(wide, 0.0, torch.finfo(torch.float32).min))


add("plain", attention, x(2, 3, 37, 16), x(2, 3, 37, 16), x(2, 3, 37, 16))
add("cross attention, values of another width", attention, x(2, 2, 50, 32), x(2, 2, 131, 32), x(2, 2, 131, 16))
add("causal", causal, x(1, 2, 200, 16), x(1, 2, 200, 16), x(1, 2, 200, 16))
add("causal, more keys than queries", causal, x(2, 70, 16), x(2, 90, 16), x(2, 90, 16))
add("causal, fewer keys than queries", causal, x(2, 90, 16), x(2, 70, 16), x(2, 70, 16))
add("a single head", attention, x(60, 32), x(70, 32), x(70, 32))
add("narrow heads", attention, x(2, 3, 9, 4), x(2, 3, 11, 4), x(2, 3, 11, 12))
add("wide heads", causal, x(1, 1, 20, 256) / 4, x(1, 1, 33, 256), x(1, 1, 33, 200))
add("merged projection", merged, x(2, 45, 96))
add("grouped heads", grouped, x(2, 33, 64), x(2, 33, 32), x(2, 33, 32))
add("one head of keys", attention, x(2, 4, 21, 16), x(2, 1, 30, 16), x(2, 1, 30, 16))
add("keys without batch", attention, x(3, 2, 20, 16), x(1, 2, 17, 16), x(1, 2, 17, 16))
add("transposed keys", lambda q, k, v: attention(q, ops.permute(k, dims=(0, 2, 1)), v), x(2, 20, 16), x(2, 16, 40), x(2, 40, 16))
add("bool mask", attention, x(2, 3, 40, 16), x(2, 3, 50, 16), x(2, 3, 50, 16), kept(40, 50))
add("additive mask", attention, x(2, 3, 40, 16), x(2, 3, 50, 16), x(2, 3, 50, 16), x(2, 1, 40, 50))
add("causal and additive mask", causal, x(2, 3, 40, 16), x(2, 3, 40, 16), x(2, 3, 40, 16), x(1, 3, 40, 40))
add("padding", padded, x(2, 3, 40, 16), x(2, 3, 50, 16), x(2, 3, 50, 16), kept(2, 50))
add("sliding window", window, x(1, 2, 200, 16), x(1, 2, 200, 16), x(1, 2, 200, 16))
add("alibi", alibi, x(1, 4, 80, 16), x(1, 4, 80, 16), x(1, 4, 80, 16), x(4, 1, 1).abs())
add("sigmoid", sigmoid, x(2, 3, 37, 16), x(2, 3, 50, 16), x(2, 3, 50, 32) / 50)
add("sigmoid, biased and causal", biased, x(1, 2, 200, 16), x(1, 2, 200, 16), x(1, 2, 200, 16))
add("sigmoid in a window", sigmoid_window, x(1, 2, 200, 16), x(1, 2, 200, 16), x(1, 2, 200, 16) / 20)
add("sigmoid, bool mask", sigmoid, x(2, 3, 40, 16), x(2, 3, 50, 16), x(2, 3, 50, 16) / 50, kept(40, 50))
add("sigmoid, bfloat16", sigmoid, *(x(1, 2, 70, 64, dtype=torch.bfloat16) for _ in range(2)), x(1, 2, 70, 64, dtype=torch.bfloat16) / 70,
    x(70, 70, dtype=torch.bfloat16))  # fmt: skip
add("sigmoid, grouped heads", sigmoid, x(2, 4, 21, 16), x(2, 2, 30, 16), x(2, 2, 30, 16) / 30)
add("sigmoid, a step of decoding", decoded, x(2, 4, 1, 32), x(2, 2, 300, 32), x(2, 2, 300, 32))
add("bfloat16", causal, *(x(1, 2, 70, 64, dtype=torch.bfloat16) for _ in range(3)), x(70, 70, dtype=torch.bfloat16))
add("float16", attention, *(x(1, 2, 33, 40, dtype=torch.float16) for _ in range(3)))
add("float64", causal, *(x(1, 2, 70, 16, dtype=torch.float64) for _ in range(3)))
add("decode", attention, x(2, 3, 1, 64), x(2, 3, 300, 64), x(2, 3, 300, 64))
add("decode, grouped", attention, x(1, 8, 1, 32), x(1, 2, 77, 32), x(1, 2, 77, 32))
add("decode, three queries", causal, x(1, 2, 3, 40), x(1, 2, 77, 40), x(1, 2, 77, 40))
add("decode, many grouped heads", attention, x(1, 16, 1, 32), x(1, 2, 77, 32), x(1, 2, 77, 32))
add("decode over a cache", filled, x(2, 3, 300, 32), x(2, 3, 1, 32), x(2, 3, 300, 32), torch.tensor(123))
add("decode of a long cache", attention, x(1, 2, 1, 32), x(1, 2, 3000, 32), x(1, 2, 3000, 32))
at = torch.tensor([0, 61, 299])
add("a step at positions", stepped, x(3, 4, 1, 32), x(3, 2, 300, 32), x(3, 2, 300, 32), at)
add("steps at positions", stepped, x(3, 4, 5, 32), x(3, 1, 304, 32), x(3, 1, 304, 32), at)
add("many steps at positions", stepped, x(3, 4, 40, 32), x(3, 2, 340, 32), x(3, 2, 340, 32), at)
add("a step in a window", stepped_window, x(3, 4, 1, 32), x(3, 2, 300, 32), x(3, 2, 300, 32), at)
add("a step, narrow heads", stepped, x(3, 4, 1, 12), x(3, 2, 300, 12), x(3, 2, 300, 20), at)
add("a step, int8 cache", cached("int8"), x(3, 4, 1, 64), *cache("int8", 3, 2, 300, 64), at)
add("a step, int4 cache", cached("int4"), x(3, 4, 1, 64), *cache("int4", 3, 2, 300, 64), at)
add("a step, bf16 cache", cached("bf16"), x(3, 4, 1, 64), *cache("bf16", 3, 2, 300, 64), at)
add("a step, int4 cache of narrow heads", cached("int4"), x(3, 4, 1, 24), *cache("int4", 3, 2, 300, 24), at)
add("a step of three, int4 cache", cached("int4"), x(3, 2, 3, 128), *cache("int4", 3, 2, 302, 128), at)
add("steps, int4 cache", cached("int4"), x(3, 4, 5, 32), *cache("int4", 3, 1, 304, 32), at)
add("many steps, int8 cache", cached("int8"), x(3, 4, 40, 32), *cache("int8", 3, 2, 340, 32), at)
add("bfloat16, int8 cache", cached("int8"), x(3, 4, 2, 32, dtype=torch.bfloat16), *cache("int8", 3, 2, 340, 32), at)
add("sigmoid, int8 cache", sigmoid_cached, x(2, 4, 1, 32), *cache("int8", 2, 2, 130, 32))
add("a step, heads of a token side by side", tokens_first, x(2, 4, 1, 32), *cache("int8", 2, 130, 2, 32))
add("columns in pairs", interleaved, x(2, 2, 3, 32) / 8, cache("int4", 2, 2, 70, 32)[0], x(2, 2, 70, 1), x(2, 2, 70, 1))
add("steps in a window", stepped_window, x(3, 4, 7, 32), x(3, 4, 310, 32), x(3, 4, 310, 32), at)
FIRST, LAST = limits_of([3, 2, 5, 40])
add("packed and causal", packed_causal, *(x(2, 50, 16) for _ in range(3)), FIRST, LAST)
add("packed, 32-bit offsets", packed_causal, *(x(2, 50, 16, dtype=torch.float16) for _ in range(3)), FIRST.int(), LAST.int())
_long = limits_of([1, 130, 0, 48, 2, 300, 1, 47, 33])
add("packed", packed, x(2, 562, 32) / 4, x(2, 562, 32), x(2, 562, 48), *_long)
add("packed, longer and causal", packed_causal, *(x(2, 562, 16) for _ in range(3)), *_long)
add("packed, in a window", packed_window, *(x(1, 562, 16) for _ in range(3)), *_long)
add("packed, in no order", packed_causal, *(x(1, 562, 16) for _ in range(3)), *(t[torch.arange(562) // 20 * 17 % 562] for t in _long))
add("sharp scores", attention, 30 * x(1, 2, 40, 16), 30 * x(1, 2, 40, 16), x(1, 2, 40, 16))

_SIZES = {"b": SymbolRange(2, 64), "s": SymbolRange(2, 512), "n": SymbolRange(2, 512)}
b, s, n = (symbol(name) for name in "bsn")
_qkv = (x(3, 75, 64), x(3, 90, 32), x(3, 90, 32))
add("packed, as many as there are", packed, *(x(1, 2, 562, 16) for _ in range(3)), *_long,
    shapes=(*((1, 2, n, 16) for _ in range(3)), (n,), (n,)), symbols={"n": SymbolRange(0, 4096)})  # fmt: skip
add("sizes known at run time", grouped, *_qkv, shapes=((b, s, 64), (b, n, 32), (b, n, 32)), symbols=_SIZES)
add("a cache of run time size", attention, x(1, 4, 1, 64), x(1, 2, 150, 64), x(1, 2, 150, 64),
    shapes=((1, 4, 1, 64), (1, 2, n, 64), (1, 2, n, 64)), symbols={"n": _SIZES["n"]})  # fmt: skip
