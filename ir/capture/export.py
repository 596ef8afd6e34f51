"""Capture from torch.export: parameters and buffers become constants, mutated buffers state, and the calling convention is kept aside."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from ..checks import assert_checks
from ..errors import CaptureError, TilewrightError
from ..graph import Data, Graph
from .decompositions import decompositions
from .fx import Binding, Captured, capture_fx


class CallError(TilewrightError):
    """A captured module was called in another way than it was captured for."""

    template = "the model was captured for another call: {reason}"


@dataclass(frozen=True)
class Signature:
    """The original calling convention around a graph.

    inputs: for every leaf of (args, kwargs) the number of the graph input it feeds, or None for a literal fixed at capture.
    literals: those leaves' values, by leaf number.
    outputs: for every leaf of the result the number of the graph output, or None for a literal.
    results: those literals, by leaf number.
    state: names of the mutated buffers; they are the graph's last inputs, in this order, and the graph writes them.
    checks: further outputs of the graph that are assertions of the model, with their messages.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[int | None, ...]
    literals: Mapping[int, Any] = field(default_factory=dict)
    outputs: tuple[int | None, ...] = ()
    results: Mapping[int, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    checks: tuple[tuple[int, str], ...] = ()

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The graph's inputs (without state) of a call; raises CallError where the call does not have the captured form."""
        from torch.export._tree_utils import reorder_kwargs

        try:
            ordered = reorder_kwargs(dict(kwargs or {}), self.in_spec)
        except ValueError as error:
            raise CallError(reason=str(error)) from error
        leaves, spec = pytree.tree_flatten((tuple(args), ordered))
        if spec != self.in_spec:
            raise CallError(reason=f"arguments are structured as {spec}, not {self.in_spec}")
        for i, value in self.literals.items():
            if leaves[i] != value:
                raise CallError(reason=f"argument {i} was fixed to {value!r}, not {leaves[i]!r}")
        fed = [(target, leaf) for target, leaf in zip(self.inputs, leaves) if target is not None]
        return [leaf for _, leaf in sorted(fed, key=lambda pair: pair[0])]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The module's result from the graph's outputs; raises RuntimeError where an assertion of the model fails."""
        assert_checks(self.checks, outputs)
        leaves = [self.results[i] if n is None else outputs[n] for i, n in enumerate(self.outputs)]
        return pytree.tree_unflatten(leaves, self.out_spec)


@dataclass(frozen=True)
class CapturedModule:
    """A graph, the convention to call it by, and the tensors of its state (mutated buffers) by name."""

    graph: Graph
    signature: Signature
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The values of the graph's inputs for a call, state last."""
        return self.signature.flatten(args, kwargs) + [self.state[name] for name in self.signature.state]


def from_exported(program: ExportedProgram, name: str = "model", sizes: Mapping[str, Mapping[int, str]] = {}) -> CapturedModule:
    """An exported program as a graph. Raises CaptureError with the reason for what cannot be expressed.

    sizes: input name -> {dimension: name of its size}: dimensions of one name are equal, though the model may take others.
    """
    with warnings.catch_warnings():  # torch copies what it itself says is no longer to be copied
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = program.run_decompositions(dict(decompositions()))
    _make_equal(program, sizes)
    signature = program.graph_signature
    written = _written(signature)
    binding = Binding(
        constants=_constants(program, set(written.values())),
        ignored=frozenset(s.arg.name for s in signature.input_specs if isinstance(s.arg, ConstantArgument)),
        last=frozenset(s.arg.name for s in signature.input_specs if s.kind is InputKind.BUFFER and s.arg.name in written.values()),
        written=written,
    )
    captured = capture_fx(program.graph_module, name=name, binding=binding)
    state = {s.arg.name: s.target for s in signature.input_specs if s.arg.name in binding.last}
    tensors = {target: _tensor(program, target).clone() for target in state.values() if target is not None}
    return CapturedModule(captured.graph, _convention(program, captured, tuple(tensors)), tensors)


def _make_equal(program: ExportedProgram, sizes: Mapping[str, Mapping[int, str]]) -> None:
    """Sizes of one name become one symbol: torch's shape environment learns that two are equal where they are compared."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    first: dict[str, Any] = {}
    for name, dims in sizes.items():
        value = values.get(name)
        shape: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        for d, size in dims.items() if len(shape) else ():
            if not shape[d] == first.setdefault(size, shape[d]):
                raise CaptureError(reason=f"two sizes are called {size}, and differ in the example")


def from_module(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> CapturedModule:
    """A module and example inputs as a graph, by torch.export."""
    program = torch.export.export(module, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    return from_exported(program, type(module).__name__.lower())


_STATE_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _written(signature: Any) -> dict[int, str]:
    """Output position -> the placeholder it is written back to."""
    names = {s.target: s.arg.name for s in signature.input_specs if s.kind in _STATE_KINDS}
    found: dict[int, str] = {}
    for i, spec in enumerate(signature.output_specs):
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        if spec.kind is OutputKind.BUFFER_MUTATION:
            found[i] = names[spec.target]
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            found[i] = str(spec.target)
        else:
            raise CaptureError(reason=f"the exported program has an output of kind {spec.kind.name}")
    return found


def _constants(program: ExportedProgram, written: set[str]) -> dict[str, Data]:
    """Placeholder -> the tensor it stands for, for all state that is only read."""
    found: dict[str, Data] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT or spec.arg.name in written:
            continue
        if spec.kind not in _STATE_KINDS or spec.target is None:
            raise CaptureError(reason=f"the exported program has an input of kind {spec.kind.name}")
        found[spec.arg.name] = Data(spec.target, _tensor(program, spec.target))
    return found


def _tensor(program: ExportedProgram, name: str) -> torch.Tensor:
    value = program.state_dict[name] if name in program.state_dict else program.constants[name]
    if not isinstance(value, torch.Tensor):
        raise CaptureError(reason=f"{name} is a {type(value).__name__}, no tensor")
    return value.detach()


def _convention(program: ExportedProgram, captured: Captured, state: tuple[str, ...]) -> Signature:
    signature = program.graph_signature
    users = [s.arg for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    inputs: list[int | None] = []
    for arg in users:
        fed = sum(n is not None for n in inputs)
        inputs.append(None if isinstance(arg, ConstantArgument) else fed)
    literals = {i: arg.value for i, arg in enumerate(users) if isinstance(arg, ConstantArgument)}
    kept = [(s.arg, n) for s, n in zip(signature.output_specs, captured.returns) if s.kind is OutputKind.USER_OUTPUT]
    results = {i: arg.value for i, (arg, n) in enumerate(kept) if n is None and isinstance(arg, ConstantArgument)}
    results |= {i: None for i, (_, n) in enumerate(kept) if n is None and i not in results}
    assert program.call_spec.in_spec is not None and program.call_spec.out_spec is not None
    outputs = tuple(n for _, n in kept)
    spec = program.call_spec
    assert spec.in_spec is not None and spec.out_spec is not None
    return Signature(spec.in_spec, spec.out_spec, tuple(inputs), literals, outputs, results, state, captured.checks)
