"""Contractions with computed operands, as they stand in models of few bits: in C++ they are right, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from low_bit import CASES
from lowering import assert_close, graph_of, memory
from support import NATIVE
from tilewright.codegen.cpp.toolchain import compile_kernels
from tilewright.codegen.lower import lower
from tilewright.codegen.target import Compiled, Failed
from tilewright.ir.interpret import bind_sizes, interpret

pytestmark = NATIVE

REFUSED = {"f8": "have no form in C++", "experts": "limits that are read"}
"""How the name of a case begins -> why C++ has no walk for it: it runs by eager."""

GRAPHS = {name: graph_of(c.build, c.tensors, c.shapes, c.symbols) for name, c in CASES.items()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled | Failed]:
    return dict(zip(GRAPHS, compile_kernels([lower(graph, f"k_{name}") for name, graph in GRAPHS.items()])))


@pytest.mark.parametrize("name", CASES)
def test_low_bit_kernels_are_right_or_refused(name: str, compiled: dict[str, Compiled | Failed]) -> None:
    made, graph, tensors = compiled[name], GRAPHS[name], CASES[name].tensors
    refused = next((reason for start, reason in REFUSED.items() if name.startswith(start)), None)
    if isinstance(made, Failed):
        assert refused is not None and refused in made.reason, made.reason
        return
    assert refused is None
    sizes, inputs = bind_sizes(graph, tensors), [memory(t) for t in tensors]
    eager, exact = interpret(graph, tensors), interpret(graph, tensors, torch.float64)
    results = [torch.full_like(e, 77) for e in eager]
    made.launch(*(t.data_ptr() for t in (*inputs, *results)), *(sizes[s] for s in made.kernel.sizes), 2)
    for triple in zip(results, eager, exact):
        assert_close(*triple)
