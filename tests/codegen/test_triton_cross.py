"""Kernels compiled for a GPU that is not here, and run from their binaries by a driver library that stands for one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import NATIVE

pytest.importorskip("triton")

from fake_driver import FakeGpu
from test_program import assert_same
from test_triton_launch import chain, product
from tilewright.codegen.code import Code
from tilewright.codegen.program import CompiledElsewhere, compile_program, list_program
from tilewright.codegen.triton import offline, prebuilt
from tilewright.codegen.triton.binary import SHARED_BYTES
from tilewright.codegen.triton.cross import cross_target

pytestmark = NATIVE


def crossed(graph, target="sm_90"):
    binaries = {}
    listing = list_program(graph, {"cpu": cross_target(target, binaries)})
    return listing, Code(target, binaries)


def run_from(graph, code, gpu):
    return compile_program(graph, {"cpu": prebuilt.prebuilt(code, gpu.driver)})


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_compiled_here_and_run_there(target, monkeypatch):
    graph = chain()
    listing, code = crossed(graph, target)
    assert len(listing.kernels) == len(code.binaries) == 2 and not listing.fallbacks
    assert all(k.usage and k.usage.registers > 0 and k.usage.spills == 0 for k in listing.kernels)
    assert {b.target for b in code.binaries.values()} == {target}
    with pytest.raises(CompiledElsewhere, match="g was compiled for another machine: save it, and load it there"):
        listing.run([])
    gpu = FakeGpu(target)
    gpu.watch(monkeypatch)
    monkeypatch.setattr(offline, "compile_launch", None)  # nothing is compiled again
    program = run_from(graph, code, gpu)
    assert_same(program, graph, [torch.randn(5, 8), torch.randn(8, 8)])
    assert len(gpu.launches) == 2


def test_a_smaller_schedule_is_found_again(monkeypatch):
    graph, values = product(128, 128, 128), [torch.randn(128, 128), torch.randn(128, 128)]
    listing, _ = crossed(graph)
    shared = listing.kernels[0].usage.shared - 1
    monkeypatch.setitem(SHARED_BYTES, "sm_90", shared)
    listing, code = crossed(graph)
    (kernel,) = listing.kernels
    assert f"it takes {shared + 1} bytes of shared memory, and sm_90 has {shared} for one program" in kernel.notes[0]
    assert kernel.usage.shared <= shared
    gpu = FakeGpu("sm_90", shared=shared)
    gpu.watch(monkeypatch)
    assert_same(run_from(graph, code, gpu), graph, values, rtol=1e-4, atol=1e-4)
    assert gpu.launches[0].shared <= shared
    monkeypatch.setitem(SHARED_BYTES, "sm_90", 100)
    listing, code = crossed(graph)
    assert not listing.kernels and not code.binaries and listing.fallbacks[0].reason.count("sm_90 has 100") == 4


def test_what_was_printed_otherwise_is_not_found(monkeypatch):
    graph = chain()
    _, code = crossed(graph)
    printed = prebuilt.build
    monkeypatch.setattr(prebuilt, "build", lambda kernel, schedule: replace(made := printed(kernel, schedule), source=made.source + "\n"))
    program = run_from(graph, code, FakeGpu("sm_90"))
    assert [f.reason for f in program.fallbacks] == ["there is no code for it among that for sm_90"] * 2
    assert_same(program, graph, [torch.randn(5, 8), torch.randn(8, 8)])


def test_another_device():
    graph = chain()
    _, code = crossed(graph, "sm_80")
    program = run_from(graph, code, FakeGpu("sm_90"))
    assert "compiled for sm_80, and device 0 is sm_90" in program.fallbacks[0].reason
    assert run_from(graph, code, FakeGpu("sm_86")).kernels, "newer, and of the same generation"


def test_without_a_compiler_nothing_is_run_from_binaries(monkeypatch):
    graph = chain()
    _, code = crossed(graph)
    monkeypatch.setattr(prebuilt, "routines", lambda: None)
    program = run_from(graph, code, FakeGpu("sm_90"))
    assert "no C++ compiler" in program.fallbacks[0].reason
    assert_same(program, graph, [torch.randn(5, 8), torch.randn(8, 8)])
