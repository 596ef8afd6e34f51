"""Recurrences of a Dynamo graph (`torch.lstm`, `gru`, `rnn_tanh`, `rnn_relu`), which AOTAutograd would take apart, step by step.

In inference each is replaced by an opaque op of ours with the same meaning, which capture knows. In training and under autocast they run
by eager, and what stands between them is compiled in parts: unrolled steps would compile for minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx.passes.split_module import split_module

_SETTINGS = "bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"
_FUNCTIONS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "lstm": (torch.lstm, "Tensor[] hx", "(Tensor, Tensor, Tensor)"),
    **{name: (getattr(torch, name), "Tensor hx", "(Tensor, Tensor)") for name in ("gru", "rnn_tanh", "rnn_relu")},
}
_LIBRARY = torch.library.Library("tilewright", "DEF")


def _define(name: str) -> None:
    function, states, results = _FUNCTIONS[name]

    def fake(x: torch.Tensor, hx: Any, params: Any, biases: bool, layers: int, dropout: float, train: bool, both: bool, first: bool) -> Any:
        hidden = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        batch, steps = x.shape[:2] if first else x.shape[1::-1]
        out = x.new_empty((steps, batch, hidden[0].shape[2] * (2 if both else 1)))
        return out.transpose(0, 1) if first else out, *(torch.empty_like(s, memory_format=torch.contiguous_format) for s in hidden)

    schema = f"{name}(Tensor input, {states}, Tensor[] params, {_SETTINGS}) -> {results}"
    _LIBRARY.define(schema, tags=(torch.Tag.nondeterministic_seeded,))  # dropout between layers
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_LIBRARY)


for _name in _FUNCTIONS:
    _define(_name)

_WHOLE: dict[Any, Any] = {function: getattr(torch.ops.tilewright, name).default for name, (function, _, _) in _FUNCTIONS.items()}


def trace_recurrences() -> None:
    """Lets Dynamo trace nn.LSTM, nn.GRU and nn.RNN, in every backend of the process: by default it breaks the graph there."""
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True


def keep_whole(gm: torch.fx.GraphModule) -> None:
    """Replaces the recurrences of a graph that needs neither autograd nor autocast by the opaque ops."""
    for node in _recurrences(gm):
        node.target = _WHOLE[node.target]
    gm.recompile()


def by_eager(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether recurrences of the graph must see autograd (AOTAutograd will derive a backward graph) or autocast."""
    tensors = [*gm.parameters(), *(x for x in example_inputs if isinstance(x, torch.Tensor))]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return torch._C._is_any_autocast_enabled() or any(n.target is torch.amp.autocast_mode._enter_autocast for n in gm.graph.nodes)


def _recurrences(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The calls on padded batches; packed sequences give sizes in place of the state."""
    called = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _WHOLE]
    return [n for n in called if len(n.args) == 9 and isinstance(n.args[3], bool)]


def in_parts(gm: torch.fx.GraphModule, compile_part: Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]) -> Any:
    """A callable in place of `gm` in which recurrences run by eager and each part between them is compiled; None without recurrences."""
    recurrences = {n: 2 * i + 1 for i, n in enumerate(_recurrences(gm))}
    if not recurrences:
        return None
    current = 0
    part: dict[torch.fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node in recurrences:
            part[node] = recurrences[node]
            current = recurrences[node] + 1
        else:
            part[node] = current
    split = split_module(gm, gm, lambda node: part[node], keep_original_order=True)
    for node in split.graph.nodes:
        if node.op == "call_module" and int(node.target.rsplit("_", 1)[1]) % 2 == 0:
            made = getattr(split, node.target)
            inputs = [n.meta["example_value"] for n in made.graph.find_nodes(op="placeholder")]
            single = _as_tuple(made)
            setattr(split, node.target, _Part(compile_part(made, inputs), single))
    return split


def _as_tuple(gm: torch.fx.GraphModule) -> bool:
    """Makes a graph that returns one value return a tuple of it, as AOTAutograd wants; whether it did."""
    (output,) = gm.graph.find_nodes(op="output")
    if isinstance(output.args[0], (tuple, list)):
        return False
    output.args = ((output.args[0],),)
    gm.recompile()
    return True


class _Part(torch.nn.Module):
    """A compiled part as a submodule; single: it stands for its one result."""

    def __init__(self, run: Callable[..., Any], single: bool) -> None:
        super().__init__()
        self.run, self.single = run, single

    def forward(self, *args: Any) -> Any:
        results = self.run(*args)
        return results[0] if self.single else results
