"""Helpers of the fusion tests: a text fused, verified and compared with itself in float64."""

from __future__ import annotations

import torch
from tilewright.ir.dims import hint
from tilewright.ir.graph import Stage, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify
from tilewright.passes.fuse_regions import FuseRegions


def fused(text, notes=None, **options):
    """The fused graph of a text; it must verify, mean the same, and each region must be a kernel unless it is one op refused."""
    graph = parse(text)
    after = FuseRegions(**options).run(graph, notes)
    assert after.stage is Stage.FUSED
    verify(after)
    same(graph, after)
    return after


def value(kind, symbols):
    if not isinstance(kind, TensorType):
        return hint(kind.value, symbols, 5)
    shape = [hint(d, symbols, 5) for d in kind.shape]
    generator = torch.Generator().manual_seed(len(shape))
    if kind.dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if kind.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=kind.dtype)
    if not kind.dtype.is_floating_point:
        return torch.randint(1, 4, shape, generator=generator, dtype=kind.dtype)
    return torch.randn(shape, generator=generator).to(kind.dtype)


def same(before, after):
    xs = [value(i.type, before.symbols) for i in before.inputs]
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in xs]
    for a, b in zip((*interpret(before, xs, torch.float64), *xs), (*interpret(after, copies, torch.float64), *copies)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def kernels(graph):
    return [n.attrs["label"] for n in order(graph) if n.op.name == "region"]


def bodies(graph):
    return [n.attrs["body"] for n in order(graph) if n.op.name == "region"]


def reasons(notes):
    return {(d.what, d.reason) for d in notes.declined}
