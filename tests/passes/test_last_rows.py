"""last-rows: what only the picked token needs is computed for it alone, the results are those of the whole, and the state takes all."""

from __future__ import annotations

import pytest
import torch
from tilewright.ir.analysis.hashing import equal
from tilewright.ir.graph import Graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.sizes import with_sizes
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes
from tilewright.passes.last_rows import LastRows

BATCH, TOKENS = 2, 6
INPUTS = "x: f32[b, 6, 8], w: f32[11, 8], k: f32[8, 8], keys: f32[b, 20, 8], position: i64[b], table: f32[6, 8], heads: f32[2, 1, 1]"
STATE = """
  m = linear(x, k)
  new = cache_update(keys, m, position, dim=1)
  write keys = new
"""


def step(body: str, inputs: str = INPUTS) -> Graph:
    return parse(f"graph g({inputs}) where b in 1..64 stage canonical {{\n{body}\n}}")


def test_the_picture() -> None:
    before = step(f"{STATE} a = add(m, table)\n n = rms_norm(a)\n y = linear(n, w)\n return y")
    after = step(
        f"""{STATE}
  at = reshape(last, shape=[b, 1, 1])
  index = expand(at, shape=[b, 1, 8])
  one = gather(m, index, dim=1)
  rows = reshape(table, shape=[1, 6, 8])
  spread = expand(rows, shape=[b, 6, 8])
  row = gather(spread, index, dim=1)
  a = add(one, row)
  n = rms_norm(a)
  y = linear(n, w)
  return y""",
        f"{INPUTS}, last: i64[b]",
    )
    notes = Notes()
    assert equal(LastRows().run(before, notes), after) is None
    assert [a.what for a in notes.applied] == ["one token of each row of linear m", "one token of each row of reshape"]


HEADS = "h = reshape(x, shape=[b, 6, 2, 4])\n q = permute(h, dims=[0, 2, 1, 3])\n kk = reshape(keys, shape=[b, 20, 2, 4])\n"
HEADS += "kv = permute(kk, dims=[0, 2, 1, 3])\n p = reshape(position, shape=[b, 1, 1, 1])\n i = iota(length=6)\n"
HEADS += "c = reshape(i, shape=[6, 1])\n s = add(p, c)\n j = iota(length=20)\n mask = ge(s, j)\n"
MERGED = "\n o = permute(a, dims=[0, 2, 1, 3])\n r = reshape(o, shape=[b, 6, 8])\n y = linear(r, w)\n return y"
COUNTED = "attention(q, kv, kv, mask, scale=0.5)"


@pytest.mark.parametrize(
    "body, narrow",
    [
        ("l = linear(x, k)\n g = gelu(l)\n y = linear(g, w)\n return y", "linear"),
        ("l = layer_norm(x, axes=1, eps=1e-5)\n s = slice(l, dim=2, start=2, stop=5)\n return s", "slice"),
        ("l = layer_norm(x, axes=2, eps=1e-5)\n y = linear(l, w)\n return y", "linear"),
        ("f = flip(x, dims=[1])\n y = linear(f, w)\n return y", "linear"),
        ("c = cumsum(x, dim=1)\n y = linear(c, w)\n return y", "linear"),
        ("s = slice(x, dim=1, start=0, stop=6)\n f = reshape(x, shape=[6*b, 8])\n l = linear(f, w)\n y = reshape(l, shape=[b, 6, 11])\n"
         "return y", ""),
        (f"{HEADS} a = {COUNTED}{MERGED}", "attention"),
        (f"{HEADS} e = permute(q, dims=[1, 0, 2, 3])\n d = permute(e, dims=[1, 0, 2, 3])\n t = mul(d, heads)\n "
         f"a = attention(t, kv, kv, mask, scale=0.5){MERGED}", "attention"),
        (f"{HEADS} cos = reshape(table, shape=[1, 1, 6, 8])\n cs = slice(cos, dim=3, start=0, stop=4)\n rr = rope(q, cs, cs)\n "
         f"a = attention(rr, kv, kv, mask, scale=0.5){MERGED}", "attention"),
        ("d = div(x, 3.0)\n t = mul(d, d)\n y = linear(t, w)\n return y", "mul"),
    ],
)  # fmt: skip
def test_results_are_those_of_the_whole(body: str, narrow: str) -> None:
    """narrow: an op that is computed for one token."""
    before = step(STATE + body)
    after = LastRows().run(before)
    for graph in (before, after):
        verify(graph)
    if narrow:
        assert any(n.op.name == narrow and 1 in n.shape[1:-1] for n in order(after)), str(after)
    torch.manual_seed(0)
    one, other = (with_sizes(g, {"b": BATCH}) for g in (before, after))
    verify(other)
    values = [torch.randn(n.shape, dtype=torch.float64).float() for n in one.inputs]
    values[4] = torch.tensor([3, 11])
    for last in ([0, 5], [5, 5], [2, 4]):
        kept = [[v.clone() for v in values] for _ in range(2)]
        (whole,) = interpret(one, kept[0])
        (row,) = interpret(other, [*kept[1], torch.tensor(last)])
        assert row.shape == (BATCH, 1, *whole.shape[2:])
        torch.testing.assert_close(row[:, 0], whole[torch.arange(BATCH), torch.tensor(last)], rtol=1e-5, atol=1e-5)
        assert torch.equal(kept[0][3], kept[1][3]), "the state"


def test_results_without_tokens_stay() -> None:
    before = step("s = sum(keys, dims=[1, 2])\n return s")
    assert LastRows().run(before) is before
