"""Errors of code generation."""

from __future__ import annotations

from ..ir.errors import TilewrightError


class Unsupported(TilewrightError):
    """A printer has no form for a kernel, which then runs by eager with this as the listed reason."""

    template = "{reason}"
