"""Builds, caches and loads C++ functions.

Functions are grouped into as many translation units as there are cores; each function is cached for itself, by what determines its
machine code: text, headers, compiler, flags, CPU. Files of the cache are written under another name and renamed, and carry a checksum
that is verified before loading, so a killed compiler, a full disk or a second process leaves at worst something that is built again.

    <cache>/<key>.json            function -> library, symbol, checksum of the library
    <cache>/<hash of text>.so     the libraries
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ..ir.errors import TilewrightError
from .threads import gnu_openmp

COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fwrapv", "-fopenmp", "-fno-exceptions",
    "-fno-rtti", "-shared", "-fPIC", "-fvisibility=default", "-w", "-s",
)  # fmt: skip
HEADERS = Path(__file__).parent / "cpp"
STALE_SECONDS = 24 * 3600
MESSAGE_LINES = 8


class BuildError(TilewrightError):
    """The C++ compiler refused a function, or there is none."""

    template = "cannot build {function}: {reason}"


@dataclass(frozen=True)
class Source:
    """One extern "C" function: its name, its text, the ctypes of its arguments and of its result (None: void).

    A function of addresses and integers that returns nothing or an int64_t has an entry too: see `entry_address`.
    """

    name: str
    text: str
    arguments: tuple[Any, ...]
    result: Any = None


@dataclass(frozen=True)
class Toolchain:
    """A compiler, its identity, and the flags for one CPU level (a value of -march)."""

    compiler: str
    identity: str
    flags: tuple[str, ...]


Loaded = Union[Callable[..., Any], BuildError]


def build(sources: Sequence[Source], level: str = "native") -> list[Loaded]:
    """The functions, each compiled or taken from the cache, or the reason why it could not be built."""
    tools = toolchain(level)
    if tools is None:
        _warn_once("no C++ compiler was found (tried $CXX, g++, clang++, c++): kernels run by eager PyTorch, slower")
        return [BuildError(function=s.name, reason="there is no C++ compiler") for s in sources]
    directory = cache_directory()
    keys = [_key(s, tools) for s in sources]
    found: dict[str, Loaded | None] = {k: _cached(directory, k, s) for k, s in zip(keys, sources)}
    missing = {k: s for k, s in zip(keys, sources) if found[k] is None}
    if missing:
        remove_stale(directory)
        found.update(_compile_all(directory, missing, tools))
    return [typed(found[k], s) for k, s in zip(keys, sources)]


def cached(sources: Sequence[Source], level: str = "native") -> list[Loaded] | None:
    """The functions if all of them are in the cache, and there is the compiler that they were made with."""
    tools, directory = toolchain(level), cache_directory()
    found: list[Loaded] = []
    for source in sources if tools else ():
        function = _cached(directory, _key(source, tools), source)  # type: ignore[arg-type]
        if function is None:
            return None
        found.append(typed(function, source))
    return found or None


def typed(function: Loaded | None, source: Source) -> Loaded:
    assert function is not None
    if not isinstance(function, BuildError):
        function.argtypes, function.restype = source.arguments, source.result  # type: ignore[attr-defined]
    return function


# ---- the compiler


def compiler_available() -> bool:
    return find_compiler() is not None


def find_compiler() -> str | None:
    """Path of $CXX, or else of the first of COMPILERS that exists."""
    chosen = os.environ.get("CXX")
    candidates = (chosen, *COMPILERS) if chosen else COMPILERS
    return next((path for c in candidates if (path := shutil.which(c))), None)


def toolchain(level: str = "native") -> Toolchain | None:
    compiler = find_compiler()
    return _toolchain(compiler, level) if compiler else None


@functools.cache
def _toolchain(compiler: str, level: str) -> Toolchain | None:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    cpu = _cpu_features() if level == "native" else ""
    arch = "-mcpu" if platform.machine() in ("aarch64", "arm64") else "-march"
    identity = "\n".join((version.splitlines()[0] if version else "", platform.machine(), level, cpu))
    return Toolchain(compiler, identity, (*FLAGS, f"{arch}={level}"))


@functools.cache
def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    shown = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(sorted(set(shown)))


def _openmp_library() -> list[str]:
    """The OpenMP runtime this process has loaded, where the linker would not find that one by itself."""
    loaded = gnu_openmp()
    if not loaded or os.path.basename(loaded[0]).startswith("libgomp.so"):
        return []
    return ["-Wl,--as-needed", loaded[0]]


# ---- the cache


def cache_directory() -> Path:
    """$TILEWRIGHT_CACHE or ~/.cache/tilewright; a temporary one, with a warning, where that cannot be written."""
    chosen = Path(os.environ.get("TILEWRIGHT_CACHE") or Path.home() / ".cache" / "tilewright")
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            return chosen
    except OSError as error:
        _warn_once(f"the cache {chosen} cannot be written ({error.strerror}): compiled kernels are kept for this process only")
        return _temporary_cache()


@functools.cache
def _temporary_cache() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="tilewright-")
    _temporary_cache.holder = holder  # type: ignore[attr-defined]  # removed with the process
    return Path(holder.name)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@functools.cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for header in sorted(HEADERS.glob("*.h")):
        digest.update(header.read_bytes())
    return digest.hexdigest()


def _key(source: Source, tools: Toolchain) -> str:
    """What the machine code depends on."""
    return _digest(*_code(source), tools.compiler, tools.identity, *tools.flags)


def source_key(source: Source) -> str:
    """What it is compiled from, whoever compiles it."""
    return _digest(*_code(source))


def _code(source: Source) -> tuple[str, str]:
    """The text, without the function's name and comments, and that of the headers."""
    return re.sub(r"^\s*//.*\n", "", renamed(source, "kernel_"), flags=re.MULTILINE), _headers_digest()


def renamed(source: Source, name: str) -> str:
    """The text with another name for the function."""
    return re.sub(rf"\b{re.escape(source.name)}\b", name, source.text)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _cached(directory: Path, key: str, source: Source) -> Loaded | None:
    try:
        entry = json.loads((directory / f"{key}.json").read_text())
        return _load(directory / entry["library"], entry["sha256"], entry["symbol"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: built again


_libraries: dict[tuple[str, str], ctypes.CDLL] = {}


def _load(path: Path, digest: str, symbol: str) -> Loaded:
    """A function of a library whose bytes are what was written."""
    library = _libraries.get((path.name, digest))
    if library is None:
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is damaged")
        library = _libraries[path.name, digest] = ctypes.CDLL(str(path))
    return function_of(library, symbol)


def function_of(library: ctypes.CDLL, symbol: str) -> Loaded:
    """Each call gives a function object of its own. Raises AttributeError."""
    function: Any = library[symbol]
    if hasattr(library, f"{symbol}_entry"):
        function.entry = ctypes.cast(library[f"{symbol}_entry"], ctypes.c_void_p).value
    return function


def write(path: Path, data: bytes) -> None:
    """All of it under its final name, or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def remove_stale(directory: Path) -> None:
    """What compilers that were killed left behind, a day later."""
    for path in directory.glob("tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # another process was faster


# ---- compiling


def _compile_all(directory: Path, missing: dict[str, Source], tools: Toolchain) -> dict[str, Loaded]:
    units = units_of(missing, cores())
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        results = list(pool.map(lambda unit: _compile_unit(directory, unit, tools), units))
        failed = [unit for unit, result in zip(units, results) if isinstance(result, str) and len(unit) > 1]
        alone = [{k: s} for unit in failed for k, s in unit.items()]  # one bad function must not spoil its neighbours
        retried = list(pool.map(lambda unit: _compile_unit(directory, unit, tools), alone))
    found: dict[str, Loaded] = {}
    for unit, result in zip(units + alone, results + retried):
        for key, source in unit.items():
            found[key] = BuildError(function=source.name, reason=result) if isinstance(result, str) else result[key]
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def units_of(missing: dict[str, Source], count: int) -> list[dict[str, Source]]:
    """The functions in at most `count` groups of about equal text, longest first."""
    units: list[dict[str, Source]] = [{} for _ in range(min(count, len(missing)))]
    sizes = [0] * len(units)
    for key, source in sorted(missing.items(), key=lambda item: -len(item[1].text)):
        place = sizes.index(min(sizes))
        units[place][key] = source
        sizes[place] += len(source.text)
    return units


def entry_address(function: Any) -> int:
    """The address of what `build` made of a function of addresses and integers, as runs of calls have it (cpp/call.h)."""
    return function.entry


_IN_RUNS = {ctypes.c_void_p, ctypes.c_int, ctypes.c_int64}


def entry_text(source: Source, symbol: str) -> str:
    """The text of the entry; nothing for a function that runs of calls cannot call."""
    if not _IN_RUNS.issuperset(source.arguments) or source.result not in (None, ctypes.c_int64):
        return ""
    return f"int64_t {symbol}_entry(const int64_t* values, const int64_t* places) {{ return enter({symbol}, values, places); }}\n"


def unit_text(functions: Iterable[str]) -> str:
    """A translation unit of functions."""
    body = "\n".join(functions)
    return f'#include "vec.h"\nusing namespace tile;\n\nextern "C" {{\n\n{body}\n}}\n'


def _compile_unit(directory: Path, unit: dict[str, Source], tools: Toolchain) -> dict[str, Loaded] | str:
    """Compiles one unit into the cache; the functions by key, or the compiler's message."""
    symbols = {key: f"{source.name}_{key[:8]}" for key, source in unit.items()}
    texts = [renamed(s, symbols[key]) + entry_text(s, symbols[key]) for key, s in unit.items()]
    name = hashlib.sha256("\0".join(unit).encode()).hexdigest()[:40]
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="tmp-") as scratch:
            source, library = Path(scratch) / "unit.cc", Path(scratch) / "unit.so"
            source.write_text(unit_text(texts))
            command = [tools.compiler, *tools.flags, f"-I{HEADERS}", str(source), "-o", str(library), *_openmp_library(), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
            if result.returncode != 0:
                return first_lines(result.stderr) or f"the compiler ended with status {result.returncode}"
            data = library.read_bytes()
        path = directory / f"{name}.so"
        digest = hashlib.sha256(data).hexdigest()
        path = directory / f"{name}-{digest[:8]}.so"
        write(path, data)
        for key, symbol in symbols.items():
            entry = {"library": path.name, "symbol": symbol, "sha256": digest}
            write(directory / f"{key}.json", json.dumps(entry).encode())
        return {key: _load(path, digest, symbol) for key, symbol in symbols.items()}
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def first_lines(message: str) -> str:
    lines = message.splitlines()
    errors = [n for n, line in enumerate(lines) if "error" in line]
    start = errors[0] if errors else 0
    return "\n".join(lines[start : start + MESSAGE_LINES])
