"""The code of an artifact for CPUs: what is stored, when it is run, and that no compiler is needed then."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tilewright
import torch
from offline import Mlp, run, save_program, sentence
from support import NATIVE
from tilewright.codegen import build, libraries
from tilewright.codegen.cpp import levels, prebuilt
from tilewright.codegen.cpp.levels import LEVELS
from tilewright.driver import measure, native_code
from tilewright.driver.artifact import contents
from tilewright.driver.errors import BadArtifact, BadOption, CodeNotTrusted

pytestmark = [NATIVE, pytest.mark.skipif(not levels.compiles_here(), reason="libraries are for Linux on x86-64")]

X = torch.linspace(-2, 2, 24).reshape(3, 8)
HERE = [level.name for level in levels.levels_here()]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    measure.MEASURE_SECONDS, before = 0.01, measure.MEASURE_SECONDS
    made = tilewright.optimize(Mlp(), (X,), tuning_seconds=0)
    measure.MEASURE_SECONDS = before
    return made


@pytest.fixture
def path(model, tmp_path):
    model.save(tmp_path / "a.tw")
    return tmp_path / "a.tw"


@pytest.fixture
def foreign(path, tmp_path, monkeypatch):
    """The artifact, with another user: nothing is cached, nothing is their own."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)


def close(found, model):
    torch.testing.assert_close(found, model(X), rtol=1e-5, atol=1e-6)


def test_what_is_stored(path, model):
    loaded = tilewright.load(path)
    assert list(loaded.code.binaries) == ["x86-64-v2", "x86-64-v3", "x86-64-v4"], "no product of bytes is in it"
    assert {f"binary {name}" for name in loaded.code.binaries} < set(contents(path))
    assert all(library.image[:4] == b"\x7fELF" and library.compiler for library in loaded.code.binaries.values())
    loaded.save(path.with_name("again.tw"))
    assert tilewright.load(path.with_name("again.tw")).code == loaded.code
    model.save(path, levels=())
    assert tilewright.load(path).code is None


ALONE = """
import os, sys
os.environ["PATH"] = ""
import subprocess
def run(*args, **options): raise AssertionError(f"a process is started: {args}")
subprocess.run = subprocess.Popen = run
import torch, tilewright
loaded = tilewright.load(sys.argv[1], trust_code=True)
assert loaded.program.kernels and not loaded.program.fallbacks
print(loaded(torch.linspace(-2, 2, 24).reshape(3, 8)).double().sum().item())
for name in ("networkx", "ortools", "rich", "torch._inductor", "tilewright.passes.manager", "tilewright.ir.capture"):
    assert name not in sys.modules, f"loading imports {name}"
"""


@pytest.mark.skipif(not HERE, reason="this machine runs none of the levels")
def test_a_new_process_without_a_compiler(path, model, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"TILEWRIGHT_CACHE": str(tmp_path / "cache")}
    made = subprocess.run([sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, timeout=120, env=environment)
    assert made.returncode == 0, made.stderr
    assert float(made.stdout) == pytest.approx(model(X).double().sum().item(), abs=1e-5)


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_runs(name, model, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(LEVELS, name, replace(LEVELS[name], gains=None))
    replace(model, code=native_code.compiled_for_levels(model.graph, [name])).save(tmp_path / "a.tw")
    if name not in HERE:
        pytest.skip("this machine compiles it, and does not run it")
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    loaded = tilewright.load(tmp_path / "a.tw")
    assert list(loaded.code.binaries) == [name]
    assert len(loaded.program.kernels) == len(model.program.kernels) and not loaded.program.fallbacks
    close(loaded(X), model)


def test_the_best_level(monkeypatch):
    def found(features, widest=64):
        monkeypatch.setattr(levels, "_features", lambda: features)
        monkeypatch.setattr(levels, "detect_target", lambda: replace(LEVELS["x86-64-v2"].target, vector_bytes=widest))
        return [level.name.removeprefix("x86-64-") for level in levels.levels_here()]

    assert found(frozenset()) == [] and found(levels.V2) == ["v2"] and found(levels.V3) == ["v3", "v2"]
    assert found(levels.V3 - {"fma"}) == ["v2"]
    assert found(levels.V4 | {"avx512_vnni"}) == ["v4-vnni", "v4", "v3", "v2"]
    assert found(levels.V4, widest=32) == ["v3", "v2"], "as torch is told to"


def test_products_of_bytes_have_a_level_of_their_own():
    vnni = LEVELS["x86-64-v4-vnni"]
    assert vnni.serves(["const auto right = byte_panels<4>(8, place);"]) and not vnni.serves(["product(...)"])


def test_code_of_others(foreign, model, monkeypatch):
    built = []
    monkeypatch.setattr(native_code, "build_program", lambda graph: built.append(graph) or model.program)
    monkeypatch.setattr(native_code, "prebuilt_for_cpu", None)
    close(tilewright.load(foreign)(X), model)
    assert len(built) == 1


def test_ones_own_code_is_run(path, model, monkeypatch):
    monkeypatch.setattr(native_code, "build_program", None)
    close(tilewright.load(path)(X), model)


@pytest.mark.skipif(not HERE, reason="this machine runs none of the levels")
def test_code_of_others_without_a_compiler(foreign, model, monkeypatch, no_compiler):
    words = f"holds code for {HERE[0].removesuffix('-vnni')} that you did not compile, and a C.. compiler, which .* is not installed; pass"
    with pytest.raises(CodeNotTrusted, match=words) as caught:
        tilewright.load(foreign)
    assert "\n" not in str(caught.value)
    close(tilewright.load(foreign, trust_code=True)(X), model)


def test_a_machine_that_runs_none_of_it(foreign, model, monkeypatch):
    monkeypatch.setattr(prebuilt, "levels_here", list)
    built = []
    monkeypatch.setattr(native_code, "build_program", lambda graph: built.append(graph) or model.program)
    close(tilewright.load(foreign, trust_code=True)(X), model)
    assert len(built) == 1


@pytest.mark.skipif(not HERE, reason="this machine runs none of the levels")
def test_code_of_another_version(foreign, model, monkeypatch, no_compiler):
    monkeypatch.setattr(build, "_headers_digest", lambda: "another")
    with pytest.raises(
        BadArtifact, match="some of its kernels cannot be run from their code .*there is no code for it.*optimize the model again"
    ):
        tilewright.load(foreign, trust_code=True)
    monkeypatch.setattr(native_code, "compiler_available", lambda: True)
    monkeypatch.setattr(native_code, "build_program", lambda graph: model.program)
    with pytest.warns(RuntimeWarning, match="are compiled here, because some of them cannot be run from their code"):
        close(tilewright.load(foreign, trust_code=True)(X), model)


@pytest.mark.skipif(not HERE, reason="this machine runs none of the levels")
def test_libraries_in_the_cache(foreign, model, tmp_path, monkeypatch, no_compiler):
    loaded = tilewright.load(foreign, trust_code=True)
    directory = tmp_path / "cache" / "compiled"
    image = loaded.code.binaries[prebuilt.best(loaded.code)].image
    library = directory / f"{hashlib.sha256(image).hexdigest()}.so"
    assert [library] == list(directory.iterdir()) and library.read_bytes() == image
    assert directory.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o077 == 0
    library.write_bytes(b"damaged")
    libraries._library.cache_clear()
    close(tilewright.load(foreign, trust_code=True)(X), model)
    assert library.read_bytes() == image, "verified before it is loaded, and written again"


def test_built_twice(model, tmp_path, monkeypatch):
    """In two directories, by as many processes as there are cores: the same bytes, and no path in them."""
    images = []
    for name, count in (("first", 1), ("second/deeper", 4)):
        monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / name))
        monkeypatch.setattr(libraries, "cores", lambda count=count: count)
        images.append(native_code.compiled_for_levels(model.graph, LEVELS))
    assert images[0] == images[1] and len(images[0].binaries) == 3
    for library in images[0].binaries.values():
        assert str(tmp_path).encode() not in library.image and b"libgomp" not in library.image
    first, second = tmp_path / "a.tw", tmp_path / "b.tw"
    model.save(first)
    model.save(second)
    assert first.read_bytes() == second.read_bytes()


def test_models_optimized_twice(path, tmp_path):
    torch.manual_seed(0)
    tilewright.optimize(Mlp(), (X,), tuning_seconds=0).save(tmp_path / "b.tw")
    first, second = contents(path), contents(tmp_path / "b.tw")
    assert first == second, "all but the receipt, which has times"


def test_what_cannot_be_compiled_is_stored_without_code(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "_run", lambda command, scratch: "no such option")
    with pytest.warns(RuntimeWarning, match="is stored without code, and compiled where it is loaded: .*no such option"):
        model.save(tmp_path / "a.tw")
    monkeypatch.undo()
    loaded = tilewright.load(tmp_path / "a.tw")
    assert loaded.code is None
    close(loaded(X), model)


def test_levels_of_the_command_line(tmp_path, capsys, monkeypatch):
    assert native_code.levels_from("v2, v4") == ("x86-64-v2", "x86-64-v4", "x86-64-v4-vnni") and native_code.levels_from("none") == ()
    with pytest.raises(BadOption):
        native_code.levels_from("")
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    program = save_program(tmp_path / "m.pt2", Mlp(), (X,))
    assert run(program, "-o", tmp_path / "m.tw", "--tune", 0, "--levels", "v3") == 0
    assert list(tilewright.load(tmp_path / "m.tw").code.binaries) == ["x86-64-v3"]
    capsys.readouterr()
    assert run(program, "-o", tmp_path / "m.tw", "--levels", "v5") == 2
    assert sentence(capsys) == "--levels: there is no level 'v5'; give some of v2, v3, v4, or none"
