"""Reading values: numbers, dims, attribute values and types, by recursive descent.

value   := sum                                            sizes: + - * // % ( ) max() min(), Python's precedence
sum     := product (("+" | "-") product)*
product := factor (("*" | "//" | "%") factor)*
factor  := "-" factor | atom
atom    := number | string | $3 | [value, ...] | (value, ...) | (value) | name
name    := true | false | none | inf | nan | complex(re, im) | max(...) | min(...) | device("cuda:0") | torch.strided
         | f32 (a dtype) | f32[4, b]@cuda:0 (a type) | b (a size symbol)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from .. import dims
from ..dims import Dim, dim, symbol
from ..ops.structure import Ref
from ..types import DTYPE_NAMES, DTYPES, ScalarType, TensorType, Type
from .tokens import Cursor

WORDS: dict[str, Any] = {
    "true": True, "false": False, "none": None, "True": True, "False": False, "None": None, "inf": math.inf, "nan": math.nan,
}  # fmt: skip
SCALAR_TYPES: dict[str, torch.dtype] = {
    "int": torch.int64, "float": torch.float64, "bool": torch.bool, "complex": torch.complex128,
}  # fmt: skip
ALL_DTYPES: dict[str, torch.dtype] = {
    **{str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype) and d not in DTYPE_NAMES},
    **DTYPES,
}
TORCH_NAMES: dict[str, Any] = {
    str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, (torch.layout, torch.memory_format))
}
_KEYWORDS = ("complex", "device", "torch", "max", "min", "graph", "where", "in", "stage", "strides", "return", "write", "into")
RESERVED = frozenset({*WORDS, *SCALAR_TYPES, *ALL_DTYPES, *_KEYWORDS})
"""Words that name neither a value nor a size symbol."""


class ValueReader:
    """Reads values at a cursor. `symbols` are the size symbols in scope; `declaring` adds those it meets (in the types of inputs)."""

    def __init__(self, cursor: Cursor, symbols: set[str]) -> None:
        self.cursor = cursor
        self.symbols = symbols
        self.declaring = False

    def value(self) -> Any:
        left = self._product()
        while self.cursor.at("+") or self.cursor.at("-"):
            left = self._combine(left, self.cursor.next().text, self._product)
        return left

    def _product(self) -> Any:
        left = self._factor()
        while any(self.cursor.at(s) for s in ("*", "//", "%")):
            left = self._combine(left, self.cursor.next().text, self._factor)
        return left

    def _combine(self, left: Any, sign: str, read: Callable[[], Any]) -> Any:
        right = read()
        if not is_dim(left) or not is_dim(right):
            self.cursor.fail(f"{sign!r} combines sizes only")
        if sign in ("//", "%"):
            return self._divided(left, sign, right)
        return dim({"+": _add, "-": _subtract, "*": _multiply}[sign](left, right))

    def _divided(self, left: Dim, sign: str, right: Dim) -> Dim:
        if right == 0:
            self.cursor.fail("division by zero")
        function = dims.FloorDiv if sign == "//" else dims.Mod
        return dim(function(sympy.sympify(left), sympy.sympify(right)))

    def _factor(self) -> Any:
        negative = False
        while self.cursor.take("-"):
            negative = not negative
        found = self._atom()
        if not negative:
            return found
        if isinstance(found, float):
            return -found
        if not is_dim(found):
            self.cursor.fail("only numbers and sizes have a sign")
        return dim(-found)

    def _atom(self) -> Any:
        token = self.cursor.peek()
        if token.kind == "number":
            return self.cursor.integer() if token.text.isdigit() else float(self.cursor.next().text)
        if token.kind == "string":
            return self.cursor.string()
        if token.kind == "ref":
            return Ref(int(self.cursor.next().text[1:]))
        if self.cursor.at("(") or self.cursor.at("["):
            return self._sequence()
        if token.kind == "name":
            return self._named(self.cursor.next().text)
        return self.cursor.fail(f"expected a value, found {token.text!r}")

    def _sequence(self) -> Any:
        opening = self.cursor.peek().text
        found, commas = self._items(opening, ")" if opening == "(" else "]", self.value)
        return found[0] if opening == "(" and len(found) == 1 and not commas else tuple(found)

    def _items(self, opening: str, closing: str, read: Callable[[], Any]) -> tuple[list[Any], int]:
        """What lies between the brackets, and how many commas."""
        self.cursor.expect(opening)
        self.cursor.enter()
        found: list[Any] = []
        commas = 0
        while not self.cursor.at(closing):
            found.append(read())
            if not self.cursor.take(","):
                break
            commas += 1
        self.cursor.expect(closing)
        self.cursor.leave()
        return found, commas

    def _named(self, name: str) -> Any:
        if name in WORDS:
            return WORDS[name]
        if name in ("max", "min", "complex", "device") and self.cursor.at("("):
            return self._call(name)
        if name == "torch" and self.cursor.take("."):
            return self._torch_name()
        if name in ALL_DTYPES:
            return self._tensor_type(ALL_DTYPES[name]) if self.cursor.at("[") else ALL_DTYPES[name]
        return self._symbol(name)

    def _symbol(self, name: str) -> sympy.Symbol:
        if name in RESERVED:
            self.cursor.fail(f"{name!r} is a reserved word")
        if self.declaring:
            self.symbols.add(name)
        if name not in self.symbols:
            self.cursor.fail(f"undefined name {name!r}")
        return symbol(name)

    def _call(self, name: str) -> Any:
        args, _ = self._items("(", ")", self.value)
        if name == "complex" and len(args) == 2 and all(isinstance(a, (int, float)) for a in args):
            return complex(*args)
        if name == "device" and len(args) == 1 and isinstance(args[0], str):
            return self._device(args[0])
        if name in ("max", "min") and args and all(is_dim(a) for a in args):
            return dim(dims.FUNCTIONS[name.capitalize()](*args))
        return self.cursor.fail(f"{name}() does not take these arguments")

    def _device(self, text: str) -> torch.device:
        try:
            return torch.device(text)
        except RuntimeError:
            self.cursor.fail(f"{text!r} is not a device")

    def _torch_name(self) -> Any:
        name = self.cursor.name("a name of torch")
        if name not in TORCH_NAMES:
            self.cursor.fail(f"torch.{name} is not a layout or memory format")
        return TORCH_NAMES[name]

    def dim(self) -> Dim:
        found = self.value()
        if not is_dim(found):
            self.cursor.fail(f"expected a size, found {found!r}")
        return found

    def type(self) -> Type:
        """f32[b, 4]@cuda:0, a tuple of such, or int, float, bool, complex with an optional `= value`."""
        if self.cursor.at("("):
            return tuple(self._items("(", ")", self._tensor)[0])
        name = self.cursor.name("a type")
        if name in SCALAR_TYPES and not self.cursor.at("["):
            value = self.value() if self.cursor.take("=") else None
            return ScalarType(SCALAR_TYPES[name], value)
        if name not in ALL_DTYPES:
            self.cursor.fail(f"unknown type {name!r}")
        return self._tensor_type(ALL_DTYPES[name])

    def _tensor(self) -> TensorType:
        found = self.type()
        if not isinstance(found, TensorType):
            self.cursor.fail("expected a tensor type")
        return found

    def _tensor_type(self, dtype: torch.dtype) -> TensorType:
        shape = self._items("[", "]", self.dim)[0]
        if any(isinstance(size, int) and size < 0 for size in shape):
            self.cursor.fail("a size is negative")
        return TensorType(dtype, tuple(shape), self._place() or "cpu")

    def _place(self) -> str:
        """`@cuda:0`, if it follows; `@ 1024+4096` is a slot of the arena and is left alone."""
        if not self.cursor.at("@") or self.cursor.peek(1).kind not in ("name", "string"):
            return ""
        self.cursor.next()
        if self.cursor.peek().kind == "string":
            return self.cursor.string()
        name = self.cursor.name("a device")
        return f"{name}:{self.cursor.integer()}" if self.cursor.take(":") else name


def is_dim(value: Any) -> bool:
    return isinstance(value, (int, sympy.Expr)) and not isinstance(value, bool)


def _add(a: Any, b: Any) -> Any:
    return a + b


def _subtract(a: Any, b: Any) -> Any:
    return a - b


def _multiply(a: Any, b: Any) -> Any:
    return a * b
