"""The tuning database: what was measured, kept in one SQLite file that many processes may read and write at once.

    kernel            shapes                   device                       version   candidate   seconds    noise
    sha256 of text    f32[1024, 384] ...       "EPYC 9B14, 2 cores, ..."    2.13.0    native      1.25e-3    0.004

    model                     layer          format      error
    sha256 of all it is of    encoder.fc1    int4-g32    6.3e-3

Every write is one transaction in a write-ahead log: a process that is killed leaves all that was written before, and nothing half.
"""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..codegen.build import cache_directory
from ..codegen.target import Usage
from .device import identity

WAIT_SECONDS = 20.0
"""A writer waits so long for the others."""

_TABLE = """CREATE TABLE IF NOT EXISTS timings (
  kernel TEXT, shapes TEXT, device TEXT, version TEXT, candidate TEXT, seconds REAL NOT NULL, noise REAL NOT NULL,
  PRIMARY KEY (kernel, shapes, device, version, candidate)) WITHOUT ROWID"""
_ERRORS = """CREATE TABLE IF NOT EXISTS errors (
  model TEXT, layer TEXT, format TEXT, error REAL NOT NULL, PRIMARY KEY (model, layer, format)) WITHOUT ROWID"""
_USAGES = """CREATE TABLE IF NOT EXISTS usages (
  program TEXT PRIMARY KEY, registers INTEGER NOT NULL, spills INTEGER NOT NULL, shared INTEGER NOT NULL) WITHOUT ROWID"""
Result = TypeVar("Result")
_COLUMNS = ("kernel", "shapes", "device", "version", "candidate", "seconds", "noise")


@dataclass(frozen=True)
class Key:
    """What was measured: the hash of a kernel, the shapes it ran on, the machine, and the version of torch; of kernels that Triton
    compiles, "2.13.0, triton 3.9.0"."""

    kernel: str
    shapes: str
    device: str
    version: str

    @staticmethod
    def here(kernel: str, shapes: str) -> Key:
        """On this machine and this torch."""
        return Key(kernel, shapes, identity(), str(torch.__version__))

    @staticmethod
    def on_gpu(kernel: str, shapes: str, gpu: str) -> Key:
        """On a GPU of that name, by this torch and this Triton."""
        import triton  # which need not be there for kernels of a CPU

        return Key(kernel, shapes, gpu, f"{torch.__version__}, triton {triton.__version__}")


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and how far that may be off, as a fraction of it."""

    seconds: float
    noise: float = 0.0


class Database:
    """path: the file, by default `tuning.sqlite` in the cache directory. Safe to use from threads, processes and after a fork."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else cache_directory() / "tuning.sqlite"

    def get(self, key: Key) -> dict[str, Timing]:
        """Candidate -> its timing; empty where nothing is known."""
        query = "SELECT candidate, seconds, noise FROM timings WHERE kernel=? AND shapes=? AND device=? AND version=?"
        rows = self._do(lambda connection: connection.execute(query, astuple(key)).fetchall())
        return {name: Timing(seconds, noise) for name, seconds, noise in rows}

    def put(self, key: Key, timings: Mapping[str, Timing]) -> None:
        """Writes what was measured, over what was known."""
        self._write([(*astuple(key), name, t.seconds, t.noise) for name, t in timings.items()])

    def usage(self, program: str) -> Usage | None:
        """What a compiled program takes of its GPU; None where that is not known. program: a hash of all that it was compiled from."""
        query = "SELECT registers, spills, shared FROM usages WHERE program=?"
        row = self._do(lambda connection: connection.execute(query, (program,)).fetchone())
        return None if row is None else Usage(*row)

    def put_usage(self, program: str, usage: Usage) -> None:
        self._insert("INSERT OR REPLACE INTO usages VALUES (?, ?, ?, ?)", [(program, *astuple(usage))])

    def errors(self, model: str) -> dict[tuple[str, str], float]:
        """(layer, format) -> the error measured; empty where nothing is known. model: a hash of all that errors depend on."""
        query = "SELECT layer, format, error FROM errors WHERE model=?"
        return {(layer, name): error for layer, name, error in self._do(lambda c: c.execute(query, (model,)).fetchall())}

    def put_error(self, model: str, layer: str, name: str, error: float) -> None:
        """Writes one error, finite or not, over what was known."""
        self._insert("INSERT OR REPLACE INTO errors VALUES (?, ?, ?, ?)", [(model, layer, name, error)])

    def dump(self, path: str | Path) -> int:
        """Writes all rows as JSON lines; their number."""
        rows = self._do(lambda connection: connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM timings").fetchall())
        Path(path).write_text("".join(json.dumps(dict(zip(_COLUMNS, row))) + "\n" for row in rows))
        return len(rows)

    def load(self, path: str | Path) -> int:
        """Adds the rows of a file that `dump` wrote, over those known; their number. Raises ValueError, and adds none, for any other."""
        rows = [_row(path, number, line) for number, line in enumerate(Path(path).read_text().splitlines(), 1) if line.strip()]
        self._write(rows)
        return len(rows)

    def _write(self, rows: list[tuple[object, ...]]) -> None:
        self._insert(f"INSERT OR REPLACE INTO timings ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' for _ in _COLUMNS)})", rows)

    def _insert(self, text: str, rows: list[tuple[object, ...]]) -> None:
        def write(connection: sqlite3.Connection) -> None:
            with connection:  # one transaction
                connection.executemany(text, rows)

        self._do(write)

    def _do(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
        """On a connection of its own. A file that is no database is put aside: measuring again is cheap, failing is not."""
        try:
            return self._attempt(operation)
        except sqlite3.OperationalError:  # a full disk, a lock that nobody gives back
            raise
        except sqlite3.DatabaseError as error:
            aside = self.path.with_suffix(".damaged")
            warnings.warn(f"{self.path} is damaged ({error}); it is kept as {aside.name}, and measuring starts anew", stacklevel=4)
            self.path.replace(aside)
            return self._attempt(operation)

    def _attempt(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
        with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as connection:
            _set_up(connection)
            return operation(connection)


def _set_up(connection: sqlite3.Connection) -> None:
    """The log and the table. While another process makes the log, SQLite says that the file is locked, and does not wait by itself."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_TABLE)
            connection.execute(_ERRORS)
            connection.execute(_USAGES)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _row(path: str | Path, number: int, line: str) -> tuple[object, ...]:
    """The values of a line of JSON, checked."""
    try:
        data = json.loads(line)
        texts, numbers = [data[name] for name in _COLUMNS[:5]], [float(data[name]) for name in _COLUMNS[5:]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number} is no timing: {error}") from None
    if not all(isinstance(t, str) for t in texts) or not all(0 <= n < float("inf") for n in numbers):
        raise ValueError(f"{path}:{number} is no timing: it wants five texts and two numbers")
    return (*texts, *numbers)
