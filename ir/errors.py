"""Error classes of the whole package: each is a template, filled with the guilty value and the user's source line."""

from __future__ import annotations

from typing import Any, ClassVar


class TilewrightError(Exception):
    """Base of every error this package raises on purpose.

    A subclass gives `template`, one sentence that says what is wrong and what to do; its fields are keyword arguments.
    `source` (a "file.py:41" string) is appended when known.
    """

    template: ClassVar[str] = "{detail}"

    def __init__(self, source: str = "", **fields: Any) -> None:
        self.source = source
        self.fields = fields
        text = self.template.format(**fields)
        super().__init__(f"{text} (at {source})" if source else text)


class TypeInferenceError(TilewrightError):
    """An op was applied to operands it is not defined for."""

    template = "{op} cannot take {operands}: {reason}"


class UnknownOpError(TilewrightError):
    template = "there is no op named {name!r}; known ops are listed in docs/ops.md"


class VerificationError(TilewrightError):
    """A graph breaks a rule of its stage; `context` shows the nodes around the fault."""

    template = "invalid graph {graph!r}: {reason}\n{context}"


class ParseError(TilewrightError):
    template = "line {line}: {reason}"


class IndexOutOfRange(TilewrightError, IndexError):
    """A computed position lies outside of what it points into."""

    template = "index out of range in {op}"


class CaptureError(TilewrightError):
    """The model cannot be expressed as a graph at all; the caller runs it by eager and lists the reason."""

    template = "cannot capture the model: {reason}"
