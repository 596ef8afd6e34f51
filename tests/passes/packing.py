"""Small encoders with padded inputs, what packs them, and how packed results are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tilewright.driver.padding import layout_of
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.passes.base import Notes
from tilewright.passes.remove_padding import Packed, without_padding

B, S, H, D = 4, 8, 2, 4
WIDTH = H * D
WEIGHTS = {
    "table": torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(0)),
    "at": torch.randn(1, S, WIDTH, generator=torch.Generator().manual_seed(1)),
    "w": torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / 2,
}
ENDS = {"full": [8] * 4, "mixed": [8, 3, 1, 5], "one empty": [8, 0, 2, 5], "single tokens": [1] * 4}

KEEP = ("k = cast(mask, dtype=bool)", "keep = reshape(k, shape=[4, 1, 1, 8])")
CAUSAL = ("i = iota(length=8)", "q = reshape(i, shape=[8, 1])", "before = le(i, q)")


def encoder(*lines: str, mask: Sequence[str] = KEEP, attended: str = "attention(h, h, h, keep, scale=0.5)", result: str = "y") -> str:
    """A layer: embeddings, attention over heads, a linear; `lines` follow and may read `y`."""
    return "\n".join(
        [
            "graph g(ids: i64[4, 8], mask: i64[4, 8]) stage canonical {",
            'table = constant "table" : f32[11, 8]',
            'at = constant "at" : f32[1, 8, 8]',
            'w = constant "w" : f32[8, 8]',
            "e = embedding(table, ids)  # model.py:1",
            "x = add(e, at)",
            "p = reshape(x, shape=[4, 8, 2, 4])",
            "h = permute(p, dims=[0, 2, 1, 3])",
            *mask,
            f"a = {attended}  # model.py:2",
            "t = permute(a, dims=[0, 2, 1, 3])",
            "m = reshape(t, shape=[4, 8, 8])",
            "y = linear(m, w)  # model.py:3",
            *lines,
            f"return {result}",
            "}",
        ]
    )


def packed(text: str) -> tuple[Graph, Packed | None, Notes]:
    graph, notes = parse(text, WEIGHTS), Notes()
    return graph, without_padding(graph, notes), notes


def mask_of(lengths: Sequence[int], left: bool = False) -> torch.Tensor:
    at = torch.arange(S).expand(len(lengths), S)
    count = torch.tensor(lengths)[:, None]
    return (at >= S - count if left else at < count).long()


def inputs_of(mask: torch.Tensor, padding: int = 0) -> list[torch.Tensor]:
    ids = torch.randint(0, 11, (B, S), generator=torch.Generator().manual_seed(3))
    return [ids, mask, *(torch.from_numpy(x) for x in layout_of((mask != padding).numpy()))]


def assert_equal_on_tokens(graph: Graph, found: Packed, mask: torch.Tensor, of_rows: bool = True) -> None:
    """Rows of tokens are as they were, by the interpreter; those of padding are 0. of_rows: results have tokens."""
    inputs, present = inputs_of(mask, found.padding), mask != found.padding
    for before, after in zip(interpret(graph, inputs[:2]), interpret(found.graph, inputs), strict=True):
        if not of_rows:
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
            continue
        torch.testing.assert_close(after[present], before[present], rtol=1e-5, atol=1e-6)
        assert not after[~present].any()
