"""The kernels of benchmarks/schedules.py, smaller ones by hand, and one place for their shorthand: shared by the tests of the search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import schedules as sampled
import torch
from tilewright.codegen.kernel import Kernel
from tilewright.ir import ops

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = sampled.KERNELS
TEMPLATES = {
    "blocks": "softmax, 4096 x 1024 float32",
    "product": "linear + gelu, 4096^3 bfloat16",
    "few rows": "linear + gelu, 1 x 4096 x 4096 bfloat16",
    "experts": "8 experts, 4096 x 1408 x 2048 bfloat16",
    "sparse": "blocks of 64, a third, 2048^3 bfloat16",
    "attention": "attention, causal, 2048, head 64 bfloat16",
    "recurrence": "rnn, 64 rows, 256 units",
}
"""One of each template."""


def kernel(template: str) -> Kernel:
    return KERNELS[TEMPLATES[template]]()


def linear(rows: Any, columns: int, depth: int, dtype: torch.dtype = BF16) -> Kernel:
    return sampled.linear(dtype, rows, columns, depth)


def softmax(rows: int, columns: int, dtype: torch.dtype = F32) -> Kernel:
    return sampled.fused(lambda x: ops.softmax(x, dim=-1), (dtype, (rows, columns)))


def pointwise(count: int, dtype: torch.dtype = F32) -> Kernel:
    return sampled.fused(lambda x: ops.mul(x, 2.0), (dtype, (count,)))


def attention(keys: int, queries: int, width: int = 64, dtype: torch.dtype = BF16) -> Kernel:
    return sampled.attention(dtype, 4, queries, keys, width, False)
