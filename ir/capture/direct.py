"""Calling a compiled inference graph without AOTAutograd's wrappers, where they would do nothing.

The wrappers write back inputs, rebuild outputs that are views, unpack tensor subclasses and thread random state and effects through. A
graph without any of these gets exactly the arguments of the call, and its results are those of the call; it then runs some 5
microseconds sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch._guards import TracingContext

Boxed = Callable[[list[Any]], Sequence[Any]]


def direct(run: Boxed, taken: int, given: int) -> Callable[..., Any] | None:
    """`run` as a function of the arguments, or None if AOTAutograd's wrappers have something to do.

    run: what the inference compiler made, which takes `taken` values; given: how many the Dynamo graph takes. To be called where
    AOTAutograd just compiled the graph: its findings are in torch's tracing context.
    """
    context = TracingContext.try_get()
    meta = context.fw_metadata if context is not None else None
    if meta is None or taken != given or not _plain(meta):
        return None
    return lambda *arguments: run(list(arguments))


def _plain(meta: Any) -> bool:
    """Whether values go in and come out as they are (`meta`: AOTAutograd's ViewAndMutationMeta)."""
    from torch._functorch._aot_autograd.schemas import PlainTensorMeta

    try:
        changed = any(i.mutates_data or i.mutates_metadata or i.mutates_storage_metadata for i in meta.input_info)
        aliased = meta.num_outputs_aliased or meta.num_intermediate_bases
        wrapped = any(not isinstance(m, (int, PlainTensorMeta)) for m in (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta))
        threaded = meta.tokens or meta.num_outputs_rng_offset or meta.is_rng_op_functionalized or meta.num_graphsafe_rng_states
        marked = meta.dynamic_outputs or meta.grad_enabled_mutation is not None or any(o.requires_grad for o in meta.output_info)
    except AttributeError:  # a torch that describes it otherwise
        return False
    return not (changed or aliased or wrapped or threaded or marked)
