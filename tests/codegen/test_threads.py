"""Threads of kernels: as many as torch has, in this process, in several Python threads at once, and in forked workers."""

import os
import subprocess
import sys

import pytest
import torch
from support import NATIVE
from tilewright.codegen import threads as module
from tilewright.codegen.threads import threads

FORKS = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forked workers are of Linux")


def test_the_number_of_threads_is_torchs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert threads() == before + 1
    finally:
        torch.set_num_threads(before)


WORKER = """
import os, torch, tilewright
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
step = torch.compile(lambda x: torch.softmax(x * 2, -1), backend="tilewright")
x = torch.arange(4096.0 * 64).reshape(4096, 64) % 7
want = torch.softmax(x * 2, -1)
torch.testing.assert_close(step(x), want)  # the threads of the parent are there now

class Steps(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        torch.set_num_threads(2)  # a worker starts with one
        return (step(x) - want).abs().max(), torch.get_num_threads()

for difference, count in DataLoader(Steps(), num_workers=2, multiprocessing_context="fork"):
    assert difference < 1e-6 and count == 2

child = os.fork()
if child == 0:
    close = torch.allclose(step(x), want) and torch.allclose((x @ x.T)[0], (x @ x[0]))  # our loops and torch's
    os._exit(0 if close else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
torch.testing.assert_close(step(x), want)  # the parent goes on
print("fine")
"""


@NATIVE
@FORKS
def test_forked_workers_run_compiled_models():
    result = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=240)
    assert result.stdout.strip() == "fine", result.stderr


@FORKS
@pytest.mark.parametrize("stayed", [False, True])
def test_a_child_whose_parent_keeps_its_threads_has_one(stayed, monkeypatch):
    monkeypatch.setattr(module, "gnu_openmp", lambda: ["/nowhere/libgomp.so"] if stayed else [])
    module._send_home()
    child = os.fork()
    if child == 0:
        os._exit(threads())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (1 if stayed else torch.get_num_threads())
    assert threads() == torch.get_num_threads()
