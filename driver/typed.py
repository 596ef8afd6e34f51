"""`typed(cls, data)`: what `json.loads` gives, as a dataclass again; a value of another type than its field declares is refused."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LARGEST = 1 << 80
"""No whole number that counts anything is larger."""


def typed(cls: type[T], data: Any, where: str = "") -> T:
    """What `dataclasses.asdict` made `data` of; absent fields take their defaults. Raises ValueError, which names the field."""
    return _read(cls, data, where or cls.__name__.lower())


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _instance(kind, value, where)
    if origin is tuple:
        item = get_args(kind)[0]
        return tuple(_read(item, x, f"{where}[{i}]") for i, x in enumerate(_of(list, value, where)))
    if origin is Mapping:
        item = get_args(kind)[1]
        return {key: _read(item, x, f"{where}[{key!r}]") for key, x in _of(dict, value, where).items()}
    if origin in (Union, types.UnionType):  # of one type and None
        return None if value is None else _read(next(k for k in get_args(kind) if k is not types.NoneType), value, where)
    return float(_of((int, float), value, where)) if kind is float else _of(kind, value, where)


def _instance(kind: Any, value: Any, where: str) -> Any:
    hints = _hints(kind)
    row = _of(dict, value, where)
    unknown = next((name for name in row if name not in hints), None)
    if unknown is not None:
        raise ValueError(f"{where} has no field {unknown!r}")
    try:
        return kind(**{name: _read(hints[name], x, f"{where}.{name}") for name, x in row.items()})
    except TypeError as error:  # a field without default is absent
        raise ValueError(f"{where}: {error}") from error


def _of(kind: Any, value: Any, where: str) -> Any:
    wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    if wrong or (isinstance(value, int) and abs(value) > LARGEST):
        raise ValueError(f"{where} cannot be {str(value)[:40]!r}")
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}
