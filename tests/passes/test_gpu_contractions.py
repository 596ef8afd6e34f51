"""Contractions of a graph on a GPU: which become kernels of ours, and that these have a Triton form. No GPU is needed."""

from __future__ import annotations

import pytest
from fusion_checks import kernels
from tilewright.codegen.lower import lower
from tilewright.codegen.triton.templates import build
from tilewright.ir.graph import order
from tilewright.ir.text import parse
from tilewright.passes.contractions import NATIVE, signature
from tilewright.passes.fuse_regions import FuseRegions

LAYER = """
    graph g(x: {t}[b, 256]@cuda:0, w: {t}[512, 256]@cuda:0, c: {t}[512]@cuda:0, r: {t}[b, 512]@cuda:0) where b in 1..4096
    stage canonical {{
      h = linear(x, w, c)
      g = gelu(h)
      a = add(g, r)
      return a
    }}"""


def on_gpu(text: str):
    return FuseRegions().run(parse(text))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_linear_and_what_follows_it_is_one_kernel(dtype: str) -> None:
    after = on_gpu(LAYER.format(t=dtype))
    assert kernels(after) == ["linear+gelu+add"]


def test_one_that_nothing_follows_is_the_librarys() -> None:
    after = on_gpu(
        """
        graph g(x: bf16[64, 256]@cuda:0, w: bf16[512, 256]@cuda:0, v: bf16[512, 512]@cuda:0) stage canonical {
          h = linear(x, w)
          y = relu(linear(h, v))
          return y
        }""".replace("relu(linear(h, v))", "linear(h, v)\n          z = relu(y)").replace("return y", "return z")
    )
    assert [n.op.name for n in order(after) if n.op.name != "input"] == ["linear", "region"]
    assert kernels(after) == ["linear+relu"]


def test_other_dtypes_and_convolutions_are_the_librarys() -> None:
    assert kernels(on_gpu(LAYER.format(t="f64"))) == ["gelu+add"]
    after = on_gpu("""
        graph g(x: f32[2, 8, 16, 16]@cuda:0, w: f32[8, 8, 3, 3]@cuda:0) stage canonical {
          h = conv(x, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
          y = relu(h)
          return y
        }""")
    assert kernels(after) == ["relu"]


CONV = """
    graph g(x: f32[2, 8, 16, 16]@cuda:0, w: f32[8, {c}, 3, 3]@cuda:0) stage canonical {{
      h = conv(x, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups={g})
      y = relu(h)
      return y
    }}"""


def _signatures(text: str) -> tuple[str, ...]:
    return tuple(signature(n) for n in order(parse(text)) if n.op.name in ("conv", "linear"))


def test_what_is_offered_is_a_kernel_of_ours() -> None:
    """For a search, which measures it against the library's."""
    text = CONV.format(c=8, g=1)
    after = FuseRegions(offered=_signatures(text)).run(parse(text))
    (region,) = [n for n in order(after) if n.op.name == "region"]
    assert kernels(after) == ["conv+relu"] and "tl.dot" in build(lower(region.attrs["body"], "conv")).source
    plain = LAYER.format(t="bf16").split("g = gelu")[0] + "return h\n}"
    assert kernels(on_gpu(plain)) == [] and kernels(FuseRegions(offered=_signatures(plain)).run(parse(plain))) == ["linear"]


def test_groups_other_devices_and_other_signatures_are_not() -> None:
    grouped, here = CONV.format(c=4, g=2), CONV.format(c=8, g=1).replace("@cuda:0", "")
    for text in (grouped, here):
        assert kernels(FuseRegions(offered=_signatures(text)).run(parse(text))) == ["relu"]
    assert kernels(FuseRegions(offered=_signatures(grouped)).run(parse(CONV.format(c=8, g=1)))) == ["relu"]


def test_the_cpu_has_its_own_rule() -> None:
    assert set(NATIVE) == {"cpu", "cuda"}
    assert kernels(FuseRegions().run(parse(LAYER.format(t="f32").replace("@cuda:0", "")))) == ["gelu+add"]


def test_the_kernel_has_a_triton_form() -> None:
    pytest.importorskip("triton")
    from tilewright.codegen.triton.offline import compile_program
    from tilewright.codegen.triton.templates import build

    (region,) = (n for n in order(on_gpu(LAYER.format(t="bf16"))) if n.op.name == "region")
    program = build(lower(region.attrs["body"], "layer"))
    assert "tl.dot" in program.source and "libdevice.erf" in program.source
    (compiled,) = compile_program(program, "sm_90")
    assert compiled.spills == 0 and "wgmma" in compiled.stages["ptx"]


EXPERTS = """
    graph experts(x: bf16[t, 256]@cuda:0, rows: i64[m]@cuda:0, w: bf16[8, 512, 256]@cuda:0, v: bf16[8, 256, 256]@cuda:0,
                  ends: i32[8]@cuda:0, s: bf16[m]@cuda:0) where t in 1..4096, m in 1..32768 stage canonical {
      p = index(x, rows, dims=[0])
      u = permute(w, dims=(0, 2, 1))
      h = grouped_matmul(p, u, ends)
      a = slice(h, dim=1, start=0, stop=256, step=1)
      b = slice(h, dim=1, start=256, stop=512, step=1)
      g = silu(a)
      c = mul(g, b)
      o = grouped_matmul(c, v, ends)
      q = reshape(s, shape=(m, 1))
      y = mul(o, q)
      return y
    }"""
SPARSE = """
    graph g(x: {0}[b, 256]@{1}, w: {0}[20, 32, 32]@{1}, c: i32[20]@{1}, s: i32[9]@{1}) where b in 1..4096 stage canonical {{
      h = block_sparse_linear(x, w, c, s)
      y = gelu(h)
      return y
    }}"""


def test_experts_gather_their_rows_and_weigh_their_results() -> None:
    assert kernels(on_gpu(EXPERTS)) == ["index+grouped_matmul", "silu+mul", "grouped_matmul+mul"]


def test_blocks_of_a_sparse_matrix_are_a_kernel_with_what_follows() -> None:
    assert kernels(on_gpu(SPARSE.format("bf16", "cuda:0"))) == ["block_sparse_linear+gelu"]
    assert kernels(on_gpu(SPARSE.format("bf16", "cuda:0").replace("return y", "return h"))) == ["block_sparse_linear"], "the library waits"


def test_uneven_parts_are_the_librarys_elsewhere() -> None:
    assert kernels(on_gpu(SPARSE.format("f64", "cuda:0"))) == ["gelu"]
    assert kernels(on_gpu(SPARSE.format("f32", "cpu").replace("@cpu", ""))) == ["gelu"]
    assert kernels(on_gpu(EXPERTS.replace("@cuda:0", "").replace("bf16", "f32"))) == ["index", "silu+mul", "mul"]


def test_kernels_of_experts_have_a_triton_form() -> None:
    pytest.importorskip("triton")
    from tilewright.codegen.triton.templates import build

    regions = [n for n in order(on_gpu(EXPERTS)) if n.op.name == "region"]
    sources = [build(lower(n.attrs["body"], f"k{i}")).source for i, n in enumerate(regions)]
    assert ["_find_group" in text for text in sources] == [True, False, True]
