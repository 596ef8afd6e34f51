"""The builder: cache hits, damage, concurrency, killed compilers, missing compilers, directories that cannot be written."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from support import NATIVE
from tilewright.codegen import build as builder
from tilewright.codegen.build import BuildError, Source, build, compiler_available

pytestmark = NATIVE


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and a process that has loaded and warned about nothing."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "_libraries", {})
    builder._warn_once.cache_clear()
    builder._toolchain.cache_clear()
    return tmp_path / "cache"


def source(name: str = "twice", factor: str = "2.0f", comment: str = "") -> Source:
    text = f"// {comment}\nvoid {name}(float* x) {{ *x = {factor} * *x; }}\n"
    return Source(name, text, (ctypes.c_void_p,))


def apply(function: object, value: float = 3.0) -> float:
    assert not isinstance(function, BuildError), str(function)
    x = ctypes.c_float(value)
    function(ctypes.addressof(x))  # type: ignore[operator]
    return x.value


def counting_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str = "") -> Path:
    """A compiler that notes each compilation in a file, then does `body` (default: compile)."""
    log, script = tmp_path / "compilations", tmp_path / "counting-c++"
    real = builder.find_compiler()
    action = body or f'exec {real} "$@"'
    script.write_text(f'#!/bin/sh\ncase "$1" in --version) exec {real} --version;; esac\necho x >> {log}\n{action}\n')
    script.chmod(0o755)
    log.write_text("")
    monkeypatch.setenv("CXX", str(script))
    return log


def compilations(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_functions_are_built_and_called() -> None:
    twice, thrice = build([source(), source("thrice", "3.0f")])
    assert apply(twice) == 6 and apply(thrice) == 9


def test_only_what_is_new_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = counting_compiler(monkeypatch, tmp_path)
    build([source()])
    assert compilations(log) == 1
    monkeypatch.setattr(builder, "_libraries", {})  # as another process would find it
    assert apply(build([source()])[0]) == 6
    assert compilations(log) == 1
    assert apply(build([source(), source("other", "5.0f")])[1]) == 15
    assert compilations(log) == 2


def test_names_and_comments_do_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = counting_compiler(monkeypatch, tmp_path)
    functions = build([source(), source("renamed", comment="model.py:3")])
    assert [apply(f) for f in functions] == [6, 6] and compilations(log) == 1


def test_flags_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = counting_compiler(monkeypatch, tmp_path)
    build([source()])
    build([source()], "x86-64")
    assert compilations(log) == 2


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove", "entry", "foreign entry"])
def test_damage_is_repaired(damage: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build([source()])
    monkeypatch.setattr(builder, "_libraries", {})
    (library,), (entry,) = list(fresh.glob("*.so")), list(fresh.glob("*.json"))
    data = library.read_bytes()
    library.unlink()  # this process has it mapped: damage a copy
    if damage in ("truncate", "garbage"):
        library.write_bytes(data[: len(data) // 2] if damage == "truncate" else data[:100] + b"?" + data[101:])
    elif damage != "remove":
        library.write_bytes(data)
        entry.write_text('{"library": ' if damage == "entry" else json.dumps(["no", "entry"]))
    assert apply(build([source()])[0]) == 6
    monkeypatch.setattr(builder, "_libraries", {})
    assert apply(build([source()])[0]) == 6


def test_an_error_names_the_function_and_spares_the_others() -> None:
    good, bad, also_good = build([source(), Source("bad", "void bad() { undeclared(); }\n", ()), source("thrice", "3.0f")])
    assert isinstance(bad, BuildError)
    assert "bad" in str(bad) and "undeclared" in str(bad)
    assert apply(good) == 6 and apply(also_good) == 9


CHILD = """
import ctypes, sys
from tilewright.codegen.build import Source, build
texts = [(f"f{n}", f"void f{n}(float* x) {{ *x = {n}.0f * *x; }}\\n") for n in range(8)]
x = ctypes.c_float(3.0)
for n, function in enumerate(build([Source(name, text, (ctypes.c_void_p,)) for name, text in texts])):
    x.value = 3.0
    function(ctypes.addressof(x))
    assert x.value == 3.0 * n, (n, x.value)
"""


def test_two_processes_at_once(fresh: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", CHILD]) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert not list(fresh.glob("tmp-*"))


def test_a_killed_compilation_leaves_nothing_that_matters(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = counting_compiler(monkeypatch, tmp_path, body="sleep 60")
    child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    deadline = time.time() + 60
    while not compilations(log) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    left = list(fresh.glob("tmp-*"))
    assert left and not list(fresh.glob("*.json"))
    monkeypatch.delenv("CXX")
    builder._toolchain.cache_clear()
    for path in left:
        os.utime(path, (0, 0))
    assert apply(build([source()])[0]) == 6
    assert not list(fresh.glob("tmp-*")), "what is a day old is removed"


def test_without_a_compiler_there_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not compiler_available()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        (result,) = build([source()])
    assert isinstance(result, BuildError)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build([source()])


def test_a_broken_compiler_is_an_error_with_its_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting_compiler(monkeypatch, tmp_path, body="echo 'error: out of registers' >&2; exit 3")
    (result,) = build([source()])
    assert isinstance(result, BuildError) and "out of registers" in str(result)


def test_a_cache_that_cannot_be_written_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(obstacle / "cache"))
    with pytest.warns(UserWarning, match="cannot be written"):
        (function,) = build([source()])
    assert apply(function) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build([source()])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache_is_replaced(fresh: Path) -> None:
    fresh.mkdir()
    fresh.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert apply(build([source()])[0]) == 6
