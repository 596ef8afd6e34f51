"""ATen factories -> `full` and `iota`. Shape, dtype and device are read from the fake result."""

from __future__ import annotations

from typing import Any

import sympy

from ..dims import Dim
from ..types import category
from .call import Call, Converter, Result, full, make


def _number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, sympy.Expr))


def _filled(position: int) -> Converter:
    """The value is argument `position`."""

    def convert(call: Call, *args: Any) -> Result:
        return full(call.type, args[position]) if _number(args[position]) else None

    return convert


def _constant(value: int) -> Converter:
    return lambda call, *args: full(call.type, value)


def _iota(call: Call, start: Any, step: Any) -> Result:
    if category(call.type.dtype) < 2 and (isinstance(start, float) or isinstance(step, float)):
        return None
    length: Dim = call.shape[0]
    return make("iota", length=length, start=start, step=step, dtype=call.type.dtype, device=call.type.device)


CONSTANTS: dict[str, Converter] = {
    "aten.full.default": _filled(1), "aten.full_like.default": _filled(1), "aten.new_full.default": _filled(2),
    "aten.scalar_tensor.default": _filled(0),
    **{f"aten.{name}.default": _constant(0) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"aten.{name}.default": _constant(1) for name in ("ones", "ones_like", "new_ones")},
    # what an uninitialised tensor holds is nobody's to rely on
    **{f"aten.{name}": _constant(0) for name in ("empty.memory_format", "empty_like.default", "new_empty.default", "empty_strided.default",
                                                   "new_empty_strided.default", "empty_permuted.default")},
    "aten.arange.default": lambda call, stop, *rest: _iota(call, 0, 1),
    "aten.arange.start": lambda call, start, stop, *rest: _iota(call, start, 1),
    "aten.arange.start_step": lambda call, start, stop, step, *rest: _iota(call, start, step),
    "prims.iota.default": lambda call, length, start, step, *rest: _iota(call, start, step),
}  # fmt: skip
