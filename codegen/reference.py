"""A slow evaluator of kernels with torch, whole axes at a time: it pins what the printers must compute, and tests lowering without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from ..ir.dims import FloorDiv, Mod, evaluate
from ..ir.scalar import Apply, Const, Scalar
from .kernel import INSIDE, Attend, Dot, Kernel, Last, Load, Position, Previous, Recurrence, Reduce, Scan, Store, cone, operands

_BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "floordiv": torch.floor_divide, "mod": torch.remainder,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "fmod": torch.fmod, "min": torch.minimum, "max": torch.maximum,
    "fmin": torch.fmin, "fmax": torch.fmax, "pow": torch.pow, "ipow": torch.pow, "atan2": torch.atan2, "copysign": torch.copysign,
    "nextafter": torch.nextafter, "hypot": torch.hypot, "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "not": torch.bitwise_not, "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift, "where": torch.where,
    "fma": lambda a, b, c: a * b + c,
}  # fmt: skip

_EMPTY = {"sum": 0, "prod": 1, "any": False, "all": True}


def run(kernel: Kernel, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """The outputs of a kernel as flat tensors; inputs are flat buffers in the kernel's order."""
    return _Run(kernel, inputs, sizes).outputs()


class _Run:
    """Every value is a tensor over all axes (extent 1 where it does not depend on one)."""

    def __init__(self, kernel: Kernel, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> None:
        self.kernel = kernel
        self.sizes = dict(sizes)
        self.memory = {b.name: x.reshape(-1) for b, x in zip(kernel.inputs, inputs, strict=True)}
        self.extents = [evaluate(a.extent, self.sizes) for a in kernel.axes]
        self.place = {a.name: k for k, a in enumerate(kernel.axes)}
        self.states: dict[str, torch.Tensor] = {}
        self.names: dict[str, torch.Tensor] = {}
        for k, (axis, n) in enumerate(zip(kernel.axes, self.extents)):
            self.names[axis.name] = torch.arange(n).reshape([n if j == k else 1 for j in range(len(self.extents))])

    def outputs(self) -> list[torch.Tensor]:
        self.found = {b.name: torch.zeros(evaluate(b.size, self.sizes), dtype=b.dtype) for b in self.kernel.outputs}
        self.written = {name: torch.zeros_like(x, dtype=torch.int64) for name, x in self.found.items()}
        if self.kernel.recurrence is not None:
            self.steps(self.kernel.recurrence)
        else:
            self.stores(self.kernel.stores, self.evaluated([s.value for s in self.kernel.stores]))
        assert all((w == 1).all() for w in self.written.values()), "every element is written exactly once"
        return [self.found[b.name] for b in self.kernel.outputs]

    def evaluated(self, roots: Sequence[Scalar], known: Mapping[Scalar, torch.Tensor] | None = None) -> dict[Scalar, torch.Tensor]:
        values: dict[Scalar, torch.Tensor] = dict(known or {})
        for value in cone(roots, values):
            result = self.value(value, values)
            assert result.dtype == value.dtype, f"{value} gave {result.dtype}"
            values[value] = result
        return values

    def stores(self, stores: Sequence[Store], values: Mapping[Scalar, torch.Tensor]) -> None:
        for store in stores:
            index, value = torch.broadcast_tensors(self.index(store.index, self.names), values[store.value])
            self.found[store.buffer][index.reshape(-1)] = value.reshape(-1).to(self.found[store.buffer].dtype)
            self.written[store.buffer].index_add_(0, index.reshape(-1), torch.ones_like(index.reshape(-1)))

    def steps(self, recurrence: Recurrence) -> None:
        """The grid at once, step by step."""
        start = self.evaluated([s.initial for s in recurrence.states])
        self.states = {s.name: start[s.initial] for s in recurrence.states}
        each = [s for s in self.kernel.stores if not isinstance(s.value, Last)]
        along, axis = self.names[recurrence.step], self.place[recurrence.step]
        for step in range(self.extents[axis])[:: -1 if recurrence.reverse else 1]:
            self.names[recurrence.step] = torch.full_like(along.narrow(axis, 0, 1), step)
            values = self.evaluated([*(s.following for s in recurrence.states), *(s.value for s in each)])
            self.stores(each, values)
            self.states = {s.name: values[s.following] for s in recurrence.states}
        last = [s for s in self.kernel.stores if isinstance(s.value, Last)]
        self.stores(last, {s.value: self.states[s.value.state.name] for s in last if isinstance(s.value, Last)})

    def previous(self, value: Previous) -> torch.Tensor:
        assert self.kernel.recurrence is not None
        return self.states[value.state].transpose(self.place[self.kernel.recurrence.unit], self.place[value.at])

    def index(self, expr: sympy.Expr, names: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """An index expression over tensors of positions; the result has one dimension per axis."""
        if expr.is_Integer:
            return torch.full([1] * len(self.extents), int(expr))
        if expr.is_Symbol:
            name = expr.name  # type: ignore[attr-defined]
            return names[name] if name in names else torch.full([1] * len(self.extents), self.sizes[name])
        args = [self.index(a, names) for a in expr.args]  # type: ignore[arg-type]
        result = args[0]
        for a in args[1:]:
            result = _INDEX[type(expr)](result, a)
        return result

    def value(self, value: Scalar, values: Mapping[Scalar, torch.Tensor]) -> torch.Tensor:
        if isinstance(value, Const):
            return torch.full([1] * len(self.extents), value.value, dtype=value.dtype)
        if isinstance(value, Load):
            return self.load(value, values)
        if isinstance(value, Position):
            return self.index(value.index, self.names)
        if isinstance(value, Reduce):
            return self.reduce(value, values[value.value])
        if isinstance(value, Scan):
            k = self.place[value.axis]
            wide = self.spread(values[value.value], (k,))
            return getattr(torch, value.op)(wide, k)
        if isinstance(value, Dot):
            return self.dot(value, *(values[v] for v in operands(value)))
        if isinstance(value, Attend):
            return self.attend(value, values[value.score], values[value.value])
        if isinstance(value, Previous):
            return self.previous(value)
        assert isinstance(value, Apply)
        return _applied(value, [values[a] for a in value.args])

    def load(self, value: Load, values: Mapping[Scalar, torch.Tensor]) -> torch.Tensor:
        names = {**self.names, **{n: values[v] for n, v in value.indirect}}
        index = self.index(value.index, names)
        if value.mask is None:
            return self.memory[value.buffer][index].to(value.dtype)
        index, mask = torch.broadcast_tensors(index, values[value.mask])
        buffer = self.memory[value.buffer]
        if buffer.numel() == 0:
            assert not mask.any(), "a masked load reads nothing where the mask is false"
            return torch.full(index.shape, value.other, dtype=value.dtype)
        read = buffer[torch.where(mask, index, 0)].to(value.dtype)
        return torch.where(mask, read, torch.tensor(value.other, dtype=value.dtype))

    def dot(self, value: Dot, left: torch.Tensor, right: torch.Tensor, *within: torch.Tensor) -> torch.Tensor:
        axes = [self.place[a] for a in value.axes]
        terms = self.spread(left, axes) * right
        if within:
            at, begin, end = within
            terms = torch.where((begin <= at) & (at < end), terms, 0)
        return terms.sum(axes, keepdim=True).to(value.dtype)

    def attend(self, value: Attend, score: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        axis = self.place[value.axis]
        weight = score = self.spread(score, [axis])
        if value.weights == "softmax":
            weight = torch.where((score == -torch.inf).all(axis, keepdim=True), 0, torch.softmax(score, axis))
        return (weight * values).sum(axis, keepdim=True).to(value.dtype)

    def spread(self, value: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        return value.expand([self.extents[k] if k in axes else n for k, n in enumerate(value.shape)])

    def reduce(self, value: Reduce, operand: torch.Tensor) -> torch.Tensor:
        axes = [self.place[a] for a in value.axes]
        wide = self.spread(operand, axes)
        order = [k for k in range(wide.dim()) if k not in axes] + axes
        flat = wide.permute(order).flatten(wide.dim() - len(axes))
        result = self._rows(value, flat)
        return result.reshape([1 if k in axes else n for k, n in enumerate(wide.shape)])

    def _rows(self, value: Reduce, flat: torch.Tensor) -> torch.Tensor:
        if flat.shape[-1] == 0:
            return torch.full(flat.shape[:-1], _identity(value), dtype=value.dtype)
        if value.op in ("max", "min"):
            return getattr(torch, "a" + value.op)(flat, -1)
        if value.op in ("any", "all"):
            return getattr(torch, value.op)(flat.to(torch.bool), -1)
        result = getattr(torch, value.op)(flat, -1)
        return result.to(value.dtype)


def _identity(value: Reduce) -> bool | int | float:
    if value.op in _EMPTY:
        return _EMPTY[value.op]
    if value.op.startswith("arg"):
        return 0
    info = torch.finfo(value.dtype) if value.dtype.is_floating_point else torch.iinfo(value.dtype)
    low, high = (float("-inf"), float("inf")) if value.dtype.is_floating_point else (info.min, info.max)
    return low if value.op == "max" else high


_INDEX: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    sympy.Add: torch.add, sympy.Mul: torch.mul, sympy.Pow: torch.pow, FloorDiv: torch.floor_divide, Mod: torch.remainder,
    sympy.Max: torch.maximum, sympy.Min: torch.minimum,
}  # fmt: skip


def _applied(value: Apply, args: list[torch.Tensor]) -> torch.Tensor:
    if value.op == "cast":
        return args[0].to(value.dtype)
    if value.op == INSIDE:
        at, extent, _, *mask = args
        outside = (at < 0) | (at >= extent)
        if bool((outside & mask[0] if mask else outside).any()):
            raise IndexError("index out of range")
        return at.clamp(min=torch.zeros_like(extent), max=(extent - 1).clamp(min=0))
    if value.op == "bitcast":
        return args[0].view(value.dtype)
    if value.op in _BINARY:
        return _BINARY[value.op](*args)
    return getattr(torch, value.op)(*args) if value.op != "neg" else -args[0]
