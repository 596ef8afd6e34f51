"""GPUs as data: the table holds what code generation knows of targets, and what is measured goes over it."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from tilewright.codegen.triton.binary import SHARED_BYTES
from tilewright.search import gpus
from tilewright.search.gpus import GPUS, Gpu, measured, of_target


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_every_target_has_a_gpu(target: str) -> None:
    gpu = of_target(target)
    assert gpu.target == target and SHARED_BYTES[target] <= gpu.shared
    assert min(gpu.bandwidth, gpu.cache_bandwidth, gpu.plain, *gpu.rates.values()) > 1e12 and gpu.cache_bandwidth > gpu.bandwidth


def test_the_registers_are_those_that_schedules_are_made_for() -> None:
    from tilewright.codegen.triton.tiles import UNITS

    for gpu in GPUS:
        unit = UNITS[gpu.target]
        assert (gpu.registers, gpu.lanes) == (unit.file, unit.lanes)


def test_one_that_is_not_known() -> None:
    with pytest.raises(KeyError):
        of_target("sm_12")


def test_it_survives_being_written() -> None:
    for gpu in GPUS:
        assert Gpu.from_json(json.dumps(asdict(gpu))) == gpu


def test_measured_rates_replace_those_of_the_table(monkeypatch) -> None:
    monkeypatch.setattr(gpus, "STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(gpus, "GEMM_SIZE", 32)
    ticks = iter(range(10_000))
    gpu = measured(of_target("sm_90"), torch.device("cpu"), lambda: next(ticks) * 1e-3)  # every run takes a millisecond
    assert gpu.bandwidth == pytest.approx(2 * 2**16 / 1e-3)
    assert gpu.rates["bfloat16"] == pytest.approx(2 * 32**3 / 1e-3) and gpu.rates["int8"] == of_target("sm_90").rates["int8"]


@pytest.fixture
def described(monkeypatch):
    """A GPU that torch says this of."""
    about = {"name": "NVIDIA H200", "multi_processor_count": 130, "total_memory": 141 << 30, "L2_cache_size": 60 << 20}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**about))
    return about


def test_what_torch_says_goes_over_the_table(described) -> None:
    gpu = gpus._described(0, "sm_90", gpus.gpu_name(0))
    assert gpu.name == "NVIDIA H200, 130 processors, 141 GiB" and gpu.processors == 130 and gpu.cache == 60 << 20
    assert gpu.bandwidth == 4.8e12 and gpu.shared == of_target("sm_90").shared, "of what it does not say, the table's"


def test_a_gpu_that_is_in_no_table_is_like_one_of_its_target(described) -> None:
    described["name"] = "NVIDIA GH200"
    assert gpus._described(0, "sm_90", "x").bandwidth == of_target("sm_90").bandwidth
    assert gpus._described(0, "sm_75", "x").processors == 130
