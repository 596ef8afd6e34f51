"""Threads of kernels: as many as torch has, in this process, in several Python threads at once, and in forked workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tilewright
import torch
from support import NATIVE, in_threads
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


class Mixed(torch.nn.Module):
    """A kernel of each family: packed products, attention, a recurrence, a window, a softmax over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)
        self.mix = torch.nn.Conv1d(64, 64, 3, padding=1, groups=64)
        self.layer = torch.nn.LSTM(64, 48, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2)) + x
        return self.layer(self.mix(y.transpose(1, 2)).transpose(1, 2))[0].softmax(-1)


def mixed(dynamic: bool = False):
    """The model, and compiled with its weights packed."""
    torch.manual_seed(0)
    model = Mixed().eval().requires_grad_(False)
    return model, torch.compile(model, backend="tilewright", dynamic=dynamic, options={"freeze": True})


@NATIVE
def test_two_threads_call_one_compiled_model(fresh_dynamo):
    model, run = mixed(dynamic=True)
    inputs = [torch.randn(b, s, 64) for b, s in ((3, 40), (2, 97), (5, 33), (4, 64))]
    want = [model(x) for x in inputs]
    for x, y in zip(inputs, want):
        torch.testing.assert_close(run(x), y, rtol=1e-4, atol=1e-5)
    receipt = tilewright.receipts()[-1]
    labels = " ".join(k.label for k in receipt.kernels)
    assert not receipt.fallbacks and all(op in labels for op in ("linear", "attention", "lstm_layer", "softmax"))

    def work(i: int) -> None:
        alone = run(inputs[i])
        for _ in range(40):
            assert torch.equal(run(inputs[i]), alone)

    in_threads(work)
    made = len(tilewright.receipts())
    in_threads(lambda i: torch.testing.assert_close(run(inputs[0]), want[0], rtol=1e-4, atol=1e-5))
    assert len(tilewright.receipts()) == made


WORKER = """
import os, torch, tilewright
from test_threads import mixed
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
model, step = mixed()
x = torch.randn(8, 96, 64)
want = model(x)
torch.testing.assert_close(step(x), want)  # the threads of the parent are there now

class Steps(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        torch.set_num_threads(2)  # a worker starts with one
        return (step(x) - want).abs().max(), torch.get_num_threads()

for difference, count in DataLoader(Steps(), num_workers=2, multiprocessing_context="fork"):
    assert difference < 1e-5 and count == 2

child = os.fork()
if child == 0:
    close = torch.allclose(step(x), want, atol=1e-5) and torch.allclose(model(x), want, atol=1e-5)  # our loops and torch's
    os._exit(0 if close else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
torch.testing.assert_close(step(x), want)  # the parent goes on
print("fine")
"""


@NATIVE
@FORKS
def test_forked_workers_run_compiled_models():
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, (str(here), str(here.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=240, env=environment)
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
