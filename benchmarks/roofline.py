"""What the machine can do at best, and what a workload cannot do without: together the least time it could take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 1536, 384), (1024, 384, 1536), (4096, 512, 4096))
BLOCK = 1 << 26  # floats: 256 MiB, far more than any cache


def machine_limits() -> dict[str, float]:
    """gemm: FLOP/s of the fastest of `GEMMS` by torch.mm. copy: bytes per second read and written by a copy. read: by a reduction."""
    source, target = torch.randn(BLOCK), torch.empty(BLOCK)
    matrix, vector = source.view(1 << 13, -1), torch.randn(1 << 13)
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    readers: tuple[Callable[[], Any], ...] = (source.sum, source.max, lambda: torch.mv(matrix, vector))
    return {"gemm": max(_gemm(*s) for s in GEMMS), "copy": copy, "read": max(source.nbytes / _seconds(f) for f in readers)}


def _gemm(m: int, n: int, k: int) -> float:
    a, b = torch.randn(m, k), torch.randn(k, n)
    out = torch.empty(m, n)
    return 2 * m * n * k / _seconds(lambda: torch.mm(a, b, out=out))


def _seconds(call: Callable[[], Any], rounds: int = 9) -> float:
    """The least time of several: what the machine can do undisturbed."""
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def least_seconds(price: dict[str, int], limits: dict[str, float]) -> float:
    """The roofline: products at the rate of the fastest, or memory at the bandwidth of a copy as far as it writes, of a read beyond."""
    copied = 2 * min(price["read"], price["written"])
    rest = price["read"] + price["written"] - copied
    return max(price["flops"] / limits["gemm"], copied / limits["copy"] + rest / limits["read"])


def price(model: nn.Module, inputs: tuple[torch.Tensor, ...], state: list[torch.Tensor], flops: int | None = None) -> dict[str, int]:
    """Arithmetic of all products; bytes of what is read of parameters, state and inputs, each once; bytes of the results.

    Of a table that is only looked up, the rows count. flops: given where torch's counter does not see the products.
    """
    owned = [*model.parameters(), *model.buffers(), *state, *inputs]
    counter, traffic = FlopCounterMode(display=False, custom_mapping={_ATTENTION: _attention_flops}), _Traffic(owned)
    with torch.no_grad(), counter, traffic:
        result = model(*inputs)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    return {
        "flops": flops if flops is not None else counter.get_total_flops(),
        "read": sum(traffic.read.values()),
        "written": sum(r.nbytes for r in results),
    }


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The CPU's kernel, which torch's counter does not know; as it does for others, causal ones count in full."""
    return sdpa_flop_count(query, key, value)


class _Traffic(TorchDispatchMode):
    """Counts the bytes that ops read of some tensors: all of one that is read at all, of one that is only looked up the rows."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.read: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            table, rows = args[0], torch.unique(args[1]).numel()
            self._count(table, rows * table[0].nbytes)
            self._count(args[1], args[1].nbytes)
        elif not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):  # views read nothing
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs or {})):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf, None)
        return func(*args, **(kwargs or {}))

    def _count(self, tensor: torch.Tensor, nbytes: int | None) -> None:
        key = tensor.untyped_storage().data_ptr()
        size = self.sizes.get(key)
        if size is not None:
            self.read[key] = max(self.read.get(key, 0), size if nbytes is None else min(nbytes, size))
