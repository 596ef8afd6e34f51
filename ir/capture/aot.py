"""What a torch.compile backend needs: AOTAutograd around a compiler of our graphs, for inference and training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
import torch.fx
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import is_lost
from ..graph import Graph
from .decompositions import traced_decompositions
from .direct import direct
from .fx import Binding, capture_fx
from .origin import input_names
from .recurrences import by_eager, in_parts, keep_whole

CompiledGraph = Callable[[list[Any]], Sequence[Any]]  # it may empty the list of inputs
Held = Mapping[int, torch.Tensor]
"""Number of a graph's input -> the parameter or buffer that it was when the graph was captured."""

TRAINING = ("_forward", "_backward")
"""What the names of the two graphs of training end with."""


def compile_fx(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_graph: Callable[[Graph, Held], CompiledGraph],
    on_failure: Callable[[Exception], None] = lambda error: None,
    name: str = "model",
) -> Callable[..., Any]:
    """A callable in place of `gm`, a Dynamo graph.

    compile_graph gets each captured graph (inference as `<name>`, training as `<name>_forward` and `<name>_backward`) with the
    parameters and buffers behind its inputs, and returns a function from the values of its inputs, in order, to those of its outputs.
    What capture or compile_graph raises goes to on_failure (CaptureError: the graph cannot be expressed; anything else is a fault), and
    eager runs it.
    """
    from functorch.compile import make_boxed_func

    if not by_eager(gm, example_inputs):
        keep_whole(gm)
    elif parts := in_parts(gm, lambda part, inputs: compile_fx(part, inputs, compile_graph, on_failure, name)):
        return parts
    binding, owned = Binding(names=input_names(gm)), _Owned(gm, example_inputs)
    inference: list[tuple[Callable[..., Any], int]] = []  # what was made for it, and how many values that takes

    def compiler(suffix: str) -> Callable[..., Any]:
        def compile_one(fx_gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            made = _compiled(fx_gm, inputs, name + suffix, binding, owned, compile_graph, on_failure)
            if made is None:
                return make_boxed_func(fx_gm.forward)
            inference.extend([(made, len(inputs))] if suffix not in TRAINING else [])
            return made

        return compile_one

    wrapped = _aot_autograd(gm, example_inputs, compiler)
    return (direct(*inference[0], len(example_inputs)) if inference else None) or wrapped


def _aot_autograd(gm: torch.fx.GraphModule, inputs: Sequence[Any], compiler: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
    """What Dynamo wraps around AOTAutograd imports much of Inductor (0.07 s); without gradients and lists nothing of it is needed."""
    from functorch.compile import aot_module_simplified, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    options: dict[str, Any] = {
        "fw_compiler": compiler(TRAINING[0]), "bw_compiler": compiler(TRAINING[1]), "inference_compiler": compiler(""),
        "decompositions": traced_decompositions(), "partition_fn": min_cut_rematerialization_partition,
        "keep_inference_input_mutations": True,
    }  # fmt: skip
    if torch.is_grad_enabled() or any(isinstance(x, (list, tuple, dict)) for x in inputs):
        return aot_autograd(**options)(gm, inputs)
    return torch._dynamo.disable(aot_module_simplified(gm, inputs, **options), reason="it is compiled")


def _compiled(
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    name: str,
    binding: Binding,
    owned: _Owned,
    compile_graph: Callable[[Graph, Held], CompiledGraph],
    on_failure: Callable[[Exception], None],
) -> Callable[..., Any] | None:
    aside = _Aside.of(gm, inputs)
    try:
        with _disable_current_modes():  # with dynamic shapes we are called under a fake mode; constants are real, and folded for real
            captured = capture_fx(gm, inputs, name, replace(binding, aside=frozenset(aside.names.values())))
            run = compile_graph(captured.graph, owned.behind(gm, aside.names))
    except Exception as error:  # whatever goes wrong here must not take the user's model down
        if is_lost(error):  # eager cannot run it either
            raise
        on_failure(error)
        return None

    def boxed(args: list[Any]) -> Sequence[Any]:
        """AOTAutograd's calling convention: the callee owns the list and empties it."""
        return captured.restore(run(args))

    def as_it_is(args: list[Any]) -> Sequence[Any]:
        return run(args)

    made = aside.put(boxed) if aside.names else as_it_is if captured.plain else boxed
    made._boxed_call = True  # type: ignore[attr-defined]
    return made


@dataclass(frozen=True)
class _Aside:
    """Inputs that are neither tensors nor sizes, which nothing computes with: the meshes that DTensors bring along, for the backward graph.

    names: by the number of the input, ascending. returned: number of a result -> that of the input it is.
    """

    names: dict[int, str]
    returned: dict[int, int]

    @staticmethod
    def of(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> _Aside:
        (results,) = gm.graph.output_node().args
        values = [i for i, x in enumerate(inputs) if not isinstance(x, (torch.Tensor, int, torch.SymInt))]
        nodes = list(gm.graph.find_nodes(op="placeholder"))
        alone = {i: nodes[i] for i in values if all(reader.op == "output" for reader in nodes[i].users)}
        numbers = {node: i for i, node in alone.items()}
        returned = {at: numbers[x] for at, x in enumerate(results) if x in numbers}  # type: ignore[arg-type]
        return _Aside({i: node.name for i, node in alone.items()}, returned)

    def put(self, run: CompiledGraph) -> CompiledGraph:
        """`run`, which knows nothing of them, called with them."""

        def call(args: list[Any]) -> Sequence[Any]:
            kept = {at: args[i] for at, i in self.returned.items()}
            for i in reversed(self.names):
                del args[i]
            results = list(run(args))
            for at, value in kept.items():
                results[at] = value
            return results

        return call


class _Owned:
    """The parameters and buffers of a Dynamo graph, none of them kept alive: those it has as attributes, and those it takes as inputs
    (which Dynamo marks as static)."""

    def __init__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._module = weakref.ref(gm)
        self._inputs: dict[int, weakref.ref[torch.Tensor]] = {}
        for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), example_inputs)):
            if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") and isinstance(value, torch.Tensor):
                self._inputs[i] = weakref.ref(value)

    def behind(self, gm: torch.fx.GraphModule, aside: Collection[int]) -> Held:
        """Those among the placeholders of an AOTAutograd graph of it, without those put aside."""
        read = (node for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if i not in aside)
        found = {i: self._behind(node.meta.get("desc")) for i, node in enumerate(read)}
        return {i: value for i, value in found.items() if value is not None}

    def _behind(self, description: Any) -> torch.Tensor | None:
        kind = type(description).__name__
        if kind == "PlainAOTInput" and description.idx in self._inputs:
            return self._inputs[description.idx]()
        if kind in ("ParamAOTInput", "BufferAOTInput") and (module := self._module()) is not None:
            return attrgetter(description.target)(module)
        return None
