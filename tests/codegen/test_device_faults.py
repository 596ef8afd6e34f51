"""A GPU that is lost, and a Triton that cannot compile: one sentence, nothing tried again that cannot help, nothing remembered wrongly."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from support import NATIVE

pytest.importorskip("triton")

from fake_driver import FakeGpu
from test_program import assert_same
from test_triton_launch import chain, product
from tilewright.codegen.lower import lower
from tilewright.codegen.program import compile_program
from tilewright.codegen.target import TARGETS, Failed
from tilewright.codegen.triton import toolchain
from tilewright.codegen.triton.binary import OfflineError
from tilewright.driver.compile import build_program
from tilewright.driver.receipt import Receipt, make_receipt
from tilewright.driver.replay import Replayed
from tilewright.ir.errors import FATAL, DeviceLost, is_lost
from tilewright.ir.graph import graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.types import TensorType
from tilewright.passes.base import Notes
from tilewright.search.database import Database, Key
from tilewright.search.tuner import remembered

pytestmark = NATIVE


@pytest.fixture
def gpu(monkeypatch):
    made = FakeGpu("sm_90")
    made.watch(monkeypatch)
    return made


def values():
    return [torch.randn(4, 8), torch.randn(8, 8)]


ILLEGAL = (
    r"CUDA_ERROR_ILLEGAL_ADDRESS \(an illegal memory access was encountered\); this process has lost the device, by that or by what ran "
)


@pytest.mark.parametrize("code", sorted(FATAL))
def test_a_launch_that_loses_the_device_is_one_sentence(gpu, code):
    program = compile_program(chain(), gpu.targets)
    gpu.library.fake_fail(code)
    reason = ILLEGAL if code == 700 else r"\S.*; this process has lost the device"
    with pytest.raises(DeviceLost, match=r"^cannot launch k0\w* on device 0 \(sm_90\): " + reason) as caught:
        program(values())
    assert "\n" not in str(caught.value) and not gpu.launches, "nothing more is launched"


def test_no_other_schedule_is_tried_on_a_lost_device(gpu):
    """Each fails but once here: what is tried again would work."""
    graph = product(128, 128, 128)
    loaded = gpu.library.fake_modules()
    for code in (700, 719):
        gpu.library.fake_fail(code)
        with pytest.raises(DeviceLost, match=r"^cannot load k0\w* on device 0 \(sm_90\): "):
            compile_program(graph, gpu.targets)
        assert gpu.library.fake_modules() == loaded
    program = compile_program(graph, gpu.targets)  # what was compiled before is whole
    assert not program.kernels[0].notes
    assert_same(program, graph, [torch.randn(128, 128), torch.randn(128, 128)], rtol=1e-4, atol=1e-4)


def test_who_compiles_a_model_sees_it(gpu, monkeypatch, fresh_dynamo):
    monkeypatch.setitem(TARGETS, "cpu", gpu.targets["cpu"])
    compiled = torch.compile(torch.nn.Softmax(-1), backend="tilewright")
    gpu.library.fake_fail(700)
    with pytest.raises(Exception, match="DeviceLost: cannot load .* " + ILLEGAL):
        compiled(torch.randn(3, 8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), x.softmax(-1))


def lost(message="CUDA error: an illegal memory access was encountered"):
    """As torch raises it."""
    error = torch.AcceleratorError(message)
    error.error_code = 700
    return error


@pytest.mark.parametrize("error", [lost(), DeviceLost(action="run", reason="it broke")], ids=["torch's", "ours"])
def test_no_time_of_a_lost_device_is_remembered(tmp_path, error):
    def breaks():
        raise error

    key, database = Key.here("kernel", "shapes"), Database(tmp_path / "tuning.sqlite")
    with pytest.raises(type(error)):
        remembered(key, database, lambda: {"a": lambda: None, "b": breaks}, "a", ("a", "b"))
    assert not database.get(key)
    assert remembered(key, database, lambda: {"a": lambda: None, "b": lambda: 1 / 0}, "a", ("a", "b")).failed, (
        "any other error is one of it"
    )


def test_a_lost_device_is_no_reason_to_run_without_recording():
    def record(*_):
        raise lost()

    called = Replayed(lambda inputs: list(inputs), [], 1, SimpleNamespace(record=record, idle=lambda: True))
    called([torch.randn(3)])
    with pytest.raises(torch.AcceleratorError):
        called([torch.randn(3)])


def test_what_loses_a_device():
    assert is_lost(lost()) and not is_lost(RuntimeError("CUDA out of memory"))
    unsupported = lost()
    unsupported.error_code = 900  # while a stream is captured: the device goes on
    assert not is_lost(unsupported)


# -- what cannot be compiled


def test_a_kernel_that_triton_does_not_compile_has_the_next_schedule(gpu, monkeypatch):
    compiled = toolchain.compile_binary

    def pipelined_fails(program, one, target, multiples=()):
        if program.schedule.num_stages > 1:
            raise OfflineError(kernel=one.function, target=target, reason="RuntimeError: PassManager::run failed")
        return compiled(program, one, target, multiples)

    monkeypatch.setattr(toolchain, "compile_binary", pipelined_fails)
    monkeypatch.setitem(TARGETS, "cpu", gpu.targets["cpu"])
    program = build_program(product(128, 128, 128))
    receipt = make_receipt(program, Notes(), {})
    (kernel,) = Receipt.from_json(receipt.to_json()).kernels
    (note,) = kernel.notes
    assert note.startswith("Tiles(block_m=") and note.endswith("for sm_90: RuntimeError: PassManager::run failed")
    assert not receipt.fallbacks


def test_one_that_it_never_compiles_runs_by_eager(gpu, monkeypatch):
    def fails(program, one, target, multiples=()):
        raise OfflineError(kernel=one.function, target=target, reason="RuntimeError: PassManager::run failed")

    monkeypatch.setattr(toolchain, "compile_binary", fails)
    graph = chain()
    program = compile_program(graph, gpu.targets)
    assert len(program.fallbacks) == 2 and all("PassManager::run failed" in f.reason for f in program.fallbacks)
    assert_same(program, graph, values())


@pytest.mark.parametrize(
    ("version", "found"), [(None, "it is not installed"), ("3.5.1", "this is 3.5.1"), ("2.0.0+rocm", "this is 2.0.0+rocm")]
)
def test_without_a_triton_that_compiles(monkeypatch, version, found):
    x = graph_input("x", TensorType(torch.float32, (4,), "cuda:0"))
    kernel = lower(make_graph("g", [x], [OPS["exp"](x)]), "k_exp")
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))
    (made,) = TARGETS["cuda"].compile([kernel], "cuda:0")
    assert isinstance(made, Failed) and made.reason.startswith("it takes Triton 3.6 or later, and ")
    assert made.reason.endswith(f"and {found}; pip install triton")
