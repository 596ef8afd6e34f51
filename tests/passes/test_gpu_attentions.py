"""Attentions of a graph on a GPU: which become kernels of ours, and that these have a Triton form. No GPU is needed."""

from __future__ import annotations

import pytest
from fusion_checks import kernels, reasons
from tilewright.codegen.lower import lower
from tilewright.ir.graph import order
from tilewright.ir.reasons import Reason
from tilewright.ir.text import parse
from tilewright.passes.attentions import WALKED
from tilewright.passes.base import Notes
from tilewright.passes.fuse_regions import FuseRegions

LAYER = """
    graph g(x: bf16[b, s, 1024]@cuda:0, k: bf16[b, 4, n, 64]@cuda:0, v: bf16[b, 4, n, 64]@cuda:0, p: bool[b, n]@cuda:0,
            r: bf16[b, s, 1024]@cuda:0) where b in 1..64, s in 1..8192, n in 2..8192 stage canonical {
      h = reshape(x, shape=(b, s, 16, 64))
      q = permute(h, dims=(0, 2, 1, 3))
      m = reshape(p, shape=(b, 1, 1, n))
      a = attention(q, k, v, m, causal=True, scale=0.125)
      t = permute(a, dims=(0, 2, 1, 3))
      c = reshape(t, shape=(b, s, 1024))
      y = add(c, r)
      return y
    }"""
PLAIN = """
    graph g(q: {0}[2, 4, 64, {1}]@{3}, k: {0}[2, 4, {2}, {1}]@{3}) stage canonical {{
      a = attention(q, k, k, scale=0.5)
      return a
    }}"""


def on_gpu(text: str, notes: Notes | None = None):
    return FuseRegions().run(parse(text), notes)


def test_grouped_heads_under_masks_are_one_kernel_with_what_follows() -> None:
    assert kernels(on_gpu(LAYER)) == ["attention+reshape+add"]


@pytest.mark.parametrize(("dtype", "columns"), [("f64", 16), ("f32", 6), ("f16", 80), ("bf16", 256)])
def test_heads_that_are_kernels(dtype: str, columns: int) -> None:
    assert kernels(on_gpu(PLAIN.format(dtype, columns, 100, "cuda:0"))) == ["attention"]


@pytest.mark.parametrize(("columns", "keys"), [(512, 100), (64, 1), (64, 0)])
def test_those_that_stay_library_calls(columns: int, keys: int) -> None:
    notes = Notes()
    assert kernels(on_gpu(PLAIN.format("bf16", columns, keys, "cuda:0"), notes)) == []
    assert ("attention", Reason.LIBRARY_CALL) in reasons(notes)


def test_devices_without_a_template_are_the_librarys() -> None:
    assert set(WALKED) == {"cpu", "cuda"}
    assert kernels(on_gpu(PLAIN.format("f32", 64, 100, "mps"))) == []


def test_the_kernel_has_a_triton_form() -> None:
    pytest.importorskip("triton")
    from tilewright.codegen.triton.offline import compile_program
    from tilewright.codegen.triton.templates import build

    (region,) = (n for n in order(on_gpu(LAYER)) if n.op.name == "region")
    program = build(lower(region.attrs["body"], "layer"))
    assert "weights.to(tl.bfloat16)" in program.source
    (compiled,) = compile_program(program, "sm_90")
    assert compiled.spills == 0 and "wgmma" in compiled.stages["ptx"]
