"""The device model: measured once, plausible, remembered."""

from __future__ import annotations

import os

import pytest
import torch
from tilewright.search import device as module
from tilewright.search.device import Device, cache_sizes, identity, this_device


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(module, "GEMM_SIZE", 64)
    monkeypatch.setattr(module, "SECONDS", 0.001)
    module._device.cache_clear()
    yield tmp_path
    module._device.cache_clear()


def test_it_is_measured_once(quick, monkeypatch) -> None:
    first = this_device()
    assert min(first.read, first.copy, *first.gemm.values()) > 0
    assert first.cores >= 1 and first.threads == torch.get_num_threads() and identity() == first.name
    module._device.cache_clear()
    monkeypatch.setattr(module, "measure", lambda: pytest.fail("measured again"))
    assert this_device() == first


def test_a_damaged_file_is_measured_again(quick) -> None:
    first = this_device()
    for text in ("{", "[]", '{"name": 1}'):
        (path,) = quick.glob("device-*.json")
        path.write_text(text)
        module._device.cache_clear()
        assert isinstance(this_device(), Device) and this_device().name == first.name


@pytest.mark.skipif(not os.path.isdir("/sys/devices/system/cpu/cpu0/cache"), reason="the system does not tell its caches")
def test_caches_grow() -> None:
    sizes = cache_sizes()
    assert list(sizes) == sorted(sizes) and sizes[0] >= 8 << 10


def test_other_threads_are_another_device() -> None:
    before, count = identity(), torch.get_num_threads()
    torch.set_num_threads(count + 1)
    try:
        assert identity() != before
    finally:
        torch.set_num_threads(count)
