"""Does it pay to run a graph in parts? A simulator of what devices and links do when, and the decisions that follow from it.

    whole     compute  [ layer 1 ]        [ layer 2 ]                 halves   compute  [1a][1b][2a][2b]
              link                [ sum 1 ]          [ sum 2 ]                 link         [1a][1b][2a][2b]

A device or link does its tasks in the order given, each as soon as it is free and what the task waits for is done. On one device nothing is
waited for, and all decisions say so: parts then only take longer. Sources: "GPipe" (Huang et al., 2018) for micro-batches; "TokenWeave"
(Gond et al., 2025) for halves, whose rules these are: no more waves than unsplit, and never below 1024 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.analysis.axis_externs import SUMS
from ..ir.dims import hint
from ..ir.graph import Graph, Node, order
from ..ir.reasons import Reason
from ..passes.base import Notes
from ..passes.split_batch import SplitBatch, SplitHalves

LEAST_TOKENS = 1024
"""Of fewer, halves are too short to hide anything behind."""

STEP = 256
"""Tokens that the first part is a multiple of."""

ONE_ROW = "a batch of one has no parts"

LEAST_GAIN = 0.02
"""Of the time: less is within the error of any prediction."""


@dataclass(frozen=True)
class Task:
    """on: the device or link that does it. after: names of tasks that must be done."""

    name: str
    on: str
    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    start: float
    stop: float


def simulate(tasks: Iterable[Task]) -> dict[str, Span]:
    """When each task runs. Those of one device in the order given; a task comes behind what it waits for."""
    spans: dict[str, Span] = {}
    free: dict[str, float] = {}
    for task in tasks:
        start = max([free.get(task.on, 0.0), *(spans[name].stop for name in task.after)])
        spans[task.name] = Span(start, start + task.seconds)
        free[task.on] = spans[task.name].stop
    return spans


def total(tasks: Iterable[Task]) -> float:
    """Seconds until all is done."""
    return max((span.stop for span in simulate(tasks).values()), default=0.0)


@dataclass(frozen=True)
class Decision:
    """parts: sizes, one where it does not pay. seconds: predicted, `whole`: in one part. reason: why not, "" if it pays."""

    parts: tuple[int, ...]
    seconds: float
    whole: float
    reason: str = ""

    @property
    def pays(self) -> bool:
        return not self.reason


# -- two parts of what several devices compute together


@dataclass(frozen=True)
class Layer:
    """What a device does until all have to wait for each other. flops: for each token; pair_flops: for each token and one that it attends
    to; nbytes: for each token, summed over the devices behind it."""

    flops: float
    pair_flops: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """devices: how many compute each layer together. rate: operations per second of one. wave: tokens that take as long as one of them.
    link: bytes per second; latency: seconds of a sum of nothing."""

    devices: int
    rate: float
    wave: int = 128
    link: float = math.inf
    latency: float = 0.0

    def computing(self, layer: Layer, tokens: int, before: int) -> float:
        """Of so many tokens, which attend to each other (half of them, on average) and to those before them."""
        padded = -(-tokens // self.wave) * self.wave
        return padded * (layer.flops + layer.pair_flops * (before + tokens / 2)) / self.rate

    def summing(self, layer: Layer, tokens: int) -> float:
        return self.latency + tokens * layer.nbytes / self.link if layer.nbytes else 0.0


def in_parts(layers: Sequence[Layer], parts: Sequence[int], cluster: Cluster) -> list[Task]:
    """All layers of all parts: of each layer the first part first. A part waits for its own sums, and for the keys of the parts before."""
    tasks: list[Task] = []
    for i, layer in enumerate(layers):
        for p, tokens in enumerate(parts):
            own = (f"sum {i - 1}.{p}",) if i else ()
            keys = (f"layer {i}.{p - 1}",) if p else ()
            tasks.append(Task(f"layer {i}.{p}", "compute", cluster.computing(layer, tokens, sum(parts[:p])), own + keys))
            tasks.append(Task(f"sum {i}.{p}", "link", cluster.summing(layer, tokens), (f"layer {i}.{p}",)))
    return tasks


def halves(layers: Sequence[Layer], tokens: int, cluster: Cluster, batch: int = 1) -> Decision:
    """In how many tokens first, and the others behind them; or in one. batch: as many of each row are first."""
    step = math.lcm(STEP, batch)
    splits = [(first, tokens - first) for first in range(step, tokens, step)]
    return _in_two(layers, tokens, cluster, splits, f"{tokens} tokens are no more than the {step} that parts are multiples of")


def batch_parts(layers: Sequence[Layer], batch: int, length: int, cluster: Cluster) -> Decision:
    """The same for the rows of a batch, which do not attend to each other: as many first as behind them."""
    apart = [replace(x, flops=x.flops + x.pair_flops * batch * length / 2, pair_flops=0.0) for x in layers]
    first = batch - batch // 2
    splits = [(first * length, (batch - first) * length)] if batch > 1 else []
    return _in_two(apart, batch * length, cluster, splits, ONE_ROW)


def _in_two(layers: Sequence[Layer], tokens: int, cluster: Cluster, splits: Sequence[tuple[int, int]], none: str) -> Decision:
    """none: why there are no splits."""
    whole = total(in_parts(layers, [tokens], cluster))
    why = alone(layers, tokens, cluster) or ("" if splits else none)
    if why:
        return Decision((tokens,), whole, whole, why)
    waves = -(-tokens // cluster.wave)
    timed = {s: total(in_parts(layers, s, cluster)) for s in splits if sum(-(-n // cluster.wave) for n in s) == waves}
    best = min(timed, key=lambda s: (timed[s], abs(s[0] - s[1])), default=None)
    if best is None:
        return Decision((tokens,), whole, whole, f"any two parts take more waves than {tokens} tokens do")
    if timed[best] > whole * (1 - LEAST_GAIN):
        return Decision((tokens,), whole, whole, f"two parts would take {timed[best] / whole:.2f} of the time")
    return Decision(best, timed[best], whole)


def alone(layers: Sequence[Layer], tokens: int, cluster: Cluster) -> str:
    """Why there is nothing to overlap, whatever the rates are."""
    if cluster.devices < 2:
        return "on one device nothing is waited for"
    if not any(layer.nbytes for layer in layers):
        return "nothing is summed over devices"
    return f"{tokens} tokens are fewer than {LEAST_TOKENS}" if tokens < LEAST_TOKENS else ""


def layers_of(graph: Graph, tokens: int) -> list[Layer]:
    """Of the graph of one of several devices, for so many tokens in all (batch included): what lies between its sums."""
    found: list[Layer] = []
    flops = pairs = 0.0
    for node in order(graph):
        if _begins_sum(node):
            found.append(Layer(flops / tokens, pairs / tokens**2, hint(node.tensor.nbytes, graph.symbols) / tokens))
            flops = pairs = 0.0
        elif node.op.name == "attention":
            pairs += 2 * _flops(node, graph)  # half of the pairs, where it is causal
        elif node.op.name != "extern":
            flops += _flops(node, graph)
    return [*found, Layer(flops / tokens, pairs / tokens**2)]


def _begins_sum(node: Node) -> bool:
    return node.op.name == "extern" and node.attrs["target"] == SUMS[0]


def _flops(node: Node, graph: Graph) -> float:
    return float(hint(node.op.cost(tuple(i.type for i in node.inputs), node.type, node.attrs).flops, graph.symbols))


def first_sum(graph: Graph) -> Node | None:
    """What the processes sum first."""
    return next((n for n in order(graph) if _begins_sum(n)), None)


def tokens_summed(graph: Graph) -> tuple[int, int] | None:
    """Batch and length of what the processes sum first, [batch, length, size] or [batch, size]; (0, 0) of no sum, None of another shape."""
    first = first_sum(graph)
    if first is None:
        return 0, 0
    batch, length = (*first.shape[:-1], 1, 1)[:2]
    return (batch, length) if isinstance(batch, int) and isinstance(length, int) and first.tensor.rank in (2, 3) else None


def in_two(graph: Graph, cluster: Cluster, notes: Notes) -> list[tuple[SplitBatch | SplitHalves, Decision]]:
    """The passes that compute the graph of one of several processes in two parts where that pays, the best first; in the notes is why not.

    By the rows of the batch, and by tokens where there are any; whether the graph lets them is for the passes to say.
    """
    sizes = tokens_summed(graph)
    if sizes is None:
        first = first_sum(graph)
        notes.decline(SplitBatch.name, graph.name, Reason.SHAPE_MISMATCH, first, f"{first and first.type} is summed")
        return []
    (batch, length), tokens = sizes, math.prod(sizes)
    layers = layers_of(graph, max(tokens, 1))
    choices: list[tuple[SplitBatch | SplitHalves, Decision]] = [(SplitBatch(2), batch_parts(layers, batch, length, cluster))]
    if length > 1:
        decision = halves(layers, tokens, cluster, batch)
        choices.append((SplitHalves(at=decision.parts[0] // batch), decision))
    for item, decision in choices:
        if not decision.pays:
            notes.decline(item.name, f"{batch} x {length} tokens" if tokens else graph.name, Reason.NO_GAIN, value=decision.reason)
    return sorted((c for c in choices if c[1].pays), key=lambda c: c[1].seconds)


# -- micro-batches


def in_pipeline(seconds: Sequence[float], sending: Sequence[float], parts: int, overhead: float = 0.0) -> list[Task]:
    """Stages on a device each, over a batch in equal parts. seconds: of each stage for the whole batch; sending: of what goes from each to
    the next; overhead: of starting a part on a device."""
    tasks: list[Task] = []
    for p in range(parts):
        for s, work in enumerate(seconds):
            arrived = (f"send {s - 1}.{p}",) if s else ()
            tasks.append(Task(f"stage {s}.{p}", f"device {s}", work / parts + overhead, arrived))
            if s < len(sending):
                tasks.append(Task(f"send {s}.{p}", f"link {s}", sending[s] / parts, (f"stage {s}.{p}",)))
    return tasks


def micro_batches(seconds: Sequence[float], sending: Sequence[float], batch: int, overhead: float = 0.0) -> Decision:
    """Into how many parts a batch is split that goes through stages on a device each. Sizes differ by one at most."""
    whole = total(in_pipeline(seconds, sending, 1, overhead))
    if len(seconds) < 2:
        return Decision((batch,), whole, whole, "on one device nothing is waited for")
    timed: Mapping[int, float] = {n: total(in_pipeline(seconds, sending, n, overhead)) for n in range(2, batch + 1)}
    best = min(timed, key=lambda n: (timed[n], n), default=1)
    if best == 1 or timed[best] > whole * (1 - LEAST_GAIN):
        why = ONE_ROW if best == 1 else f"{best} parts would take {timed[best] / whole:.2f} of the time"
        return Decision((batch,), whole, whole, why)
    return Decision(tuple(batch // best + (i < batch % best) for i in range(best)), timed[best], whole)
