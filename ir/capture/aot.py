"""What a torch.compile backend needs: AOTAutograd around a compiler of our graphs, for inference and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch.utils._python_dispatch import _disable_current_modes

from ..graph import Graph
from .decompositions import decompositions
from .fx import Binding, capture_fx
from .origin import input_names

CompiledGraph = Callable[[list[Any]], Sequence[Any]]  # it may empty the list of inputs


def compile_fx(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_graph: Callable[[Graph], CompiledGraph],
    on_failure: Callable[[Exception], None] = lambda error: None,
    name: str = "model",
) -> Callable[..., Any]:
    """A callable in place of `gm`, a Dynamo graph.

    compile_graph gets each captured graph (inference as `<name>`, training as `<name>_forward` and `<name>_backward`) and returns a
    function from the values of its inputs, in order, to those of its outputs. What capture or
    compile_graph raises goes to on_failure (CaptureError: the graph cannot be expressed; anything else is a fault), and eager runs it.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    binding = Binding(names=input_names(gm))

    def compiler(suffix: str) -> Callable[..., Any]:
        return lambda fx_gm, inputs: _compiled(fx_gm, inputs, name + suffix, binding, compile_graph, on_failure)

    backend = aot_autograd(
        fw_compiler=compiler("_forward"), bw_compiler=compiler("_backward"), inference_compiler=compiler(""),
        decompositions=decompositions(), partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True,
    )  # fmt: skip
    return backend(gm, example_inputs)


def _compiled(
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    name: str,
    binding: Binding,
    compile_graph: Callable[[Graph], CompiledGraph],
    on_failure: Callable[[Exception], None],
) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func

    try:
        with _disable_current_modes():  # with dynamic shapes we are called under a fake mode; constants are real, and folded for real
            captured = capture_fx(gm, inputs, name, binding)
            run = compile_graph(captured.graph)
    except Exception as error:  # whatever goes wrong here must not take the user's model down
        on_failure(error)
        return make_boxed_func(gm.forward)

    def boxed(args: list[Any]) -> list[Any]:
        """AOTAutograd's calling convention: the callee owns the list and empties it."""
        values = list(args)
        args.clear()
        return captured.restore(run(values))

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
