"""The rows of the benchmark, the most important first: what is measured, and about how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from . import checks, kernels, models
from .clock import Answer
from .place import NotHere, Place

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Row:
    """table: which one it stands in. seconds: what it takes about, compiling included; it is left out where less is left."""

    table: str
    name: str
    measure: Callable[[Place], Answer]
    seconds: float = 10.0


def _checks() -> list[Row]:
    return [Row("checks", name, partial(checks.checked, name), 8.0) for name in checks.CHECKS]


def _bandwidth() -> list[Row]:
    sizes = {"64 MB": {F32: (16_384, 1024), BF16: (32_768, 1024)}, "256 MB": {F32: (16_384, 4096), BF16: (32_768, 4096)}}
    words = {"gelu chain": kernels.chain, "softmax": kernels.soft, "layer norm": kernels.norm, "add, rms norm": kernels.residual_norm}
    return [
        Row("bandwidth", f"{word}, {str(dtype).removeprefix('torch.')}, {size}", partial(kernels.bandwidth, build, dtype, *shape))
        for size, shapes in sizes.items()
        for dtype, shape in shapes.items()
        for word, build in words.items()
    ]


def _product(name: str, m: int, n: int, k: int, dtype: torch.dtype = BF16, follows: str = "gelu") -> Row:
    return Row("products", name, partial(kernels.product, m=m, n=n, k=k, dtype=dtype, follows=follows), 15.0)


def _attention(name: str, **shape: int) -> Row:
    return Row("attention", name, partial(kernels.attention, **shape), 15.0)


def _models(peers: tuple[str, ...], table: str, seconds: float) -> list[Row]:
    return [Row(table, name, partial(models.compared, name, peers), seconds) for name in models.MODELS]


def _tuned(row: Row) -> Row:
    """The same under the schedule that a search finds."""
    return replace(row, name=f"{row.name}, tuned", measure=lambda place: row.measure(replace(place, tuned=True)), seconds=60.0)


def _ranked(name: str, place: Place) -> Answer:
    try:
        from .ranking import ranked
    except ImportError as error:
        raise NotHere(f"this version has no cost model of GPUs: {error}") from error
    return ranked(name, place)


CAUSAL = {"batch": 4, "queries": 4096, "keys": 4096, "causal": True}
STEP = {"batch": 8, "queries": 1, "causal": False, "head": 128}

LAYER = _product("bfloat16 4096^3, bias and GELU", 4096, 4096, 4096)
HEAD_64 = _attention("causal 4096, head 64", heads=32, shared=32, head=64, **CAUSAL)
HEAD_128 = _attention("causal 4096, head 128", heads=16, shared=16, head=128, **CAUSAL)
FOUR_BITS = Row("few bits", "4-bit weights, batch 1, 4096^2", partial(kernels.vector_product, bits=4))

ROWS: tuple[Row, ...] = (
    *_checks(),
    LAYER,
    HEAD_64,
    HEAD_128,
    *_bandwidth()[:8],
    FOUR_BITS,
    Row("few bits", "8-bit weights, batch 1, 4096^2", partial(kernels.vector_product, bits=8)),
    *_models(models.DEFAULT, "models", 60.0),
    *map(_tuned, (LAYER, HEAD_64, HEAD_128, FOUR_BITS)),
    *_models(models.REPLAYED, "models, replayed", 60.0)[:2],
    _product("bfloat16 4096^3", 4096, 4096, 4096, follows=""),
    _product("float16 8192x1024x4096, bias and GELU", 8192, 1024, 4096, F16),
    _product("bfloat16 16x4096x4096, bias and GELU", 16, 4096, 4096),
    _product("bfloat16 1x4096x4096, bias and GELU", 1, 4096, 4096),
    _product("float32 512^3, bias and GELU", 512, 512, 512, F32),
    _attention("one query, cache of 8192, 4 heads share keys", heads=32, shared=8, keys=8192, **STEP),
    _attention("one query, cache of 32768", heads=16, shared=16, keys=32_768, **STEP),
    Row("few bits", "int8 by int8, 4096^3", kernels.integer_product),
    Row("ranking", "product, bfloat16 4096^3", partial(_ranked, "product"), 60.0),
    Row("ranking", "one row, bfloat16 4096^2", partial(_ranked, "one row"), 60.0),
    Row("ranking", "attention, causal 4096", partial(_ranked, "attention"), 60.0),
    Row("ranking", "softmax, 64 MB", partial(_ranked, "softmax"), 30.0),
    *map(_tuned, _bandwidth()[:8]),
    *_bandwidth()[8:],
    *_models(models.REPLAYED, "models, replayed", 60.0)[2:],
    *_models(models.TUNED, "models, max-autotune", 180.0),
)
