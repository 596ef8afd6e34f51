"""Memory: weights exist in one form at a time, and what is needed no more is freed at once."""

import gc
from functools import partial

import pytest
import torch
from support import NATIVE
from tilewright.driver.compile import compile_graph
from tilewright.ir.graph import Data, constants
from tilewright.ir.text import parse
from tilewright.passes import weights
from torch.multiprocessing.reductions import StorageWeakRef

pytestmark = NATIVE

LAYERS = 4
LAYER = """
  n{i} = layer_norm(h{i}, g{i}, axes=1, eps=1e-05)
  q{i} = linear(n{i}, wq{i})
  k{i} = linear(n{i}, wk{i})
  s{i} = mul(q{i}, k{i})
  v{i} = linear(s{i}, wv{i})
  h{j} = add(h{i}, v{i})"""


def model():
    """Layers in which two weights take a norm's scale, are merged and packed, and one is packed."""
    names = {"g": (64,), "wq": (96, 64), "wk": (96, 64), "wv": (64, 96)}
    values = {f"{name}{i}": torch.randn(shape) for i in range(LAYERS) for name, shape in names.items()}
    given = "".join(f'\n  {name} = constant "{name}"' for name in values)
    layers = "".join(LAYER.format(i=i, j=i + 1) for i in range(LAYERS))
    return parse(f"graph g(h0: f32[32, 64]) {{{given}{layers}\n  return h{LAYERS}\n}}", values)


@pytest.fixture
def uncollected():
    """Python looks for no cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(storages):
    return sum(not s.expired() for s in storages)


def test_a_weight_exists_in_one_form_at_a_time(monkeypatch, uncollected):
    made, counts = [], []
    real = weights.memory

    def counted(shape, dtype, device):
        result = real(shape, dtype, device)
        made.append(StorageWeakRef(result.untyped_storage()))
        counts.append(alive(made))
        return result

    monkeypatch.setattr(weights, "memory", counted)
    compiled = compile_graph(model())
    kept = [d for name, d in constants(compiled.graph).items() if name.endswith(".panels")]
    assert (len(kept), alive(made), len(made)) == (2 * LAYERS, 2 * LAYERS, 5 * LAYERS)
    assert max(counts) == 2 * LAYERS + 2, "those that are kept, and of the last layer two that are scaled and one that is merged"


def test_a_program_that_is_dropped_frees_its_weights_at_once(uncollected):
    compiled = compile_graph(model())
    compiled.program([torch.randn(32, 64)])
    storages = [StorageWeakRef(d.value.untyped_storage()) for name, d in constants(compiled.graph).items() if name.endswith(".panels")]
    assert alive(storages) == 2 * LAYERS
    del compiled
    assert not alive(storages)


def test_what_is_never_read_is_never_computed(uncollected):
    source = torch.ones(4)
    data = Data("w", make=partial(torch.mul, source, 2))
    assert data.known and not Data("v").known
    storage = StorageWeakRef(source.untyped_storage())
    del source
    assert torch.equal(data.value, torch.full((4,), 2.0)) and data.value is data.value
    assert storage.expired(), "what it was computed from is let go of"


def test_large_weights_have_pages_of_their_own():
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        large = weights.memory((weights.LARGE // 64, 64), dtype, "cpu")
        assert large.shape == (weights.LARGE // 64, 64) and large.dtype == dtype and large.is_contiguous()
        large.fill_(1)
        assert large.all() and large.data_ptr() % 4096 == 0
    assert weights.memory((0, 3), torch.float32, "cpu").shape == (0, 3) and weights.memory((), torch.float32, "cpu").shape == ()
