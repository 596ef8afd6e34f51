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


class DeviceLost(TilewrightError):
    """A GPU met a fault that ends its use by this process. Nobody tries anything else on it: this error goes through to the user."""

    template = (
        "cannot {action}: {reason}; this process has lost the device, by that or by what ran before (CUDA_LAUNCH_BLOCKING=1 tells): "
        "start another"
    )


FATAL = frozenset({4, 46, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
"""Errors of CUDA and HIP after which nothing more runs: illegal addresses and instructions, time-outs, failed assertions, broken memory."""


def is_lost(error: BaseException) -> bool:
    """Whether an error, ours or torch's own, says that a device is lost."""
    return isinstance(error, DeviceLost) or getattr(error, "error_code", 0) in FATAL


class CaptureError(TilewrightError):
    """The model cannot be expressed as a graph at all; the caller runs it by eager and lists the reason."""

    template = "cannot capture the model: {reason}"
