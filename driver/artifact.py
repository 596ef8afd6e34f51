"""The artifact: one file that holds an optimized model and runs without the original source.

It is a safetensors file: the tensors are the weights; the metadata holds `tilewright` (manifest: format version, calling convention,
sha256 of every other member), `graph` (IR text after all passes), `receipt` (JSON) and `kernels` (the generated source, to read). Nothing
in it is unpickled. Code is in it as tensors of bytes, for levels of x86-64 or for a GPU; `native_code.py` says when it is run, and where it
is not, native code is built from the IR on load, through the cache of the machine. Weights in bfloat16 may be stored as codes (`coded.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..codegen.build import cores
from ..codegen.code import Code
from ..codegen.cpp.levels import LEVELS
from ..codegen.program import Listing, Program
from ..ir.errors import DeviceLost, TilewrightError
from ..ir.graph import Graph, constants
from ..ir.retarget import retarget
from ..ir.text import parse
from ..ir.types import DTYPE_NAMES, DTYPES
from .calling import CallingConvention
from .coded import compressed, restored
from .errors import BadArtifact, CannotWrite, first_line
from .native_code import (
    build_program,
    code_of,
    compiled_for_levels,
    described,
    images,
    is_for_cpu,
    machine_for,
    program_on_cpu,
    program_on_gpu,
    sums,
)
from .padding import WithoutPadding
from .receipt import Receipt
from .trust import unsafe_in_graph

if TYPE_CHECKING:
    from ..passes.quantize import Plan  # loading a model takes no part of the compiler

FORMAT = 1
MEMBERS = ("graph", "receipt", "kernels")
UNPADDED = "unpadded"  # one more, of a model that leaves padding out
DAMAGE = (
    SafetensorError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
)
"""What reading and checking a file may raise that is none of ours, if it is not what `save` wrote."""
LONGEST = 400  # characters of a reason, which may quote the file
KNOWN_CALLS = 1024  # kinds of calls that are remembered as checked
STATE = "state "  # what the names of updated buffers begin with


@dataclass(frozen=True)
class Optimized:
    """An optimized model: call it like the original. `receipt` says what was done to it, `graph` is its IR, `program` runs it.

    state: the buffers that the model updates as it runs, by name. unpadded: the program that leaves padding out, where it was asked for
    (`driver.padding`). code: its binaries, where it was compiled for a target, or loaded with them; what was compiled here for another
    machine can be saved, and not called. plan: the formats of its weights, where a budget chose them, for a `Generator` of the same model;
    an artifact holds the weights themselves.
    """

    graph: Graph = field(repr=False)
    convention: CallingConvention
    program: Listing = field(repr=False)
    receipt: Receipt = field(repr=False)
    state: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    code: Code[Any] | None = field(default=None, repr=False)
    unpadded: WithoutPadding | None = field(default=None, repr=False)
    plan: Plan | None = field(default=None, repr=False)
    _known: set[Any] = field(default_factory=set, repr=False, compare=False)  # kinds of inputs that have been checked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.convention.bind(args, kwargs)
        kind = tuple([(v.dtype, v.shape, v.device) if isinstance(v, torch.Tensor) else type(v) for v in flat])
        if kind not in self._known:
            if not isinstance(self.program, Program):
                self.program.run(flat)
            self.convention.checked(flat, self.graph)
            if len(self._known) < KNOWN_CALLS:
                self._known.add(kind)
        inputs = flat + [self.state[name] for name in self.convention.state]
        return self.convention.pack(self.program.run(inputs) if self.unpadded is None else self.unpadded.run(inputs, self.program.run))

    def with_own_state(self) -> Optimized:
        """The same model, whose buffers are copies: what it does to them is not seen here, nor are its calls counted."""
        state = {name: value.clone() for name, value in self.state.items()}
        return replace(self, state=state, unpadded=None if self.unpadded is None else self.unpadded.afresh())

    def save(self, path: str | Path, levels: Collection[str] = tuple(LEVELS), compress: bool = False) -> None:
        """Writes the artifact; raises CannotWrite. levels: of x86-64, for which a model that runs on CPUs is compiled (`cpp.levels`).

        compress: weights in bfloat16 take two thirds of their bytes in the file, without loss, and loading takes longer (`driver.coded`).
        """
        save(path, self, levels, compress)


def save(path: str | Path, model: Optimized, levels: Collection[str] = tuple(LEVELS), compress: bool = False) -> None:
    """Writes the artifact under a temporary name and renames it; raises CannotWrite and leaves nothing behind."""
    code = compiled_for_levels(model.graph, levels) if model.code is None else model.code
    members = {"graph": str(model.graph), "receipt": model.receipt.to_json(), "kernels": model.program.source}
    graphs = [model.graph]
    if model.unpadded is not None:
        graphs.append(model.unpadded.plan.graph)
        members[UNPADDED] = str(graphs[-1])
    weights = {name: data.value for graph in graphs for name, data in constants(graph).items() if data.value is not None}
    tensors, names = _distinct(weights | {f"{STATE}{name}": value for name, value in model.state.items()})
    tensors, about = _coded(tensors) if compress else (tensors, {})
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "convention": model.convention.to_json(),
        "weights": names,
        "sha256": {m: _digest(text) for m, text in members.items()} | {f"weight {n}": _tensor_digest(t) for n, t in tensors.items()},
    }
    if about:
        manifest["coded"] = about
    if model.unpadded is not None:
        manifest[UNPADDED] = model.unpadded.to_json()
    if code is not None:
        manifest["code"] = described(code)
        manifest["sha256"] |= sums(code)
        tensors |= images(code)
    manifest["sha256"]["manifest"] = _manifest_digest(manifest)
    try:
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=members | {"tilewright": json.dumps(manifest)})
            _put_in_order(temporary)
    except SafetensorError as error:
        raise CannotWrite(path=path, reason=_io_reason(error)) from error


def _put_in_order(path: str) -> None:
    """Sorts the metadata of a safetensors file: it is written in the order of a hash table, and equal models shall be equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


@contextmanager
def replacing(target: Path) -> Iterator[str]:
    """A temporary file beside `target` that takes its place if all goes well, and vanishes if not. Raises CannotWrite."""
    if target.is_dir():
        raise CannotWrite(path=target, reason="it is a directory")
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise CannotWrite(path=target, reason=error.strerror or str(error)) from error
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _io_reason(error: Exception) -> str:
    """safetensors says `Error while serializing: I/O error: No space left on device (os error 28)`."""
    return str(error).rpartition("error: ")[2].partition(" (os error")[0] or str(error)


def _distinct(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each memory once, contiguous; and constant name -> the tensor it is stored as (tied weights share one)."""
    stored: dict[str, torch.Tensor] = {}
    known: dict[Any, str] = {}
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        names[name] = known.setdefault(key, name)
        if names[name] == name:
            stored[name] = _own(tensor.detach().cpu())
    return stored, names


def _coded(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, as codes where that is much smaller; and what the manifest says of those. sha256: of the values."""
    with ThreadPoolExecutor(cores()) as pool:
        found = dict(zip(tensors, pool.map(compressed, tensors.values())))
    about = {
        name: {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "sha256": _tensor_digest(tensors[name])}
        for name, codes in found.items()
        if codes is not None
    }
    return {name: tensor if (codes := found[name]) is None else codes for name, tensor in tensors.items()}, about


def _plain(coded: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with the values of those that are codes."""

    def value(name: str) -> torch.Tensor:
        return restored(tensors[name], DTYPES[coded[name]["dtype"]], coded[name]["shape"])

    with ThreadPoolExecutor(cores()) as pool:
        return {**tensors, **dict(zip(coded, pool.map(value, coded)))}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and alone in its memory, as safetensors wants it; copied only where it is not."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Of all but the sums."""
    return _digest(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True))


def _tensor_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def load(path: str | Path, operators: Collection[str] = (), trust_code: bool = False) -> Optimized:
    """The optimized model in `path`, ready to call; builds its kernels unless this machine has them cached, or they are in the file.

    The file may come from anyone: it is parsed, not executed. operators: namespaces of custom operators that it may call besides
    torch's own, e.g. ("torchvision",). trust_code: run the code in the file; without it, what this user did not compile is compiled anew,
    from the graph. Raises BadArtifact, and WrongMachine for a file that was compiled for another one.
    """
    with _reported(path):
        return _load(Path(path), operators, trust_code)


@contextmanager
def _reported(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with a file's content is a BadArtifact of one sentence."""
    try:
        yield
    except (BadArtifact, DeviceLost):
        raise
    except TilewrightError as error:
        raise BadArtifact(path=path, reason=first_line(error)[:LONGEST]) from error
    except DAMAGE as error:
        raise BadArtifact(path=path, reason=f"it is damaged or no artifact at all ({first_line(error)[:LONGEST]})") from error


def _load(path: Path, operators: Collection[str], trust_code: bool) -> Optimized:
    metadata, tensors = _read(path)
    manifest = _manifest(path, metadata)
    code = code_of(manifest, tensors)
    _verify(path, manifest, metadata, tensors, code)
    plain = _plain(manifest.get("coded", {}), tensors)
    values = {name: plain[stored] for name, stored in manifest["weights"].items()}
    graph = _graph(path, metadata["graph"], values, operators)
    rows = _graph(path, metadata[UNPADDED], values, operators) if UNPADDED in metadata else None
    convention = CallingConvention.from_json(manifest["convention"])
    receipt = Receipt.from_json(metadata["receipt"])
    state = {name: values[f"{STATE}{name}"].clone() for name in convention.state}
    if is_for_cpu(graph, code):
        kernels = len(receipt.kernels)
        program = build_program(graph) if code is None else program_on_cpu(path, graph, code, kernels, trust_code)
        return Optimized(graph, convention, program, receipt, state, code, _unpadded(manifest, rows))
    machine = machine_for(path, code.target if code is not None else None)
    graph = retarget(graph, machine.device, machine.move)
    state = {name: machine.move(value) for name, value in state.items()}
    program = build_program(graph) if code is None else program_on_gpu(path, graph, code, machine, len(receipt.kernels), trust_code)
    rows = None if rows is None else retarget(rows, machine.device, machine.move)
    return Optimized(graph, convention, program, receipt, state, code, _unpadded(manifest, rows))


def _graph(path: Path, text: str, values: Mapping[str, torch.Tensor], operators: Collection[str]) -> Graph:
    """A graph of the file, which has its weights and calls nothing that it may not."""
    graph = parse(text, values)
    missing = next((name for name, data in constants(graph).items() if not data.known), None)
    if missing is not None:
        raise BadArtifact(path=path, reason=f"its graph needs {_shown(missing)}, which is not among its weights")
    unsafe = unsafe_in_graph(graph, operators)
    if unsafe:
        raise BadArtifact(path=path, reason=unsafe)
    return graph


def _unpadded(manifest: Mapping[str, Any], graph: Graph | None) -> WithoutPadding | None:
    """The program that leaves padding out; its kernels are compiled here."""
    return None if graph is None else WithoutPadding.from_json(manifest[UNPADDED], graph, build_program(graph))


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(str(_existing(path)), framework="pt") as file:
        metadata = file.metadata() or {}
        _manifest(path, metadata)
        return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _manifest(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a format that this version reads."""
    if "tilewright" not in metadata:
        raise BadArtifact(path=path, reason="it is a safetensors file, but not one that tilewright wrote")
    manifest = json.loads(metadata["tilewright"])
    found = manifest["format"]
    if found != FORMAT:
        hint = "a newer tilewright wrote it" if isinstance(found, int) and found > FORMAT else "optimize the model again"
        raise BadArtifact(path=path, reason=f"it has format {found!r}, this version reads {FORMAT}; {hint}")
    foreign = next((name for name in metadata if name not in ("tilewright", *MEMBERS, UNPADDED)), None)
    if foreign is not None:
        raise BadArtifact(path=path, reason=f"it has a member {_shown(foreign)!r}, which tilewright never writes")
    return manifest


def _verify(
    path: Path, manifest: Mapping[str, Any], metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], code: Code | None
) -> None:
    binaries = sums(code) if code is not None else {}
    weights = {f"weight {n}": _tensor_digest(t) for n, t in tensors.items() if n not in binaries}
    members = (*MEMBERS, UNPADDED) if UNPADDED in metadata else MEMBERS
    found = {m: _digest(metadata[m]) for m in members} | {"manifest": _manifest_digest(manifest)} | weights | binaries
    expected = manifest["sha256"]
    wrong = [m for m, digest in expected.items() if found.get(m) != digest] + [m for m in found if m not in expected]
    if wrong:
        raise BadArtifact(path=path, reason=f"its {_shown(wrong[0])} does not match the recorded sha256; the file was damaged or changed")


def _shown(name: str) -> str:
    """A name from the file, as it may stand in a sentence."""
    return "".join(c if c.isprintable() else " " for c in name[:100])


def member(path: str | Path, name: str) -> str:
    """One of MEMBERS as text, without building anything; raises BadArtifact."""
    with _reported(path), safe_open(str(_existing(path)), framework="pt") as file:
        metadata = file.metadata() or {}
        _manifest(path, metadata)
        return metadata[name]


def receipt_of(path: str | Path) -> Receipt:
    """The receipt alone, of an artifact or of a file that `--json` wrote; raises BadArtifact."""
    with _reported(path):
        return Receipt.from_json(_existing(path).read_text() if _is_json(path) else member(path, "receipt"))


def contents(path: str | Path) -> dict[str, str]:
    """What an artifact holds beside the receipt, by name, with the recorded sha256 of each, however it is stored; nothing of a receipt.
    Raises BadArtifact."""
    with _reported(path):
        if _is_json(path):
            return {}
        with safe_open(str(path), framework="pt") as file:
            manifest = _manifest(path, file.metadata() or {})
        sums, coded = manifest["sha256"], manifest.pop("coded", {})
        if coded:
            sums |= {f"weight {name}": about["sha256"] for name, about in coded.items()} | {"manifest": _manifest_digest(manifest)}
        return {str(name): str(digest) for name, digest in sums.items() if name != "receipt"}


def _is_json(path: str | Path) -> bool:
    """A safetensors file begins with the length of its header, of which most bytes are 0."""
    with open(_existing(path), "rb") as file:
        start = file.read(8)
    return start.lstrip()[:1] == b"{" and 0 not in start


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise BadArtifact(path=path, reason="there is no such file")
    return Path(path)
