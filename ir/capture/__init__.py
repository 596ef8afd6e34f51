"""Capture: torch.fx graphs of ATen ops become our graphs."""

from __future__ import annotations

from .aot import compile_fx
from .decompositions import decompositions
from .export import CallError, CapturedModule, Signature, from_exported, from_module
from .fx import Binding, Captured, capture_fx, from_fx
from .recurrences import trace_recurrences

__all__ = [
    "Binding", "CallError", "Captured", "CapturedModule", "Signature", "capture_fx", "compile_fx", "decompositions", "from_exported",
    "from_fx", "from_module", "trace_recurrences",
]  # fmt: skip
