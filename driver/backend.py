"""The torch.compile door: `torch.compile(model, backend="tilewright")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..codegen.regions import internal_error
from ..ir.capture import compile_fx, trace_recurrences
from ..ir.capture.aot import TRAINING, CompiledGraph, Held
from ..ir.errors import CaptureError
from ..ir.graph import Graph
from ..passes.base import Notes, Reason
from .compile import Compiled, Options, compile_graph
from .errors import BadOption
from .freeze import declined, freeze
from .packed import compile_packed, plan_without_padding
from .padding import recorded
from .receipt import failed_receipt, record
from .replay import device_to_record, replayed

MODES = {"default": {}, "max-autotune": {"max_autotune": True}, "reduce-overhead": {"cuda_graphs": True}}
"""Mode -> the options that it sets."""

trace_recurrences()  # when the backend is loaded: Dynamo decides what it traces before it calls one


def tilewright(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend. `options` are the fields of `driver.compile.Options`; raises BadOption for anything else.

    options={"freeze": True}: see `driver.freeze`; for inference only, a graph that records gradients keeps its parameters as inputs.
    mode="max-autotune", or options={"max_autotune": True}: see `driver.tune`; it does not freeze, as torch.compile's own mode does not:
    whoever wants both says options={"max_autotune": True, "freeze": True}.
    mode="reduce-overhead", or options={"cuda_graphs": True}: see `driver.replay`; for inference on one GPU with sizes that stay.
    options={"remove_padding": True}: see `driver.padding`; for inference, `tilewright.padding_counts()` says how calls went.

    Every graph leaves a receipt (`tilewright.receipts()`). One that cannot be captured or compiled runs by eager, and its receipt says why.
    """
    checked = checked_options(mode, options)

    def compiled(graph: Graph, notes: Notes, held: Held) -> CompiledGraph:
        place = device_to_record(graph, notes) if checked.cuda_graphs else None
        packed = plan_without_padding(graph, checked, notes) if checked.remove_padding and not graph.name.endswith(TRAINING) else None
        made = _tuned(graph, checked, notes, held) if checked.tunes else compile_graph(graph, checked, notes)
        record(made.receipt)
        if packed is not None:
            return recorded(compile_packed(packed, checked, made.graph), made.program.run)
        return made.program.run if place is None else replayed(made.program.run, graph, held, place)

    def frozen(graph: Graph, held: Held) -> CompiledGraph:
        if not checked.freeze:
            return compiled(graph, Notes(), held)
        if graph.name.endswith(TRAINING):
            return compiled(graph, declined(graph, held, Reason.TRAINING), held)
        return freeze(graph, held, compiled)

    def failed(error: Exception) -> None:
        reason = str(error) if isinstance(error, CaptureError) else internal_error("model", error)
        record(failed_receipt("model", reason, _calls(gm)))

    return compile_fx(gm, example_inputs, frozen, failed)


def checked_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """The options in normal form; raises BadOption, one sentence that names what exists."""
    if (mode or "default") not in MODES:
        raise BadOption(option=f"mode={mode!r}", reason=f"not available; modes are {', '.join(MODES)}")
    fields = {f.name: f for f in dataclasses.fields(Options)}
    for name, value in (options or {}).items():
        if name not in fields:
            raise BadOption(option=f"options[{name!r}]", reason=f"there is no such option; options are {', '.join(fields)}")
        kind = type(fields[name].default) if fields[name].default is not None else str
        if not isinstance(value, (int, float) if kind is float else kind) or (kind is float and isinstance(value, bool)):
            raise BadOption(option=f"options[{name!r}]", reason=f"it must be a {kind.__name__}, not {value!r}")
    made = Options(**{**MODES[mode or "default"], **(options or {})})
    if made.offload and not made.freeze:
        raise BadOption(option="options['offload']", reason="it moves what freezing leaves over: it needs options['freeze'] too")
    if made.remove_padding and (made.cuda_graphs or made.passes is not None):
        reason = "rows differ in every call, and the default passes make them: leave out options['cuda_graphs'] and options['passes']"
        raise BadOption(option="options['remove_padding']", reason=reason)
    _passes(made)
    return made


def _tuned(graph: Graph, options: Options, notes: Notes, held: Held) -> Compiled:
    """Measured on inputs made up, but with the parameters themselves."""
    from ..search.examples import example_inputs
    from .tune import compile_tuned

    return compile_tuned(graph, options, example_inputs(graph, held), notes)


def _passes(options: Options) -> None:
    """Reports unknown passes before anything is compiled."""
    from .pipeline import passes_from

    passes_from(options.passes)


def _calls(gm: torch.fx.GraphModule) -> int:
    return sum(n.op.startswith("call_") for n in gm.graph.nodes)
