"""Formats: in what form the weights of a layer are kept, as a table. What a format makes of a layer is plain ops.

    int8           q i8 [n, k], scale f32 [n, 1]                            w = dequantize(q, scale)
    int4-g32       packed u8 [n, k/2], scale bf16, zero u8 [n, k/32]        w = dequantize(unpack(packed), scale, zero)
    int8-bf16      as int8, which bfloat16 holds; inputs are rounded to it  y = linear(cast(x), cast(q)) * scale
    int8-dynamic   as int8, and the inputs are rounded too, row by row      y = int_linear(quantize_rows(x), q) * both scales

Weights are a matrix here, [n, k]: a row for each output of a layer (each word of an embedding); groups lie along the rows, which are padded
with zeros to whole ones. The size of a layer is that of all its parts, scales and zeros included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..ir.graph import Node
from ..ir.ops import OPS
from .clusters import CLUSTERS, clusters
from .low_rank import factors, rank_for
from .rounding import Grid, Rounded, rounded

Tensors = dict[str, torch.Tensor]
Parts = Mapping[str, Node]
Encode = Callable[[torch.Tensor, "torch.Tensor | None"], Tensors]
ANY = frozenset({"linear", "matmul", "conv", "embedding"})
PRODUCTS = frozenset({"linear"})
"""Readers of a layer whose inputs a format changes."""


@dataclass(frozen=True)
class Format:
    """encode(weight, gram): the parts of a finite float32 matrix, by name; `gram` is x.T @ x of the inputs, where it is known.

    weight(parts, dtype): the matrix that the parts stand for, as a node; it may have columns behind the last. Instead, for what is not
    a matrix, linear(x, parts): the product with it. readers: the ops that may read the layer. bits: of an input of the products.
    inputs: what products round their other operand to, and compute in. scale(parts): [n, 1] by which their results are multiplied.
    plain: the name of the format with the same weights that leaves inputs as they are.
    """

    name: str
    encode: Encode
    weight: Callable[[Parts, torch.dtype], Node] | None = None
    linear: Callable[[Node, Parts], Node] | None = None
    readers: frozenset[str] = ANY
    bits: int = 32
    inputs: torch.dtype | None = None
    scale: Callable[[Parts], Node] | None = None
    plain: str = ""


# -- narrower floats


def _cast(dtype: torch.dtype) -> Format:
    def weight(parts: Parts, wide: torch.dtype) -> Node:
        return OPS["cast"](parts["weight"], dtype=wide)

    return Format(_FLOATS[dtype], lambda w, gram: {"weight": w.to(dtype)}, weight)


_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _fp8() -> Format:
    """e4m3 with a scale for each row, so that its largest weight is the largest number."""
    largest = torch.finfo(torch.float8_e4m3fn).max

    def encode(weight: torch.Tensor, gram: torch.Tensor | None) -> Tensors:
        scale = weight.abs().amax(1, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, 1).clamp(min=torch.finfo(torch.float32).tiny)
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}

    return Format("fp8", encode, lambda parts, dtype: OPS["dequantize"](parts["weight"], parts["scale"], dtype=dtype))


# -- integers


def _integers(name: str, grid: Grid) -> Format:
    return Format(name, lambda w, gram: _stored(rounded(_whole(w, grid), grid, _wide(gram, grid)), grid), _integer_weight(grid))


def _whole(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """With zeros behind the last column, up to whole groups and whole bytes."""
    return torch.nn.functional.pad(weight, (0, grid.padded(weight.shape[1]) - weight.shape[1]))


def _wide(gram: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    if gram is None:
        return None
    more = grid.padded(gram.shape[0]) - gram.shape[0]
    return torch.nn.functional.pad(gram, (0, more, 0, more))


def _stored(found: Rounded, grid: Grid) -> Tensors:
    scale = found.scale.to(grid.scale_dtype)
    if grid.symmetric:
        return {"weight": found.codes.to(torch.int8), "scale": scale}
    return {"weight": packed(found.codes.to(torch.uint8), grid.bits), "scale": scale, "zero": found.zero.to(torch.uint8)}


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """u8 codes [n, k] of so many bits, 8 / bits in a byte, the first in its lowest bits: what `unpack` reads."""
    share = 8 // bits
    parts = codes.view(codes.shape[0], -1, share) << torch.arange(0, 8, bits, dtype=torch.uint8)
    return parts.sum(2, dtype=torch.uint8)


def _integer_weight(grid: Grid) -> Callable[[Parts, torch.dtype], Node]:
    def weight(parts: Parts, dtype: torch.dtype) -> Node:
        if grid.symmetric:
            return OPS["dequantize"](parts["weight"], parts["scale"], dtype=dtype)
        codes = parts["weight"] if grid.bits == 8 else OPS["unpack"](parts["weight"], bits=grid.bits)
        return OPS["dequantize"](codes, parts["scale"], parts["zero"], dtype=dtype)

    return weight


def _dynamic(base: Format) -> Format:
    """Inputs are rounded as they come, each row by its largest; the products are exact."""

    def linear(x: Node, parts: Parts) -> Node:
        rows = OPS["quantize_rows"](x)
        codes, scale = OPS["item"](rows, index=0), OPS["item"](rows, index=1)
        total = OPS["cast"](OPS["int_linear"](codes, parts["weight"]), dtype=torch.float32)
        across = OPS["reshape"](parts["scale"], shape=(parts["scale"].shape[0],))
        return OPS["cast"](OPS["mul"](OPS["mul"](total, scale), across), dtype=x.dtype)

    return Format("int8-dynamic", base.encode, None, linear, PRODUCTS, 8)


def _in_bf16(base: Format) -> Format:
    """The same parts; products run in bfloat16, which matrix units of CPUs and GPUs take. Integers of a row stay what they are."""
    whole_rows = base.name == "int8"

    def weight(parts: Parts, dtype: torch.dtype) -> Node:
        if whole_rows:
            return OPS["cast"](parts["weight"], dtype=dtype)
        return parts["weight"] if base.name == "bf16" else base.weight(parts, dtype)  # type: ignore[misc]

    scale = (lambda parts: parts["scale"]) if whole_rows else None
    readers = ANY - {"embedding"}
    return replace(
        base, name=f"{base.name}-bf16", weight=weight, readers=readers, bits=16, inputs=torch.bfloat16, scale=scale, plain=base.name
    )


# -- SplitQuant


def _split(bits: int) -> Format:
    """w = low[id] + code * step[id], where the id says which of three clusters of its row a weight is of."""

    def encode(weight: torch.Tensor, gram: torch.Tensor | None) -> Tensors:
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4))
        found = clusters(weight)
        low = found.low.to(torch.bfloat16)
        step = ((found.high - low.float()) / ((1 << bits) - 1)).clamp(min=torch.finfo(torch.float32).tiny).to(torch.bfloat16)
        ids = found.ids.long()
        codes = (weight - low.float().gather(1, ids)) / step.float().gather(1, ids)
        codes = codes.round().clamp(0, (1 << bits) - 1).to(torch.uint8)
        return {"weight": packed(codes, bits), "cluster": packed(found.ids, 2), "low": low, "step": step}

    def weight(parts: Parts, dtype: torch.dtype) -> Node:
        cluster = OPS["unpack"](parts["cluster"], bits=2)
        low, step = (_by_cluster(cluster, parts[name]) for name in ("low", "step"))
        code = OPS["cast"](OPS["unpack"](parts["weight"], bits=bits), dtype=torch.float32)
        return OPS["cast"](OPS["add"](OPS["mul"](code, step), low), dtype=dtype)

    return Format(f"int{bits}-split{CLUSTERS}", encode, weight)


def _by_cluster(cluster: Node, table: Node) -> Node:
    """table[..., 3] at cluster[..., k], in float32."""
    last = table.tensor.rank - 1
    columns = [OPS["cast"](OPS["slice"](table, dim=last, start=i, stop=i + 1), dtype=torch.float32) for i in range(CLUSTERS)]
    value = columns[0]
    for i, column in enumerate(columns[1:], 1):
        value = OPS["where"](OPS["eq"](cluster, i), column, value)
    return value


# -- block floating point

BLOCK = 16
"""Weights that share an exponent."""
BIAS = 127
MANTISSA = 31


def _bfp6(name: str, in_order: bool) -> Format:
    """Six bits for a sign and five of mantissa, 2^exponent <= largest of a block; in planes of four and two bits.

    Sorted: columns are ordered by their largest weight, so that large ones share blocks; then the inputs are picked in that order.
    Source: "Accurate Block Quantization in LLMs with Outliers" (Trukhanov and Soloveychik, 2024).
    """

    def encode(weight: torch.Tensor, gram: torch.Tensor | None) -> Tensors:
        order = weight.abs().amax(0).argsort(descending=True, stable=True)
        weight = weight if in_order else weight[:, order]
        blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        exponent = torch.frexp(blocks.abs().amax(2)).exponent.clamp(min=8 - BIAS) - 1
        codes = (torch.ldexp(blocks, 4 - exponent[..., None])).round().clamp(-MANTISSA, MANTISSA) + MANTISSA + 1
        codes = codes.flatten(1).to(torch.uint8)
        parts = {"weight": packed(codes & 15, 4), "above": packed(codes >> 4, 2), "exponent": (exponent + BIAS).to(torch.uint8)}
        return parts if in_order else parts | {"order": order}

    def weight(parts: Parts, dtype: torch.dtype) -> Node:
        low, high = OPS["unpack"](parts["weight"], bits=4), OPS["unpack"](parts["above"], bits=2)
        code = OPS["cast"](OPS["add"](low, OPS["mul"](high, 16)), dtype=torch.int8)
        scale = OPS["exp2"](OPS["sub"](OPS["cast"](parts["exponent"], dtype=torch.float32), BIAS + 4.0))
        return OPS["dequantize"](OPS["sub"](code, MANTISSA + 1), scale, dtype=dtype)

    def linear(x: Node, parts: Parts) -> Node:
        picked = OPS["index"](x, parts["order"], dims=(x.tensor.rank - 1,))
        return OPS["linear"](picked, columns(weight(parts, x.dtype), x.shape[-1]))

    return Format(name, encode, weight) if in_order else Format(name, encode, None, linear, PRODUCTS)


def columns(matrix: Node, count: object) -> Node:
    """The first columns of a matrix."""
    last = matrix.tensor.rank - 1
    return matrix if matrix.shape[last] == count else OPS["slice"](matrix, dim=last, start=0, stop=count)


# -- low rank


def _low_rank(name: str, share: float) -> Format:
    """Two thin factors with that share of the numbers."""

    def encode(weight: torch.Tensor, gram: torch.Tensor | None) -> Tensors:
        n, k = weight.shape
        out, into = factors(weight, rank_for(n, k, share), gram)
        return {"out": out, "into": into}

    def linear(x: Node, parts: Parts) -> Node:
        return OPS["linear"](OPS["linear"](x, _as(parts["into"], x)), _as(parts["out"], x))

    return Format(name, encode, None, linear, PRODUCTS)


def _as(node: Node, like: Node) -> Node:
    return node if node.dtype == like.dtype else OPS["cast"](node, dtype=like.dtype)


def _with_residual(name: str, grid: Grid, rank: int) -> Format:
    """Integers, and a product of rank `rank` of what they miss."""
    base = _integers(name, grid)

    def encode(weight: torch.Tensor, gram: torch.Tensor | None) -> Tensors:
        found = rounded(_whole(weight, grid), grid, _wide(gram, grid))
        missed = weight - found.values[:, : weight.shape[1]]
        out, into = factors(missed, min(rank, *weight.shape), gram)
        return _stored(found, grid) | {"out": out.to(torch.bfloat16), "into": into.to(torch.bfloat16)}

    def linear(x: Node, parts: Parts) -> Node:
        assert base.weight is not None
        whole = OPS["linear"](x, columns(base.weight(parts, x.dtype), x.shape[-1]))
        return OPS["add"](whole, OPS["linear"](OPS["linear"](x, _as(parts["into"], x)), _as(parts["out"], x)))

    return Format(name, encode, None, linear, PRODUCTS)


_INT8 = _integers("int8", Grid(8, symmetric=True))
_PLAIN = (
    _cast(torch.bfloat16),
    _INT8,
    *(_integers(f"int4-g{g}", Grid(4, g)) for g in (32, 64, 128)),
)
_TABLE = (
    *_PLAIN,
    *map(_in_bf16, _PLAIN),
    _cast(torch.float16),
    _fp8(),
    _integers("int8-g32", Grid(8, 32)),
    _dynamic(_INT8),
    *(_integers(f"int2-g{g}", Grid(2, g)) for g in (32, 64)),
    _split(4),
    _split(2),
    _bfp6("bfp6", in_order=True),
    _bfp6("bfp6-sorted", in_order=False),
    _low_rank("rank-half", 0.5),
    _low_rank("rank-quarter", 0.25),
    _with_residual("int4-g64-rank16", Grid(4, 64), 16),
)
FORMATS: Mapping[str, Format] = {f.name: f for f in _TABLE}
