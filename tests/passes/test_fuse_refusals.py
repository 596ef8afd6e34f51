"""fuse-regions: what stays apart, and the reason that is given."""

from __future__ import annotations

import torch
from fusion_checks import bodies, fused, kernels, same
from tilewright.codegen.lower import lower
from tilewright.ir import ops
from tilewright.ir.graph import Stage, make_graph
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.passes.base import Notes, Reason
from tilewright.passes.fuse_regions import FuseRegions


def declined(text, **options):
    notes = Notes()
    fused(text, notes, **options)
    return {d.reason for d in notes.declined}


def test_refused_because_a_reduction_crosses_a_tiled_axis():
    assert Reason.TILED_AXIS in declined("""
        graph g(x: f32[64, 64]) stage canonical {
          a = softmax(x, dim=1)
          b = sum(a, dims=(0,), keepdim=True)
          return b
        }""")


def test_refused_because_spaces_differ():
    assert Reason.DIFFERENT_SPACE in declined("""
        graph g(x: f32[64, 64], y: f32[64, 64, 32]) stage canonical {
          a = exp(x)
          s = sum(a, dims=(1,))
          t = sum(y, dims=(1, 2))
          b = add(s, t)
          return b
        }""")


def test_refused_because_recomputing_costs_more():
    assert Reason.RECOMPUTE in declined(
        """
        graph g(x: f32[4096, 1], w: f32[4096, 4096]) stage canonical {
          a = erf(x)
          b = exp(a)
          c = tanh(b)
          t = permute(c, dims=(1, 0))
          y = add(t, w)
          return y
        }""".replace("4096", "512")
    )


def test_refused_because_of_a_cycle():
    assert Reason.CYCLE in declined("""
        graph g(x: f32[8, 8], w: f32[8, 8]) stage canonical {
          a = exp(x)
          h = linear(a, w)
          b = add(a, h)
          return b
        }""")


def test_refused_because_it_grows_too_large():
    assert Reason.TOO_LARGE in declined(
        """
        graph g(x: f32[8, 8]) stage canonical {
          a = exp(x)
          b = sin(a)
          c = cos(b)
          d = tanh(c)
          return d
        }""",
        max_values=3,
    )


def test_a_very_long_chain_is_cut_into_kernels():
    x = ops.op("input")(type=TensorType(torch.float32, (4,)), strides=None, hint="x")
    y = x
    for _ in range(500):
        y = ops.sin(ops.add(y, 1.0))
    graph = make_graph("g", [x], [y], stage=Stage.CANONICAL)
    after = FuseRegions().run(graph)
    same(graph, after)
    assert 1 < len(bodies(after)) < 40
    for body in bodies(after):
        lower(body, "k")


def test_refused_because_of_a_library_call():
    assert Reason.LIBRARY_CALL in declined("""
        graph g(x: f32[8, 8], w: f32[8, 8]) stage canonical {
          h = linear(x, w)
          a = exp(h)
          return a
        }""")


def test_refused_because_of_the_dtype():
    assert declined("""
        graph g(x: c64[8], y: c64[8]) stage canonical {
          a = cat(x, y, dim=0)
          return a
        }""") == {Reason.UNSUPPORTED_DTYPE}


def test_refused_because_of_the_dtype_that_is_read():
    assert Reason.UNSUPPORTED_DTYPE in declined("""
        graph g(x: u16[8]) stage canonical {
          a = cast(x, dtype=f32)
          b = exp(a)
          return b
        }""")


def test_refused_because_operands_live_on_different_devices():
    """A number in a 0-d CPU tensor goes with tensors anywhere."""
    notes = Notes()
    graph = parse("""
        graph g(x: f32[8]@cuda:0, s: f32[]) stage canonical {
          a = mul(x, s)
          return a
        }""")
    FuseRegions().run(graph, notes)
    assert {d.reason for d in notes.declined} == {Reason.DIFFERENT_DEVICE}


def test_refused_because_an_integer_divisor_is_unknown():
    notes = Notes()
    after = fused(
        """
        graph g(x: i64[8], y: i64[8]) stage canonical {
          a = add(x, 1)
          b = floor_divide(a, y)
          c = add(b, 1)
          return c
        }""",
        notes,
    )
    assert Reason.RUNTIME_INTEGER_DIVISION in {d.reason for d in notes.declined}
    assert len(kernels(after)) == 3


def test_refused_because_a_layout_has_no_index():
    assert Reason.LAYOUT in declined("""
        graph g(x: f32[4, 3]) stage canonical {
          a = exp(x)
          b = as_strided(a, shape=(3, 4), strides=(1, 8), of=(8, 1))
          c = exp(b)
          return c
        }""")


def test_refused_because_there_is_no_scalar_form():
    assert Reason.NOT_EXPRESSIBLE in declined("""
        graph g(x: f32[s, 4]) where s in 2..9 stage canonical {
          v = var(x, dims=(0,), correction=0.5)
          b = exp(v)
          return b
        }""")
