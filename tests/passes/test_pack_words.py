"""pack-weights of few bits: constants become words of panels and views of them; the numbers, and the bytes, stay."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, assert_same_values, body, refusals, run
from tilewright.ir.graph import Graph, constants, order
from tilewright.passes.base import Reason
from tilewright.passes.contractions import PRODUCTS, is_in_words, is_native
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.pack_weights import PackWeights


def integers(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    low = -128 if dtype == torch.int8 else 0
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


GIVEN = {
    "q": integers(50, 24), "p": integers(50, 32, dtype=torch.uint8), "s": torch.rand(50, 1), "t": torch.rand(50, 2).bfloat16(),
    "z": integers(50, 2, dtype=torch.uint8), "h": torch.randn(50, 24).half(),
}  # fmt: skip
NAMED = [f'{n} = constant "{n}"' for n in GIVEN]
INT4 = ("u = unpack(p, bits=4)", "w = dequantize(u, t, z, dtype=f32)")


def packed(signature: str, *lines: str) -> tuple[Graph, Graph, object]:
    return run(PackWeights(), body(signature, *NAMED, *lines), GIVEN)


def test_picture() -> None:
    old, new, notes = packed("x: f32[b, 64]", *INT4, "y = linear(x, w)", "y")
    assert_becomes(new, """graph g(x: f32[b, 64]) {
      p = constant "p.words" : u8[2, 8, 32, 4]
      a = permute(p, dims=[0, 2, 1, 3])
      c = reshape(a, shape=[64, 32])
      d = slice(c, dim=0, start=0, stop=50)
      u = unpack(d, bits=4)
      t = constant "t.panels" : bf16[2, 2, 32]
      e = permute(t, dims=[0, 2, 1])
      f = reshape(e, shape=[64, 2])
      s = slice(f, dim=0, start=0, stop=50)
      z = constant "z.panels" : u8[2, 2, 32]
      g = permute(z, dims=[0, 2, 1])
      h = reshape(g, shape=[64, 2])
      i = slice(h, dim=0, start=0, stop=50)
      w = dequantize(u, s, i, dtype=f32)
      y = linear(x, w)
      return y
    }""")  # fmt: skip
    assert_same_values(old, new, [torch.randn(3, 64)])
    assert len(notes.applied) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "lines",
    [
        ("w = dequantize(q, s, dtype=f32)", "y = linear(x, w)"),
        ("w = cast(h, dtype=f32)", "y = linear(x, w)"),
        ("w = dequantize(q, s, dtype=f32)", "v = permute(w, dims=[1, 0])", "y = matmul(x, v)"),
        ("i = cast(x, dtype=i8)", "y = int_linear(i, q)"),
        ("u = unpack(p, bits=4)", "w = dequantize(u, t, z, dtype=f32)", "v = slice(w, dim=1, start=0, stop=24)", "y = linear(x, v)"),
    ],
)
def test_one_kernel_reads_the_bytes(lines: tuple[str, ...]) -> None:
    old, new, _ = packed("x: f32[3, 24]", *lines, "y")
    assert is_native(new.outputs[0])
    assert_same_values(old, new, [torch.randn(3, 24)])
    regions = [n for n in order(FuseRegions().run(new)) if n.op.name == "region"]
    assert all(any(n.op.name in PRODUCTS for n in order(r.attrs["body"])) for r in regions)


def test_bytes_do_not_grow_but_by_padding() -> None:
    count, depth = 96, 256
    given = {"p": integers(count, depth // 2, dtype=torch.uint8), "t": torch.rand(count, 4).bfloat16()}
    lines = ['p = constant "p"', 't = constant "t"', "u = unpack(p, bits=4)", "w = dequantize(u, t, dtype=f32)", "y = linear(x, w)", "y"]
    _, new, _ = run(PackWeights(), body(f"x: f32[b, {depth}]", *lines), given)
    assert sum(c.value.nbytes for c in constants(new).values()) == sum(v.nbytes for v in given.values())  # type: ignore[union-attr]
    assert is_in_words(new.outputs[0].inputs[1])


def test_an_embedding_picks_from_the_words() -> None:
    lines = ("w = dequantize(q, s, dtype=f32)", "y = linear(x, w)", "e = embedding(q, i)", "y, e")
    old, new, _ = packed("x: f32[3, 24], i: i64[3]", *lines)
    assert "q" not in constants(new)
    assert_same_values(old, new, [torch.randn(3, 24), torch.tensor([0, 49, 7])])


REFUSED = {
    "shared": (("w = dequantize(q, s, dtype=f32)", "y = linear(x, w)", "e = neg(q)", "y, e"), Reason.SHARED),
    "a result": (("w = dequantize(q, s, dtype=f32)", "y = linear(x, w)", "y, w"), Reason.SHARED),
    "picked": (("w = dequantize(q, s, dtype=f32)", "y = linear(x, w)", "e = embedding(q, i)", "y, e"), Reason.NO_GAIN),
    "other dtypes": (("v = cast(x, dtype=bf16)", "w = dequantize(q, s, dtype=bf16)", "y = linear(v, w)", "y"), Reason.UNSUPPORTED_DTYPE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    lines, reason = REFUSED[name]
    old, new, notes = packed("x: f32[3, 24], i: i64[300]", *lines)
    assert ("pack-weights", reason) in refusals(notes)  # type: ignore[arg-type]
    assert "q" in constants(new)


def test_groups_that_are_no_words_are_refused() -> None:
    given = {"p": integers(50, 32, dtype=torch.uint8), "t": torch.rand(50, 16)}
    lines = ['p = constant "p"', 't = constant "t"', "u = unpack(p, bits=4)", "w = dequantize(u, t, dtype=f32)", "y = linear(x, w)", "y"]
    _, new, notes = run(PackWeights(), body("x: f32[b, 64]", *lines), given)
    assert "p" in constants(new) and ("pack-weights", Reason.NOT_CONSTANT) in refusals(notes)


def test_small_weights_are_not_turned_into_floats_at_compile_time() -> None:
    old, new, notes = run(FoldConstants(), body("x: f32[3, 64]", *NAMED, *INT4, "y = linear(x, w)", "y"), GIVEN)
    assert set(constants(new)) == {"p", "t", "z"} and ("fold-constants", Reason.MEMORY) in refusals(notes)
