"""`tilewright verify`: what an artifact computes on given inputs, against float64: its own graph's meaning, and the original model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

from ..ir.graph import Node
from ..ir.types import TensorType
from ..search.metrics import METRICS, Metric
from .accuracy import TIMES_EAGER
from .artifact import Optimized, load
from .budget import Spent
from .errors import BadInputs, BadOption, ModelFails, first_line
from .inputs import Example, copied
from .loading import Model, captured_of
from .measure import apart, convention_for, flat_example
from .padding import Way, WithoutPadding
from .reproduce import FLOOR, interpreted, observed
from .shrink import departing

RELATIVE = METRICS["relative"]


@dataclass(frozen=True)
class Line:
    """One output against one reference: its error, that of eager, and what is allowed."""

    output: str
    against: str
    ours: float
    eager: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed


@dataclass(frozen=True)
class Verification:
    """metric: what errors against the model are of. culprit: the first kernel or call whose own result is wrong, "" if none is."""

    lines: tuple[Line, ...]
    metric: str = RELATIVE.name
    culprit: str = ""

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)

    def render(self, console: Console) -> None:
        table = Table(box=None, pad_edge=False)
        for name in ("output", "against", "error", "eager", "allowed", ""):
            table.add_column(name, justify="right" if name in ("error", "eager", "allowed") else "left")
        for line in self.lines:
            verdict = "[green]ok[/green]" if line.ok else "[bold red]too far[/bold red]"
            table.add_row(line.output, line.against, *(f"{x:.1e}" for x in (line.ours, line.eager, line.allowed)), verdict)
        console.print(table)
        if self.metric != RELATIVE.name:
            console.print(f"errors against the model are by {self.metric}")
        if self.culprit:
            console.print(f"the first whose own result is wrong: {self.culprit}", markup=False, highlight=False)


def verify(
    path: Path, example: Example, model: Model | None = None, max_error: float | None = None, trust_code: bool = False
) -> Verification:
    """Runs an artifact on an example, which is the model's too.

    Its kernels are held to its own graph in float64, by the rule of `driver.accuracy`; its results to the model's, by that rule, or by
    the budget on the receipt. max_error: instead of that budget. trust_code: as for `load`.
    Raises BadArtifact, BadInputs, BadOption, ModelFails.
    """
    artifact = load(path, trust_code=trust_code)
    metric, allowed = (RELATIVE, FLOOR) if model is None else _limit(artifact.receipt.spent, max_error)
    inputs = _inputs(artifact, example)
    try:
        ours = observed(artifact.graph, artifact.program.run, inputs)
        found = artifact.convention.pack(ours)
    except RuntimeError as error:  # an assertion of the model, or an op that these inputs are not for
        raise ModelFails(path=path, inputs=example.described(), reason=first_line(error)) from error
    lines = _own_graph(artifact, inputs, ours)
    rows = _rows(artifact, inputs)
    if rows is not None:
        lines += _own_graph(rows.program, rows.inputs, rows.outputs, "its graph without padding")
    culprit = "" if all(line.ok for line in lines) else departing(artifact.graph, inputs)
    if model is not None:
        lines += _original(model, found, metric, allowed)
        lines += _at_tokens(model, artifact, rows, metric, allowed) if rows is not None else []
    return Verification(tuple(lines), metric.name, culprit)


def _limit(spent: Spent | None, max_error: float | None) -> tuple[Metric, float]:
    """The metric of the errors against the model, and what they may be beside the rule of eager."""
    name = RELATIVE.name if spent is None else spent.metric
    if name not in METRICS:
        raise BadOption(option="model", reason=f"the artifact keeps a budget of {name}, which only its maker can measure; leave it out")
    limit = max_error if max_error is not None else FLOOR if spent is None else spent.limits.get("error")
    if limit is None:
        raise BadOption(option="max-error", reason="say how large it may be; the budget that the artifact was made within leaves it open")
    return METRICS[name], limit


def _inputs(artifact: Optimized, example: Example) -> list[Any]:
    """The example as the graph takes it, where the graph is, with the artifact's state."""
    convention, graph = artifact.convention, artifact.graph
    try:
        flat = convention.bind(example.args, dict(example.kwargs))
        flat = [*copied(flat), *(artifact.state[name].clone() for name in convention.state)]
        placed = [_placed(node, value) for node, value in zip(graph.inputs, flat, strict=True)]
        return convention.checked(placed, graph)
    except TypeError as error:
        raise BadInputs(spec=", ".join(example.kwargs) or "of the model", reason=first_line(error)) from error


def _placed(node: Node, value: Any) -> Any:
    return value.to(node.tensor.device) if isinstance(node.type, TensorType) and isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class _Rows:
    """The program that leaves padding out, as a model of its own, and a call of it."""

    program: Optimized
    unpadded: WithoutPadding
    inputs: list[Any]
    outputs: Sequence[Any]


def _rows(artifact: Optimized, inputs: Sequence[Any]) -> _Rows | None:
    """What is run without padding, if the artifact has such a program and the example is for it."""
    if artifact.unpadded is None:
        return None
    unpadded = artifact.unpadded.whenever_possible()
    graph, mask = unpadded.plan.graph, inputs[unpadded.plan.mask]
    way, layout = unpadded.choose(mask)
    if way is not Way.PACKED:
        return None
    given = [*inputs, *(torch.from_numpy(x).to(mask.device) for x in layout)]
    program = replace(artifact, graph=graph, program=unpadded.program, unpadded=None)
    return _Rows(program, unpadded, given, observed(graph, unpadded.program.run, given))


def _own_graph(artifact: Optimized, inputs: Sequence[Any], ours: Sequence[Any], against: str = "its graph") -> list[Line]:
    """Against the meaning of the artifact's graph: results, and what it writes back."""
    graph, convention = artifact.graph, artifact.convention
    count = len(graph.outputs)

    def named(values: Sequence[Any]) -> dict[str, torch.Tensor]:
        written = {f"{target.hint} (updated)": value.cpu() for (target, _), value in zip(graph.writes, values[count:])}
        return _leaves(convention.pack(values[:count])) | written

    eager, reference = (named(interpreted(graph, inputs, dtype)) for dtype in (None, torch.float64))
    return _lines(against, named(ours), eager, reference, RELATIVE, FLOOR)


def _original(model: Model, found: Any, metric: Metric, allowed: float) -> list[Line]:
    """Against the model: the results of a call, in float64 and by eager."""
    captured = captured_of(model)
    convention = convention_for(model, captured)
    exact = interpreted(captured.graph, flat_example(model, captured, convention), torch.float64)
    reference = list(_leaves(convention.pack(exact)).values())
    with torch.no_grad():
        result = apart(model, captured).module(*copied(model.example.args), **copied(dict(model.example.kwargs)))
    eager = list(_leaves(result).values())
    named = _leaves(found)
    if not len(named) == len(eager) == len(reference):
        raise BadOption(
            option="model", reason=f"it has {len(reference)} outputs, and the artifact {len(named)}: they are not the same model"
        )
    return _lines("the model", named, dict(zip(named, eager)), dict(zip(named, reference)), metric, allowed)


def _at_tokens(model: Model, artifact: Optimized, rows: _Rows, metric: Metric, allowed: float) -> list[Line]:
    """What is run without padding against the model, where there is none."""
    captured = captured_of(model)
    inputs = flat_example(model, captured, artifact.convention)

    def there(outputs: Sequence[Any]) -> dict[str, torch.Tensor]:
        return _leaves(artifact.convention.pack(rows.unpadded.at_tokens(rows.inputs, outputs)))

    eager, reference = (there(interpreted(captured.graph, inputs, dtype)) for dtype in (None, torch.float64))
    return _lines("the model, at tokens", there(rows.outputs), eager, reference, metric, allowed)


def _leaves(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors of a result by where they are in it: `['logits']`, `[0]`."""
    found = pytree.tree_flatten_with_path(tree)[0]
    return {pytree.keystr(path) or "result": value.cpu() for path, value in found if isinstance(value, torch.Tensor)}


def _lines(
    against: str,
    ours: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    metric: Metric,
    floor: float,
) -> list[Line]:
    found: list[Line] = []
    for name, value in ours.items():
        by_eager = metric.of(eager[name], reference[name])
        found.append(Line(name, against, metric.of(value, reference[name]), by_eager, max(TIMES_EAGER * by_eager, floor)))
    return found
