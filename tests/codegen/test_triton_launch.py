"""Launches: binaries, words, grids, streams, scratch and errors, by a driver library that stands for a GPU, and on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import NATIVE, in_threads, on_gpu

pytest.importorskip("triton")

import tilewright
from fake_driver import CONTEXT, STREAM, FakeGpu
from test_program import ANY_S, S, assert_same, fused, t
from tilewright.codegen.arena import Arena, PerStream
from tilewright.codegen.build import BuildError
from tilewright.codegen.lower import lower
from tilewright.codegen.program import compile_program
from tilewright.codegen.target import TARGETS, Failed
from tilewright.codegen.triton import native, offline, toolchain
from tilewright.codegen.triton.binary import parameter_sizes, runs_on
from tilewright.codegen.triton.driver import SHARED_BYTES_FREELY, DriverError
from tilewright.codegen.triton.tiles import Tiles
from tilewright.ir.errors import DeviceLost
from tilewright.ir.graph import Stage, graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.retarget import retarget
from tilewright.ir.types import TensorType

pytestmark = NATIVE


@pytest.fixture
def gpu(monkeypatch):
    made = FakeGpu("sm_90")
    made.watch(monkeypatch)
    return made


def chain():
    """Two kernels around a product of the library, over s rows."""
    x, w = graph_input("x", t(S, 8)), graph_input("w", t(8, 8))
    return fused([x, w], [OPS["softmax"](OPS["linear"](OPS["gelu"](x), w), dim=-1)], symbols=ANY_S)


def test_kernels_are_launched_with_their_words(gpu):
    graph = chain()
    program = compile_program(graph, gpu.targets)
    assert [k.name for k in program.kernels] and not program.fallbacks
    for n in (3, 50):
        gpu.launches.clear()
        x, w = torch.randn(n, 8), torch.randn(8, 8)
        assert_same(program, graph, [x, w])
        first, second = gpu.launches
        assert first.words[2:] == (n, 0, 0) == second.words[2:]  # pointers; the size; memory of the compiler's own: none
        assert {one.stream for one in gpu.launches} == {STREAM} and {one.context for one in gpu.launches} == {CONTEXT}
        assert all(one.threads % 32 == 0 and one.grid[1:] == (1, 1) for one in gpu.launches)


def test_grids_follow_sizes(gpu):
    x = graph_input("x", t(S, 64))
    graph = fused([x], [OPS["softmax"](x, dim=-1)], symbols=ANY_S)
    program = compile_program(graph, gpu.targets)
    (call,) = [c for c in program.source.splitlines() if "# calls_0" in c]
    assert call.strip() == "# calls_0: k0_softmax(x_dense, softmax, s)"
    for n in (1, 16, 33):
        assert_same(program, graph, [torch.randn(n, 64)])
    grids = [one.grid[0] for one in gpu.launches]
    block = -(-33 // grids[-1])
    assert grids == [-(-n // block) for n in (1, 16, 33)] or grids == [1, 1, 3]
    gpu.launches.clear()
    assert program([torch.randn(0, 64)])[0].shape == (0, 64)
    assert not gpu.launches, "no programs: nothing is launched"


def test_sizes_that_are_strides_have_code_of_their_own_for_multiples_of_16(gpu):
    x = graph_input("x", t(8, S))
    graph = fused([x], [OPS["softmax"](x, dim=-1)], symbols=ANY_S)
    program = compile_program(graph, gpu.targets)
    assert "(k0_softmax_at if s % 16 else k0_softmax_16_at)" in program.source
    for n in (16, 17, 48, 1):
        assert_same(program, graph, [torch.randn(8, n)])
    first, second, third, fourth = (one.function for one in gpu.launches)
    assert first == third != second == fourth


def test_code_for_any_size_is_enough_where_that_for_multiples_does_not_fit(gpu, monkeypatch):
    compiled = toolchain.compile_binary

    def too_large(program, one, target, multiples=()):
        return replace(compiled(program, one, target, multiples), shared=1 << 30 if multiples else 0)

    monkeypatch.setattr(toolchain, "compile_binary", too_large)
    x = graph_input("x", t(8, S))
    graph = fused([x], [OPS["softmax"](x, dim=-1)], symbols=ANY_S)
    program = compile_program(graph, gpu.targets)
    assert "_16_at" not in program.source and not program.fallbacks
    assert_same(program, graph, [torch.randn(8, 32)])


def test_the_stream_is_asked_for_at_every_call(gpu):
    graph = chain()
    program = compile_program(graph, gpu.targets)
    for stream in (0, 7, STREAM):
        gpu.stream = stream
        program([torch.randn(4, 8), torch.randn(8, 8)])
    assert [one.stream for one in gpu.launches] == [0, 0, 7, 7, STREAM, STREAM]


def test_a_binary_is_loaded_once(gpu):
    graph = chain()
    compile_program(graph, gpu.targets)
    before = gpu.library.fake_modules()
    compile_program(graph, gpu.targets)
    assert before == gpu.library.fake_modules() > 0


def test_threads_launch_at_the_same_time(gpu):
    graph = chain()
    program = compile_program(graph, gpu.targets)
    values = [[torch.randn(n + 1, 8), torch.randn(8, 8)] for n in range(4)]
    in_threads(lambda i: assert_same(program, graph, values[i]))  # none of them has a context of its own
    assert {one.context for one in gpu.launches} == {CONTEXT}


def test_the_chosen_device_stays_chosen(gpu):
    program = compile_program(chain(), gpu.targets)
    elsewhere = 0x1001
    gpu.library.cuCtxSetCurrent(elsewhere)
    try:
        program([torch.randn(4, 8), torch.randn(8, 8)])
        assert {one.context for one in gpu.launches} == {CONTEXT}
        now = ctypes.c_void_p()
        gpu.library.cuCtxGetCurrent(ctypes.byref(now))
        assert now.value == elsewhere
    finally:
        gpu.library.cuCtxSetCurrent(None)


def test_what_does_not_lie_at_16_bytes_is_copied(gpu):
    x = graph_input("x", t(64))
    graph = fused([x], [OPS["exp"](x)])
    program = compile_program(graph, gpu.targets)
    assert program.copies == ("x",)
    values = torch.randn(65)
    for start in (0, 1):
        assert_same(program, graph, [values[start : start + 64]])
    straight, moved = gpu.launches
    assert straight.words[0] % 16 == moved.words[0] % 16 == 0


def test_errors_of_the_driver(gpu):
    program = compile_program(chain(), gpu.targets)
    gpu.library.fake_fail(209)
    message = r"cannot launch k0\w* on device 0 \(sm_90\): CUDA_ERROR_NO_BINARY_FOR_GPU$"
    with pytest.raises(DriverError, match=message):
        program([torch.randn(4, 8), torch.randn(8, 8)])
    assert program([torch.randn(4, 8), torch.randn(8, 8)])[0].shape == (4, 8)
    gpu.library.fake_fail(12345)
    with pytest.raises(DriverError, match="error 12345"):
        program([torch.randn(4, 8), torch.randn(8, 8)])


def test_kernels_of_amd(monkeypatch):
    gpu = FakeGpu("gfx942", shared=65_536, index=2)
    gpu.watch(monkeypatch)
    gpu.library.hipSetDevice(1)
    graph = chain()
    program = compile_program(graph, gpu.targets)
    assert_same(program, graph, [torch.randn(5, 8), torch.randn(8, 8)])
    assert [one.context for one in gpu.launches] == [2, 2] and all(one.threads % 64 == 0 for one in gpu.launches)
    now = ctypes.c_int()
    gpu.library.hipGetDevice(ctypes.byref(now))
    gpu.library.fake_fail(719)
    with pytest.raises(DeviceLost, match=r"cannot launch k0\w* on device 2 \(gfx942\): hipErrorLaunchFailure; this process has lost"):
        program([torch.randn(5, 8), torch.randn(8, 8)])
    gpu.library.hipSetDevice(0)
    assert now.value == 1, "the device that was chosen stays chosen"


def test_a_binary_of_another_target_is_one_sentence(gpu):
    x = graph_input("x", t(4))
    program = toolchain.print_program(lower(make_graph("g", [x], [OPS["exp"](x)]), "k_exp"))
    binary = toolchain.compile_binary(program, program.launches[0], "sm_80")
    with pytest.raises(DriverError, match="it was compiled for sm_80, and device 0 is sm_90; compile it for sm_90"):
        gpu.driver.load(binary)


def test_a_driver_that_refuses_a_binary_leaves_the_region_to_eager(gpu):
    graph = chain()
    gpu.library.fake_fail(209)
    program = compile_program(graph, gpu.targets)
    assert [f.reason.partition(": ")[2] for f in program.fallbacks] == ["CUDA_ERROR_NO_BINARY_FOR_GPU"]
    assert_same(program, graph, [torch.randn(4, 8), torch.randn(8, 8)])


def product(m, n, k):
    """A region that is a product: one kernel of ours."""
    x, w = graph_input("x", t(m, k)), graph_input("w", t(k, n))
    a, b = graph_input("a", t(m, k)), graph_input("b", t(k, n))
    body = make_graph("body", [a, b], [OPS["matmul"](a, b)])
    return make_graph("g", [x, w], [OPS["region"](x, w, body=body)], stage=Stage.FUSED)


def test_launches_of_one_kernel_share_memory(gpu, monkeypatch):
    """The depth of a product in two parts: sums of each in memory of its own, added by a second launch."""
    halves = Tiles(16, 16, 16, split_k=2, num_warps=1, num_stages=1)
    printed = toolchain.print_program
    monkeypatch.setattr(toolchain, "print_program", lambda kernel, schedule=None: printed(kernel, halves))
    graph = product(24, 16, 70)
    program = compile_program(graph, gpu.targets)
    assert_same(program, graph, [torch.randn(24, 70), torch.randn(70, 16)], rtol=1e-4, atol=1e-4)
    first, second = gpu.launches
    assert first.grid[:2] == (2, 2) and second.grid[1:] == (1, 1)
    assert set(first.words[:3]) & set(second.words[:2]), "what the second reads is what the first wrote"
    assert program.source.count("run(calls_") == 1


def test_memory_of_the_compiler(gpu, monkeypatch):
    """A kernel that Triton wants memory for, some bytes for every program of its grid."""
    compiled = toolchain.compile_binary
    monkeypatch.setattr(toolchain, "compile_binary", lambda *parts: replace(compiled(*parts), scratch=48))
    x = graph_input("x", t(S, 64))
    graph = fused([x], [OPS["softmax"](x, dim=-1)], symbols=ANY_S)
    program = compile_program(graph, gpu.targets)
    assert_same(program, graph, [torch.randn(40, 64)])
    (one,) = gpu.launches
    assert one.words[-2] % 16 == 0 and one.words[-2] not in (0, *one.words[:2]) and one.words[-1] == 0
    assert "uint8" in program.source


def test_a_smaller_schedule_is_taken_where_the_device_has_not_enough(gpu, monkeypatch):
    graph, values = product(128, 128, 128), [torch.randn(128, 128), torch.randn(128, 128)]
    compile_program(graph, gpu.targets)(values)
    shared = gpu.launches[0].shared - 1
    small = FakeGpu("sm_90", shared=shared)
    small.watch(monkeypatch)
    program = compile_program(graph, small.targets)
    (kernel,) = program.kernels
    assert f"it takes {shared + 1} bytes of shared memory, and device 0 (sm_90) has {shared} for one program" in kernel.notes[0]
    assert_same(program, graph, values, rtol=1e-4, atol=1e-4)
    assert small.launches[0].shared <= shared


def test_a_kernel_that_no_schedule_fits_runs_by_eager():
    gpu = FakeGpu("sm_80", shared=100)
    graph = product(128, 128, 128)
    program = compile_program(graph, gpu.targets)
    assert not program.kernels and program.fallbacks[0].reason.count("bytes of shared memory") == toolchain.TRIES
    assert_same(program, graph, [torch.randn(128, 128), torch.randn(128, 128)])


def test_more_threads_than_registers_are_for():
    program = compile_program(chain(), FakeGpu("sm_90", threads=16).targets)
    assert "threads per program, and has registers for 16" in program.fallbacks[0].reason


NEEDS = {"profile_scratch_size": (8, "it is instrumented"), "num_ctas": (2, "its programs work together"),
         "tmem_size": (576, "it takes 576 columns of tensor memory, and there are 512")}  # fmt: skip


@pytest.mark.parametrize("need", NEEDS)
def test_what_a_plain_launch_does_not_give(need, monkeypatch):
    value, reason = NEEDS[need]
    compiled = offline.compile_launch

    def needing(*parts):
        made = compiled(*parts)
        about = SimpleNamespace(**{**made.metadata._asdict(), need: value})
        return SimpleNamespace(metadata=about, asm=made.asm)

    monkeypatch.setattr(offline, "compile_launch", needing)
    x = graph_input("x", t(4))
    program = toolchain.print_program(lower(make_graph("g", [x], [OPS["exp"](x)]), "k_exp"))
    with pytest.raises(offline.OfflineError, match=f"cannot compile k_exp for sm_90: {reason}"):
        offline.compile_binary(program, program.launches[0], "sm_90")


def test_shared_memory_is_asked_for(gpu):
    graph = product(256, 256, 256)
    program = compile_program(graph, gpu.targets)
    assert_same(program, graph, [torch.randn(256, 256), torch.randn(256, 256)], rtol=1e-4, atol=1e-4)
    (one,) = gpu.launches
    assert one.shared <= SHARED_BYTES_FREELY or gpu.library.fake_allowed_shared() == one.shared


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_a_device_triton_launches(device):
    x = graph_input("x", t(4))
    (compiled,) = toolchain.compile_kernels([lower(make_graph("g", [x], [OPS["exp"](x)]), "k_exp")], device)
    assert compiled.native is None or torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_block_of_unknown_length(device, gpu, monkeypatch):
    """What must lie in one block, which some s would not fit, is not for a GPU. The interpreter tries."""
    printed = toolchain.print_program
    monkeypatch.setattr(toolchain, "print_program", lambda kernel, schedule=None: replace(printed(kernel), whole=((S, 64),)))
    x = graph_input("x", t(S, 8))
    kernel = lower(make_graph("g", [x], [OPS["sum"](x, dims=(0,))], symbols=ANY_S), "k_sum")
    for driver in (None, gpu.driver):
        (made,) = toolchain.compile_kernels([kernel], device, driver)
        refused = isinstance(made, Failed) and made.reason == "an inner extent of s must fit one block, and is not known"
        assert refused == (device != "cpu" or driver is not None)


def test_without_a_compiler_triton_launches(gpu, monkeypatch):
    monkeypatch.setattr(native, "build", lambda sources, level: [BuildError(function=s.name, reason="none") for s in sources])
    graph = chain()
    program = compile_program(graph, gpu.targets)
    assert_same(program, graph, [torch.randn(4, 8), torch.randn(8, 8)])
    assert not gpu.launches and not program.fallbacks


def test_arenas_belong_to_streams():
    now, capturing = [1], [False]
    free = PerStream([lambda: now[0]], lambda: capturing[0])
    first = Arena("cpu")
    free().append(first)
    now[0] = 2
    assert free() == []
    now[0] = 1
    assert free() == [first]
    capturing[0] = True
    free().append(Arena("cpu"))
    assert free() == []


@pytest.mark.parametrize(
    "target, device, right",
    [("sm_80", "sm_80", True), ("sm_80", "sm_86", True), ("sm_80", "sm_90", False), ("sm_86", "sm_80", False), ("sm_90", "sm_90", True),
     ("sm_100", "sm_103", False), ("gfx942", "gfx942", True), ("gfx942", "gfx90a", False), ("sm_90", "gfx942", False)],
)  # fmt: skip
def test_what_runs_where(target, device, right):
    assert runs_on(target, device) is right


def test_parameters_are_read_from_assembly():
    ptx = """.visible .entry softmax(
	.param .u64 .ptr .global .align 1 softmax_param_0,
	.param .u32 softmax_param_1,
	.param .b64 softmax_param_2
)"""
    assert parameter_sizes(ptx) == (8, 4, 8)
    with pytest.raises(ValueError, match="cannot be read"):
        parameter_sizes(ptx.replace(".u32", ".align 64 .b8"))
    with pytest.raises(ValueError, match="cannot be read"):
        parameter_sizes("; nothing")


def encoder():
    """Norm, attention, a product of ours or the library's, residuals: what a model is made of."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.qkv, self.out = torch.nn.LayerNorm(32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
            self.mlp = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))

        def forward(self, x):
            heads = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            x = x + self.out(torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.mlp(x)

    return Block().eval()


def check_model(device):
    torch._dynamo.reset()
    model = encoder().to(device)
    compiled = torch.compile(model, backend="tilewright")
    for rows in (5, 9):
        x = torch.randn(2, rows, 32, device=device)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for ours, theirs in zip(torch.autograd.grad(compiled(x).square().sum(), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_model_and_its_gradients(gpu, monkeypatch):
    monkeypatch.setitem(TARGETS, "cpu", gpu.targets["cpu"])
    check_model("cpu")
    assert len({one.name for one in gpu.launches}) > 5


def exponential(device):
    x = graph_input("x", TensorType(torch.float32, (S, 8), device))
    graph = fused([x], [OPS["exp"](x)], symbols=ANY_S)
    program = compile_program(graph)
    assert program.kernels and not program.fallbacks and "stream_" in program.source, "by our launches, not by Triton's"
    return program


@on_gpu
def test_a_model_on_a_gpu():
    check_model("cuda")


@on_gpu
def test_streams_and_threads_on_a_gpu():
    program = exponential("cuda:0")
    x = torch.randn(50, 8, device="cuda:0")
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                torch.testing.assert_close(program([x + i])[0], (x + i).exp())

    in_threads(work)
    torch.testing.assert_close(program([x[1:].reshape(-1)[1:-7].view(48, 8)])[0], x[1:].reshape(-1)[1:-7].view(48, 8).exp())


@on_gpu
def test_a_graph_of_cuda_replays_the_launches():
    program = exponential("cuda:0")
    x = torch.randn(50, 8, device="cuda:0")
    program([x])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = program([x])
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, x.exp())


@on_gpu
def test_memory_on_a_gpu_is_torchs():
    """Outputs and the arena come from the caching allocator, and go back to it; what a call takes on the way is used again."""
    graph = retarget(chain(), "cuda:0")
    program = compile_program(graph)
    values = [torch.randn(4096, 8, device="cuda:0"), torch.randn(8, 8, device="cuda:0")]
    program(values)
    torch.cuda.synchronize()
    before, blocks = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    (out,) = program(values)
    assert torch.cuda.memory_allocated() - before == out.nbytes
    at = out.data_ptr()
    del out
    assert torch.cuda.memory_allocated() == before
    (again,) = program(values)
    assert again.data_ptr() == at and torch.cuda.memory_stats()["allocation.all.allocated"] - blocks <= 8
    torch.testing.assert_close(again, (torch.nn.functional.gelu(values[0]) @ values[1].T).softmax(-1), rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_outputs_on_a_gpu_have_eagers_strides(mode, fresh_dynamo):
    def outputs(x):
        y = x.exp()
        return y.t(), y.permute(1, 0).contiguous(), (x + 1).unflatten(0, (2, 4)).transpose(0, 1) * 2, y[1:, ::2].sin()

    compiled = torch.compile(outputs, backend="tilewright", mode=mode)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(8, 6, device="cuda")
            for ours, theirs in zip(compiled(x), outputs(x), strict=True):
                assert ours.stride() == theirs.stride()
                torch.testing.assert_close(ours, theirs)


@on_gpu
def test_sizes_on_a_gpu_compile_once(fresh_dynamo):
    compiled = torch.compile(lambda x: torch.nn.functional.layer_norm(x.relu(), x.shape[1:]).sum(0), backend="tilewright", dynamic=True)
    start = len(tilewright.receipts())
    for rows, columns in ((5, 40), (64, 48), (3, 100), (1000, 7)):
        x = torch.randn(rows, columns, device="cuda")
        torch.testing.assert_close(compiled(x), torch.nn.functional.layer_norm(x.relu(), x.shape[1:]).sum(0), rtol=1e-4, atol=1e-3)
    assert len(tilewright.receipts()) == start + 1


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    programs = {device: exponential(device) for device in ("cuda:0", "cuda:1")}
    for chosen in (0, 1):
        with torch.cuda.device(chosen):
            for device, program in programs.items():
                x = torch.randn(50, 8, device=device)
                torch.testing.assert_close(program([x])[0], x.exp())
            assert torch.cuda.current_device() == chosen
