"""Reading a model from what a user names: a `.pt2` program, TorchScript, `module:callable`, or (only if trusted) a pickled module.

Files are untrusted: a `.pt2` archive is read with torch's restricted unpickler, and refused where it holds objects that need more.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CannotOptimize, ModelNotFound, NotAModel, PickleRefused
from .inputs import Example


@dataclass(frozen=True)
class Model:
    """What was read: `program` is the exported graph, `module` runs eagerly, `example` are inputs to check and time with."""

    name: str
    program: torch.export.ExportedProgram
    module: torch.nn.Module
    example: Example


def load_model(path: str, example: Example | None, trust_pickle: bool = False) -> Model:
    """Reads `path` and exports it where it is not a program yet. `example` may be None for a program that carries its own.

    Raises ModelNotFound, NotAModel, PickleRefused, BadInputs or CannotOptimize.
    """
    if _is_import(path):
        return _from_callable(path, example)
    if not os.path.isfile(path):
        raise ModelNotFound(path=path)
    kind = _archive_kind(path)
    if kind == "pt2":
        return _from_program(path, _load_program(path, trust_pickle), example)
    if kind == "torchscript":
        return _from_torchscript(path, example)
    if not trust_pickle:
        raise PickleRefused(path=path, what="a pickled Python module")
    return _from_pickle(path, example)


def _is_import(path: str) -> bool:
    module, colon, attribute = path.rpartition(":")
    return bool(colon) and attribute.isidentifier() and all(p.isidentifier() for p in module.split("."))


def _archive_kind(path: str) -> str:
    """pt2, torchscript or pickle, by the members of the archive; raises NotAModel for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.split("/", 1)[-1] for n in archive.namelist()]
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise NotAModel(path=path, reason="it is no torch archive, or it is cut short") from error
    except OSError as error:
        raise NotAModel(path=path, reason=f"it cannot be read ({error.strerror})") from error
    if damaged:
        raise NotAModel(path=path, reason=f"its member {damaged} is damaged")
    if "archive_format" in names or any(n.startswith("models/") for n in names):
        return "pt2"
    if "constants.pkl" in names:
        return "torchscript"
    if "data.pkl" in names:
        return "pickle"
    raise NotAModel(path=path, reason="it is a zip file without a torch model in it")


def _load_program(path: str, trust_pickle: bool) -> torch.export.ExportedProgram:
    if trust_pickle:
        return _export_load(path)
    what = _pickled_member(path)
    if what:
        raise PickleRefused(path=path, what=what)
    with _only_weights():
        return _export_load(path)


def _export_load(path: str) -> torch.export.ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises many kinds here; the first line says what it did not like
        raise NotAModel(path=path, reason=_first_line(error)) from error


def _pickled_member(path: str) -> str | None:
    """What in a .pt2 archive would need an unrestricted unpickler, in words."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_constants_config.json"):
                entries = json.loads(archive.read(name)).get("config", {})
                odd = [fqn for fqn, meta in entries.items() if not str(meta.get("path_name", "")).startswith("tensor_")]
                if odd:
                    return f"the pickled object {odd[0]!r}"
    return None


@contextmanager
def _only_weights() -> Iterator[None]:
    """torch.load refuses everything but tensors and plain containers inside; torch offers this as an environment variable only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _from_program(path: str, program: torch.export.ExportedProgram, example: Example | None) -> Model:
    module = program.module()
    if example is None:
        if program.example_inputs is None:
            raise NotAModel(path=path, reason="it carries no example inputs; give --inputs")
        example = Example(*program.example_inputs)
    return Model(Path(path).stem, program, module, example.matched(_parameter_names(program)))


def _parameter_names(program: torch.export.ExportedProgram) -> list[str]:
    """The names of the call's arguments, as far as the program records them."""
    args_spec, kwargs_spec = program.call_spec.in_spec.children()  # type: ignore[union-attr]
    names = [s for s in program.graph_signature.user_inputs if isinstance(s, str)]
    return names[: args_spec.num_leaves] + list(kwargs_spec.context or ())


def _from_torchscript(path: str, example: Example | None) -> Model:
    from torch._export.converter import TS2EPConverter

    example = _required(path, example)
    try:
        script = torch.jit.load(path, map_location="cpu").eval()
        names = [a.name for a in script.forward.schema.arguments[1:]]
        example = example.matched(names)
        program = TS2EPConverter(script, example.args, example.kwargs).convert()
    except (RuntimeError, ValueError) as error:
        raise NotAModel(path=path, reason=_first_line(error)) from error
    return Model(Path(path).stem, program, script, example)


def _from_pickle(path: str, example: Example | None) -> Model:
    try:
        module = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:  # whatever the pickle raises
        raise NotAModel(path=path, reason=_first_line(error)) from error
    if not isinstance(module, torch.nn.Module):
        raise NotAModel(path=path, reason=f"it holds a {type(module).__name__}, not a torch.nn.Module")
    return export_module(Path(path).stem, module, _required(path, example))


def _from_callable(path: str, example: Example | None) -> Model:
    """`package.module:name`: a module, or a function that returns a module, or (module, example inputs)."""
    where, _, name = path.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError) as error:
        raise NotAModel(path=path, reason=_first_line(error)) from error
    made = made() if callable(made) and not isinstance(made, torch.nn.Module) else made
    module, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise NotAModel(path=path, reason=f"it gives a {type(module).__name__}, not a torch.nn.Module")
    if example is None and given is not None:
        example = Example((), dict(given)) if isinstance(given, dict) else Example(tuple(given), {})
    return export_module(name, module, _required(path, example))


def export_module(name: str, module: torch.nn.Module, example: Example) -> Model:
    """A module in evaluation mode, exported on the example with its declared dynamic dimensions; raises CannotOptimize."""
    module = module.eval()
    example = example.bound_to(module)
    try:
        with torch.no_grad():
            program = torch.export.export(module, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes(), strict=False)
    except Exception as error:  # torch.export raises many kinds; its first line names the cause
        raise CannotOptimize(path=name, reason=f"torch.export says: {_first_line(error)}") from error
    return Model(name, program, module, example)


def _required(path: str, example: Example | None) -> Example:
    if example is None:
        raise NotAModel(path=path, reason='it carries no example inputs; give --inputs "x=1x3x224x224:f32" or a file of tensors')
    return example


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__
