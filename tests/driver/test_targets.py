"""Artifacts for a GPU that is not here: what is written, what is refused, and how they are loaded where one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tilewright
import torch
from offline import Running, run, sentence
from safetensors import safe_open
from safetensors.torch import save_file
from support import NATIVE, on_gpu
from torch import nn

pytest.importorskip("triton")

from fake_driver import FakeGpu, built
from tilewright.codegen.program import CompiledElsewhere, devices_of
from tilewright.codegen.triton import offline as compiler
from tilewright.codegen.triton.driver import Facts
from tilewright.driver import artifact, native_code
from tilewright.driver.errors import BadArtifact, CannotOptimize, CodeNotTrusted, WrongMachine
from tilewright.driver.targets import require_portable
from tilewright.ir.text import parse

pytestmark = NATIVE
HERE = Path(__file__).parent


class Block(nn.Module):
    """Norm, attention, residuals, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def made(block):
    return tilewright.optimize(block, (torch.randn(2, 5, 32),), dynamic={"x": {0: "batch"}}, target="sm_90", tuning_seconds=0)


@pytest.fixture
def path(made, tmp_path):
    made.save(tmp_path / "block.tw")
    return tmp_path / "block.tw"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU: what is on it lies in memory of the CPU."""
    found = FakeGpu("sm_90")
    found.watch(monkeypatch)
    monkeypatch.setattr(artifact, "machine_for", lambda path, target: native_code.Machine("cpu", found.driver))
    return found


def test_the_receipt(made):
    receipt = made.receipt
    assert receipt.target == "sm_90" and receipt.summary.startswith("for sm_90; ")
    assert receipt.kernels and not receipt.fallbacks
    assert all(k.usage and k.usage.registers > 0 and k.usage.spills == 0 for k in receipt.kernels)
    assert receipt.speed is None and receipt.error is not None and receipt.error.ok
    assert [line.split()[0] for line in receipt.unmeasured] == ["speed,", "error"]
    assert type(receipt).from_json(receipt.to_json()) == receipt and not receipt.seconds


def test_the_graph_is_on_the_device_and_the_weights_are_here(made):
    assert devices_of(made.graph) == ["cuda:0"]
    assert all(data.value.device.type == "cpu" for data in artifact.constants(made.graph).values())
    with pytest.raises(CompiledElsewhere, match="compiled for another machine: save it, and load it there"):
        made(torch.randn(2, 5, 32))


def test_a_machine_with_a_gpu_compiles_nothing(path, block, made, gpu, monkeypatch):
    monkeypatch.setattr(compiler, "compile_launch", None)
    loaded = tilewright.load(path, trust_code=True)
    assert [k.name for k in loaded.program.kernels] == [k.name for k in made.receipt.kernels] and not loaded.program.fallbacks
    for batch in (1, 3):
        x = torch.randn(batch, 5, 32)
        torch.testing.assert_close(loaded(x), block(x).detach(), rtol=1e-4, atol=1e-5)
    assert len(gpu.launches) >= 2 * len(made.receipt.kernels)
    loaded.save(path.with_name("again.tw"))
    assert tilewright.load(path.with_name("again.tw")).code == made.code


ALONE = """
import ctypes, sys
sys.modules["triton"] = None
import tilewright
from tilewright.codegen.triton.driver import FUNCTIONS, Driver, Facts
from tilewright.driver import artifact, native_code
driver = Driver(FUNCTIONS["cuda"], ctypes.CDLL(sys.argv[2]), 0, Facts("sm_90", 232_448), lambda: 0)
artifact.machine_for = lambda path, target: native_code.Machine("cpu", driver)
print(len(tilewright.load(sys.argv[1], trust_code=True).program.kernels))
"""


def test_triton_need_not_be_there(path, made, tmp_path):
    command = [sys.executable, "-c", ALONE, str(path), str(built(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{len(made.receipt.kernels)}\n", done.stderr


def test_buffers_of_the_model(gpu, tmp_path):
    x = torch.randn(3, 8)
    tilewright.optimize(Running(), (x,), target="sm_90").save(tmp_path / "a.tw")
    loaded, model = tilewright.load(tmp_path / "a.tw"), Running()
    for _ in range(3):
        for ours, eager in zip(loaded(x), model(x)):
            torch.testing.assert_close(ours, eager)
    assert gpu.launches


# -- whose code it is


@pytest.fixture
def foreign(path, tmp_path, monkeypatch):
    """The artifact, on the machine of somebody else."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    return path


def test_code_of_others_is_compiled_anew(foreign, gpu, monkeypatch, made):
    built = []
    monkeypatch.setattr(native_code, "build_program", lambda graph: built.append(graph))
    with pytest.warns(RuntimeWarning, match="are compiled here, because its code was not compiled by you"):
        tilewright.load(foreign)
    assert len(built) == 1 and devices_of(built[0]) == ["cpu"], "the graph, on the device of this machine"
    native_code.remember(made.code)
    assert tilewright.load(foreign).program.kernels and len(built) == 1, "what one compiled oneself is run"


def test_code_of_others_without_triton(foreign, gpu, monkeypatch):
    monkeypatch.setattr(native_code, "find_spec", lambda name: None)
    with pytest.raises(CodeNotTrusted, match="that you did not compile, and Triton.* is not installed; pass trust_code=True only if"):
        tilewright.load(foreign)
    assert tilewright.load(foreign, trust_code=True).program.kernels


def test_code_of_another_version(path, gpu, monkeypatch):
    from tilewright.codegen.triton import prebuilt

    printed = prebuilt.build
    monkeypatch.setattr(prebuilt, "build", lambda kernel, schedule: replace(made := printed(kernel, schedule), source=made.source + "\n"))
    built = []
    monkeypatch.setattr(native_code, "build_program", lambda graph: built.append(graph))
    with pytest.warns(RuntimeWarning, match="there is no code for it among that for sm_90"):
        tilewright.load(path)
    assert built
    monkeypatch.setattr(native_code, "find_spec", lambda name: None)
    refused(path, "some of its kernels cannot be run from their code .*optimize the model again with this version")


# -- the wrong machine, and damaged files


def refused(path, words, kind=BadArtifact):
    with pytest.raises(kind, match=words) as caught:
        tilewright.load(path, trust_code=True)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu(path, made):
    words = r"block.tw was compiled for sm_90 \(NVIDIA\), and this machine has no GPU .* or optimize again for the CPU, without --target"
    refused(path, words, WrongMachine)
    replace(made, code=None).save(path)
    refused(path, "was compiled for a GPU, and this machine has no GPU", WrongMachine)


@pytest.mark.parametrize(
    "here, advice", [("sm_80", "with --target sm_80"), ("gfx942", "with --target gfx942"), ("sm_75", "on this machine")]
)
def test_another_gpu(path, monkeypatch, here, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(native_code, "driver_of", lambda index: SimpleNamespace(index=index, facts=Facts(here, 1 << 16)))
    refused(path, rf"compiled for sm_90 \(NVIDIA\), and the GPU of this machine is {here}; optimize again {advice}$", WrongMachine)


def parts_of(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def test_damaged_code(path, gpu):
    metadata, tensors = parts_of(path)
    name = next(n for n in tensors if n.startswith("binary "))
    spoilt = tensors[name].clone()
    spoilt[100] ^= 1
    save_file(tensors | {name: spoilt}, path, metadata=metadata)
    refused(path, f"its {name} does not match the recorded sha256")
    manifest = json.loads(metadata["tilewright"])
    manifest["code"]["binaries"][name.split()[1]]["threads"] *= 2
    save_file(tensors, path, metadata=metadata | {"tilewright": json.dumps(manifest)})
    refused(path, f"its {name} does not match the recorded sha256")
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    refused(path, "damaged")


# -- the command line


def test_the_same_model_gives_the_same_file(tmp_path, monkeypatch, capsys):
    """In two processes at two places, with orders of sets of their own, the second with nothing compiled before."""
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run("offline:with_inputs", "--target", "sm_90", "--tune", "4", "-o", "a.tw") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "for sm_90, error" in said and "not measured speed, and that it is not slower than eager" in said
    assert "run it on a machine with sm_90 with tilewright.load('a.tw', trust_code=True)" in said
    arguments = ["offline:with_inputs", "--target", "sm_90", "--tune", "4", "-o", "../b.tw"]
    command = [sys.executable, "-m", "tilewright.driver.cli", "optimize", *arguments]
    environment = {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]), "PYTHONHASHSEED": "7"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TILEWRIGHT_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, cwd=elsewhere, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
    assert Path("a.tw").read_bytes() == Path("b.tw").read_bytes()
    assert b"site-packages" not in Path("a.tw").read_bytes()
    assert run("a.tw", command="explain") == 0
    assert "registers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words", [("sm_12", "there is no target 'sm_12'; known targets are sm_80, sm_90, gfx942"), ("", "no target ''")]
)
def test_unknown_targets(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    assert run("offline:with_inputs", "--target", name) == 2
    assert words in sentence(capsys) and not os.listdir()


@pytest.mark.parametrize("version, found", [(None, "it is not installed"), ("3.5.1", "this is 3.5.1")])
def test_without_a_triton_that_compiles(tmp_path, monkeypatch, capsys, version, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))
    assert run("offline:with_inputs", "--target", "sm_90") == 2
    assert sentence(capsys) == f"cannot compile for sm_90: it takes Triton 3.6 or later, and {found}; pip install triton"
    assert not os.listdir()


def test_what_only_a_cpu_can():
    call = 'extern[mkldnn._linear_pointwise.default](x, args=[$0, $0, none, "none", [], none])'
    graph = parse(f"graph g(x: f32[8, 8]) {{\n  y = {call} : f32[8, 8]\n  return y\n}}")
    with pytest.raises(CannotOptimize, match="m for sm_90: torch runs mkldnn._linear_pointwise.default, which is part of it, on CPUs only"):
        require_portable("m", graph, "sm_90")
    with pytest.raises(CannotOptimize, match="it is on cuda:0; with a target, models are read on the CPU"):
        require_portable("m", parse("graph g(x: f32[8]@cuda:0) {\n  return x\n}"), "sm_90")


@on_gpu
def test_on_a_gpu(block, tmp_path):
    here = native_code.driver_of(torch.cuda.current_device()).facts.architecture
    if here not in native_code.SHARED_BYTES:
        pytest.skip(f"{here} is no target")
    tilewright.optimize(block, (torch.randn(2, 5, 32),), target=here).save(tmp_path / "a.tw")
    loaded = tilewright.load(tmp_path / "a.tw", trust_code=True)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(loaded(x.cuda()).cpu(), block(x).detach(), rtol=1e-3, atol=1e-4)
