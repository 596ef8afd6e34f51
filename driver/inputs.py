"""Example inputs: from files (`.npz`, `.pt` tensors, `.safetensors`) or from shapes (`x=1x3x224x224:f32`), and which dims may vary."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ir.types import DTYPE_NAMES, DTYPES
from .errors import BadInputs, first_line

EXAMPLE_SIZE = 3  # what a dimension named in place of a number is filled with
INTEGER_LIMIT = 2  # random integers are 0 or 1: valid as token ids, indices of any table, and masks

_SPEC = re.compile(r"^(?P<name>[A-Za-z_]\w*)=(?P<dims>[A-Za-z0-9_]+)(?::(?P<dtype>\w+))?$")


@dataclass(frozen=True)
class Example:
    """Arguments to call the model with. `dynamic` names the varying dims: input name -> {dimension: symbol name}."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)

    def bound_to(self, module: torch.nn.Module) -> Example:
        """The same, matched to the parameters of the module's forward; raises BadInputs for an unknown name."""
        parameters = inspect.signature(module.forward).parameters.values()
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return self
        return self.matched([p.name for p in parameters])

    def described(self) -> str:
        """`x: f32[3, 8], mask: bool[3]`, for messages."""
        named = [*((f"argument {i}", v) for i, v in enumerate(self.args)), *self.kwargs.items()]
        return ", ".join(f"{k}: {_described(v)}" for k, v in named)

    def matched(self, names: Sequence[str]) -> Example:
        """Checks keyword names against the model's; raises BadInputs, naming the inputs that there are."""
        unknown = [k for k in (*self.kwargs, *self.dynamic) if k not in names]
        if unknown:
            raise BadInputs(spec=unknown[0], reason=f"the model has no such input; its inputs are {', '.join(names) or 'none'}")
        return self

    def positional(self, names: Sequence[str]) -> Example:
        """Keyword arguments moved to the positions that `names` gives them, as far as there are no gaps."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name in names[len(args) :]:
            if name not in kwargs:
                break
            args.append(kwargs.pop(name))
        return replace(self, args=tuple(args), kwargs=kwargs)

    def dynamic_shapes(self, module: torch.nn.Module, named: bool = True) -> Any:
        """The `dynamic_shapes` argument of torch.export; None if all shapes are fixed. Raises BadInputs for an unknown input.

        named: one size per symbol, of any value; else torch finds out which sizes are equal and what they may be.
        """
        if not self.dynamic:
            return None
        dims = {s: torch.export.Dim(s) if named else torch.export.Dim.DYNAMIC for spec in self.dynamic.values() for s in spec.values()}
        signature = inspect.signature(module.forward)
        bound = signature.bind(*self.args, **self.kwargs).arguments
        rest = next((k for k, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD and k in bound), "")
        given = (*bound, *bound.get(rest, ()))
        unknown = [name for name in self.dynamic if name not in given]
        if unknown:
            raise BadInputs(spec=unknown[0], reason=f"the example has no such input; it has {', '.join(given) or 'none'}")
        shapes = {k: self._varying(k, v, dims) for k, v in bound.items()}
        if rest:
            shapes[rest] = {k: self._varying(k, v, dims) for k, v in bound[rest].items()}
        return shapes

    def _varying(self, name: str, value: Any, dims: dict[str, Any]) -> Any:
        spec = self.dynamic.get(name)
        if not spec:
            return None
        if not isinstance(value, torch.Tensor) or max(spec) >= value.dim():
            raise BadInputs(spec=name, reason=f"dimension {max(spec)} is to vary, but the input has none")
        return {d: dims[s] for d, s in spec.items()}


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{DTYPE_NAMES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def copied(tree: Any) -> Any:
    """The same arguments with their tensors copied: a model may write into what it is given."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def parse_inputs(specs: list[str]) -> Example | None:
    """One Example from all `--inputs` values: files first, then shapes; None if there are none. Raises BadInputs."""
    values: dict[str, Any] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for spec in (s for text in specs for s in _split(text)):
        if "=" in spec:
            name, value, varying = _from_shape(spec)
            values[name] = value
            dynamic.update({name: varying} if varying else {})
        else:
            values.update(_from_file(spec))
    return Example((), values, dynamic) if values else None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _from_shape(spec: str) -> tuple[str, torch.Tensor, dict[int, str]]:
    match = _SPEC.match(spec)
    if not match:
        raise BadInputs(spec=spec, reason='write name=dims:dtype, for example "x=1x3x224x224:f32" or "ids=bx128:i64" for a varying b')
    dtype = DTYPES.get(match["dtype"] or "f32")
    if dtype is None:
        raise BadInputs(spec=spec, reason=f"unknown dtype {match['dtype']!r}; choose from {', '.join(DTYPES)}")
    dims = [] if match["dims"] == "scalar" else match["dims"].split("x")
    if not all(d.isidentifier() or d.isdigit() for d in dims):
        raise BadInputs(spec=spec, reason=f"{match['dims']!r} is no list of sizes separated by x")
    varying = {i: d for i, d in enumerate(dims) if not d.isdigit()}
    symbols = list(dict.fromkeys(varying.values()))
    sizes = {s: EXAMPLE_SIZE + 2 * i for i, s in enumerate(symbols)}
    shape = tuple(int(d) if d.isdigit() else sizes[d] for d in dims)
    return match["name"], random_tensor(shape, dtype), varying


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Seeded standard normal values; integers and bool are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, INTEGER_LIMIT, shape, generator=generator).to(dtype)


def _from_file(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise BadInputs(spec=path, reason="there is no such file, and it is no shape either")
    reader = _READERS.get(Path(path).suffix)
    if reader is None:
        raise BadInputs(spec=path, reason=f"unknown kind of file; use one of {', '.join(_READERS)}")
    try:
        return reader(path)
    except BadInputs:
        raise
    except Exception as error:  # readers raise many kinds; none of them executes what it reads
        raise BadInputs(spec=path, reason=f"it cannot be read: {first_line(error)}") from error


def _read_npz(path: str) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in arrays.files}


def _read_pt(path: str) -> dict[str, Any]:
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise BadInputs(spec=path, reason="it must hold a dictionary of tensors by input name")
    return loaded


def _read_safetensors(path: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


_READERS = {".npz": _read_npz, ".pt": _read_pt, ".safetensors": _read_safetensors}
