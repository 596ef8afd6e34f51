"""A fault as a case that stands alone: a graph as text, what is done to it, and whether that keeps its results.

A reproducer that `bisect` writes is a Python file that holds one `Case` and checks it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..codegen.program import compile_program
from ..ir.dims import evaluate
from ..ir.graph import Graph, Node, constants, order
from ..ir.interpret import bind_sizes, interpret
from ..ir.ops.views import laid_out
from ..ir.text import name_nodes, parse
from ..ir.types import ScalarType, TensorType
from ..passes.base import Notes, Steps
from ..passes.manager import parse_passes, run_passes
from .accuracy import ErrorCheck, check
from .artifact import replacing
from .inputs import copied

FLOOR = 1e-6
"""Errors below this are not looked at, unless a budget allows more."""

INPUT = "input "  # what the names of saved inputs begin with


def observed(graph: Graph, run: Callable[[list[Any]], Sequence[Any]], inputs: Sequence[Any]) -> list[Any]:
    """What a call leaves behind: its results, and the inputs that it wrote to. The call gets copies, and draws the same numbers always."""
    flat = copied(list(inputs))
    written = [flat[graph.inputs.index(target)] for target, _ in graph.writes]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [*run(flat[:]), *written]


def interpreted(graph: Graph, inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """`observed`, op by op."""
    return observed(graph, lambda flat: interpret(graph, flat, dtype), inputs)


@dataclass(frozen=True)
class Case:
    """A graph, and what must not change its results.

    passes: as on the command line; `before` of their steps give the graph that is right, `after` of them the one in question.
    program: the latter is compiled and run, else it is run op by op. sizes: of symbols that no input tells. allowed: a budget for errors.
    values: a safetensors file, or tensors, by the names of the constants, and for inputs "input NAME"; what is not there is seeded.
    """

    text: str
    passes: str = ""
    before: int = 0
    after: int = 0
    program: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    allowed: float = FLOOR
    values: str | Path | Mapping[str, torch.Tensor] = field(default_factory=dict)

    def graph(self, steps: int) -> Graph:
        """After so many steps of the passes."""
        return run_passes(self._graph, parse_passes(self.passes), Notes(steps=Steps(steps))) if self.passes else self._graph

    def inputs(self) -> list[Any]:
        """Saved ones, and seeded ones."""
        names = name_nodes(self._graph)
        return [self._input(i, node, names[node]) for i, node in enumerate(self._graph.inputs)]

    def check(self) -> ErrorCheck:
        """How far the results are from those of the right graph in float64, by the rule of `driver.accuracy`."""
        inputs = self.inputs()
        right, asked = self.graph(self.before), self.graph(self.after)
        run = compile_program(asked) if self.program else functools.partial(interpret, asked)
        reference = interpreted(right, inputs, torch.float64)
        return check(observed(asked, run, inputs), interpreted(right, inputs), reference, budget=self.allowed)

    def require(self) -> None:
        """Raises AssertionError, with both graphs in it, while the fault is there."""
        found = self.check()
        if not found.ok:
            graphs = "\n".join(map(str, dict.fromkeys((self.graph(self.before), self.graph(self.after)))))
            raise AssertionError(f"off by {found.ours:.1e} where {found.allowed:.1e} is allowed\n{graphs}")

    @functools.cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """`values`, read."""
        return load_file(self.values) if isinstance(self.values, (str, Path)) else self.values

    @functools.cached_property
    def _graph(self) -> Graph:
        bare = parse(self.text)
        made = {name: seeded(kind, i, self.sizes) for i, (name, kind) in enumerate(sorted(constant_types(bare).items()))}
        return parse(self.text, {**made, **{name: value for name, value in self.tensors.items() if name in made}})

    def _input(self, number: int, node: Node, name: str) -> Any:
        if isinstance(node.type, ScalarType):
            return self.sizes[str(node.type.value)]
        value = self.tensors.get(f"{INPUT}{name}")
        value = seeded(node.tensor, number, self.sizes) if value is None else value.to(node.tensor.device)
        strides = node.attrs["strides"]
        return value if strides is None else laid_out(value, tuple(evaluate(s, self.sizes) for s in strides))


def constant_types(graph: Graph) -> dict[str, TensorType]:
    """Name -> type of every constant of the graph, regions included."""
    found: dict[str, TensorType] = {}
    for node in order(graph):
        if node.op.name == "constant":
            found[node.attrs["data"].name] = node.tensor
        for value in node.attrs.values():
            if isinstance(value, Graph):
                found |= constant_types(value)
    return found


def seeded(kind: TensorType, number: int, sizes: Mapping[str, int]) -> torch.Tensor:
    """Standard normal values; integers are 0 or 1, which most indices may be."""
    generator = torch.Generator().manual_seed(number)
    shape = tuple(evaluate(d, sizes) for d in kind.shape)
    wide = kind.dtype.is_floating_point or kind.dtype.is_complex
    value = torch.randn(shape, generator=generator) if wide else torch.randint(0, 2, shape, generator=generator)
    return value.to(kind.dtype).to(kind.device)


def case_of(graph: Graph, inputs: Sequence[Any], **fields: Any) -> Case:
    """A case with the constants and inputs of a graph at hand."""
    names, sizes = name_nodes(graph), bind_sizes(graph, inputs)
    given = {f"{INPUT}{names[n]}": v for n, v in zip(graph.inputs, inputs) if isinstance(v, torch.Tensor)}
    values = {name: data.value for name, data in constants(graph).items() if data.value is not None}
    return Case(str(graph), sizes=sizes, values=given | values, **fields)


def write_case(path: Path, case: Case, fault: str) -> list[Path]:
    """Writes the file that runs the case, and its tensors beside it where it has any; gives what was written. Raises CannotWrite."""
    assert not isinstance(case.values, (str, Path)), "a case that was read stands in a file already"
    beside = path.with_name(f"{path.name}.safetensors")
    if case.values:
        with replacing(beside) as temporary:
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in case.values.items()}, temporary)
    with replacing(path) as temporary:
        Path(temporary).write_text(_source(case, fault, beside.name if case.values else ""))
    return [path, beside] if case.values else [path]


def _source(case: Case, fault: str, beside: str) -> str:
    """The file's text. What came from a model stands in it as literals only."""
    fields = {"passes": case.passes, "before": case.before, "after": case.after, "program": case.program,
              "sizes": dict(case.sizes), "allowed": case.allowed}  # fmt: skip
    rows = [f"    {name}={value!a}," for name, value in fields.items() if value]
    values = [f"    values=Path(__file__).with_name({beside!a}),"] if beside else []
    text = "\n".join("    " + ascii(f"{line}\n") for line in case.text.rstrip("\n").split("\n"))
    imports = ["from pathlib import Path", ""] if beside else []
    return "\n".join(
        ['"""Made by `tilewright bisect`: exits with status 1 while the fault is there."""', "", *imports,
         "from tilewright.driver.reproduce import Case", "", f"FAULT = {fault!a}", "GRAPH = (", text, ")", "",
         "case = Case(", "    GRAPH,", *rows, *values, ")", "print(FAULT)", "case.require()", 'print("it is gone")', ""]
    )  # fmt: skip
