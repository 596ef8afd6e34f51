"""From a kernel to a program: which template prints it. One line per template; the first that takes a kernel prints it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from ...ir.dims import evaluate
from ..kernel import Kernel
from .attention import build_attention, is_attention, tiles_of
from .attention_tiles import AttentionTiles
from .contraction import build_contraction
from .legalize import UnsupportedByTriton
from .printer import build_blocks
from .product import is_contraction, without_matrix
from .program import Program
from .ragged import build_ragged
from .ragged_roles import is_ragged
from .recurrence import build_recurrence
from .recurrence_tiles import RecurrenceTiles, is_recurrence, layer_tiles
from .schedule import NARROW, Schedule, default_schedule, is_wide, may_be_wide, reach
from .smaller import smaller
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
    """The kernel printed under a schedule: the options of its template, by default those that were chosen for it, or that it starts from.

    Raises UnsupportedByTriton.
    """
    kernel = without_matrix(kernel)
    template = template_of(kernel)
    if schedule is not None and not isinstance(schedule, template.options):
        raise TypeError(f"{kernel.name} is printed with {template.options.__name__}, not with {type(schedule).__name__}")
    program = template.build(kernel, schedule or chosen(kernel, template))
    if program.schedule.wide or not is_wide(kernel, program.scratch):
        return program
    return template.build(kernel, replace(program.schedule, wide=True))


def widened(program: Program) -> Program | None:
    """The same program for sizes whose offsets pass 32 bits, where some do; `reach` says which."""
    kernel = program.kernel
    if program.schedule.wide or not may_be_wide(kernel, program.scratch):
        return None
    return template_of(kernel).build(replace(kernel, name=f"{kernel.name}_wide"), replace(program.schedule, wide=True))


def is_large(program: Program, sizes: Mapping[str, int]) -> bool:
    """Whether these sizes are such."""
    return evaluate(reach(program.kernel, program.scratch), sizes) >= NARROW


def chosen(kernel: Kernel, template: Template) -> Any:
    """The options that a kernel's `schedule` names; those it starts from where it names none. Raises UnsupportedByTriton."""
    kinds, values = get_type_hints(template.options), dict[str, Any]()
    for item in kernel.schedule.split():
        name, _, text = item.partition("=")
        value = int(text) if text.isdecimal() else {"True": True, "False": False}.get(text, text)
        if name in _OF_THE_KERNEL or kinds.get(name) is not type(value):
            raise UnsupportedByTriton(what=kernel.name, reason=f"{item} is no option of {template.options.__name__}")
        values[name] = value
    start = template.default(kernel)
    return template.options(**values, **{name: getattr(start, name) for name in _OF_THE_KERNEL}) if values else start


def following(kernel: Kernel, failed: Any, first: bool) -> Any:
    """The schedule to try after one that does not work: the one to start from, where the first was another; else a smaller one, or None."""
    kernel = without_matrix(kernel)
    start = template_of(kernel).default(kernel)
    return start if first and kernel.schedule and failed != start else smaller(failed)


def text_of(schedule: Any) -> str:
    """A schedule as `Kernel.schedule` has it, "block_m=128 num_warps=8": the first option, and those that are not what they usually are."""
    first, *rest = (f for f in fields(schedule) if f.name not in _OF_THE_KERNEL)
    return " ".join(f"{f.name}={getattr(schedule, f.name)}" for f in (first, *rest) if f is first or getattr(schedule, f.name) != f.default)


_OF_THE_KERNEL = ("wide",)
"""Options that are no choice: whether indices need 64 bits."""


TEMPLATES: tuple[Template, ...] = (
    Template(RecurrenceTiles, is_recurrence, layer_tiles, build_recurrence),
    Template(AttentionTiles, is_attention, tiles_of, build_attention),
    Template(Tiles, is_ragged, default_tiles, build_ragged),
    Template(Tiles, is_contraction, default_tiles, build_contraction),
    Template(Schedule, lambda kernel: True, default_schedule, build_blocks),
)
