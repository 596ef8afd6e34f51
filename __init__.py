"""tilewright: a graph-IR compiler and auto-optimizer for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver.artifact import load
    from .driver.budget import Budget
    from .driver.chunks import ChunkReuse, ChunkStore
    from .driver.distributed.pipeline import Pipeline
    from .driver.distributed.shards import shard
    from .driver.generate import Generator
    from .driver.iterated import reuse_blocks
    from .driver.optimize import optimize
    from .driver.padding import padding_counts
    from .driver.prefixes import PrefixStore
    from .driver.receipt import receipts
    from .driver.simplify import simplify
    from .driver.speculation import PromptLookup
    from .driver.split import split
    from .driver.stepping import stepper

_API = {
    "Budget": ".driver.budget",
    "ChunkReuse": ".driver.chunks",
    "ChunkStore": ".driver.chunks",
    "Generator": ".driver.generate",
    "Pipeline": ".driver.distributed.pipeline",
    "PrefixStore": ".driver.prefixes",
    "PromptLookup": ".driver.speculation",
    "load": ".driver.artifact",
    "optimize": ".driver.optimize",
    "padding_counts": ".driver.padding",
    "receipts": ".driver.receipt",
    "reuse_blocks": ".driver.iterated",
    "shard": ".driver.distributed.shards",
    "simplify": ".driver.simplify",
    "split": ".driver.split",
    "stepper": ".driver.stepping",
}
_PACKAGES = ("codegen", "driver", "ir", "passes", "search")

__all__ = [
    "Budget",
    "ChunkReuse",
    "ChunkStore",
    "Generator",
    "Pipeline",
    "PrefixStore",
    "PromptLookup",
    "load",
    "optimize",
    "padding_counts",
    "receipts",
    "reuse_blocks",
    "shard",
    "simplify",
    "split",
    "stepper",
]


def __getattr__(name: str) -> Any:
    """The public functions and the packages, imported when first used: importing tilewright stays fast."""
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _API:
        return getattr(importlib.import_module(_API[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
