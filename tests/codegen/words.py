"""Layers with constant weights of few bits, laid out by `pack-weights` and fused: the kernels that the tests of words compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from low_bit import integers, packed, steps
from lowering import x
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Data, Graph, Node, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType
from tilewright.passes.contractions import PRODUCTS
from tilewright.passes.formats import FORMATS, columns
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.pack_weights import PackWeights

F32, F16, BF16, I8, U8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8
Weight = Callable[[int, int], Node]
"""Makes a weight [n, k] of constants."""


def constant(name: str, value: torch.Tensor) -> Node:
    return ops.op("constant")(data=Data(name, value))


def bytes_of(dtype: torch.dtype = I8, groups: int = 1, zero: bool = False, scale: torch.dtype = F32) -> Weight:
    """8 bits, with scales and perhaps zeros for groups."""

    def make(n: int, k: int) -> Node:
        low = -128 if dtype == I8 else 0
        zeros = [constant("z", integers(n, groups, low=low, high=low + 256, dtype=dtype))] if zero else []
        q = constant("q", integers(n, k, low=low, high=low + 256, dtype=dtype))
        return ops.dequantize(q, constant("s", steps(n, groups, dtype=scale)), *zeros, dtype=F32)

    return make


def packed_of(bits: int, groups: int = 1, zero: bool = False, more: int = 0) -> Weight:
    """Several levels in a byte. more: columns behind those that count."""

    def make(n: int, k: int) -> Node:
        zeros = [constant("z", integers(n, groups, low=0, high=1 << bits, dtype=U8))] if zero else []
        q = ops.unpack(constant("q", packed(n, (k + more) * bits // 8)), bits=bits)
        w = ops.dequantize(q, constant("s", steps(n, groups, dtype=BF16)), *zeros, dtype=F32)
        return ops.slice(w, dim=1, start=0, stop=k, step=1) if more else w

    return make


def in_format(name: str) -> Weight:
    """As one of the formats that have more to compute than a level, a zero and a scale."""

    def make(n: int, k: int) -> Node:
        kind = FORMATS[name]
        assert kind.weight is not None
        parts = {part: constant(part, value) for part, value in kind.encode(x(n, k), None).items()}
        return columns(kind.weight(parts, F32), k)

    return make


def of_narrow_integers(n: int, k: int) -> Node:
    """Sums, products and shifts of bytes that wrap where bytes do."""
    q, p = constant("q", integers(n, k)), constant("p", packed(n, k))
    mixed = ops.add(ops.mul(q, 3), ops.cast(ops.bitwise_left_shift(p, 1), dtype=I8))
    large = ops.where(ops.gt(mixed, 5), ops.bitwise_right_shift(p, 3), ops.bitwise_or(ops.bitwise_and(p, 129), 2))
    return ops.mul(ops.cast(ops.sub(large, 7), dtype=F32), constant("s", steps(n, 1)))


def stored(dtype: torch.dtype) -> Weight:
    return lambda n, k: ops.cast(constant("w", x(n, k, dtype=dtype)), dtype=F32)


def plain(a: Node, w: Node) -> Node:
    return ops.linear(a, w)


def layer(a: Node, w: Node, b: Node, r: Node) -> Node:
    return ops.add(ops.gelu(ops.linear(a, w, b)), r)


def heads(a: Node, w: Node) -> Node:
    """[2, s, 96] -> [2, 3, s, 32]"""
    return ops.permute(ops.reshape(ops.linear(a, w), shape=(2, a.shape[1], 3, 32)), dims=(0, 2, 1, 3))


def turned(a: Node, w: Node) -> Node:
    return ops.relu(ops.matmul(a, ops.permute(w, dims=(1, 0))))


def integers_times(a: Node, w: Node) -> Node:
    """What int8-dynamic is made of; the weight stands for the shape only."""
    n, k = map(int, w.shape)  # type: ignore[arg-type]
    q = constant("q", integers(n, k))
    made = ops.quantize_rows(a)
    total = ops.cast(ops.int_linear(ops.item(made, index=0), q), dtype=F32)
    return ops.mul(ops.mul(total, ops.item(made, index=1)), constant("s", steps(n)))


@dataclass(frozen=True)
class Case:
    """build(x, weight, *more) over x of `shape`; symbols: names for its first dimensions."""

    weight: Weight
    columns: int
    shape: tuple[int, ...]
    build: Callable[..., Node] = plain
    more: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(x(*s) for s in (self.shape, *self.more))

    def graph(self) -> Graph:
        """As it is written: plain constants."""
        sizes = [*map(symbol, self.names), *self.shape[len(self.names) :]]
        inputs = [graph_input("x", TensorType(F32, tuple(sizes), "cpu"))]
        inputs += [graph_input(f"m{i}", TensorType(F32, s, "cpu")) for i, s in enumerate(self.more)]
        out = self.build(inputs[0], self.weight(self.columns, self.shape[-1]), *inputs[1:])
        return make_graph("g", inputs, (out,), symbols={n: SymbolRange() for n in self.names})


def region_of(graph: Graph) -> Node:
    """The one region with a contraction that the graph becomes."""
    after = FuseRegions().run(PackWeights().run(graph))
    (region,) = (n for n in order(after) if n.op.name == "region" and any(b.op.name in PRODUCTS for b in order(n.attrs["body"])))
    return region


def operands_of(region: Node, graph: Graph, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The operands of a region that the graph became: what other kernels compute is computed by eager."""
    return interpret(replace(graph, outputs=region.inputs), tensors)


CASES: dict[str, Case] = {}


def add(name: str, *given: Any, **more: Any) -> None:
    CASES[name] = Case(*given, **more)


for rows in (1, 2, 5, 20, 21, 70):
    add(f"int8_{rows}", bytes_of(), 100, (rows, 66))
    add(f"int4_{rows}", packed_of(4, 4, True), 100, (rows, 128))
for rows in (1, 3, 40):
    add(f"epilogue_{rows}", packed_of(4, 2, True), 70, (rows, 64), layer, ((70,), (rows, 70)))
    add(f"uint8_zeros_{rows}", bytes_of(U8, 3, True, BF16), 50, (rows, 96))
    add(f"int8_zeros_{rows}", bytes_of(I8, 1, True), 50, (rows, 1100))
    add(f"int2_{rows}", packed_of(2, 2, True), 40, (rows, 64))
    add(f"int1_{rows}", packed_of(1), 40, (rows, 96))
    add(f"bfp6_{rows}", in_format("bfp6"), 50, (rows, 80))
    add(f"split_{rows}", in_format("int4-split3"), 50, (rows, 80))
    add(f"split2_{rows}", in_format("int2-split3"), 33, (rows, 64))
    add(f"narrow_{rows}", of_narrow_integers, 100, (rows, 40))
    add(f"bf16_{rows}", stored(BF16), 100, (rows, 50))
    add(f"f16_{rows}", stored(F16), 100, (rows, 50))
    add(f"dynamic_{rows}", bytes_of(), 100, (rows, 66), integers_times)
add("int4_odd", packed_of(4), 51, (3, 50))
add("int4_long_channels", packed_of(4), 16, (2, 9000))
add("int4_padded_depth", packed_of(4, 4, True, more=28), 33, (6, 100))
add("int4_padded_bytes", packed_of(4, 1, False, more=1), 33, (6, 101))
add("bfp6_odd", in_format("bfp6"), 51, (3, 100))
add("split_odd", in_format("int4-split3"), 51, (3, 41), layer, ((51,), (3, 51)))
add("split_heads", in_format("int4-split3"), 96, (2, 5, 64), heads)
add("narrow_odd", of_narrow_integers, 9, (5, 13))
add("int8_one_column_more", bytes_of(), 49, (4, 64))
add("int8_deep_few_columns", bytes_of(groups=5), 8, (2, 6500))
add("batch", packed_of(4, 2, True), 40, (2, 3, 64))
add("heads_few", packed_of(4, 2, True), 96, (2, 5, 64), heads)
add("heads_many", bytes_of(), 96, (2, 30, 64), heads)
add("matmul_by_the_turned_weight", bytes_of(), 48, (7, 64), turned)
add("no_rows", packed_of(4, 2, True), 40, (0, 64))
add("some_rows", packed_of(4, 2, True), 100, (7, 64), names=("b",))
add("many_of_some_rows", packed_of(4, 2, True), 100, (60, 64), names=("b",))
add("one_of_some_rows", bytes_of(), 100, (1, 66), names=("b",))
add("dynamic_some_rows", bytes_of(), 100, (9, 66), integers_times, names=("b",))
