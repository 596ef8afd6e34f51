"""Values that a template writes over the dimensions of a block, and operands of products among them."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from ...ir.scalar import Apply, Scalar
from ..attentions import selections
from ..kernel import Kernel, Load, Position, scalars
from .expressions import Expressions, Widths
from .layout import Dimension, Layout
from .scalars import AND, Text
from .unpacked import Unpacking

_VARIABLE = "variable "  # begins the name of the buffer of a load that stands for a variable


def variable(dtype: torch.dtype, name: str, index: sympy.Expr) -> Load:
    """A value that a variable of the function holds, over the axes of an index."""
    return Load(dtype, _VARIABLE + name, index)


class Tile(Unpacking):
    """Writes values over two dimensions of a block."""

    def assign(self, name: str, code: str) -> str:
        """A line of the loop that is being written."""
        assert self.body is not None
        self.body.lines.append(f"{name} = {code}")
        return name

    def define(self, word: str, code: str) -> str:
        """A variable that holds what the code gives where it is written."""
        return self._variable(word, code, self.body or self.outer)

    def fresh(self, word: str) -> str:
        return self._name(word)

    def name_variables(self) -> None:
        """What is made by `variable` is known from here on."""
        for value in scalars(self.kernel.stores):
            if isinstance(value, Load) and value.buffer.startswith(_VARIABLE):
                self._scope(self._free[value]).texts[value] = Text(value.buffer.removeprefix(_VARIABLE))

    def value(self, value: Scalar) -> str:
        self.prepare(value)
        return self.text(value).code

    def masked(self, score: Scalar, mask: str, out: float) -> str:
        """A score that is `out`, 0 or -inf, outside of a mask."""
        other = 'float("-inf")' if out else "0.0"
        if not isinstance(score, Apply) or score not in selections(score, out):
            return f"tl.where({mask}, {self.value(score)}, {other})"
        condition, value, _ = score.args
        self.prepare(condition)
        return f"tl.where({mask} & {self.text(condition).at(AND)}, {self.value(value)}, {other})"

    def limit(self, value: Scalar) -> tuple[str, bool]:
        """An integer, and whether it differs between the rows of the block."""
        along = bool(self.layout.along(self._free[value]))
        if isinstance(value, Position):
            return self._plain_position(value).code, along
        code = self.value(value)
        return (code if self.schedule.wide else f"tl.cast({code}, tl.int32)"), along

    def forget(self, names: set[str]) -> None:
        """Names of a body that ended may be used again."""
        self._taken -= names - {*self.outer.variables.values(), *self._run_names.values()}

    def names(self) -> set[str]:
        return set(self._taken)


class Operand(Tile):
    """Writes operands of products: whole blocks, 0 beyond the extents along which the products are added up."""

    def __init__(
        self, kernel: Kernel, layout: Layout, schedule: Widths, beside: Expressions | None = None, zero: Sequence[Dimension] | None = None
    ) -> None:
        """zero: the dimensions beyond whose extents operands that are loaded are 0; by default all."""
        super().__init__(kernel, layout, schedule, beside)
        self._zero = tuple(layout.dimensions if zero is None else zero)
        reads = [_read(s.value) for s in kernel.stores]
        self._zeroed = {v for v in reads if v is not None and any(d.masked and d in self._zero for d in self._along(v))}

    def _along(self, value: Scalar) -> tuple[Dimension, ...]:
        return self.layout.along(self._free[value])

    def _other(self, value: Load) -> str | None:
        return _zero(value.dtype).code if value in self._zeroed else super()._other(value)

    def operand(
        self, value: Scalar, dtype: torch.dtype | None = None,
        along: Sequence[Dimension] | None = None, zero: Sequence[Dimension] | None = None,
    ) -> str:  # fmt: skip
        """A variable that holds the value in a dtype, as a block along these dimensions (all), 0 beyond the extents of some (`_zero`)."""
        self.prepare(value)
        dtype, read = dtype or value.dtype, _read(value)
        masked = [d for d in (self._zero if zero is None else zero) if d.masked]
        if read in self._zeroed and set(masked) <= set(self._along(value)):
            masked = []
        text, covered = self._filled(value, dtype, masked, _zero(dtype))
        text = self._spread(text, covered, self.layout.dimensions if along is None else along)
        if text.code.isidentifier():
            return text.code
        axes = self._free[value].union(a.name for d in masked for a in d.span.axes)
        return self._variable(self._word(value), text.code, self._scope(axes))


def _zero(dtype: torch.dtype) -> Text:
    return Text("0.0" if dtype.is_floating_point else "0")


def _read(value: Scalar) -> Load | None:
    """The load that the value is, perhaps in another dtype, if that can give 0."""
    while isinstance(value, Apply) and value.op == "cast":
        value = value.args[0]
    return value if isinstance(value, Load) and (value.mask is None or value.other == 0) else None
