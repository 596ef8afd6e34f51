"""Containers of classes that this process does not have: a `.pt2` names the classes of its results, and `Record` stands in for them.

torch can read a program only if every container in it is registered, which importing transformers does for its outputs. Nothing is
imported here because a file names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch._C import PyTorchFileReader
from torch.utils._pytree import SERIALIZED_TYPE_TO_PYTHON_TYPE, register_pytree_node

from .calling import Record, field_names


def stand_in_for_unknown(path: str) -> None:
    """Registers a class of records for every container in the archive that torch does not know."""
    reader: Any = PyTorchFileReader(path)
    for member in reader.get_all_records():
        if member.startswith("models/"):
            for name in set(_container_names(json.loads(reader.get_record(member)))) - set(SERIALIZED_TYPE_TO_PYTHON_TYPE):
                _register(name)


def _container_names(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            stack += [json.loads(v) if k in ("in_spec", "out_spec") and isinstance(v, str) and v else v for k, v in item.items()]
            if "children_spec" in item and isinstance(item.get("type"), str):
                yield item["type"]


def _register(name: str) -> None:
    def unflatten(values: Any, context: Any) -> Any:
        leaves = list(values)
        keys = field_names(context, len(leaves))
        return tuple(leaves) if keys is None else kind(zip(keys, leaves + [None] * (len(keys) - len(leaves))))

    kind = type(name.rpartition(".")[2], (Record,), {})
    register_pytree_node(kind, lambda r: (list(r.values()), list(r)), unflatten, serialized_type_name=name)
