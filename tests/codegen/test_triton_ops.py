"""Every pointwise op, and mixes of ops, through lowering and the Triton printer: run in the interpreter, compiled offline."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from support import EVERYWHERE
from triton_kernels import OLD_INTERPRETER

pytest.importorskip("triton")

from tilewright.codegen.lower import lower
from tilewright.codegen.triton.offline import TARGETS, compile_offline
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.scalars import PRINTED
from tilewright.codegen.triton.schedule import Schedule
from tilewright.codegen.triton.templates import build
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Graph, Node, graph_input
from tilewright.ir.interpret import interpret
from tilewright.ir.ops.pointwise import POINTWISE, unprintable
from tilewright.ir.scalar import SCALAR_OPS
from tilewright.ir.types import TensorType

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -2.5, 0.1, -7.0, 10.0, -20.0, 100.0, 1e-6, 6e4, math.inf, -math.inf, math.nan]
INTEGERS = [0, 1, -1, 2, -2, 3, 5, 7, -7, 9, 31, 33, 100, -100, 127, -128]
CATALOGUE = [op for op in POINTWISE if op.name not in ("cast", "gelu")]


def edges(dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.tensor([False, True])
    return torch.tensor(FLOATS, dtype=torch.float64).to(dtype) if dtype.is_floating_point else torch.tensor(INTEGERS).to(dtype)


def operands(op: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every combination of edge values."""
    arity = len(inspect.signature(op.scalar).parameters)
    kinds = [torch.bool if op.name == "where" and k == 0 else dtype for k in range(arity)]
    values = [edges(k) for k in kinds]
    axes = torch.meshgrid(*(torch.arange(len(v)) for v in values), indexing="ij")
    return [v[a.flatten()] for v, a in zip(values, axes)]


@functools.cache
def operand(name: str, dtype: torch.dtype, n: int) -> Node:
    """Ops share their inputs, so that many of them make one kernel."""
    return graph_input(f"{name}_{dtype.itemsize}", TensorType(dtype, (n,)))


def node(op: Any, dtype: torch.dtype, n: int) -> Node | None:
    """The op on inputs of a dtype; None where it is not defined on it. Integer division takes a literal divisor."""
    arity = len(inspect.signature(op.scalar).parameters)
    kinds = [torch.bool if op.name == "where" and k == 0 else dtype for k in range(arity)]
    inputs: list[Any] = [operand(f"x{k}", kind, n) for k, kind in enumerate(kinds)]
    try:
        if unprintable(op, tuple(i.type for i in inputs)):
            inputs[1] = -3 if dtype.is_signed else 3
        return op(*inputs)
    except Exception:
        return None


def assert_close(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Integers equal; floats by the float64 rule with a few units in the last place."""
    if not eager.is_floating_point():
        assert torch.equal(ours, eager)
        return
    a, e, x = ours.double(), eager.double(), exact.double()
    budget = 4 * torch.finfo(eager.dtype).eps * x.abs().nan_to_num() + torch.finfo(eager.dtype).tiny
    agrees = (a == e) | (a.isnan() & e.isnan()) | ((a - x).abs() <= torch.maximum(2 * (e - x).abs().nan_to_num(), budget))
    assert bool(agrees.all()), f"ours {a[~agrees][:5].tolist()}, eager {e[~agrees][:5].tolist()}"


def graph_of(*outputs: Node, symbols: Any = None) -> Graph:
    found: dict[Node, None] = {}
    stack = list(outputs)
    while stack:
        at = stack.pop()
        if at.op.name == "input":
            found[at] = None
        stack.extend(at.inputs)
    inputs = sorted(found, key=lambda i: i.hint)
    return Graph("g", tuple(inputs), outputs, symbols=symbols or {})


@EVERYWHERE
@pytest.mark.parametrize("op", CATALOGUE, ids=lambda op: op.name)
def test_op(op: Any, device: str) -> None:
    if OLD_INTERPRETER and op.name == "bitwise_not" and device == "cpu":
        pytest.skip("the interpreter is wrong")
    for dtype in DTYPES:
        values = operands(op, dtype)
        built = node(op, dtype, len(values[0]))
        if built is None:
            continue
        graph = graph_of(built)
        values = [v.to(device) for v in values[: len(graph.inputs)]]
        program = build(lower(graph, op.name))
        (ours,) = run(program, {b.name: v for b, v in zip(program.kernel.inputs, values)}).values()
        (eager,) = interpret(graph, values)
        wide = [v.double() if v.is_floating_point() else v for v in values]
        literal = [i.type.value for i in built.inputs if not isinstance(i.type, TensorType)]  # type: ignore[union-attr]
        assert_close(ours, eager, op.eager(*wide, *literal))


def test_vocabulary_is_complete() -> None:
    assert set(SCALAR_OPS) - PRINTED == {"floordiv", "mod"}, "these two are rewritten"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int8, torch.bool], ids=str)
def test_catalogue_compiles(dtype: torch.dtype, target: str) -> None:
    """All ops on one dtype as one kernel of many outputs."""
    nodes = [n for n in (node(op, dtype, 256) for op in CATALOGUE) if n is not None]
    kernel = lower(graph_of(*nodes), "catalogue")
    assert compile_offline(kernel, Schedule(xblock=256), target).binary


@EVERYWHERE
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_cast(source: torch.dtype, device: str) -> None:
    x = edges(source)
    x = x[x.isfinite()] if source.is_floating_point else x
    for target in DTYPES:
        graph = graph_of(ops.cast(graph_input("x", TensorType(source, (len(x),))), dtype=target))
        (made,) = run(build(lower(graph, "cast")), {"x": x.to(device)}).values()
        ours = made.cpu()
        if target == torch.bfloat16:  # the interpreter truncates where a GPU rounds
            torch.testing.assert_close(ours, x.to(target), rtol=2**-7, atol=0)
        else:
            assert torch.equal(ours, x.to(target))


N = symbol("n")


def _mix(name: str, x: Node, w: Node) -> tuple[Node, ...]:
    f = ops.op
    table = {
        "softmax": lambda: (ops.softmax(f("mul")(x, 0.5), dim=-1),),
        "log_softmax_rows": lambda: (ops.log_softmax(x, dim=0),),
        "layer_norm": lambda: (ops.layer_norm(f("add")(x, 1.0), w, w, axes=1, eps=1e-5),),
        "rms_norm": lambda: (ops.rms_norm(x, w, axes=1, eps=1e-6),),
        "gelu": lambda: (ops.gelu(x, approximate="none"), ops.gelu(x, approximate="tanh")),
        "bias_relu_transposed": lambda: (f("permute")(f("relu")(f("add")(x, w)), dims=(1, 0)),),
        "mean_var": lambda: (f("mean")(x, dims=(1,), keepdim=False),),
        "column_max": lambda: (f("amax")(x, dims=(0,), keepdim=False),),
        "argmax": lambda: (f("argmax")(x, dims=(1,), keepdim=False),),
        "cat": lambda: (f("cat")(x, f("neg")(x), dim=1),),
        "cumsum": lambda: (f("cumsum")(x, dim=1),),
        "rope": lambda: (ops.rope(x, w, f("sin")(w), interleaved=False),),
    }  # fmt: skip
    return table[name]()


MIXES = ("softmax", "log_softmax_rows", "layer_norm", "rms_norm", "gelu", "bias_relu_transposed", "mean_var", "column_max", "argmax", "cat",
         "cumsum", "rope")  # fmt: skip


@EVERYWHERE
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", MIXES)
def test_mix(name: str, symbolic: bool, device: str) -> None:
    rows: Any = N if symbolic else 5
    x, w = graph_input("x", TensorType(torch.float32, (rows, 22))), graph_input("y", TensorType(torch.float32, (22,)))
    graph = graph_of(*_mix(name, x, w), symbols={"n": SymbolRange(1, 1 << 20)})
    kernel = lower(graph, name, label=name)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 22, generator=generator), torch.rand(22, generator=generator)][: len(graph.inputs)]
    sizes = {s: 5 for s in kernel.sizes}
    eager, exact = interpret(graph, values), interpret(graph, [v.double() for v in values])
    schedules = [None] + [Schedule(4, 32), Schedule(2, 8, persistent=False)] * bool(kernel.inner)
    for schedule in schedules:
        outputs = run(build(kernel, schedule), {b.name: v.reshape(-1).to(device) for b, v in zip(kernel.inputs, values)}, sizes)
        for ours, e, x64 in zip(outputs.values(), eager, exact):
            torch.testing.assert_close(ours.cpu().double().reshape(e.shape), x64.double(), rtol=3e-6, atol=3e-6)
    for target in ("sm_90", "gfx942"):
        assert compile_offline(kernel, target=target).binary


def test_printing_is_deterministic() -> None:
    x = graph_input("x", TensorType(torch.float32, (4, 22)))
    kernels = [lower(graph_of(ops.softmax(x, dim=-1)), "softmax") for _ in range(2)]
    assert len({build(k).source for k in kernels}) == 1
    assert len(list(itertools.chain(*(k.stores for k in kernels)))) == 2
