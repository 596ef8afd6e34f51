"""The torch.compile door: `torch.compile(model, backend="tilewright")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..codegen.regions import internal_error
from ..ir.capture import compile_fx
from ..ir.capture.aot import TRAINING, CompiledGraph, Held
from ..ir.errors import CaptureError
from ..ir.graph import Graph
from ..passes.base import Notes, Reason
from .compile import Options, compile_graph
from .errors import BadOption
from .freeze import declined, freeze
from .receipt import failed_receipt, record

MODES = ("default",)


def tilewright(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend. `options` are the fields of `driver.compile.Options`; raises BadOption for anything else.

    options={"freeze": True}: see `driver.freeze`; for inference only, a graph that records gradients keeps its parameters as inputs.

    Every graph leaves a receipt (`tilewright.receipts()`). One that cannot be captured or compiled runs by eager, and its receipt says why.
    """
    checked = checked_options(mode, options)

    def compiled(graph: Graph, notes: Notes) -> CompiledGraph:
        made = compile_graph(graph, checked, notes)
        record(made.receipt)
        return made.program.run

    def frozen(graph: Graph, held: Held) -> CompiledGraph:
        if not checked.freeze:
            return compiled(graph, Notes())
        if graph.name.endswith(TRAINING):
            return compiled(graph, declined(graph, held, Reason.TRAINING))
        return freeze(graph, held, compiled)

    def failed(error: Exception) -> None:
        reason = str(error) if isinstance(error, CaptureError) else internal_error("model", error)
        record(failed_receipt("model", reason, _calls(gm)))

    return compile_fx(gm, example_inputs, frozen, failed)


def checked_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """The options in normal form; raises BadOption, one sentence that names what exists."""
    if mode is not None and mode not in MODES:
        raise BadOption(option=f"mode={mode!r}", reason=f"not available yet; modes are {', '.join(MODES)}")
    fields = {f.name: f for f in dataclasses.fields(Options)}
    for name, value in (options or {}).items():
        if name not in fields:
            raise BadOption(option=f"options[{name!r}]", reason=f"there is no such option; options are {', '.join(fields)}")
        kind = type(fields[name].default) if fields[name].default is not None else str
        if not isinstance(value, kind):
            raise BadOption(option=f"options[{name!r}]", reason=f"it must be a {kind.__name__}, not {value!r}")
    made = Options(**(options or {}))
    _passes(made)
    return made


def _passes(options: Options) -> None:
    """Reports unknown passes before anything is compiled."""
    from .pipeline import passes_from

    passes_from(options.passes)


def _calls(gm: torch.fx.GraphModule) -> int:
    return sum(n.op.startswith("call_") for n in gm.graph.nodes)
