"""The decomposition table given to AOTAutograd and torch.export: what we have no op for is taken apart, what we want whole is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._decomp import _core_aten_decompositions_post_autograd, core_aten_decompositions, decomposition_table
from torch._ops import OpOverload

# kept whole: we have them as one op, or a better way of saying them
_KEPT = (
    "native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm", "_softmax", "_log_softmax", "softmax", "log_softmax",
    "gelu", "silu", "linear", "matmul", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "addmm", "addmv",
    "baddbmm", "mv", "dot", "leaky_relu", "threshold", "square", "reciprocal", "rsub", "stack", "split", "split_with_sizes", "unbind",
    "t", "transpose", "squeeze", "slice_scatter", "select_scatter", "roll", "masked_fill", "fill", "zeros", "ones", "zeros_like",
    "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "empty_like", "index_select", "avg_pool1d",
    "adaptive_avg_pool1d", "max_pool1d", "addcmul", "addcdiv", "lerp", "hardtanh", "clamp_min", "clamp_max", "lstm", "gru", "rnn_tanh",
    "rnn_relu",
)  # fmt: skip

# kept whole because a decomposition would draw other random numbers than eager
_RANDOM = (
    "bernoulli", "rrelu", "rrelu_with_noise", "native_dropout", "multinomial", "normal",
)  # fmt: skip

# not in torch's core table
_ADDED = (
    "_native_batch_norm_legit_functional", "linalg_vector_norm", "native_batch_norm_backward", "native_layer_norm_backward",
    "pixel_shuffle", "im2col", "elu",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def decompositions() -> dict[Any, Callable[..., Any]]:
    """ATen overload -> its decomposition, for torch.export: composite ops are in it."""
    return _without_kept(core_aten_decompositions())


@functools.lru_cache(maxsize=1)
def traced_decompositions() -> dict[Any, Callable[..., Any]]:
    """The same for AOTAutograd, below which composite ops take themselves apart: to list those too takes a tenth of a second."""
    return _without_kept(_core_aten_decompositions_post_autograd())


def _without_kept(core: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    kept = {*_KEPT, *_RANDOM}
    table = {op: rule for op, rule in core.items() if _base_name(op) not in kept}
    added = {op: rule for op, rule in decomposition_table.items() if isinstance(op, OpOverload) and _base_name(op) in _ADDED}
    no_stats = torch.ops.aten._native_batch_norm_legit.no_stats  # its other overloads write into the running statistics
    return {**table, **added, no_stats: decomposition_table[no_stats]}


def _base_name(op: Any) -> str:
    """ "softmax" for aten.softmax.int; higher-order operators, which libraries register too, have no schema."""
    return op._schema.name.split("::")[-1] if isinstance(op, OpOverload) else str(op)
