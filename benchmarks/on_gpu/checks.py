"""Each template on small inputs, under several schedules, against float64: err(ours) <= max(k * err(eager), a tiny budget)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tilewright.codegen.lower import lower
from tilewright.codegen.triton.attention_tiles import AttentionTiles
from tilewright.codegen.triton.recurrence_tiles import RecurrenceTiles
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.schedule import Schedule
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import Tiles
from tilewright.driver.accuracy import check
from tilewright.ir import ops
from tilewright.ir.graph import Node
from tilewright.ir.interpret import interpret

from .clock import Answer
from .kernels import chain, norm, soft
from .place import Kind, Place, graph_of, op

F32, F16, BF16, F64, I8, U8, I64 = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64,
)  # fmt: skip
EXACT, NARROW = 2e-6, 8e-3
"""What rounding alone may make of a result: of float32, and of one that is stored in 16 bits."""


@dataclass(frozen=True)
class Checked:
    """What a template computes, of what, and the schedules it is tried under beside the one it starts from.

    scale: of inputs that are random; given: those that are not, by number.
    """

    build: Callable[..., Any]
    kinds: tuple[Kind, ...]
    schedules: tuple[Any, ...] = ()
    scale: float = 1.0
    given: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def gelu_layer(x: Node, w: Node, b: Node, r: Node) -> Node:
    return ops.add(ops.gelu(ops.linear(x, w, b)), r)


def attended(causal: bool, q: Node, k: Node, v: Node) -> Node:
    return ops.op("attention")(q, k, v, causal=causal, scale=0.25)


def packed(q: Node, k: Node, v: Node, ids: Node) -> Node:
    """Tokens attend to those of their own document before them."""
    keep = ops.eq(ops.reshape(ids, shape=(*ids.shape, 1)), ids)
    return ops.op("attention")(q, k, v, keep, causal=True, scale=0.25)


def recurrent(x: Node, h: Node, w: Node) -> Node:
    return ops.op("item")(ops.op("rnn_layer")(x, h, w), index=0)


def convolved(x: Node, w: Node, b: Node) -> Node:
    return ops.relu(ops.conv(x, w, b, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1))


def four_bits(x: Node, w: Node, scale: Node) -> Node:
    return ops.linear(x, op("dequantize")(op("unpack")(w, bits=4), scale, dtype=x.dtype))


def eight_bits(q: Node, w: Node, rows: Node) -> Node:
    return ops.mul(ops.cast(op("int_linear")(q, w), dtype=F32), rows)


def _layer(dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Kind, ...]:
    return (dtype, (m, k)), (dtype, (n, k)), (dtype, (n,)), (dtype, (m, n))


def _qkv(dtype: torch.dtype, queries: int, keys: int, head: int = 64) -> tuple[Kind, ...]:
    return (dtype, (2, 4, queries, head)), (dtype, (2, 2, keys, head)), (dtype, (2, 2, keys, head))


SMALL, FEW = Tiles(16, 16, 16), Tiles(4, 16, 16, walk="sum")
BLOCKS = AttentionTiles(16, 16, 4, 2)
LOOPED, ROWS = Schedule(xblock=2, rblock=16, persistent=False), Schedule(xblock=1, rblock=64)

CHECKS: dict[str, Checked] = {
    "pointwise": Checked(chain, ((F32, (30, 100)), (F32, (30, 100)))),
    "pointwise, bfloat16": Checked(chain, ((BF16, (30, 100)), (BF16, (30, 100)))),
    "softmax": Checked(soft, ((F32, (13, 60)),), (LOOPED, ROWS)),
    "layer norm": Checked(norm, ((F32, (13, 60)), (F32, (60,)), (F32, (60,))), (LOOPED, ROWS)),
    "column sum": Checked(lambda x: ops.op("sum")(x, dims=(0,)), ((F32, (50, 33)),), (LOOPED,)),
    "cumsum": Checked(lambda x: ops.op("cumsum")(x, dim=1), ((F32, (7, 300)),)),
    "product, float32": Checked(gelu_layer, _layer(F32, 70, 50, 90), (SMALL, replace(SMALL, block_n=32, num_stages=1))),
    "product, bfloat16": Checked(gelu_layer, _layer(BF16, 70, 50, 90), (SMALL,)),
    "product, float16": Checked(gelu_layer, _layer(F16, 128, 64, 64)),
    "product, parts of the depth": Checked(gelu_layer, _layer(F32, 20, 18, 200), (replace(SMALL, split_k=4),)),
    "product, few rows": Checked(gelu_layer, _layer(BF16, 1, 200, 130), (FEW, replace(FEW, split_k=2))),
    "convolution": Checked(convolved, ((F32, (2, 5, 17, 16)), (F32, (24, 5, 3, 3)), (F32, (24,)))),
    "attention": Checked(partial(attended, True), _qkv(BF16, 70, 70), (BLOCKS,)),
    "attention, float32": Checked(partial(attended, True), _qkv(F32, 40, 70, 32), (BLOCKS,)),
    "attention, head of 128": Checked(partial(attended, True), _qkv(F16, 40, 40, 128)),
    "attention, one query": Checked(partial(attended, False), _qkv(BF16, 1, 300), (replace(BLOCKS, splits=4),)),
    "attention, packed": Checked(
        packed, (*_qkv(F32, 50, 50, 16), (I64, (50,))), (BLOCKS, replace(BLOCKS, splits=2)), given={3: (0,) * 3 + (1,) * 20 + (0,) * 27}
    ),
    "recurrence": Checked(
        recurrent, ((F32, (9, 5, 37)), (F32, (5, 37)), (F32, (37, 37))),
        (RecurrenceTiles(16, 16, 16, num_stages=1), RecurrenceTiles(2, 64, 64, 8, 1, "sum")), scale=0.2,
    ),
    "groups of rows": Checked(
        lambda x, w, ends: ops.relu(op("grouped_matmul")(x, w, ends)), ((BF16, (70, 24)), (BF16, (5, 24, 33)), (I64, (5,))), (SMALL,),
        given={2: (1, 1, 40, 60, 60)},
    ),
    "sparse blocks": Checked(
        lambda x, values, columns, starts: ops.relu(op("block_sparse_linear")(x, values, columns, starts)),
        ((F32, (20, 48)), (F32, (4, 16, 16)), (I64, (4,)), (I64, (4,))), (SMALL,), given={2: (0, 2, 1, 0), 3: (0, 2, 2, 4)},
    ),
    "4-bit weights": Checked(four_bits, ((F32, (3, 64)), (U8, (40, 32)), (F32, (40, 4))), (SMALL, FEW)),
    "8-bit weights": Checked(lambda x, q, s: ops.linear(x, op("dequantize")(q, s, dtype=F32)),
                             ((F32, (20, 64)), (I8, (40, 64)), (F32, (40, 1))), (SMALL,)),
    "8 by 8 bits": Checked(eight_bits, ((I8, (40, 64)), (I8, (48, 64)), (F32, (40, 1)))),
}  # fmt: skip


def checked(name: str, place: Place) -> Answer:
    """The schedule that is nearest to breaking the rule."""
    one = CHECKS[name]
    graph, inputs = graph_of(one.build, one.kinds, place.device), _inputs(one, place)
    (eager,), (exact,) = interpret(graph, inputs), interpret(graph, inputs, F64)
    kernel = lower(graph, "row")
    buffers = {b.name: x.reshape(-1) for b, x in zip(kernel.inputs, inputs)}
    worst: Answer = {}
    for schedule in (None, *one.schedules):
        (out,) = run(build(kernel, schedule), buffers, None, torch.device(place.device)).values()
        budget = NARROW if eager.dtype in (BF16, F16) else EXACT
        found = check(out.view(eager.shape), eager, exact, k=2.0, budget=budget)
        if not worst or found.ours > worst["ours"]:
            worst = {"ours": found.ours, "eager": found.eager, "allowed": found.allowed, "ok": found.ok, "schedule": str(schedule or "")}
    return worst | {"schedules": 1 + len(one.schedules)}


def _inputs(one: Checked, place: Place) -> list[torch.Tensor]:
    tensors = [x * one.scale if x.is_floating_point() else x for x in place.tensors(one.kinds)]
    for number, values in one.given.items():
        tensors[number] = torch.tensor(values, dtype=tensors[number].dtype, device=place.device)
    return tensors
