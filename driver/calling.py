"""The calling convention of an optimized model: Python arguments -> flat graph inputs, flat outputs -> Python result, as plain JSON.

Containers a new process may not know (a transformers `ModelOutput`) become `Record`: a dict whose fields are also attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils._pytree import TreeSpec

Tree = Any  # JSON: "leaf" | "none" | {"kind": tuple|list|dict|record, "keys": [...], "items": [Tree, ...]}


class Record(dict[str, Any]):
    """A dict whose keys are also attributes: stands in for result classes of the original source."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the result has no field {name!r}; it has {', '.join(self)}")


def tree_of(spec: TreeSpec) -> Tree:
    """A torch TreeSpec as JSON."""
    if spec.is_leaf():
        return "leaf"
    if spec.type is type(None):
        return "none"
    items = [tree_of(c) for c in spec.children()]
    if spec.type in (tuple, list):
        return {"kind": spec.type.__name__, "items": items}
    keys = spec.context if spec.type is dict else _field_names(spec, len(items))
    if keys is None:
        return {"kind": "tuple", "items": items}
    return {"kind": "dict" if spec.type is dict else "record", "keys": list(keys), "items": items}


def _field_names(spec: TreeSpec, count: int) -> Sequence[str] | None:
    """The field names of a registered container: a named tuple's, or those its flattening recorded."""
    names = getattr(spec.context, "_fields", None) or spec.context
    while isinstance(names, (list, tuple)) and len(names) and isinstance(names[0], (list, tuple)):
        names = names[0]
    good = isinstance(names, (list, tuple)) and len(names) == count and all(isinstance(n, str) for n in names)
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
class Signature:
    """names: the arguments in order; arguments: their trees; tensors: which flat leaves are graph inputs (the others were constants
    at export); result: the tree of the result.
    """

    names: tuple[str, ...]
    arguments: tuple[Tree, ...]
    tensors: tuple[int, ...]
    result: Tree

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The graph inputs for a call; arguments may be passed by position or by name. Raises TypeError."""
        given = dict(zip(self.names, args)) | kwargs
        if len(args) > len(self.names):
            raise TypeError(f"the model takes {len(self.names)} arguments ({', '.join(self.names)}), {len(args)} were given")
        unknown = [k for k in kwargs if k not in self.names]
        if unknown:
            raise TypeError(f"the model has no argument {unknown[0]!r}; its arguments are {', '.join(self.names)}")
        missing = [n for n, t in zip(self.names, self.arguments) if n not in given and self._needed(n)]
        if missing:
            raise TypeError(f"argument {missing[0]!r} is missing; the model takes {', '.join(self.names)}")
        leaves: list[Any] = []
        for name, tree in zip(self.names, self.arguments):
            leaves += flatten(tree, given[name], name) if name in given else [None] * _count(tree)
        return [leaves[i] for i in self.tensors]

    def _needed(self, name: str) -> bool:
        """An argument that was a constant at export may be left out."""
        start = 0
        for other, tree in zip(self.names, self.arguments):
            count = _count(tree)
            if other == name:
                return any(start <= i < start + count for i in self.tensors)
            start += count
        return False

    def pack(self, outputs: Sequence[Any]) -> Any:
        """The result of a call from the flat outputs."""
        return unflatten(self.result, iter(outputs))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Signature:
        lists = {k: tuple(data[k]) for k in ("names", "arguments", "tensors")}
        return Signature(result=data["result"], **lists)


def _count(tree: Tree) -> int:
    if isinstance(tree, str):
        return int(tree == "leaf")
    return sum(_count(t) for t in tree["items"])
