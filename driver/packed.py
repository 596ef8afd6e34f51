"""Programs over packed rows, compiled: what `driver/padding.py` runs, kept apart because loading a model takes no part of the compiler."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..ir.graph import Graph, constants
from ..passes.base import Notes
from ..passes.canonicalize import Canonicalize
from ..passes.remove_padding import Packed, without_padding
from .compile import Options, build_program, rewritten
from .padding import WithoutPadding
from .pipeline import FINISHING, PREPARING


def plan_without_padding(graph: Graph, options: Options, notes: Notes) -> Packed | None:
    """A captured graph over packed rows; None where it has no such form, with the reason in the notes."""
    return without_padding(rewritten(graph, replace(options, dump=None), PREPARING, Notes(), {}), notes)


def compile_packed(plan: Packed, options: Options, beside: Graph) -> WithoutPadding:
    """A planned graph, compiled. beside: the padded graph after its passes, whose constants it shares."""
    fused = rewritten(plan.graph, replace(options, dump=None), (Canonicalize(), *FINISHING), Notes(), {})
    share_constants(fused, beside)
    return WithoutPadding(replace(plan, graph=fused), build_program(fused))


def share_constants(graph: Graph, other: Graph) -> None:
    """Constants of the same name that are equal become one memory; where they differ, ours get a name of their own."""
    theirs = constants(other)
    for name, data in constants(graph).items():
        ours, their = data.value, theirs[name].value if name in theirs else None
        if ours is None or their is None or ours is their:
            continue
        if ours.dtype == their.dtype and ours.stride() == their.stride() and torch.equal(ours, their):
            ours.data = their
        else:
            data.name = f"{name}.rows"
