"""Contractions of uneven parts: groups of rows of every number, and blocks of a sparse matrix."""

from __future__ import annotations

import torch
from lowering import Cases, x
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol

F32, F16, BF16, F64, I32, I64 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64

CASES = Cases()
add = CASES.add


def ends(*values: int, dtype: torch.dtype = I32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def grouped(a, w, e):
    return ops.grouped_matmul(a, w, e)


def expert(a, w, e, scale):
    """With what follows in a mixture of experts: an activation, and the weight of the routing."""
    return ops.mul(ops.silu(ops.grouped_matmul(a, w, e)), ops.reshape(scale, shape=(scale.shape[0], 1)))


def transposed(a, w, e):
    """Weights [experts, n, k]."""
    return ops.relu(ops.grouped_matmul(a, ops.permute(w, dims=(0, 2, 1)), e))


def routed(tokens, rows, w, e):
    """The rows of the tokens that each expert was given."""
    return ops.gelu(ops.grouped_matmul(ops.index(tokens, rows, dims=(0,)), w, e))


def low_bit(a, packed, scale, e):
    """Weights [experts, n, k] of four bits each."""
    w = ops.op("dequantize")(ops.op("unpack")(packed, bits=4), scale, dtype=a.dtype)
    return ops.relu(ops.grouped_matmul(a, ops.permute(w, dims=(0, 2, 1)), e))


NAN = x(40, 24)
NAN[3], NAN[30:] = float("nan"), float("inf")

for word, kind in {"f32": F32, "f16": F16, "bf16": BF16, "f64": F64}.items():
    add(f"grouped_{word}", expert, x(70, 24, dtype=kind), x(5, 24, 33, dtype=kind), ends(1, 1, 40, 70, 70), x(70, dtype=kind))
add("all_rows_in_one_group", grouped, x(70, 24), x(4, 24, 33), ends(0, 70, 70, 70))
add("rows_behind_the_last", expert, x(70, 24), x(3, 24, 33), ends(0, 17, 39), x(70))
add("no_group_has_rows", grouped, x(20, 24), x(3, 24, 33), ends(0, 0, 0))
add("one_row_each", grouped, x(3, 24), x(3, 24, 33), ends(1, 2, 3, dtype=I64))
add("one_row", expert, x(1, 24), x(4, 24, 33), ends(0, 0, 1, 1), x(1))
add("no_rows", grouped, x(0, 24), x(3, 24, 33), ends(0, 0, 0))
add("nan_rows", grouped, NAN, x(3, 24, 17), ends(3, 4, 30))
add("transposed", transposed, x(50, 24), x(4, 33, 24), ends(16, 32, 33, 50))
add("transposed_bf16", transposed, x(50, 24, dtype=BF16), x(4, 33, 24, dtype=BF16), ends(16, 32, 33, 50))
add("routed", routed, x(9, 24), torch.arange(50) % 9, x(4, 24, 33), ends(0, 20, 33, 50))
add("cast", lambda a, w, e: ops.neg(ops.grouped_matmul(ops.cast(a, dtype=F32), w, e)), x(30, 24, dtype=BF16), x(2, 24, 33), ends(7, 30))
_PACKED = torch.randint(256, (3, 33, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
add("low_bit", low_bit, x(30, 32, dtype=BF16), _PACKED, x(3, 33, 2, dtype=BF16) / 16, ends(5, 9, 30))
add("selected_ends", lambda a, w, e: ops.grouped_matmul(a, w, ops.select(e, dim=0, index=1)),
    x(30, 24), x(3, 24, 33), torch.tensor([[0, 1, 2], [5, 9, 30]]))  # fmt: skip
add("cast_ends", lambda a, w, e: ops.grouped_matmul(a, w, ops.cast(e, dtype=I32)), x(30, 24), x(3, 24, 33), ends(5, 9, 30, dtype=I64))
add("folded_rows", lambda a, w, e, r: ops.add(ops.reshape(ops.grouped_matmul(a, w, e), shape=(3, 10, 33)), r),
    x(30, 24), x(3, 24, 33), ends(4, 9, 30), x(10, 33))  # fmt: skip
_S = symbol("s")
add("sizes", expert, x(70, 24), x(5, 24, 33), ends(1, 1, 40, 70, 70), x(70),
    shapes=((_S, 24), (5, 24, 33), (5,), (_S,)), symbols={"s": SymbolRange()})  # fmt: skip


# ---- blocks


def sparse(shape: tuple[int, int], block: tuple[int, int], *columns: list[int], dtype: torch.dtype = F32, index: torch.dtype = I32):
    """(values, columns, starts) of a matrix that has blocks in these columns of each block row."""
    counts = torch.tensor([0, *(len(c) for c in columns)])
    flat = [c for row in columns for c in row]
    return x(len(flat), *block, dtype=dtype) / 8, torch.tensor(flat, dtype=index), counts.cumsum(0).to(index)


def layer(a, v, c, s):
    return ops.gelu(ops.op("block_sparse_linear")(a, v, c, s))


def plain(a, v, c, s):
    return ops.op("block_sparse_linear")(a, v, c, s)


def biased(a, v, c, s, b, r):
    return ops.add(ops.add(ops.op("block_sparse_linear")(a, v, c, s), b), r)


ROWS = ([0, 3], [], [1], [0, 1, 2, 3])
HOLES = x(20, 64)
HOLES[:, 32:48] = float("nan")  # read by a block only where one is
for word, kind in {"f32": F32, "f16": F16, "bf16": BF16, "f64": F64}.items():
    add(f"blocks_{word}", biased, x(37, 64, dtype=kind), *sparse((64, 64), (16, 16), *ROWS, dtype=kind), x(64, dtype=kind),
        x(37, 64, dtype=kind))  # fmt: skip
add("tall_blocks", layer, x(2, 5, 64), *sparse((96, 64), (48, 16), [0, 3], [2]))
add("wide_blocks", layer, x(5, 96, dtype=BF16), *sparse((64, 96), (32, 48), [1], [0, 1], dtype=BF16, index=I64))
add("odd_blocks", plain, x(20, 30), *sparse((27, 30), (9, 10), [2, 0], [1], []))
add("empty_rows", layer, x(20, 64), *sparse((64, 64), (16, 16), [], [], [0, 1], []))
add("no_blocks", layer, x(20, 64), *sparse((32, 64), (16, 16), [], []))
add("nan_columns", plain, HOLES, *sparse((48, 64), (16, 16), [0, 1], [2, 3], [3]))
add("rows_of_one", plain, x(20, 64), *sparse((3, 64), (1, 32), [0, 1], [1], [0]))
add("one_token", layer, x(1, 64), *sparse((64, 64), (32, 32), [0, 1], [1]))
add("no_tokens", layer, x(0, 64), *sparse((64, 64), (32, 32), [0, 1], [1]))
add("heads", lambda a, v, c, s: ops.exp(ops.permute(ops.reshape(plain(a, v, c, s), shape=(2, 10, 2, 32)), dims=(0, 2, 1, 3))),
    x(2, 10, 64), *sparse((64, 64), (16, 16), *ROWS))  # fmt: skip
add("some_tokens", layer, x(37, 64), *sparse((64, 64), (16, 16), *ROWS), shapes=((_S, 64), (7, 16, 16), (7,), (5,)),
    symbols={"s": SymbolRange()})  # fmt: skip
