"""Types of values: `TensorType(dtype, shape, device)` for tensors, `ScalarType` for Python numbers and sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Union

import sympy
import torch

from .dims import Dim, dim, product, same, same_shape, to_source

Number = Union[bool, int, float, complex]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64", torch.bool: "bool",
    torch.complex64: "c64", torch.complex128: "c128", torch.complex32: "c32",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}  # fmt: skip
NATIVE_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
})  # fmt: skip
"""Element types our ops do arithmetic in. Values of the others are moved, cast and handed to ATen."""

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""Element types that numbers are stored in: casts widen them, and there is no other arithmetic."""

DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorType:
    """A dense tensor value: element type, shape (outermost first) and device string ("cpu", "cuda:0").

    A value has no strides: where layout matters (outputs as eager lays them out, as_strided) it is an op's attribute.
    """

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    device: str = "cpu"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return product(self.shape)

    @property
    def nbytes(self) -> Dim:
        return dim(self.numel * self.dtype.itemsize)

    def with_shape(self, shape: tuple[Dim, ...]) -> TensorType:
        return replace(self, shape=shape)

    def with_dtype(self, dtype: torch.dtype) -> TensorType:
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        dims = ", ".join(to_source(d) for d in self.shape)
        name = DTYPE_NAMES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{name}[{dims}]" + ("" if self.device == "cpu" else f"@{self.device}")


@dataclass(frozen=True)
class ScalarType:
    """A Python number that is no tensor: a literal, or an integer size over the graph's symbols.

    Scalars promote like Python numbers in torch ("weak"): they change the category of a result, never its width.
    """

    dtype: torch.dtype  # bool, int64, float64 or complex128
    value: Number | sympy.Expr | None = None

    def __str__(self) -> str:
        name = {torch.bool: "bool", torch.int64: "int", torch.float64: "float", torch.complex128: "complex"}[self.dtype]
        return f"{name}" if self.value is None else f"{name}={scalar_source(self.value)}"


Type = Union[TensorType, ScalarType, tuple[TensorType, ...]]


def scalar_source(value: Number | sympy.Expr) -> str:
    """A number as the text form writes it, exact: -0.0, inf and nan included."""
    if isinstance(value, sympy.Expr):
        return to_source(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    return repr(value)


def type_source(kind: Type) -> str:
    """A type as the text form writes it; several results in parentheses."""
    return f"({', '.join(str(t) for t in kind)})" if isinstance(kind, tuple) else str(kind)


def scalar_type(value: Number | sympy.Expr) -> ScalarType:
    """The type of a literal or size."""
    if isinstance(value, bool):
        return ScalarType(torch.bool, value)
    if isinstance(value, (int, sympy.Expr)):
        return ScalarType(torch.int64, value)
    return ScalarType(torch.float64 if isinstance(value, float) else torch.complex128, value)


def same_type(a: Type, b: Type) -> bool:
    """Provably equal types (shapes compared up to sympy normal form)."""
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        return a.dtype == b.dtype and a.device == b.device and same_shape(a.shape, b.shape)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_type(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and str(a) == str(b)


def normalize_dim(d: int, rank: int) -> int:
    """A dimension number in [0, rank); raises IndexError outside [-rank, rank)."""
    span = max(rank, 1)
    if not -span <= d < span:
        raise IndexError(f"dimension {d} is out of range for rank {rank}")
    return d % span


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The broadcast shape by torch's rule; raises ValueError where two dims differ and neither is 1."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Dim] = [1] * rank
    for shape in shapes:
        for i, d in enumerate(shape, start=rank - len(shape)):
            if same(d, 1):
                continue
            if not same(out[i], 1) and not same(out[i], d):
                raise ValueError(f"sizes {out[i]} and {d} do not broadcast at dimension {i - rank}")
            out[i] = d
    return tuple(out)


def one_device(*types: TensorType) -> str:
    """The device of the operands with dimensions; 0-d CPU tensors follow the others, as in torch. Raises ValueError where two differ."""
    if len(types) == 1:
        return types[0].device
    devices = {t.device for t in types if t.rank or t.device != "cpu"} or {"cpu"}
    if len(devices) > 1:
        raise ValueError(f"operands live on different devices: {', '.join(sorted(devices))}")
    return devices.pop()


_CATEGORY = {torch.bool: 0, torch.complex32: 3, torch.complex64: 3, torch.complex128: 3}


def category(dtype: torch.dtype) -> int:
    """0 bool, 1 integer, 2 floating, 3 complex: torch's promotion order."""
    return _CATEGORY.get(dtype, 2 if dtype.is_floating_point else 1)


def promote(*types: TensorType | ScalarType) -> torch.dtype:
    """torch.result_type over any number of operands.

    Tensors with dimensions outrank 0-d tensors, which outrank Python numbers: a lower rank only raises the category.
    """
    ranked: list[list[torch.dtype]] = [[], [], []]
    for t in types:
        ranked[2 if isinstance(t, ScalarType) else 1 if t.rank == 0 else 0].append(t.dtype)
    result: torch.dtype | None = None
    for rank, dtypes in enumerate(ranked):
        if not dtypes:
            continue
        best = dtypes[0]
        for d in dtypes[1:]:
            best = torch.promote_types(best, d)
        if rank == 2:
            best = _weak_default(best, result)
        if result is None or category(best) > category(result):
            result = best
    assert result is not None, "promote needs at least one operand"
    return result


_COMPLEX_OF: dict[torch.dtype | None, torch.dtype] = {torch.float64: torch.complex128, torch.float16: torch.complex32}


def _weak_default(dtype: torch.dtype, strong: torch.dtype | None) -> torch.dtype:
    """The dtype a Python number takes when it decides the category."""
    if category(dtype) == 2:
        return torch.get_default_dtype()
    if category(dtype) == 3:
        return _COMPLEX_OF.get(strong, torch.complex64)
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: float32 for 16-bit and 8-bit floats, else the dtype itself."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
