"""Views, gathers, norms, masks and scans through lowering and the Triton printer, static (one block) and symbolic (looped)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import EVERYWHERE

pytest.importorskip("triton")

from tilewright.codegen.lower import lower
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.schedule import Schedule
from tilewright.codegen.triton.templates import build
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Graph, Node, graph_input
from tilewright.ir.interpret import interpret
from tilewright.ir.types import TensorType

B = symbol("b")


def tensor(name: str, *shape: Any, dtype: torch.dtype = torch.float32) -> Node:
    return graph_input(name, TensorType(dtype, shape))


def cases(b: Any) -> Iterator[tuple[str, Node, tuple[Node, ...]]]:
    """Name, result and inputs."""
    f = ops.op
    x, m = tensor("x", b, 6, 10), tensor("m", b, 6, 10, dtype=torch.bool)
    y, c, w, ids = tensor("y", 10), tensor("c", 6), tensor("w", 9, 8), tensor("ids", b, 4, dtype=torch.int64)
    row = f("reshape")(f("iota")(length=6, device="cpu"), shape=(6, 1))
    centered = f("sub")(x, f("mean")(x, dims=(0,), keepdim=True))
    yield "flip", f("flip")(x, dims=(1, 2)), (x,)
    yield "slice", f("slice")(x, dim=2, start=1, stop=9, step=2), (x,)
    yield "pad", f("pad")(x, low=(0, 1, 2), high=(0, 0, 1), value=2.5), (x,)
    yield "cat3", f("cat")(x, f("mul")(x, 2.0), f("relu")(x), dim=2), (x,)
    yield (
        "embedding",
        f("embedding")(w, ids),
        (
            w,
            ids,
        ),
    )
    yield (
        "emb_norm",
        ops.layer_norm(f("embedding")(w, ids), axes=1, eps=1e-5),
        (
            w,
            ids,
        ),
    )
    yield (
        "group_norm",
        ops.group_norm(x, c, c, groups=3, eps=1e-5),
        (
            x,
            c,
        ),
    )
    yield (
        "batch_norm",
        ops.batch_norm(x, c, f("abs")(c), c, c, eps=1e-5),
        (
            x,
            c,
        ),
    )
    yield "var", f("var")(x, dims=(0, 2), correction=1.0, keepdim=False), (x,)
    yield "sum02", f("sum")(x, dims=(0, 2), keepdim=True), (x,)
    yield "sumall", f("sum")(x, dims=(), keepdim=False), (x,)
    yield "argmaxall", f("argmax")(x, dims=(), keepdim=False), (x,)
    yield "argmin1", f("argmin")(x, dims=(1,), keepdim=False), (x,)
    yield "any", f("any")(m, dims=(2,), keepdim=False), (m,)
    yield "count", f("sum")(m, dims=(1,), keepdim=False), (m,)
    yield (
        "masked_softmax",
        ops.softmax(f("where")(m, x, -1e9), dim=-1),
        (
            x,
            m,
        ),
    )
    yield (
        "softmax_inf",
        ops.softmax(f("where")(m, x, float("-inf")), dim=1),
        (
            x,
            m,
        ),
    )
    yield "cumsum0", f("cumsum")(x, dim=0), (x,)
    yield "cumprod1", f("cumprod")(x, dim=1), (x,)
    yield "cumsum_bool", f("cumsum")(m, dim=2), (m,)
    yield (
        "perm",
        f("permute")(f("add")(x, y), dims=(2, 0, 1)),
        (
            x,
            y,
        ),
    )
    yield "reshape", f("mul")(f("reshape")(x, shape=(b, 60)), 2.0), (x,)
    yield "resh_sm", ops.softmax(f("reshape")(f("permute")(x, dims=(0, 2, 1)), shape=(b, 60)), dim=-1), (x,)
    yield "var_then", f("div")(centered, f("sqrt")(f("add")(f("var")(x, dims=(0,), correction=0.0, keepdim=True), 1e-5))), (x,)
    yield "causal", f("where")(f("ge")(row, f("iota")(length=10, device="cpu")), x, -1.0), (x,)
    yield "logsumexp", f("log")(f("sum")(f("exp")(x), dims=(2,), keepdim=False)), (x,)
    yield (
        "two_out_norm",
        ops.rms_norm(f("add")(x, y), y, axes=1, eps=1e-6),
        (
            x,
            y,
        ),
    )


def values(inputs: tuple[Node, ...]) -> list[torch.Tensor]:
    """Random tensors for the inputs; a symbolic size is 3."""
    generator, made = torch.Generator().manual_seed(1), []
    for node in inputs:
        shape = tuple(d if isinstance(d, int) else 3 for d in node.shape)
        number = torch.randn(shape, generator=generator)
        made.append({torch.bool: number > 0, torch.int64: (number.abs() * 3).long().clamp(0, 8)}.get(node.dtype, number))
    return made


@EVERYWHERE
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", [name for name, _, _ in cases(3)])
def test_structure(name: str, symbolic: bool, device: str) -> None:
    _, result, inputs = next(case for case in cases(B if symbolic else 3) if case[0] == name)
    kernel = lower(Graph("g", inputs, (result,), symbols={"b": SymbolRange(1, None)}), name)
    given = values(inputs)
    (expected,) = interpret(Graph("g", inputs, (result,)), given)
    schedule = Schedule(2, 8, persistent=False) if symbolic and kernel.inner else None
    buffers = {b.name: v.reshape(-1).to(device) for b, v in zip(kernel.inputs, given)}
    (ours,) = run(build(kernel, schedule), buffers, dict.fromkeys(kernel.sizes, 3)).values()
    torch.testing.assert_close(ours.cpu().reshape(expected.shape), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
