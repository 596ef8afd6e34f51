"""From a kernel to a program: which template prints it. One line per template; the first that takes a kernel prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernel import Kernel
from .attention import build_attention, is_attention, tiles_of
from .attention_tiles import AttentionTiles
from .contraction import build_contraction
from .printer import build_blocks
from .product import is_contraction, without_matrix
from .program import Program
from .recurrence import build_recurrence
from .recurrence_tiles import RecurrenceTiles, is_recurrence, layer_tiles
from .schedule import Schedule, default_schedule
from .tiles import Tiles, default_tiles


@dataclass(frozen=True)
class Template:
    """takes(kernel): whether this template is the one for it; default(kernel): the options to start from; build(kernel, options)."""

    options: type
    takes: Callable[[Kernel], bool]
    default: Callable[[Kernel], Any]
    build: Callable[[Kernel, Any], Program]


def template_of(kernel: Kernel) -> Template:
    return next(t for t in TEMPLATES if t.takes(kernel))


def build(kernel: Kernel, schedule: Any = None) -> Program:
    """The kernel printed under a schedule: the options of its template, by default those it starts from. Raises UnsupportedByTriton."""
    kernel = without_matrix(kernel)
    template = template_of(kernel)
    if schedule is not None and not isinstance(schedule, template.options):
        raise TypeError(f"{kernel.name} is printed with {template.options.__name__}, not with {type(schedule).__name__}")
    return template.build(kernel, schedule or template.default(kernel))


TEMPLATES: tuple[Template, ...] = (
    Template(RecurrenceTiles, is_recurrence, layer_tiles, build_recurrence),
    Template(AttentionTiles, is_attention, tiles_of, build_attention),
    Template(Tiles, is_contraction, default_tiles, build_contraction),
    Template(Schedule, lambda kernel: True, default_schedule, build_blocks),
)
