"""What may be done to a model one after the other: transforms as data, small models they apply to, and what came of each pair.

`python tests/compositions.py` writes docs/composition.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import generations
import pytest
import torch
from matrices import EXACT, Outcome, table
from processes import together
from tilewright.driver.inputs import Example
from tilewright.driver.loading import captured_of, export_module
from tilewright.driver.padding import layout_of
from tilewright.driver.pipeline import PREPARING
from tilewright.ir.analysis.residuals import units
from tilewright.ir.analysis.segments import segments
from tilewright.ir.graph import Graph, Node
from tilewright.ir.interpret import interpret
from tilewright.passes.base import Notes, Pass
from tilewright.passes.manager import run_passes
from tilewright.passes.merge_tokens import MergeTokens, tokens_of
from tilewright.passes.prune_blocks import PruneBlocks
from tilewright.passes.quantize import Plan, Quantize
from tilewright.passes.remove_padding import without_padding
from tilewright.passes.reuse_blocks import pieces
from tilewright.passes.reuse_kv import CannotDerive, ReuseKV
from tilewright.passes.shard_linears import ShardLinears
from tilewright.passes.split_batch import SplitBatch, SplitHalves
from tilewright.passes.split_layers import split
from tilewright.passes.split_space import SplitSpace
from torch import nn

PAGE = Path(__file__).parents[1] / "docs" / "composition.md"
TOKENS, LENGTHS, CHUNK = 12, (12, 7), 4

Call = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Refused(Exception):
    """A transform that is not done to a model, and why."""


@dataclass(frozen=True)
class Subject:
    """A model that transforms are done to. graph: what is run. execute: how a graph is run on inputs, which state is written back into.
    drive: how calls of it make the model's function of its first inputs."""

    graph: Graph
    execute: Callable[[Graph], Call]
    drive: Callable[[Call, list[torch.Tensor]], list[torch.Tensor]] = lambda call, inputs: call(inputs)

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return self.drive(self.execute(self.graph), inputs)


# -- models


class Block(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.causal = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), causal

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Text(nn.Module):
    """Tokens to logits: a decoder, or an encoder that is told which tokens are padding."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 32), nn.Embedding(TOKENS, 32)
        self.first, self.second = Block(32, causal), Block(32, causal)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        keys = None if mask is None else mask[:, None, None].bool()
        return self.head(self.second(self.first(x, keys), keys))


class Image(nn.Module):
    """Convolutions, then a transformer over their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 8, 8)
        )
        self.first, self.second = Block(32, False), Block(32, False)
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.stem(image).flatten(2).transpose(1, 2))).mean(1))


@dataclass(frozen=True)
class Small:
    """A model, and two sets of inputs for it. valid: what of its result counts."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], list[torch.Tensor]]
    valid: Callable[[torch.Tensor], torch.Tensor] = lambda y: y


def _padded(made: torch.Generator) -> list[torch.Tensor]:
    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    return [torch.randint(0, 50, (2, TOKENS), generator=made), mask]


MODELS: dict[str, Small] = {
    "decoder": Small(lambda: Text(True), lambda made: [torch.randint(0, 50, (2, TOKENS), generator=made)]),
    "encoder": Small(lambda: Text(False), _padded, lambda y: torch.cat([row[:n] for row, n in zip(y, LENGTHS)])),
    "image": Small(Image, lambda made: [torch.randn(2, 3, 64, 64, generator=made, dtype=torch.float64)]),
}


@cache
def subject(name: str) -> Subject:
    torch.manual_seed(0)
    model = MODELS[name].make().eval().requires_grad_(False)
    given = tuple(x.float() if x.is_floating_point() else x for x in example(name))
    captured = captured_of(export_module(name, model, Example(given, {}, {})))
    with torch.no_grad():
        return Subject(run_passes(captured.graph, PREPARING, Notes()), _interpreted)


@cache
def example(name: str) -> list[torch.Tensor]:
    return MODELS[name].inputs(torch.Generator().manual_seed(1))


def _interpreted(graph: Graph) -> Call:
    return lambda inputs: interpret(graph, inputs, torch.float64)


# -- transforms


def _pass(make: Callable[[Graph], Pass]) -> Callable[[Subject], Subject]:
    """Of the graph that is run, whatever runs it."""

    def transform(before: Subject) -> Subject:
        notes = Notes()
        made = make(before.graph)
        after = made.run(before.graph, notes)
        if not any(a.rule == made.name for a in notes.applied) or after is before.graph:
            raise Refused(_declined(notes))
        return replace(before, graph=after)

    return transform


def _declined(notes: Notes) -> str:
    if not notes.declined:
        return "there is nothing it applies to"
    last = notes.declined[-1]
    return f"{last.what}: {last.reason.value}" + (f" ({last.value})" if last.value else "")


def _one_unit(graph: Graph) -> PruneBlocks:
    return PruneBlocks(removed=tuple(u.name for u in units(graph)[-1:]))


def _two_tokens(graph: Graph) -> MergeTokens:
    found = tokens_of(graph)
    return MergeTokens(tuple((site.name, 2) for site in found.sites[:1]) if found else (("attention", 2),))


def _without_padding(before: Subject) -> Subject:
    notes = Notes()
    found = without_padding(before.graph, notes)
    if found is None:
        raise Refused(_declined(notes))

    def drive(call: Call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        present = inputs[found.mask].numpy() != found.padding
        return before.drive(lambda given: call([*given, *map(torch.as_tensor, layout_of(present))]), inputs)

    return replace(before, graph=found.graph, drive=drive)


def _by_steps(before: Subject) -> Subject:
    """In chunks, with keys and values as state."""
    try:
        derived = ReuseKV(CHUNK).derive(before.graph)
    except CannotDerive as error:
        raise Refused(str(error).split(": ", 1)[1].split(" (at ")[0]) from error
    if derived.start is not None:
        raise Refused("other inputs are computed once, by a graph of their own")

    def drive(call: Call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        (tokens,) = inputs
        state = [torch.zeros([int(d) for d in k.node.shape], dtype=torch.float64) for k in derived.kept]
        found = [call([tokens[:, at : at + CHUNK], torch.full((len(tokens),), at), *state])[0] for at in range(0, tokens.shape[1], CHUNK)]
        return [torch.cat(found, 1)]

    return Subject(derived.step, before.execute, lambda call, inputs: before.drive(lambda given: drive(call, given), inputs))


def _reused(before: Subject) -> Subject:
    """As pieces of which a caller may leave some out: none are, at threshold 0."""
    if before.graph.writes:
        raise Refused("a step that is left out would not write its state")

    def execute(graph: Graph) -> Call:
        parts = [(piece, before.execute(piece.graph)) for piece in pieces(graph)]

        def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            known: dict[Node, torch.Tensor] = dict(zip(graph.inputs, inputs, strict=True))
            for piece, run in parts:
                known.update(zip(piece.gives, run([known[n] for n in piece.takes])))
            return [known[n] for n in graph.outputs]

        return call

    if len(pieces(before.graph)) < 2:
        raise Refused("it has no residual blocks")
    return replace(before, execute=execute)


def _staged(before: Subject) -> Subject:
    """In two parts, cut in the middle."""
    if not segments(before.graph).cuts:
        raise Refused("there is no place to cut it")

    def execute(graph: Graph) -> Call:
        found = segments(graph)
        parts = split(found, [len(found.cuts) // 2]) if found.cuts else split(found, [])
        runs = [before.execute(part.graph) for part in parts]

        def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            known = dict(zip(graph.inputs, inputs, strict=True))
            written = {target for target, _ in graph.writes}
            values = [x for n, x in known.items() if n not in written]
            for part, run in zip(parts, runs):
                values = run([*values, *(known[n] for n in part.state)])
            return values

        return call

    return replace(before, execute=execute)


def _sharded(before: Subject) -> Subject:
    """On two processes; threads stand for them."""
    if before.graph.writes:
        raise Refused("the state would be shared out over processes, and a step takes it whole")
    notes = Notes()
    if ShardLinears(0, 2).run(before.graph, notes) is before.graph:
        raise Refused(_declined(notes))

    def execute(graph: Graph) -> Call:
        made = [ShardLinears(rank, 2).run(graph) for rank in range(2)]

        def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            with pytest.MonkeyPatch.context() as patch:
                return together(made, inputs, patch, torch.float64)[0]

        return call

    return replace(before, execute=execute)


@dataclass(frozen=True)
class Transform:
    """bounded: by how much it may move the result on these models, relative; None where it computes the same function."""

    apply: Callable[[Subject], Subject]
    bounded: float | None = None


TRANSFORMS: dict[str, Transform] = {
    "prune-blocks": Transform(_pass(_one_unit), 0.9),
    "merge-tokens": Transform(_pass(_two_tokens), 0.9),
    "quantize, int8": Transform(_pass(lambda graph: Quantize(Plan.parse("*:int8"))), 0.02),
    "quantize, int4": Transform(_pass(lambda graph: Quantize(Plan.parse("*:int4-g32"))), 0.4),
    "split-space": Transform(_pass(lambda graph: SplitSpace(overhead=1.0))),
    "remove-padding": Transform(_without_padding),
    "split-halves": Transform(_pass(lambda graph: SplitHalves(at=5))),
    "split-batch": Transform(_pass(lambda graph: SplitBatch(2))),
    "reuse-kv": Transform(_by_steps),
    "shard-linears": Transform(_sharded),
    "reuse-blocks": Transform(_reused),
    "split-layers": Transform(_staged),
}
"""In the order in which they are done: what changes the model, what changes its graph, what changes how it is run."""


# -- pairs


def single(name: str, model: str) -> Outcome:
    return _outcome(model, (name,))


def pair(first: str, second: str) -> Outcome:
    """On a model that both apply to on their own; else on one that the first applies to, where the second says why not."""
    both = [m for m in MODELS if not single(first, m).refused and not single(second, m).refused]
    one = [m for m in MODELS if not single(first, m).refused]
    return _outcome((both or one)[0], (first, second))


@cache
def _outcome(model: str, names: tuple[str, ...]) -> Outcome:
    inputs, valid = example(model), MODELS[model].valid
    (expected,) = subject(model)(inputs)
    made = subject(model)
    for name in names:
        try:
            made = TRANSFORMS[name].apply(made)
        except Refused as why:
            return Outcome(refused=f"{name}: {why}")
    (found,) = made([x.clone() for x in inputs])
    allowed = sum(TRANSFORMS[name].bounded or 0.0 for name in names) or EXACT
    error = float((valid(found) - valid(expected)).norm() / valid(expected).norm())
    return Outcome(error, allowed)


def page() -> str:
    """Both matrices in words."""
    rewrites, ways = table("first, then", TRANSFORMS, pair), table("together", generations.FEATURES, generations.pair)
    return "\n".join([HEAD, rewrites, GENERATION, ways])


HEAD = """# What goes with what

Each pair of rewrites is done to a small model, one after the other, and the result compared with the model as it was, in float64: `=` is
the same function, a percentage is how far outputs moved where one of the two is bounded (the models have random weights, so that says
nothing of real ones), and a number is a refusal, with its reason below. `tests/test_composition.py` does this in every run of the tests,
and `python tests/compositions.py` writes this page.
"""

GENERATION = """## Generating

Each pair of what a `Generator` does, on a small decoder like Llama: the same documents and questions are read in one order, in another,
and once more, and the logits from which each token was chosen compared with those of the whole model on the whole text, in float64. What is
`=` also writes the same text as the plain generator; and what is exact changes no text beside what is bounded, either: drafts, kept
beginnings and prompts in chunks leave each token as it was, and the numbers it was drawn with.
"""

if __name__ == "__main__":
    PAGE.write_text(page())
