"""Calls without padding: a program over packed rows beside the padded one, and which of the two runs a call.

    mask [[1, 1, 1, 0],      rows       0 1 2 4      first  0 0 0 3      places [[0,  1,  2, -1],
          [1, 0, 0, 0]]      positions  0 1 2 0      last   3 3 3 4              [3, -1, -1, -1]]

Which one runs is decided by the mask of the call: how many of its tokens are padding, and whether padding is at the ends only. How often
each was taken, and why, is counted.
"""

from __future__ import annotations

import enum
import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..codegen.program import Program
from ..ir.graph import Graph
from ..passes.remove_padding import FIRST, LAST, Packed

PAYS_BELOW = 0.9
"""Share of tokens that are no padding, below which packing is thought to gain where nothing was measured: packing and unpacking cost about
what a twentieth of the rows of a narrow encoder do."""

LAYOUT = 5
"""Further inputs of a packed graph."""

Run = Callable[[list[Any]], list[Any]]


class Way(enum.Enum):
    """How a call went. All but the first are reasons to compute padding."""

    PACKED = "without padding"
    LITTLE = "there is too little padding"
    HOLES = "padding stands between tokens"
    VALUES = "the mask holds other values than 0 and 1"
    EMPTY = "there is nothing but padding"
    READ = "padding stands where a token is read by itself"


def layout_of(present: np.ndarray) -> list[np.ndarray]:
    """The further inputs of a packed graph (`passes.packed_masks.Layout`) for tokens [b, s] that are no padding."""
    counts, rows = present.sum(1), np.flatnonzero(present)
    ends = counts.cumsum()
    places = np.full(present.size, -1)
    places[rows] = np.arange(rows.size)
    first, last = (ends - counts).repeat(counts), ends.repeat(counts)
    return [rows, rows % present.shape[1], first, last, places.reshape(present.shape)]


@dataclass(frozen=True)
class WithoutPadding:
    """A model's program over packed rows.

    plan: its graph, after all passes, and what that takes for granted. pays_below: the share of tokens that are no padding, below which
    packing gains. counts: calls by the way they went.
    """

    plan: Packed
    program: Program
    pays_below: float = PAYS_BELOW
    counts: Counter[Way] = field(default_factory=Counter, repr=False, compare=False)

    def run(self, inputs: list[Any], padded: Run) -> list[Any]:
        """The outputs for the inputs of the padded program, by it or by the packed one."""
        mask = inputs[self.plan.mask]
        way, layout = self.choose(mask)
        self.counts[way] += 1
        if way is not Way.PACKED:
            return padded(inputs)
        inputs += [torch.from_numpy(x).to(mask.device) for x in layout]
        return self.program.run(inputs)

    def afresh(self) -> WithoutPadding:
        """The same, with no calls counted yet."""
        return replace(self, counts=Counter())

    def whenever_possible(self) -> WithoutPadding:
        """The same for all calls that it may run, whether it gains or not."""
        return replace(self, pays_below=math.inf, counts=Counter())

    def share(self, inputs: Sequence[Any]) -> float:
        """How much of a call's tokens is computed."""
        way, layout = self.choose(inputs[self.plan.mask])
        return layout[0].size / inputs[self.plan.mask].numel() if way is Way.PACKED else 1.0

    def at_tokens(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        """What the outputs of a call hold where there is no padding: rows. Those that have no tokens are as they are."""
        present = inputs[self.plan.mask] != self.plan.padding
        return [x if dims is None else rows_at(x, dims, present) for x, dims in zip(outputs, self.plan.spread)]

    def choose(self, mask: torch.Tensor) -> tuple[Way, Sequence[np.ndarray]]:
        """How a call with this mask goes, and where its rows come from."""
        values = mask.detach().to("cpu", torch.float32 if mask.dtype == torch.bfloat16 else mask.dtype).numpy()
        present = values != self.plan.padding
        if mask.dtype != torch.bool and not np.array_equal(values, present ^ bool(self.plan.padding)):
            return Way.VALUES, ()
        count = int(present.sum())
        if count >= self.pays_below * present.size:
            return Way.LITTLE, ()
        if not count:
            return Way.EMPTY, ()
        begins = present[:, 1:] & ~present[:, :-1]
        if bool((begins.sum(1) + present[:, 0] > 1).any()):
            return Way.HOLES, ()
        if not all(bool(present[:, 0 if at == FIRST else -1].all()) for at in self.plan.present):
            return Way.READ, ()
        return Way.PACKED, layout_of(present)

    def statistic(self) -> dict[str, int]:
        """Calls by the way they went, in words."""
        return {way.value: self.counts[way] for way in Way if self.counts[way]}

    def to_json(self) -> dict[str, Any]:
        """What an artifact keeps beside the graph."""
        plan = self.plan
        return {
            "mask": plan.mask,
            "padding": plan.padding,
            "present": sorted(plan.present),
            "spread": plan.spread,
            "below": self.pays_below,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], graph: Graph, program: Program) -> WithoutPadding:
        spread = tuple(None if dims is None else (int(dims[0]), int(dims[1])) for dims in data["spread"])
        plan = Packed(graph, int(data["mask"]), int(data["padding"]), frozenset(map(int, data["present"])), spread)
        if not 0 <= plan.mask < len(graph.inputs) - LAYOUT or plan.padding not in (0, 1) or not plan.present <= {FIRST, LAST}:
            raise ValueError("what it says of padding fits no graph")
        return WithoutPadding(plan, program, float(data["below"]))


def rows_at(x: torch.Tensor, dims: tuple[int, int], where: torch.Tensor) -> torch.Tensor:
    """Of a value whose dimensions are batch and tokens, the same one where they are merged, those that are chosen: [rows, ...]."""
    batch, tokens = dims
    if batch == tokens:
        return x.movedim(batch, 0)[where.reshape(-1)]
    return x.movedim((batch, tokens), (0, 1))[where]


_COMPILED: deque[WithoutPadding] = deque(maxlen=4096)


def recorded(made: WithoutPadding, padded: Run) -> Run:
    """What runs the calls of a graph that torch.compile gave us; `padding_counts` has how they went."""
    _COMPILED.append(made)
    return functools.partial(made.run, padded=padded)


def padding_counts() -> list[dict[str, int]]:
    """Of every graph that torch.compile gave us with `remove_padding`, newest last: calls without padding, and with it by the reason."""
    return [made.statistic() for made in _COMPILED]
