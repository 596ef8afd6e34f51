"""A torch.compile backend that interprets the captured graphs and remembers them; and comparison with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tilewright.ir.capture import compile_fx
from tilewright.ir.errors import CaptureError
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from torch.utils._pytree import tree_flatten


@dataclass
class Recorder:
    """`graphs` holds what was captured, `failures` why something was not."""

    graphs: list[Graph] = field(default_factory=list)
    failures: list[CaptureError] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_fx(gm, example_inputs, self._interpreted, self.failures.append)

    def _interpreted(self, graph: Graph, held: Mapping[int, torch.Tensor]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        self.graphs.append(graph)
        assert str(parse(str(graph))) == str(graph)
        return lambda values: interpret(graph, values)

    @property
    def ops(self) -> list[str]:
        return [n.op.name for g in self.graphs for n in order(g)]

    @property
    def externs(self) -> set[str]:
        return {n.attrs["target"] for g in self.graphs for n in order(g) if n.op.name == "extern"}


def compiled(function: Any, dynamic: bool | None = False) -> tuple[Callable[..., Any], Recorder]:
    torch._dynamo.reset()
    recorder = Recorder()
    return torch.compile(function, backend=recorder, dynamic=dynamic, fullgraph=True), recorder


def check(function: Any, *args: Any, dynamic: bool | None = False) -> Recorder:
    """Compiled and eager give the same values, dtypes and strides, and change their arguments in the same way."""
    run, recorder = compiled(function, dynamic)
    ours = copy.deepcopy(args)
    torch.manual_seed(0)
    expected = function(*args)
    torch.manual_seed(0)
    got = run(*ours)
    same(got, expected)
    same(ours, args)
    assert not recorder.failures, recorder.failures
    return recorder


def same(got: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> None:
    leaves, wanted = tree_flatten(got)[0], tree_flatten(expected)[0]
    assert len(leaves) == len(wanted)
    for a, b in zip(leaves, wanted):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
            assert b.numel() == 0 or relevant_strides(a) == relevant_strides(b), f"strides {a.stride()} instead of {b.stride()}"
        else:
            assert a == b and type(a) is type(b)


def relevant_strides(x: torch.Tensor) -> list[int]:
    return [s for n, s in zip(x.shape, x.stride()) if n != 1]
