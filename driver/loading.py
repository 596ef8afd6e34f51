"""Reading a model from what a user names: a `.pt2` program, TorchScript, `module:callable`, or (only if trusted) a pickled module.

Files are untrusted: a `.pt2` archive is read with torch's restricted unpickler, and refused where it holds objects that need more.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from ..ir.capture import CapturedModule, from_exported
from ..ir.errors import CaptureError
from .containers import stand_in_for_unknown
from .errors import BadInputs, BadOption, CannotOptimize, ModelFails, ModelNotFound, NoInputs, NotAModel, PickleRefused, first_line
from .inputs import Example, copied
from .trust import unsafe_in_program

P = ParamSpec("P")
Made = TypeVar("Made")

MOST_UNPACKED = 256 << 20
"""Bytes that unpacking an archive may add to its own."""


@dataclass(frozen=True)
class Model:
    """What was read: `program` is the exported graph, `module` runs eagerly, `example` are inputs to check and time with.

    names: the arguments of its call, in order.
    """

    name: str
    program: torch.export.ExportedProgram
    module: torch.nn.Module
    example: Example
    names: tuple[str, ...]


def captured_of(model: Model) -> CapturedModule:
    """The graph of a model; raises CannotOptimize."""
    try:
        return from_exported(model.program, model.name, model.example.dynamic)
    except CaptureError as error:
        raise CannotOptimize(path=model.name, reason=error.fields["reason"]) from error


def load_model(path: str, example: Example | None, trust_pickle: bool = False) -> Model:
    """Reads `path` and exports it where it is not a program yet. `example` may be None for a program that carries its own.

    Raises ModelNotFound, NoInputs, NotAModel, PickleRefused, BadInputs or CannotOptimize.
    """
    if _is_import(path):
        return _from_callable(path, example)
    if os.path.isdir(path):
        raise NotAModel(path=path, reason="it is a directory")
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
            bomb = _bomb(archive, os.path.getsize(path))
            damaged = None if bomb else archive.testzip()
    except zipfile.BadZipFile as error:
        raise NotAModel(path=path, reason="it is no torch archive, or it is cut short") from error
    except OSError as error:
        raise NotAModel(path=path, reason=f"it cannot be read ({error.strerror})") from error
    except (RuntimeError, ValueError, EOFError, zlib.error, struct.error) as error:  # a kind of compression that torch never writes
        raise NotAModel(path=path, reason=f"it cannot be unpacked ({first_line(error)})") from error
    if bomb:
        raise NotAModel(path=path, reason=bomb)
    if damaged:
        raise NotAModel(path=path, reason=f"its member {damaged} is damaged")
    if "archive_format" in names or any(n.startswith("models/") for n in names):
        return "pt2"
    if "constants.pkl" in names:
        return "torchscript"
    if "data.pkl" in names:
        return "pickle"
    raise NotAModel(path=path, reason="it is a zip file without a torch model in it")


def _bomb(archive: zipfile.ZipFile, size: int) -> str:
    """Why an archive of `size` bytes must not be unpacked, by what it says of its members and of archives among them; "" if it may.

    torch stores tensors as they are, and deflates the text of TorchScript only.
    """
    rows = archive.infolist()
    if sum(row.compress_size for row in rows) > size:
        return "its members overlap"
    more = sum(row.file_size - row.compress_size for row in rows)
    if more > MOST_UNPACKED:
        return f"it would unpack to {more / 1e6:.0f} MB more than it takes"
    for row in rows:
        if row.filename.endswith(".pt") and row.compress_type == zipfile.ZIP_STORED:
            with archive.open(row) as file:
                inner = _bomb(zipfile.ZipFile(file), row.file_size) if zipfile.is_zipfile(file) else ""
            if inner:
                return f"{inner} (in {row.filename})"
    return ""


def _load_program(path: str, trust_pickle: bool) -> torch.export.ExportedProgram:
    if trust_pickle:
        return _export_load(path)
    try:
        what = unsafe_in_program(path)
        if not what:
            stand_in_for_unknown(path)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise NotAModel(path=path, reason=f"it is damaged ({first_line(error)})") from error
    if what:
        raise PickleRefused(path=path, what=what)
    with _only_weights():
        return _export_load(path)


def _export_load(path: str) -> torch.export.ExportedProgram:
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load hides why it fails

    try:
        program = load_pt2(path).exported_programs["model"]
    except Exception as error:  # torch raises many kinds here; the first line says what it did not like
        raise NotAModel(path=path, reason=f"torch.export cannot read it: {first_line(error)}") from error
    program._guards_code = []  # Python text that torch would execute; the inputs are checked by the graph's types instead
    return program


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
    module = program.module(check_guards=False)
    names, count = _parameters(program)
    if example is None:
        if program.example_inputs is None:
            raise NoInputs(path=path)
        return Model(Path(path).stem, program, module, Example(*program.example_inputs), names)
    if example.dynamic:
        name, dims = next(iter(example.dynamic.items()))
        reason = f"an exported program has fixed which sizes vary; give a number for {', '.join(dims.values())}"
        raise BadInputs(spec=name, reason=reason)
    return Model(Path(path).stem, program, module, example.matched(names).positional(names[:count]), names)


def _parameters(program: torch.export.ExportedProgram) -> tuple[tuple[str, ...], int]:
    """The names of the call's arguments, and how many of them are passed by position."""
    args, kwargs = program.call_spec.in_spec.children()  # type: ignore[union-attr]
    signature = program.module_call_graph[0].signature
    recorded = tuple((signature and signature.forward_arg_names) or ())
    keywords = tuple(kwargs.context or ())
    if len(recorded) != args.num_children + len(keywords):
        recorded = (*(f"input_{i}" for i in range(args.num_children)), *keywords)
    return recorded, args.num_children


def _from_torchscript(path: str, example: Example | None) -> Model:
    from torch._export.converter import TS2EPConverter

    example = _required(path, example)
    try:
        script = torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise NotAModel(path=path, reason=first_line(error)) from error
    names = tuple(a.name for a in script.forward.schema.arguments[1:])
    example = example.matched(names).positional(names)
    if example.kwargs:
        missing = next(n for n in names[len(example.args) :] if n not in example.kwargs)
        raise BadInputs(spec=", ".join(example.kwargs), reason=f"the input {missing} comes before and is missing")
    _try(path, script, example)
    try:
        program = TS2EPConverter(script, example.args, {}).convert()
    except Exception as error:  # the converter raises many kinds
        raise CannotOptimize(path=path, reason=f"torch cannot convert it from TorchScript: {first_line(error)}") from error
    if example.dynamic:
        program = _varying(path, program, names, example)
    return Model(Path(path).stem, program, script, example, names)


def _varying(path: str, program: torch.export.ExportedProgram, names: Sequence[str], example: Example) -> torch.export.ExportedProgram:
    """The program exported once more, with sizes that vary."""
    module = program.module(check_guards=False)
    inner = list(inspect.signature(module.forward).parameters)
    renamed = {new: example.dynamic[old] for old, new in zip(names, inner) if old in example.dynamic}
    return _exported(path, module, replace(example, dynamic=renamed))


def _try(name: str, module: torch.nn.Module, example: Example) -> None:
    """Runs the model once, so that its own complaint about the inputs is what the user reads; raises ModelFails."""
    try:
        with torch.no_grad():
            with_own_buffers(module)(*copied(example.args), **copied(example.kwargs))
    except Exception as error:  # the model's own
        raise ModelFails(path=name, inputs=example.described(), reason=_cause(error)) from error


def with_own_buffers(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares the parameters: running it leaves the module's buffers alone."""
    if not any(True for _ in module.buffers()):
        return module
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _cause(error: Exception) -> str:
    """The line that says what is wrong: the first one, or for TorchScript, which quotes its source first, the last."""
    text = str(error)
    last = [line.strip() for line in text.splitlines() if line.strip()][-1:]
    return last[0] if "TorchScript interpreter" in text and last else first_line(error)


def _from_pickle(path: str, example: Example | None) -> Model:
    try:
        module = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:  # whatever the pickle raises
        raise NotAModel(path=path, reason=f"it cannot be unpickled: {first_line(error)}") from error
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
        made = made() if callable(made) and not isinstance(made, torch.nn.Module) else made
    except Exception as error:  # the user's own code
        kind = "" if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: "
        raise NotAModel(path=path, reason=f"{kind}{first_line(error)}") from error
    module, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise NotAModel(path=path, reason=f"it gives {_kind(made)}, not a torch.nn.Module or (module, example inputs)")
    return export_module(name, module, _required(path, example or _given(given)))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _given(inputs: Any) -> Example | None:
    """The example that came with a module: a dict by name, a sequence by position, or one tensor."""
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        return Example((), dict(inputs))
    return Example(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


def evaluating(door: Callable[P, Made]) -> Callable[P, Made]:
    """A door whose first argument, a model, is in evaluation mode within, and afterwards as it was: it may be in the middle of training.

    Raises BadOption where it is given something else.
    """
    name = next(iter(inspect.signature(door).parameters))

    @functools.wraps(door)
    def entered(*args: P.args, **kwargs: P.kwargs) -> Made:
        model = args[0] if args else kwargs.get(name)
        if not isinstance(model, torch.nn.Module):
            raise BadOption(option=name, reason=f"it is {_kind(model)}, not a torch.nn.Module")
        training = [m for m in model.modules() if m.training]
        try:
            return door(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    return entered


def export_module(name: str, module: torch.nn.Module, example: Example) -> Model:
    """A module, which goes over to evaluation mode, exported on the example with its declared dynamic dimensions.

    Raises BadInputs, ModelFails where it does not run on the example, or CannotOptimize where it cannot be exported.
    """
    module = module.eval()
    placed = next((name for name, p in module.named_parameters() if type(p).__name__ == "DTensor"), None)
    if placed is not None:
        reason = f"its parameter {placed} lies on a mesh of processes: tilewright.shard and torch.compile take it so"
        raise CannotOptimize(path=name, reason=reason)
    example = example.bound_to(module)
    _try(name, module, example)
    program = _exported(name, module, example)
    return Model(name, program, module, example, _parameters(program)[0])


def _exported(name: str, module: torch.nn.Module, example: Example) -> torch.export.ExportedProgram:
    """With one size per symbol; where the model allows not every such size, with the sizes that torch finds it allows."""
    failure: Exception | None = None
    for named in (True, False) if example.dynamic else (True,):
        shapes = example.dynamic_shapes(module, named)
        try:
            with torch.no_grad(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # torch prints graphs where it fails
                return torch.export.export(module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises many kinds; its first line names the cause
            failure = error
    assert failure is not None
    raise CannotOptimize(path=name, reason=f"torch.export says: {first_line(failure)}") from failure


def _required(path: str, example: Example | None) -> Example:
    if example is None:
        raise NoInputs(path=path)
    return example
