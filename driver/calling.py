"""The calling convention of an optimized model: Python arguments -> flat graph inputs, flat outputs -> Python result, as plain JSON.

Containers a new process may not know (a transformers `ModelOutput`) become `Record`: a dict whose fields are also attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.utils._pytree import TreeSpec, register_pytree_node

from ..ir.checks import assert_checks
from ..ir.dims import SymbolRange
from ..ir.graph import Graph
from ..ir.types import TensorType, Type

if TYPE_CHECKING:  # loading a model captures none
    from torch.export import ExportedProgram

    from ..ir.capture import CapturedModule

Tree = Any  # JSON: "leaf" | "none" | {"kind": tuple|list|dict|record, "keys": [...], "items": [Tree, ...]}


class Record(dict[str, Any]):
    """A dict whose keys are also attributes: stands in for result classes of the original source. Torch's pytrees see its fields."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the result has no field {name!r}; it has {', '.join(self)}")


register_pytree_node(
    Record, lambda r: (list(r.values()), list(r)), lambda values, keys: Record(zip(keys, values)), serialized_type_name="tilewright.Record"
)


def tree_of(spec: TreeSpec) -> Tree:
    """A torch TreeSpec as JSON."""
    if spec.is_leaf():
        return "leaf"
    if spec.type is type(None):
        return "none"
    items = [tree_of(c) for c in spec.children()]
    if spec.type in (tuple, list):
        return {"kind": spec.type.__name__, "items": items}
    keys = spec.context if spec.type is dict else field_names(spec.context, len(items))
    if keys is None:
        return {"kind": "tuple", "items": items}
    items += ["none"] * (len(keys) - len(items))
    return {"kind": "dict" if spec.type is dict else "record", "keys": list(keys), "items": items}


def field_names(context: Any, count: int) -> Sequence[str] | None:
    """The field names of a registered container: a named tuple's, or those its flattening recorded; fields that are None come last."""
    names = getattr(context, "_fields", None) or context
    if isinstance(names, (list, tuple)) and len(names) == 2 and all(isinstance(n, list) for n in names) and len(names[0]) == count:
        names = [*names[0], *names[1]]  # a dataclass: its fields, and those that are None
    while isinstance(names, (list, tuple)) and len(names) and isinstance(names[0], (list, tuple)):
        names = names[0]
    good = isinstance(names, (list, tuple)) and len(names) >= count and all(isinstance(n, str) for n in names)
    return names if good else None


def unflatten(tree: Tree, leaves: Iterator[Any]) -> Any:
    """The Python value of that structure, leaves taken in order."""
    if tree == "leaf":
        return next(leaves)
    if tree == "none":
        return None
    items = [unflatten(t, leaves) for t in tree["items"]]
    if tree["kind"] == "tuple":
        return tuple(items)
    if tree["kind"] == "list":
        return items
    pairs = zip(tree["keys"], items)
    return dict(pairs) if tree["kind"] == "dict" else Record(pairs)


def flatten(tree: Tree, value: Any, where: str) -> list[Any]:
    """The leaves of `value`, which must have that structure; raises TypeError naming the argument that does not."""
    if tree == "leaf":
        return [value]
    if tree == "none":
        return [] if value is None else _mismatch(where, "None", value)
    if tree["kind"] in ("tuple", "list"):
        if not isinstance(value, (tuple, list)) or len(value) != len(tree["items"]):
            return _mismatch(where, f"a {tree['kind']} of {len(tree['items'])}", value)
        return [leaf for i, (t, v) in enumerate(zip(tree["items"], value)) for leaf in flatten(t, v, f"{where}[{i}]")]
    if not isinstance(value, dict) or set(value) != set(tree["keys"]):
        return _mismatch(where, f"a dict with keys {', '.join(map(str, tree['keys']))}", value)
    return [leaf for k, t in zip(tree["keys"], tree["items"]) for leaf in flatten(t, value[k], f"{where}.{k}")]


def _mismatch(where: str, wanted: str, value: Any) -> Any:
    raise TypeError(f"argument {where} must be {wanted}, not {type(value).__name__}")


@dataclass(frozen=True)
class CallingConvention:
    """How a model is called.

    names: the arguments in order; arguments: their trees; tensors: which of their flat leaves are graph inputs (the others were constants
    at export). result: the tree of the result; outputs: for each of its leaves the graph output, or None for a constant of `constants`
    (leaf -> number, string or None). state: names of the buffers that the graph updates; they are its last inputs.
    checks: further graph outputs that are assertions of the model, with their messages.
    """

    names: tuple[str, ...]
    arguments: tuple[Tree, ...]
    tensors: tuple[int, ...]
    result: Tree
    outputs: tuple[int | None, ...]
    constants: dict[int, Any]
    state: tuple[str, ...] = ()
    checks: tuple[tuple[int, str], ...] = ()

    @functools.cached_property
    def _plain(self) -> bool:
        """Every argument is a graph input, in that order."""
        return all(t == "leaf" for t in self.arguments) and self.tensors == tuple(range(len(self.names)))

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The graph inputs (without state) for a call; arguments may be passed by position or by name. Raises TypeError."""
        if not kwargs and self._plain and len(args) == len(self.names):
            return list(args)
        listed = ", ".join(self.names)
        if len(args) > len(self.names):
            raise TypeError(f"the model takes {len(self.names)} arguments ({listed}), {len(args)} were given")
        given = dict(zip(self.names, args)) | kwargs
        unknown = [k for k in kwargs if k not in self.names]
        if unknown:
            raise TypeError(f"the model has no argument {unknown[0]!r}; its arguments are {listed}")
        twice = [k for k in self.names[: len(args)] if k in kwargs]
        if twice:
            raise TypeError(f"argument {twice[0]!r} is given twice")
        leaves: list[Any] = []
        for name, tree in zip(self.names, self.arguments):
            count = _count(tree)
            needed = any(len(leaves) <= i < len(leaves) + count for i in self.tensors)
            if needed and name not in given:
                raise TypeError(f"argument {name!r} is missing; the model takes {listed}")
            leaves += flatten(tree, given[name], name) if name in given else [None] * count
        return [leaves[i] for i in self.tensors]

    def checked(self, inputs: list[Any], graph: Graph) -> list[Any]:
        """The inputs, if the graph is for such: dtype, rank, sizes and device. Raises TypeError naming the argument."""
        sizes: dict[str, int] = {}
        for i, (node, value) in enumerate(zip(graph.inputs, inputs)):
            wrong = _misfit(node.type, value, sizes, graph)
            if wrong:
                kind = node.type if isinstance(node.type, TensorType) else "a number"
                raise TypeError(f"argument {self._place(i)} must be {kind}, {wrong}")
        return inputs

    def _place(self, number: int) -> str:
        """Where in the call graph input `number` comes from: `x`, or `cache (value 2 of 4)`."""
        leaf = self.tensors[number]
        for name, tree in zip(self.names, self.arguments):
            count = _count(tree)
            if leaf < count:
                return repr(name) if count == 1 else f"{name!r} (value {leaf + 1} of {count})"
            leaf -= count
        return f"number {number + 1}"

    def pack(self, outputs: Sequence[Any]) -> Any:
        """The result of a call from the flat outputs of the graph. Raises RuntimeError where an assertion of the model is false."""
        assert_checks(self.checks, outputs)
        leaves = (self.constants.get(i) if n is None else outputs[n] for i, n in enumerate(self.outputs))
        return unflatten(self.result, iter(leaves))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"constants": [list(pair) for pair in self.constants.items()]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CallingConvention:
        lists = {k: tuple(data[k]) for k in ("names", "arguments", "tensors", "outputs", "state")}
        checks = tuple((int(i), str(message)) for i, message in data["checks"])
        return CallingConvention(result=data["result"], constants=dict(data["constants"]), checks=checks, **lists)


def convention_of(program: ExportedProgram, captured: CapturedModule) -> CallingConvention:
    """The convention of an exported program and its graph; argument names as the original forward had them."""
    signature = captured.signature
    arguments, keywords = signature.in_spec.children()
    entry = program.module_call_graph[0].signature
    names = (entry.forward_arg_names if entry else None) or [f"input_{i}" for i in range(arguments.num_children)] + list(keywords.context)
    return CallingConvention(
        names=tuple(names),
        arguments=tuple(tree_of(s) for s in (*arguments.children(), *keywords.children())),
        tensors=tuple(i for i, n in enumerate(signature.inputs) if n is not None),
        result=tree_of(signature.out_spec),
        outputs=signature.outputs,
        constants=dict(signature.results),
        state=signature.state,
        checks=signature.checks,
    )


def _misfit(kind: Type, value: Any, sizes: dict[str, int], graph: Graph) -> str:
    """In what a value is not of that type, "" if it is; `sizes` collects what the symbols stand for in this call."""
    if not isinstance(kind, TensorType):
        return "" if isinstance(value, (bool, int, float, complex)) else f"not a {type(value).__name__}"
    if not isinstance(value, torch.Tensor):
        return f"not a {type(value).__name__}"
    if value.dtype != kind.dtype or value.dim() != kind.rank or value.device.type != kind.device.split(":")[0]:
        return f"not {TensorType(value.dtype, tuple(value.shape), str(value.device))}"
    for wanted, found in zip(kind.shape, value.shape):
        if isinstance(wanted, int):
            fits = wanted == found
        elif isinstance(wanted, sympy.Symbol):
            fits = sizes.setdefault(wanted.name, found) == found and _in_range(graph.symbols.get(wanted.name), found)
        else:
            continue
        if not fits:
            where = "" if isinstance(wanted, int) else f" ({_range_text(wanted.name, graph)})"
            return f"not {TensorType(value.dtype, tuple(value.shape), str(value.device))}{where}"
    return ""


def _in_range(known: SymbolRange | None, size: int) -> bool:
    if known is None:
        return True
    low = known.lo if known.lo > 2 else 0  # torch counts varying sizes from 2, and means any
    return low <= size and (known.hi is None or size <= known.hi) and size % known.divisor == 0


def _range_text(name: str, graph: Graph) -> str:
    known = graph.symbols.get(name, SymbolRange())
    limits = f"{name} in {known.lo if known.lo > 2 else 0}..{'' if known.hi is None else known.hi}"
    return limits + (f", a multiple of {known.divisor}" if known.divisor > 1 else "")


def _count(tree: Tree) -> int:
    if isinstance(tree, str):
        return int(tree == "leaf")
    return sum(_count(t) for t in tree["items"])
