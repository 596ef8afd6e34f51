"""From a kernel to a program: which template prints it. One line per template; the first that takes a kernel prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernel import Kernel
from .layout import layout_of
from .legalize import legalize
from .printer import print_kernel
from .program import Launch, Program, blocks_of, function_name, pointers
from .schedule import Schedule, default_schedule


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
    template = template_of(kernel)
    if schedule is not None and not isinstance(schedule, template.options):
        raise TypeError(f"{kernel.name} is printed with {template.options.__name__}, not with {type(schedule).__name__}")
    return template.build(kernel, schedule or template.default(kernel))


def build_blocks(kernel: Kernel, schedule: Schedule) -> Program:
    """Points and reductions: the program of `printer`."""
    layout = layout_of(legalize(kernel), schedule)
    constants = {d.constant: d.block for d in layout.dimensions}
    whole = tuple((g.span.extent, g.block) for g in layout.groups if not g.looped)
    grid = (blocks_of(layout.grid.extent, constants.get("XBLOCK", 1)),)
    warps, stages, wide = schedule.num_warps, schedule.num_stages, schedule.wide
    launch = Launch(function_name(kernel), pointers(kernel), grid, constants, warps, stages, wide)
    return Program(kernel, schedule, print_kernel(kernel, schedule), (launch,), whole=whole)


TEMPLATES: tuple[Template, ...] = (Template(Schedule, lambda kernel: True, default_schedule, build_blocks),)
