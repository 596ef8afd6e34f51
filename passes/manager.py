"""Runs passes in order with one callback between them, and reads passes from the command line."""

from __future__ import annotations

import dataclasses
import re
import time
import typing
from collections.abc import Callable, Sequence

from ..ir.errors import TilewrightError
from ..ir.graph import Graph
from .base import Notes, Pass
from .canonicalize import Canonicalize
from .choose_layouts import ChooseLayouts
from .fold_constants import FoldConstants
from .fold_norms import FoldNorms
from .fuse_regions import FuseRegions
from .merge_linears import MergeLinears
from .merge_tokens import MergeTokens
from .pack_weights import PackWeights
from .plan_memory import PlanMemory
from .prune_blocks import PruneBlocks
from .quantize import Plan, Quantize
from .recognize import Recognize
from .reuse_kv import ReuseKV
from .split_batch import SplitBatch, SplitHalves
from .split_bias import SplitBias
from .split_space import SplitSpace

_KINDS = (
    Canonicalize, ChooseLayouts, FoldConstants, FoldNorms, FuseRegions, MergeLinears, MergeTokens, PackWeights, PlanMemory,
    PruneBlocks, Quantize, Recognize, ReuseKV, SplitBatch, SplitBias, SplitHalves, SplitSpace,
)  # fmt: skip

PASSES: dict[str, type[Pass]] = {kind.name: kind for kind in _KINDS}
"""What `--passes` knows, by name."""


Callback = Callable[[Pass, Graph, Graph, float], None]
"""Called after each pass with the pass, the graph before, the graph after and the seconds it took: verify, time, dump, diff."""


class StageError(TilewrightError):
    """Passes in an order that cannot work."""

    template = "pass {name!r} needs a graph that is at least {needs}, and {graph!r} is {stage}: run {hint} before it"


class PassSyntaxError(TilewrightError):
    """A list of passes that cannot be read."""

    template = "--passes {text!r}: {reason}"


def run_passes(graph: Graph, passes: Sequence[Pass], notes: Notes, callback: Callback | None = None) -> Graph:
    """The graph after all `passes`, or as far as the steps of `notes` may go. Raises StageError."""
    for item in passes:
        if notes.steps is not None and not notes.steps.enter(item.name):
            return graph
        if graph.stage < item.needs:
            hint = " or ".join(repr(p.name) for p in passes if p.leaves is not None and p.leaves >= item.needs) or "a pass that makes it so"
            raise StageError(name=item.name, needs=item.needs.name.lower(), graph=graph.name, stage=graph.stage.name.lower(), hint=hint)
        start = time.perf_counter()
        after = item.run(graph, notes)
        if callback is not None:
            callback(item, graph, after, time.perf_counter() - start)
        graph = after
    return graph


def options(kind: type[Pass]) -> dict[str, type]:
    """Option name -> type of a pass: its fields."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def pass_text(item: Pass) -> str:
    """The pass as `parse_passes` reads it."""
    changed = [f for f in dataclasses.fields(item) if getattr(item, f.name) != f.default]
    body = ", ".join(f"{f.name}={_text(getattr(item, f.name))}" for f in changed)
    return f"{item.name}{{{body}}}" if body else item.name


def _text(value: object) -> str:
    if isinstance(value, Plan):
        value = value.entries
    if not isinstance(value, tuple):
        return str(value)
    return " ".join(v if isinstance(v, str) else ":".join(map(str, v)) for v in value)


_ITEM = re.compile(r"\s*([a-zA-Z0-9_-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def parse_passes(text: str) -> list[Pass]:
    """The passes of "fuse-regions,merge-linears{max_columns=4096}", looked up in PASSES by name.

    Raises PassSyntaxError: one sentence that lists what exists.
    """
    found: list[Pass] = []
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise PassSyntaxError(text=text, reason=f"expected name{{option=value, ...}} at {text[position:]!r}")
        found.append(_pass(text, match[1].replace("_", "-"), match[2] or ""))
        position = match.end()
    return found


def _pass(text: str, name: str, body: str) -> Pass:
    kind = PASSES.get(name)
    if kind is None:
        raise PassSyntaxError(text=text, reason=f"there is no pass {name!r}; passes are {', '.join(sorted(PASSES))}")
    fields = options(kind)
    values: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in body.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in fields:
            exist = f"its options are {', '.join(fields)}" if fields else "it has none"
            raise PassSyntaxError(text=text, reason=f"pass {name!r} has no option {key!r}; {exist}")
        if not equals:
            raise PassSyntaxError(text=text, reason=f"option {key!r} of {name!r} is given as {key}=value")
        values[key] = _value(text, f"option {key!r} of {name!r}", fields[key], value)
    return kind(**values)


_BOOLS = {"true": True, "false": False}
_WANTED: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number"}


def _value(text: str, what: str, kind: type, value: str) -> object:
    if kind == tuple[str, ...]:
        return tuple(value.split())
    if kind is Plan:
        return Plan.parse(value)
    try:
        if kind == tuple[tuple[str, int], ...]:
            return tuple((name, int(count)) for name, _, count in (item.rpartition(":") for item in value.split()))
        return _BOOLS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = _WANTED.get(kind, "name:number ...")
        raise PassSyntaxError(text=text, reason=f"{what} takes {wanted}, not {value!r}") from None
