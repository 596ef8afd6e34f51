"""Contractions with operands of few bits: which compute them where they multiply them, and what is declined, on a GPU and a CPU."""

from __future__ import annotations

import pytest
from fusion_checks import bodies, fused, kernels
from tilewright.ir.graph import graph_input, order
from tilewright.ir.reasons import Reason
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.passes.base import Notes
from tilewright.passes.contractions import is_low_bit
from tilewright.passes.fuse_regions import FuseRegions

INT4 = """
    graph g(x: bf16[{rows}, 256]@cuda:0, q: u8[512, 128]@cuda:0, s: f32[512, {groups}]@cuda:0, z: u8[512, {packed}]@cuda:0)
    stage canonical {{
      w = dequantize(unpack(q, bits=4), s, unpack(z, bits=4), dtype=bf16)
      y = linear(x, w)
      {tail}
    }}"""


def int4(rows: int = 4, groups: int = 4, tail: str = "return y") -> str:
    """The text form names every value: nested calls get names of their own here."""
    text = INT4.format(rows=rows, groups=groups, packed=groups // 2, tail=tail)
    return text.replace(
        "w = dequantize(unpack(q, bits=4), s, unpack(z, bits=4), dtype=bf16)",
        "p = unpack(q, bits=4)\n      o = unpack(z, bits=4)\n      w = dequantize(p, s, o, dtype=bf16)",
    )


def on_gpu(text: str, notes: Notes | None = None):
    return FuseRegions().run(parse(text), notes)


def ops_of(graph) -> list[str]:
    return [n.op.name for n in order(graph) if n.op.name not in ("input", "constant", "reshape")]


@pytest.mark.parametrize("rows", [1, 4, 128, 4096])
def test_four_bits_in_groups_are_one_kernel_with_their_linear(rows: int) -> None:
    after = on_gpu(int4(rows))
    assert ops_of(after) == ["region"], str(after)
    (body,) = bodies(after)
    assert sorted(i.hint for i in body.inputs) == ["q", "s", "x", "z"]


def test_what_follows_the_linear_is_in_its_kernel() -> None:
    after = on_gpu(int4(64, tail="r = gelu(y)\n      return r"))
    assert ops_of(after) == ["region"] and kernels(after)[0].endswith("gelu")


@pytest.mark.parametrize("kind", ["i8", "u8", "f8e4m3", "f8e5m2"])
def test_eight_bits_are_one_kernel_with_their_linear(kind: str) -> None:
    after = on_gpu(f"""
        graph g(x: f16[b, 256]@cuda:0, q: {kind}[512, 256]@cuda:0, s: f16[512, 1]@cuda:0) where b in 1..4096 stage canonical {{
          w = dequantize(q, s, dtype=f16)
          y = linear(x, w)
          return y
        }}""")
    assert ops_of(after) == ["region"]


def test_a_product_of_integers_is_a_kernel_with_or_without_what_follows() -> None:
    text = """
        graph g(x: f32[64, 256]@cuda:0, w: i8[512, 256]@cuda:0, s: f32[512]@cuda:0) stage canonical {
          r = quantize_rows(x)
          q = item(r, index=0)
          t = item(r, index=1)
          y = int_linear(q, w)
          a = cast(y, dtype=f32)
          c = mul(a, t)
          d = mul(c, s)
          return d
        }"""
    after = on_gpu(text)
    assert [n for n in ops_of(after) if n != "item"] == ["region", "region"]
    assert kernels(after) == ["quantize_rows", "int_linear+mul"]
    bare = on_gpu(text.replace("return d", "return y"))
    assert kernels(bare) == ["quantize_rows", "int_linear"]


def test_a_weight_that_several_read_is_computed_once() -> None:
    notes = Notes()
    after = on_gpu(int4(tail="v = linear(x, w)\n      e = exp(w)\n      return y, e"), notes)
    assert kernels(after)[0].startswith("unpack+dequantize") and "linear" not in kernels(after)[0]
    declined = {d.reason for d in notes.declined if "linear" in d.what}
    assert declined & {Reason.DIFFERENT_SPACE, Reason.RECOMPUTE}, declined


def test_operands_that_are_computed_from_as_many_bytes_are_read() -> None:
    notes = Notes()
    after = on_gpu(
        """
        graph g(x: bf16[64, 256]@cuda:0, w: bf16[512, 256]@cuda:0) stage canonical {
          a = gelu(x)
          y = linear(a, w)
          z = relu(y)
          return z
        }""",
        notes,
    )
    assert kernels(after) == ["gelu", "linear+relu"]
    assert ("gelu into linear+relu", Reason.PROLOGUE) in {(d.what, d.reason) for d in notes.declined}


def test_a_cpu_computes_operands_from_words_only() -> None:
    after = fused("""
        graph g(x: f32[64, 256], q: i8[512, 256], s: f32[512, 1]) stage canonical {
          w = dequantize(q, s, dtype=f32)
          y = linear(x, w)
          return y
        }""")
    assert ops_of(after) == ["region", "linear"] and kernels(after) == ["dequantize"]
    words = fused("""
        graph g(x: f32[64, 256], q: i8[16, 64, 32, 4], s: f32[512, 1]) stage canonical {
          p = permute(q, dims=[0, 2, 1, 3])
          r = reshape(p, shape=[512, 256])
          w = dequantize(r, s, dtype=f32)
          y = linear(x, w)
          return y
        }""")
    assert [n for n in ops_of(words) if n != "permute"] == ["region"] and kernels(words) == ["dequantize+linear"]


def test_what_is_low_bit() -> None:
    def first(text: str):
        given = "a: u8[64, 32], b: bf16[64, 64], c: i64[64, 64], s: f32[64, 1]"
        return parse(f"graph g({given}) {{\n{text}\nreturn y\n}}").outputs[0]

    assert is_low_bit(first("y = dequantize(a, s, dtype=f32)"))
    assert is_low_bit(first("p = unpack(a, bits=4)\n y = dequantize(p, s, dtype=f16)"))
    assert is_low_bit(first("p = permute(a, dims=[1, 0])\n y = cast(p, dtype=f32)"))
    assert not is_low_bit(first("y = cast(b, dtype=f32)")), "floats of 16 bits"
    assert not is_low_bit(first("y = cast(c, dtype=f32)")), "as many bytes"
    assert not is_low_bit(first("p = exp(s)\n y = expand(p, shape=[64, 64])"))
    assert not is_low_bit(graph_input("q", TensorType(first("y = exp(s)").dtype, (4,))))
