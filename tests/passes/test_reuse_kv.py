"""reuse-kv: a step is what its text says, computes what the whole model computes at every position, and is refused where tokens mix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tilewright.ir.analysis.hashing import equal
from tilewright.ir.graph import Graph, graph_input
from tilewright.ir.interpret import interpret
from tilewright.ir.sizes import with_sizes
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.kv_formats import KV_FORMATS
from tilewright.passes.reuse_kv import CannotDerive, Derived, ReuseKV

LENGTH, BATCH = 8, 3

HEAD = """
graph g(tokens: i64[b, 8], w: f32[11, 8], p: f32[8, 8]) where b in 1..64 stage canonical {
  x = embedding(w, tokens)
"""
QKV = """
  q = reshape(x, shape=[b, 8, 2, 4])
  q1 = permute(q, dims=[0, 2, 1, 3])
  m = matmul(x, p)
  k = reshape(m, shape=[b, 8, 2, 4])
  k1 = permute(k, dims=[0, 2, 1, 3])
"""
TAIL = """
  o = permute(y, dims=[0, 2, 1, 3])
  r = reshape(o, shape=[b, 8, 8])
  s = add(x, r)
  return s
}
"""


def graph(*lines: str) -> Graph:
    return parse("\n".join(lines))


def with_constants(made: Graph, **values: torch.Tensor) -> Graph:
    """Inputs become constants."""
    from tilewright.ir.graph import Data, order
    from tilewright.ir.ops import OPS

    new = {n: OPS["constant"](data=Data(n.hint, values[n.hint]), hint=n.hint) for n in made.inputs if n.hint in values}
    for node in order(made):
        if node not in new and node.op.name != "input":
            new[node] = replace(node, inputs=tuple(new.get(i, i) for i in node.inputs))
    inputs = tuple(n for n in made.inputs if n not in new)
    return replace(made, inputs=inputs, outputs=tuple(new[n] for n in made.outputs))


def model(*lines: str, **values: torch.Tensor) -> Graph:
    torch.manual_seed(0)
    values = {"w": torch.randn(11, 8), "p": torch.randn(8, 8), **values}
    head = HEAD.replace("p: f32[8, 8]", ", ".join(["p: f32[8, 8]", *(f"{n}: {_type(v)}" for n, v in values.items() if n not in "wp")]))
    return with_constants(graph(head, *lines), **values)


def _type(x: torch.Tensor) -> str:
    return {torch.float32: "f32", torch.bool: "bool", torch.int64: "i64"}[x.dtype] + str(list(x.shape))


def causal(**values: torch.Tensor) -> Graph:
    return model(QKV, "y = attention(q1, k1, k1, causal=true, scale=0.5)", TAIL, **values)


def empty_state(made: Derived, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    kinds = [with_sizes(made.step, {"b": BATCH}).inputs[-len(made.kept) :]][0]
    return [torch.zeros(n.shape, dtype=dtype if n.dtype.is_floating_point else n.dtype) for n in kinds]


def error_of(whole: Graph, size: int, kv: str = "same", starts: tuple[int, ...] = (0, 0, 0)) -> float:
    """The largest difference from the whole model at any position, in float64; rows of the batch start at steps of their own."""
    made = ReuseKV(size, kv).derive(whole)
    verify(made.step)
    tokens = torch.randint(0, 11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    (expected,) = interpret(whole, [tokens], torch.float64)
    state, got = empty_state(made), torch.full_like(expected, float("nan"))
    fed = torch.nn.functional.pad(tokens, (0, size))
    for step in range(-(-LENGTH // size) + max(starts)):
        at = torch.tensor([min(max(step - start, 0) * size, (LENGTH - 1) // size * size) for start in starts])
        rows = torch.arange(BATCH)[:, None]
        (y,) = interpret(made.step, [fed[rows, at[:, None] + torch.arange(size)], at, *state], torch.float64)
        for row, start in enumerate(at.tolist()):
            got[row, start : start + size] = y[row, : LENGTH - start]
    return float((got - expected).abs().max())


EXPECTED = """
graph "g.step"(tokens: i64[b, 2], position: i64[b], kept_0: f32[b, 2, 8, 4]) where b in 1..64 stage canonical {
  w = constant "w" : f32[11, 8]
  x = embedding(w, tokens)
  q = reshape(x, shape=[b, 2, 2, 4])
  q1 = permute(q, dims=[0, 2, 1, 3])
  p = constant "p" : f32[8, 8]
  m = matmul(x, p)
  k = reshape(m, shape=[b, 2, 2, 4])
  k1 = permute(k, dims=[0, 2, 1, 3])
  new = cache_update(kept_0, k1, position, dim=2)
  at = reshape(position, shape=[b, 1, 1, 1])
  own = iota(length=2)
  own1 = reshape(own, shape=[2, 1])
  queries = add(at, own1)
  keys = iota(length=8)
  keep = ge(queries, keys)
  y = attention(q1, new, new, keep, scale=0.5)
  o = permute(y, dims=[0, 2, 1, 3])
  r = reshape(o, shape=[b, 2, 8])
  s = add(x, r)
  write kept_0 = new
  return s
}
"""


def test_the_step_reads():
    """Keys that are values, too, are kept once."""
    notes = Notes()
    made = Canonicalize().run(ReuseKV(2).run(causal(), notes))
    assert equal(made, Canonicalize().run(parse(EXPECTED))) is None
    assert [a.what for a in notes.applied] == ["permute k1 kept as f32[b, 2, 8, 4]"]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 2, 1)], ids=["together", "apart"])
def test_a_step_computes_what_the_whole_computes(size, starts):
    assert error_of(causal(), size, starts=starts) < 1e-14


def band(window: int) -> torch.Tensor:
    away = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (away >= 0) & (away < window)


MASKS = {
    "a window": band(3)[None, None],
    "a window, as numbers": torch.where(band(3), 0.0, torch.finfo(torch.float32).min)[None, None],
    "causal, by data": band(8)[None, None],
    "a bias of each head": torch.where(band(8), torch.randn(2, LENGTH, LENGTH), float("-inf"))[None],
    "a hole": (band(8) & (torch.arange(LENGTH) != 2) | torch.eye(LENGTH, dtype=torch.bool))[None, None],
    "for two rows of a batch": band(4).expand(1, 1, LENGTH, LENGTH),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [1, 3])
def test_masks(name, size):
    whole = model(QKV, "y = attention(q1, k1, k1, mask, scale=0.5)", TAIL, mask=MASKS[name])
    assert error_of(whole, size, starts=(1, 0, 2)) < 1e-14


def test_a_window_is_computed_not_read():
    whole = model(QKV, "y = attention(q1, k1, k1, mask, scale=0.5)", TAIL, mask=MASKS["a window"])
    text = str(ReuseKV(1).run(whole))
    assert "lt(" in text and "index(" not in text


def test_tables_of_positions_are_read_where_the_tokens_stand():
    lines = ("e = add(x, t)", QKV.replace("(x,", "(e,"), "y = attention(q1, k1, k1, causal=true, scale=0.5)", TAIL)
    for shape in ((LENGTH, 8), (1, LENGTH, 8)):
        whole = model(*lines, t=torch.randn(shape))
        assert error_of(whole, 1, starts=(0, 1, 2)) < 1e-14
        assert error_of(whole, 3) < 1e-14


ROPE = """
  q2 = rope(q1, c, s)
  k2 = rope(k1, c, s)
  y = attention(q2, k2, k1, causal=true, scale=0.5)
"""


@pytest.mark.parametrize("size", [1, 3])
def test_keys_are_kept_as_attention_reads_them(size):
    angles = torch.randn(1, 1, LENGTH, 2).repeat(1, 1, 1, 2)
    whole = model(QKV, ROPE, TAIL.replace("s = ", "z = ").replace("return s", "return z"), c=angles.cos(), s=angles.sin())
    assert error_of(whole, size, starts=(0, 1, 2)) < 1e-14
    assert [str(k.node.type) for k in ReuseKV(size).derive(whole).kept] == ["f32[b, 2, 8, 4]"] * 2


REPEATED = """
  h = slice(m, dim=2, start=0, stop=4)
  k = reshape(h, shape=[b, 8, 1, 4])
  k1 = permute(k, dims=[0, 2, 1, 3])
  k2 = reshape(k1, shape=[b, 1, 1, 8, 4])
  k3 = expand(k2, shape=[b, 1, 2, 8, 4])
  k4 = reshape(k3, shape=[b, 2, 8, 4])
  y = attention(q1, k4, k4, causal=true, scale=0.5)
"""


def test_repeats_of_heads_are_not_kept():
    whole = model(*QKV.splitlines()[:4], REPEATED, TAIL)
    made = ReuseKV(1).derive(whole)
    assert [str(k.node.type) for k in made.kept] == ["f32[b, 1, 8, 4]"]
    assert "expand(" not in str(made.step)
    assert error_of(whole, 1) < 1e-14


WRITTEN_OUT = """
  kt = permute(k1, dims=[0, 1, 3, 2])
  a = matmul(q1, kt)
  c = tanh(a)
  n = add(c, mask)
  f = softmax(n, dim=3)
  y = matmul(f, k1)
"""


@pytest.mark.parametrize("size", [1, 3])
def test_attention_that_is_written_out(size):
    whole = model(QKV, WRITTEN_OUT, TAIL, mask=torch.where(band(8), 0.0, float("-inf"))[None, None])
    assert error_of(whole, size, starts=(0, 1, 2)) < 1e-14
    assert [str(k.node.type) for k in ReuseKV(size).derive(whole).kept] == ["f32[b, 2, 8, 4]"]


@pytest.mark.parametrize(("kv", "most"), [("f32", 1e-6), ("bf16", 2e-2), ("int8", 4e-2), ("int4", 0.6)])
def test_formats_of_keys_and_values(kv, most):
    error = error_of(causal(), 1, kv)
    assert error < most and (kv in ("f32", "bf16") or error > 1e-4)  # floats are all float64 here
    assert error_of(causal(), 3, kv) < most


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_rows_that_are_no_numbers_are_none_when_they_are_read(kv):
    value = graph_input("x", TensorType(torch.float32, (5, 8)))
    parts = KV_FORMATS[kv].encode(value)
    x = torch.randn(5, 8)
    x[1], x[2, 3], x[3, 4], x[4, 5] = 0.0, float("nan"), float("inf"), -float("inf")
    (got,) = interpret(Graph("g", (value,), (KV_FORMATS[kv].decode(parts, torch.float32),)), [x])
    assert got[2:].isnan().all() and not got[1].any() and (got[0] - x[0]).abs().max() <= x[0].abs().max() / 13


def test_halves_of_columns_share_bytes():
    value = graph_input("x", TensorType(torch.float32, (1, 4)))
    packed, scale = interpret(Graph("g", (value,), KV_FORMATS["int4"].encode(value)), [torch.tensor([[7.0, -7.0, 1.0, 0.0]])])
    assert packed.tolist() == [[15 + (9 << 4), 1 + (8 << 4)]] and scale.tolist() == [[1.0]]


def test_what_formats_keep():
    kept = {kv: [str(k.node.type) for k in ReuseKV(1, kv).derive(causal()).kept] for kv in KV_FORMATS}
    assert kept == {
        "same": ["f32[b, 2, 8, 4]"],
        "f32": ["f32[b, 2, 8, 4]"],
        "bf16": ["bf16[b, 2, 8, 4]"],
        "int8": ["i8[b, 2, 8, 4]", "f32[b, 2, 8, 1]"],
        "int4": ["u8[b, 2, 8, 2]", "f32[b, 2, 8, 1]"],
    }


CROSS = """
graph g(tokens: i64[b, 8], memory: f32[b, 5, 8], w: f32[11, 8], p: f32[8, 8]) where b in 1..64 stage canonical {
  x = embedding(w, tokens)
"""
MEMORY = """
  e = exp(memory)
  n = matmul(e, p)
  c = reshape(n, shape=[b, 5, 2, 4])
  c1 = permute(c, dims=[0, 2, 1, 3])
  z = attention(y, c1, c1, scale=0.5)
"""


def test_what_depends_on_other_inputs_only_is_computed_once():
    torch.manual_seed(0)
    text = "\n".join([CROSS, QKV, "y = attention(q1, k1, k1, causal=true, scale=0.5)", MEMORY, TAIL.replace("permute(y", "permute(z")])
    whole = with_constants(parse(text), w=torch.randn(11, 8), p=torch.randn(8, 8))
    made = ReuseKV(1).derive(whole)
    assert made.start is not None and [n.hint for n in made.start.inputs] == ["memory"]
    assert [str(n.type) for n in made.start.outputs] == ["f32[b, 2, 5, 4]"] and "exp(" not in str(made.step)
    tokens, memory = torch.randint(0, 11, (BATCH, LENGTH)), torch.randn(BATCH, 5, 8)
    (expected,) = interpret(whole, [tokens, memory], torch.float64)
    given = interpret(made.start, [memory], torch.float64)
    state = empty_state(made)
    for i in range(LENGTH):
        (y,) = interpret(made.step, [tokens[:, i : i + 1], torch.full((BATCH,), i), *given, *state], torch.float64)
        assert torch.allclose(y[:, 0], expected[:, i], rtol=0, atol=1e-14)


NARROW = (
    "q = reshape(x, shape=[b, 8, 8, 1])", "q1 = permute(q, dims=[0, 2, 1, 3])", "y = attention(q1, q1, q1, causal=true, scale=0.5)", TAIL,
)  # fmt: skip


def test_a_padding_mask_of_keys():
    """Other inputs may say which keys count, of all there will be."""
    torch.manual_seed(0)
    lines = ["keep = reshape(valid, shape=[b, 1, 1, 8])", "y = attention(q1, k1, k1, keep, causal=true, scale=0.5)", TAIL]
    head = HEAD.replace("tokens: i64[b, 8]", "tokens: i64[b, 8], valid: bool[b, 8]")
    whole = with_constants(graph(head, QKV, *lines), w=torch.randn(11, 8), p=torch.randn(8, 8))
    made = ReuseKV(1).derive(whole)
    tokens, valid = torch.randint(0, 11, (BATCH, LENGTH)), torch.rand(BATCH, LENGTH) > 0.3
    valid[:, 0] = True
    (expected,) = interpret(whole, [tokens, valid], torch.float64)
    assert made.start is not None
    given, state = interpret(made.start, [valid]), empty_state(made)
    for i in range(LENGTH):
        (y,) = interpret(made.step, [tokens[:, i : i + 1], torch.full((BATCH,), i), *given, *state], torch.float64)
        assert torch.allclose(y[:, 0], expected[:, i], rtol=0, atol=1e-14)


def refusal(whole: Graph, **options: object) -> str:
    with pytest.raises(CannotDerive) as error:
        ReuseKV(1, **options).run(whole)  # type: ignore[arg-type]
    return str(error.value)


def test_refused():
    both_ways = model(QKV, "y = attention(q1, k1, k1, scale=0.5)  # model.py:7", TAIL)
    assert "attention y reads all indices together" in refusal(both_ways) and "(at model.py:7)" in refusal(both_ways)
    late = band(8)
    late[2, 5] = True
    assert "attention y reads all" in refusal(model(QKV, "y = attention(q1, k1, k1, m2, scale=0.5)", TAIL, m2=late[None, None]))
    mean = "a = mean(x, dims=[1], keepdim=true)  # model.py:3\n s = add(x, a)\n return s }"
    assert "mean a reads all indices together" in refusal(model(mean)) and "(at model.py:3)" in refusal(model(mean))
    assert "cumsum a reads earlier tokens by other means than attention" in refusal(model("a = cumsum(x, dim=1)\n return a }"))
    assert "it has no causal attention" in refusal(model("return x }"))
    last = model(
        QKV, "y = attention(q1, k1, k1, causal=true, scale=0.5)", TAIL.replace("return s", "z = select(s, dim=1, index=7)\n return z")
    )
    assert "select z" in refusal(last)
    assert "no input of tokens" in refusal(graph("graph g(x: f32[b, 8]) where b in 1..64 stage canonical {\n return x }"))
    assert "not as 'int3'" in refusal(causal(), kv="int3")
    assert "which int8 does not serve" in refusal(model(*NARROW), kv="int8") and "int4 does not serve" in refusal(model(*NARROW), kv="int4")
    writing = causal()
    writing = replace(writing, writes=((writing.inputs[0], writing.inputs[0]),))
    assert "it writes to its input tokens" in refusal(writing)
    one = parse(str(causal()).replace("where b in 1..64", "").replace("[b, ", "[1, ").replace("4*b", "4"))
    assert "a batch of one" in refusal(one)
