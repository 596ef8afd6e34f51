"""Memory of large results: tensors that own blocks of the pool behave as torch's own, and blocks come back, wherever they die."""

import copy
import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from support import NATIVE, in_threads
from tilewright.codegen import pool as module
from tilewright.codegen.build import BuildError, build
from tilewright.codegen.pool import LEAST, START, Pool, allocator, empty
from tilewright.ir.dims import contiguous_strides

pytestmark = NATIVE
MB = 1 << 20
ROWS = (2048, 256)


@pytest.fixture
def pool():
    """The pool of this process, with 64 MiB to keep and nothing kept yet."""
    gc.collect()
    found = allocator(build([START])[0])
    assert isinstance(found, Pool)
    found.allow(0)
    found.allow(64 * MB)
    yield found
    found.allow(0)


def floats(pool, *shape):
    return pool(shape, contiguous_strides(shape), torch.float32)


@pytest.mark.parametrize("dtype", module._KINDS, ids=str)
def test_a_tensor_is_as_torch_makes_it(pool, dtype):
    shape, strides = (3, 1, LEAST // 2, 1), (LEAST // 2, LEAST // 2, 1, 1)
    got, want = pool(shape, strides, dtype), empty(shape, strides, dtype)
    for tensor in (got, want):
        tensor.fill_(3)
    assert torch.equal(got, want)
    assert (got.stride(), got.storage_offset(), got.is_contiguous()) == (want.stride(), 0, True)
    assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
    assert got.data_ptr() % 64 == 0 and not got._is_view() and got.is_leaf
    assert pool.used >= got.nbytes


@pytest.mark.parametrize("shape", [(), (0, LEAST), (LEAST // 4 - 1,), (LEAST // 4, *(1,) * module.MAX_RANK)], ids=str)
def test_small_empty_and_deep_tensors_are_torchs(pool, shape):
    before = pool.used
    assert floats(pool, *shape).untyped_storage().resizable() and pool.used == before


def test_a_dtype_without_a_kind_is_torchs(pool):
    assert pool((LEAST,), (1,), torch.float8_e5m2).untyped_storage().resizable()


def test_inference_mode_makes_inference_tensors(pool):
    with torch.inference_mode():
        assert floats(pool, *ROWS).is_inference()
    assert not floats(pool, *ROWS).is_inference()


def test_a_block_is_used_again(pool):
    tensor = floats(pool, *ROWS)
    at, size = tensor.data_ptr(), pool.used
    del tensor
    assert pool.idle == 2 * MB and pool.used == size - 2 * MB
    assert floats(pool, 2000, 256).data_ptr() == at  # an eighth of slack
    again = floats(pool, *ROWS)
    assert again.data_ptr() == at and pool.idle == 0
    assert floats(pool, *ROWS).data_ptr() != at


HOLDERS = {
    "view": lambda t: t[5:, 1:].t(),
    "storage": lambda t: t.untyped_storage(),
    "array": lambda t: t.numpy()[3:],
    "memoryview": lambda t: memoryview(t.numpy()),
    "dlpack": lambda t: np.from_dlpack(t),
    "detached": lambda t: t.detach(),
    "bytes": lambda t: t.view(torch.uint8),
    "autograd": lambda t: (torch.ones(ROWS, requires_grad=True) * t).grad_fn,
    "set": lambda t: torch.empty(0).set_(t.untyped_storage(), 8, (4,), (1,)),
    "closure": lambda t: lambda: t,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_block_lives_as_long_as_anything_that_reads_it(pool, hold):
    before = pool.used
    tensor = floats(pool, *ROWS).fill_(7)
    holder = hold(tensor)
    del tensor
    gc.collect()
    assert pool.used == before + 2 * MB and pool.idle == 0
    if isinstance(holder, (torch.Tensor, np.ndarray)) and getattr(holder, "dtype", None) in (torch.float32, np.float32):
        assert (holder == 7).all()
    del holder
    gc.collect()
    assert pool.used == before and pool.idle == 2 * MB


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


COPIES = {"save": saved, "pickle": lambda t: pickle.loads(pickle.dumps(t)), "deepcopy": copy.deepcopy, "clone": torch.clone}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_torchs_own(pool, copied):
    tensor = floats(pool, *ROWS).copy_(torch.arange(ROWS[0] * ROWS[1]).view(ROWS))
    got = copied(tensor)
    assert torch.equal(got, tensor) and got.untyped_storage().nbytes() == 2 * MB and got.data_ptr() != tensor.data_ptr()


def test_shared_memory_takes_the_place_of_the_block(pool):
    before = pool.used
    tensor = floats(pool, *ROWS).fill_(5)
    view = tensor[1:]
    tensor.share_memory_()
    assert tensor.is_shared() and (view == 5).all()
    assert pool.used == before and pool.idle == 2 * MB


def test_a_queue_of_another_process_takes_it(pool):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    queue.put(floats(pool, *ROWS).fill_(3))
    assert (queue.get(timeout=60) == 3).all()


def test_resizing_within_the_block_works_and_growing_says_so(pool):
    tensor = floats(pool, *ROWS).fill_(2)
    assert (tensor.resize_(100, 100) == 2).all()
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(4096, 256)
    assert tensor.untyped_storage().nbytes() == 2 * MB
    tensor.set_(torch.ones(3))
    assert pool.idle == 2 * MB


def test_a_capsule_that_nobody_takes_gives_its_block_back(pool):
    before = pool.used
    capsule = pool._take(*module._request(ROWS, torch.float32))
    assert pool.used == before + 2 * MB
    del capsule
    assert pool.used == before and pool.idle == 2 * MB


def test_memory_that_there_is_not_is_torchs_error(pool):
    before = pool.used
    with pytest.raises(RuntimeError, match="memory"):
        pool((1 << 50,), (1,), torch.float64)
    assert pool.used == before


# -- what may lie idle


def test_idle_blocks_are_bounded(pool):
    pool.allow(5 * MB)
    tensors = [floats(pool, *ROWS) for _ in range(4)]
    last = tensors[-1].data_ptr()
    while tensors:
        tensors.pop(0)
    assert pool.idle == 4 * MB
    assert floats(pool, *ROWS).data_ptr() == last
    large = floats(pool, 8192, 256)
    del large
    assert pool.idle == 4 * MB  # it would not fit, and does not push out what does
    pool.allow(1 * MB)
    assert pool.idle == 0


def test_blocks_together_are_never_more_than_those_in_use_were():
    script = """
import torch
from tilewright.codegen.build import build
from tilewright.codegen.pool import START, allocator
pool = allocator(build([START])[0])
pool.allow(1 << 30)
most = 0
for n in range(20, 60, 3):  # sizes that do not fit each other
    tensor = pool((n, 1 << 18), (1 << 18, 1), torch.float32)
    most = max(most, pool.used)
    assert pool.used == tensor.nbytes and pool.used + pool.idle <= most, (n, pool.used, pool.idle)
    del tensor
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_process_keeps_a_small_part_of_its_memory(pool):
    allocator(build([START])[0])
    bound = pool._state[module._MOST_IDLE]
    assert 8 * MB < bound <= 256 * MB and bound <= module._peak() // 10


# -- threads, processes, the end


def test_blocks_may_die_in_another_thread(pool):
    before = pool.used
    held = [floats(pool, *ROWS)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert pool.used == before and pool.idle == 2 * MB


def test_threads_that_allocate_write_pass_on_and_free(pool):
    """No block is ever in two hands: each tensor is filled with a number of its own and looked at before it dies."""
    before = pool.used
    shared, lock = [], threading.Lock()

    def work(seed):
        choose = random.Random(seed)
        mine = []
        for step in range(150):
            number = seed * 1000 + step
            mine.append((number, floats(pool, choose.randrange(1024, 2400), 256).fill_(number)))
            with lock:
                if shared and choose.random() < 0.5:
                    mine.append(shared.pop(choose.randrange(len(shared))))
                if choose.random() < 0.5:
                    shared.append(mine.pop())
            while len(mine) > choose.randrange(1, 6):
                expected, tensor = mine.pop(choose.randrange(len(mine)))
                assert tensor[0, 0] == expected and tensor[-1, -1] == expected and bool((tensor[::64] == expected).all())

    in_threads(work)
    shared.clear()
    gc.collect()
    assert pool.used == before and pool.idle <= 64 * MB


def test_who_cannot_have_the_lock_does_without(pool):
    held = floats(pool, *ROWS)
    del held
    before = pool.used
    pool._state[module._LOCKED] = 1  # as a child finds it that was forked while another thread had it
    try:
        tensor = floats(pool, *ROWS).fill_(1)
        assert pool.used == before + 2 * MB and pool.idle == 2 * MB
        del tensor
        assert pool.used == before and pool.idle == 2 * MB
    finally:
        pool._state[module._LOCKED] = 0


ENDS = """
import os, sys, threading
import torch
from tilewright.codegen import pool as module
from tilewright.codegen.build import build
pool = module.allocator(build([module.START])[0])
pool.allow(1 << 28)
make = lambda: pool((1024, 1024), (1024, 1), torch.float32).fill_(1)
kept, idle = make(), make()
del idle
"""
FORK = """
pool._state[module._LOCKED] = 1
child = os.fork()
if not child:
    for _ in range(3):
        assert make().sum() == 1 << 20
    del kept
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and kept.sum() == 1 << 20
"""
CHILD = """
at = make().data_ptr()
child = os.fork()
if not child:
    mine = make()
    same = mine.data_ptr() == at
    mine.fill_(9)
    os._exit(0 if same and kept.sum() == 1 << 20 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert make().data_ptr() == at
"""
HELD = """
torch.held = kept                                  # dies with the module, late
sys.held = kept[3:].numpy()
class Late:
    def __del__(self): self.tensor = None
late = Late(); late.tensor = make(); late.itself = late
del pool, module, build
"""
DAEMON = """
filled = threading.Event()
def work():
    mine = make()
    filled.set()
    threading.Event().wait()
threading.Thread(target=work, daemon=True).start()
filled.wait()
"""


@pytest.mark.parametrize("script", [FORK, CHILD, HELD, DAEMON], ids=["fork, locked", "fork", "held to the end", "daemon thread"])
def test_ends(script):
    if script in (FORK, CHILD) and (not hasattr(os, "fork") or sys.platform == "darwin"):
        pytest.skip("forked workers are of Linux")
    result = subprocess.run([sys.executable, "-c", ENDS + script], timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- compiled models


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(1024))

    def forward(self, x):
        return (x * self.scale).softmax(-1), torch.tanh(x) + self.scale


def test_outputs_of_a_compiled_model_outlive_it(pool):
    torch.manual_seed(0)
    model = Wide()
    x = torch.randn(600, 1024)
    with torch.no_grad():
        compiled = torch.compile(model, backend="tilewright")
        before = pool.used
        first, second = compiled(x)
        assert pool.used >= before + first.nbytes + second.nbytes
        want = model(x)
        compiled(2 * x)  # in other memory
        del compiled
        torch._dynamo.reset()
        gc.collect()
        torch.testing.assert_close((first, second), want)
        del first, second
        assert pool.used == before


def test_training_and_sizes_that_change(pool):
    torch.manual_seed(0)
    model = Wide()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="tilewright", dynamic=True)
    for rows in (600, 640, 300, 3, 700):
        x = torch.randn(rows, 1024)
        for run, who in ((model, model), (compiled, other)):
            who.zero_grad()
            first, second = run(x)
            assert first.requires_grad and not first.is_leaf
            (first * second).square().sum().backward()
        torch.testing.assert_close(other.scale.grad, model.scale.grad, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_memory_is_torchs():
    assert allocator(BuildError(function="start_pool", reason="there is no C++ compiler")) is empty
