"""Graphs shared out over processes: which linears go in pairs, what is declined, and that all processes together compute the graph."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes
from processes import together
from tilewright.ir.graph import Graph, constants, order
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes, Reason
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.quantize import Plan, Quantize
from tilewright.passes.scatter_norms import ScatterNorms
from tilewright.passes.shard_linears import ShardLinears


def sharded(graph: Graph, count: int, scatter: bool = False) -> tuple[list[Graph], Notes]:
    notes = Notes()
    made = [ShardLinears(rank, count).run(graph, notes if rank == 0 else None) for rank in range(count)]
    if scatter:
        made = [ScatterNorms(rank, count).run(g, notes if rank == 0 else None) for rank, g in enumerate(made)]
    for one in made:
        verify(one)
    return made, notes


def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def graph(signature: str, constants: dict[str, torch.Tensor], *lines: str) -> Graph:
    named = [f'{name} = constant "{name}"' for name in constants]
    return parse("\n".join([f"graph g({signature}) stage canonical {{", *named, *lines, "}"]), constants)


def mlp() -> Graph:
    return graph(
        "x: f64[6, 4]",
        weights(up=(8, 4), upb=(8,), down=(4, 8), downb=(4,)),
        "h = linear(x, up, upb)",
        "a = gelu(h)",
        "y = linear(a, down, downb)",
        "return y",
    )


def test_columns_then_rows_and_one_sum() -> None:
    made, notes = sharded(mlp(), 2)
    assert_becomes(
        made[1],
        """graph g(x: f64[6, 4]) stage canonical {
          up = constant "up.shard1" : f64[4, 4]
          upb = constant "upb.shard1" : f64[4]
          h = linear(x, up, upb)
          a = gelu(h)
          down = constant "down.shard1" : f64[4, 4]
          y = linear(a, down)
          begun = extern[_c10d_functional.all_reduce.default](y, args=[$0, "sum", "0"], sequence=0) : f64[6, 4]
          total = extern[_c10d_functional.wait_tensor.default](begun, sequence=1) : f64[6, 4]
          downb = constant "downb" : f64[4]
          z = add(total, downb)
          return z
        }""",
    )
    assert [a.what for a in notes.applied] == ["process 1 of 2: 1 linears by columns, 1 by rows"]


HEADS = (
    "q = linear(x, wq)",
    "k = linear(x, wk)",
    "v = linear(x, wv)",
    *(f"{n}4 = reshape({n}, shape=[2, 6, {h}, 4])" for n, h in (("q", 4), ("k", "G"), ("v", "G"))),
    *(f"{n}h = permute({n}4, dims=[0, 2, 1, 3])" for n in "qkv"),
    "qr = rope(qh, cos, sin)",
    "a = attention(qr, kh, vh, mask, scale=0.5)",
    "ap = permute(a, dims=[0, 2, 1, 3])",
    "flat = reshape(ap, shape=[2, 6, 16])",
    "y = linear(flat, wo)",
    "return y",
)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_goes_by_heads(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = weights(wq=(16, 8), wk=(groups * 4, 8), wv=(groups * 4, 8), wo=(8, 16), cos=(1, 1, 6, 4), sin=(1, 1, 6, 4), mask=(1, 4, 6, 6))
    whole = graph("x: f64[2, 6, 8]", held, *(line.replace("G", str(groups)) for line in HEADS))
    made, notes = sharded(whole, 2)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    for outputs in together(made, [x], monkeypatch):
        torch.testing.assert_close(outputs, interpret(whole, [x]))
    assert {d.what for d in notes.declined} == (set() if groups > 1 else {"linear k", "linear v"})
    assert "mask.shard0" in constants(made[0])


def test_one_product_of_queries_keys_and_values_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "qkv = linear(x, w, b)",
        "q = slice(qkv, dim=1, start=0, stop=8)",
        "k = slice(qkv, dim=1, start=8, stop=16)",
        "p = mul(q, k)",
        "y = linear(p, o)",
        "return y",
    )
    whole = graph("x: f64[6, 4]", weights(w=(16, 4), b=(16,), o=(4, 8)), *lines)
    made, _ = sharded(whole, 4)
    x = torch.randn(6, 4, dtype=torch.float64)
    for outputs in together(made, [x], monkeypatch):
        torch.testing.assert_close(outputs, interpret(whole, [x]))
    assert sum(n.op.name == "linear" for n in order(made[0])) == 3


def test_what_is_cut_is_said_with_the_dimension() -> None:
    item = ShardLinears(1, 2)
    assert item.shared_out(mlp(), Notes()).cut == {"up": 0, "upb": 0, "down": 1}
    lines = ("t = permute(w, dims=[1, 0])", "qk = linear(x, t)", *(f"{n} = slice(qk, dim=1, start={s}, stop={s + 8})" for n, s in QK))
    whole = graph("x: f64[6, 4]", weights(w=(4, 16), o=(4, 8)), *lines, "p = mul(q, k)", "y = linear(p, o)", "return y")
    assert item.shared_out(whole, Notes()).cut == {"w[0:8]": 1, "w[8:16]": 1, "o": 1}


QK = (("q", 0), ("k", 8))


@pytest.mark.parametrize(("only", "cut"), [(("up", "down"), {"up", "upb", "down"}), (("up",), set()), (("other",), set())])
def test_linears_that_are_not_named_stay_whole(only: tuple[str, ...], cut: set[str]) -> None:
    notes = Notes()
    assert set(ShardLinears(0, 2, only=only).shared_out(mlp(), notes).cut) == cut
    assert [d.value for d in notes.declined] == (["linear y"] if only == ("up",) else [])


@pytest.mark.parametrize(
    ("line", "value"),
    [("a = softmax(h, dim=1)", "softmax a"), ("a = rms_norm(h)", "rms_norm a"), ("a = cumsum(h, dim=0)", "cumsum a")],
)
def test_what_needs_all_columns_keeps_a_linear_whole(line: str, value: str) -> None:
    whole = graph("x: f64[6, 4]", weights(up=(8, 4), down=(4, 8)), "h = linear(x, up)", line, "y = linear(a, down)", "return y")
    made, notes = sharded(whole, 2)
    assert (notes.declined[0].what, notes.declined[0].reason, notes.declined[0].value) == ("linear h", Reason.SHARED, value)
    assert made[0] is whole


def test_a_result_that_is_returned_is_whole() -> None:
    held = weights(up=(8, 4), down=(4, 8))
    _, notes = sharded(graph("x: f64[6, 4]", held, "h = linear(x, up)", "y = linear(h, down)", "return y, h"), 2)
    assert {d.value for d in notes.declined} == {"the result"}


def test_an_odd_number_of_columns_is_not_shared_out() -> None:
    whole = graph("x: f64[6, 4]", weights(up=(7, 4), down=(3, 7)), "h = linear(x, up)", "y = linear(h, down)", "return y")
    assert sharded(whole, 2)[0][0] is whole


def in_format(kind: str, *lines: str) -> Graph:
    held = weights(up=(64, 32), upb=(64,), down=(32, 64), downb=(32,))
    whole = graph("x: f32[6, 32]", {name: w.float() for name, w in held.items()}, *lines)
    return Canonicalize().run(Quantize(Plan.parse(f"*:{kind}")).run(whole))


MLP = ("h = linear(x, up, upb)", "a = gelu(h)", "y = linear(a, down, downb)", "return y")


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4-g32", "int4-g64", "int8-g32", "int4-split3", "bfp6", "rank-half"])
def test_weights_in_other_formats_are_cut_with_their_scales(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_format(kind, *MLP)
    made, _ = sharded(whole, 2)
    x = torch.randn(6, 32)
    for outputs in together(made, [x], monkeypatch):
        torch.testing.assert_close(outputs, interpret(whole, [x]), rtol=1e-5, atol=1e-4)
    held, shared = (sum(d.value.nbytes for d in constants(g).values() if d.value is not None) for g in (whole, made[0]))
    assert shared < 0.6 * held


def test_a_format_that_reads_whole_rows_is_not_shared_out() -> None:
    whole = in_format("int8-dynamic", *MLP)
    made, notes = sharded(whole, 2)
    assert made[0] is whole and notes.declined[0].value == "quantize_rows"


@pytest.mark.parametrize(("columns", "groups"), [(64, 2), (96, 4), (96, 3)])
def test_groups_of_scales_are_cut_in_pieces(columns: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has 32 columns of one group, 48 of two, 48 of one and a half: scales go with the columns."""
    held = {
        "up": torch.randn(columns, 8),
        "q": torch.randint(0, 256, (4, columns // 2), dtype=torch.uint8),
        "s": torch.rand(4, groups),
        "z": torch.full((4, groups), 7, dtype=torch.uint8),
    }
    lines = ("h = linear(x, up)", "u = unpack(q, bits=4)", "w = dequantize(u, s, z, dtype=f32)", "y = linear(h, w)", "return y")
    whole = graph("x: f32[3, 8]", held, *lines)
    made, _ = sharded(whole, 2)
    x = torch.randn(3, 8)
    for outputs in together(made, [x], monkeypatch):
        torch.testing.assert_close(outputs, interpret(whole, [x]), rtol=1e-4, atol=1e-4)
    cut = ShardLinears(0, 2).shared_out(whole, Notes()).cut
    assert cut["q"] == 1 and cut["s"] == cut["z"] == (None if columns == 96 and groups == 3 else 1)
    assert constants(made[0])["q.shard0"].value.shape == (4, columns // 4)


def test_half_a_byte_is_not_cut() -> None:
    held = {"up": torch.randn(6, 8), "q": torch.zeros(4, 3, dtype=torch.uint8), "s": torch.rand(4, 1)}
    lines = ("h = linear(x, up)", "u = unpack(q, bits=4)", "w = dequantize(u, s, dtype=f32)", "y = linear(h, w)", "return y")
    whole = graph("x: f32[3, 8]", held, *lines)
    made, notes = sharded(whole, 2)
    assert made[0] is whole and notes.declined[0].value == "linear y"


NORMS = (
    "h = linear(x, up)",
    "s = linear(h, down, b)",
    "r = add(x, s)",
    "n = rms_norm(r, w)",
    "g = linear(n, up)",
    "t = linear(g, down)",
    "u = add(r, t)",
    "m = layer_norm(u)",
    "y = linear(m, head)",
)


@pytest.mark.parametrize("count", [2, 3])
def test_norms_of_sums_are_scattered_and_the_residual_stays_so(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = weights(up=(6, 4), down=(4, 6), b=(4,), w=(4,), head=(3, 4))
    whole = graph("x: f64[2, 3, 4]", held, *NORMS, "return y")
    made, notes = sharded(whole, count, scatter=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for outputs in together(made, [x], monkeypatch):
        torch.testing.assert_close(outputs, interpret(whole, [x]))
    assert notes.applied[-1].what == "2 sums, 2 norms of a share of the tokens, 2 gathered"
    assert {n.shape for n in order(made[0]) if n.op.name in ("rms_norm", "layer_norm")} == {(6 // count, 4)}


def test_scattering_is_declined_where_more_would_be_gathered() -> None:
    held = weights(up=(8, 4), down=(4, 8), b=(4,), w=(4,), head=(3, 4))
    _, notes = sharded(graph("x: f64[2, 3, 4]", held, *NORMS, "return y, r, u, n"), 2, scatter=True)
    assert (notes.declined[-1].reason, notes.declined[-1].value) == (Reason.NO_GAIN, "4 values to gather for 2 sums")


def test_tokens_that_do_not_divide_are_not_scattered() -> None:
    held = weights(up=(8, 4), down=(4, 8), b=(4,), w=(4,), head=(3, 4))
    made, notes = sharded(graph("x: f64[1, 3, 4]", held, *NORMS, "return y"), 2, scatter=True)
    assert all(a.rule == "shard-linears" for a in notes.applied) and "reduce_scatter" not in str(made[0])
