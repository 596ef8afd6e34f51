"""Values that a template writes over two dimensions of a block, and operands of `tl.dot` among them."""

from __future__ import annotations

from ...ir.scalar import Apply, Scalar
from ..attentions import hidden
from ..kernel import Load, Position
from .expressions import Expressions
from .scalars import AND, Text


class Tile(Expressions):
    """Writes values over two dimensions of a block."""

    def assign(self, name: str, code: str) -> str:
        """A line of the loop that is being written."""
        assert self.body is not None
        self.body.lines.append(f"{name} = {code}")
        return name

    def fresh(self, word: str) -> str:
        return self._name(word)

    def stand_in(self, value: Scalar, name: str) -> None:
        """A value that is known by a variable."""
        self._scope(self._free[value]).texts[value] = Text(name)

    def value(self, value: Scalar) -> str:
        self.prepare(value)
        return self.text(value).code

    def masked(self, score: Scalar, mask: str) -> str:
        """A score that is -inf outside of a mask."""
        if not isinstance(score, Apply) or score not in hidden(score):
            return f'tl.where({mask}, {self.value(score)}, float("-inf"))'
        condition, value, _ = score.args
        self.prepare(condition)
        return f'tl.where({mask} & {self.text(condition).at(AND)}, {self.value(value)}, float("-inf"))'

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
    """Writes an operand of `tl.dot`: a whole block, 0 where it is masked."""

    def operand(self, value: Scalar) -> str:
        """A variable that holds the value."""
        self.prepare(value)
        text = self.text(value)
        along, masked = self.layout.along(self._free[value]), [d for d in self.layout.dimensions if d.masked]
        if masked and not _is_read(value):
            text = Text(f"tl.where({self._mask(tuple(masked))}, {text.code}, 0.0)")
        if len(along) < self.layout.rank:
            text = Text(f"tl.broadcast_to({text.code}, {self.layout.shape})")
        if text.code.isidentifier():
            return text.code
        return self._variable(self._word(value), text.code, self._scope(self._free[value]))

    def _other(self, value: Load) -> str | None:
        other = super()._other(value)
        masked = any(d.masked for d in self.layout.along(self._free[value]))
        return "0" if other is None and masked else other


def _is_read(value: Scalar) -> bool:
    """Whether the value is 0 wherever nothing is read."""
    if isinstance(value, Load):
        return value.other == 0
    return isinstance(value, Apply) and value.op == "cast" and _is_read(value.args[0])
