"""Libraries of C++ functions that are compiled ahead of time, and run where there is no compiler.

A library is all functions of a model at one level of instructions, as bytes that do not depend on where, or on how many cores, they were
compiled. Its symbols name what they were compiled from, so that a function printed in another way is not found, rather than wrong.

    compiled(sources, tools)  -->  bytes        loaded(bytes, sources)  -->  functions
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .build import (
    HEADERS,
    BuildError,
    Loaded,
    Source,
    Toolchain,
    cache_directory,
    cores,
    entry_text,
    first_lines,
    function_of,
    remove_stale,
    renamed,
    source_key,
    typed,
    unit_text,
    units_of,
    write,
)
from .threads import gnu_openmp

UNITS, FUNCTIONS = 4, 12
"""Translation units of a library at most, and functions from which on another is worth reading the headers again. Units are compiled in
parallel; their number must not depend on the cores."""

PRIVATE = 0o700


# -- compiling


def compile_libraries(orders: Sequence[tuple[Sequence[Source], Toolchain]]) -> list[bytes | BuildError]:
    """Each a library, from the cache if it was compiled before; all units of all of them in parallel."""
    with ThreadPoolExecutor(cores()) as pool, ThreadPoolExecutor(len(orders) or 1) as waiting:
        return list(waiting.map(lambda order: _compiled(order[0], order[1], pool), orders))


def _compiled(sources: Sequence[Source], tools: Toolchain, pool: ThreadPoolExecutor) -> bytes | BuildError:
    directory = library_directory()
    note = directory / f"{_order_key(sources, tools)}.json"
    known = _known(directory, note)
    if known is not None:
        return known
    remove_stale(directory)
    units = [list(unit.values()) for unit in units_of({symbol_of(s): s for s in sources}, min(UNITS, -(-len(sources) // FUNCTIONS)))]
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="tmp-") as scratch:
            done = list(pool.map(lambda i: _object(Path(scratch), f"unit{i}", units[i], tools), range(len(units))))
            failed = next((message for message in done if message), None)
            message = failed or _run(_link(tools, [f"unit{i}.o" for i in range(len(units))]), Path(scratch))
            if message:
                return BuildError(function="a library", reason=message)
            image = (Path(scratch) / "library.so").read_bytes()
        digest = keep(image)
        write(note, json.dumps({"sha256": digest}).encode())
        return image
    except OSError as error:
        return BuildError(function="a library", reason=f"{type(error).__name__}: {error}")


def _known(directory: Path, note: Path) -> bytes | None:
    try:
        return _read(directory, json.loads(note.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: compiled again


def _object(scratch: Path, name: str, sources: Sequence[Source], tools: Toolchain) -> str:
    """Compiles one unit; what the compiler complains of."""
    texts = [renamed(s, symbol_of(s)) + entry_text(s, symbol_of(s)) for s in sources]
    (scratch / f"{name}.cc").write_text(unit_text(texts))
    return _run([tools.compiler, *tools.flags, f"-frandom-seed={name}", f"-I{HEADERS}", "-c", f"{name}.cc", "-o", f"{name}.o"], scratch)


def _link(tools: Toolchain, objects: Sequence[str]) -> list[str]:
    """Without GNU's OpenMP runtime, whose file has another name in every build of torch: the process has it loaded. LLVM's is named."""
    runtime = ["-fopenmp"] if "clang" in tools.identity else []
    own = ["-shared", "-s", *runtime, "-Wl,--build-id=none", "-Wl,--as-needed"]
    return [tools.compiler, *own, *objects, "-o", "library.so", "-lm"]


def _run(command: Sequence[str], scratch: Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    return "" if result.returncode == 0 else first_lines(result.stderr) or f"the compiler ended with status {result.returncode}"


def _order_key(sources: Sequence[Source], tools: Toolchain) -> str:
    parts = (*map(symbol_of, sources), tools.compiler, tools.identity, *tools.flags)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def symbol_of(source: Source) -> str:
    """What a function is called in a library: its name, and the sum of its text."""
    return f"{source.name}_{source_key(source)[:16]}"


# -- loading


def load_functions(image: bytes, sources: Sequence[Source]) -> list[Loaded]:
    """The functions of a library that were compiled from these very sources; for others the reason why there are none."""
    try:
        library = _library(keep(image))
    except OSError as error:
        reason = f"its library cannot be loaded here ({error})"
        return [BuildError(function=s.name, reason=reason) for s in sources]
    return [_found(library, source) for source in sources]


def _found(library: ctypes.CDLL, source: Source) -> Loaded:
    try:
        return typed(function_of(library, symbol_of(source)), source)
    except AttributeError:
        return BuildError(function=source.name, reason="there is no code for it")


@functools.cache
def _library(digest: str) -> ctypes.CDLL:
    """Raises OSError where something that it needs is not there; all its symbols are bound at once."""
    for runtime in gnu_openmp()[:1]:
        ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library_directory() / f"{digest}.so"))


def library_directory() -> Path:
    """Where libraries lie, by their sums, as only the user may read and write them."""
    directory = cache_directory() / "compiled"
    directory.mkdir(mode=PRIVATE, exist_ok=True)
    return directory


def keep(image: bytes) -> str:
    """Writes a library to the cache, unless it is there; its sum."""
    digest = hashlib.sha256(image).hexdigest()
    directory = library_directory()
    try:
        _read(directory, digest)
    except (OSError, ValueError):
        write(directory / f"{digest}.so", image)
    return digest


def _read(directory: Path, digest: str) -> bytes:
    """Raises OSError, or ValueError for one that is not what was written."""
    image = (directory / f"{digest}.so").read_bytes()
    if hashlib.sha256(image).hexdigest() != digest:
        raise ValueError(f"{digest}.so is damaged")
    return image
