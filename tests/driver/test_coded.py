"""Weights stored as codes: every bit of every value comes back, files get smaller, and codes that do not decode are refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tilewright
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offline import run, save_program
from safetensors import safe_open
from safetensors.torch import save_file
from tilewright.driver import artifact, measure
from tilewright.driver.coded import WORTH, code, compressed, decode, restored
from tilewright.driver.errors import BadArtifact

WIDE = {torch.bfloat16: np.dtype(np.uint16), torch.float32: np.dtype(np.uint32)}


def normal(*shape):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def through(bits, dtype=torch.bfloat16):
    return decode(code(bits), len(bits), WIDE[dtype])


@pytest.mark.parametrize("dtype", list(WIDE))
def test_all_65536_patterns(dtype):
    """NaN with any bits, infinities, -0.0 and denormals among them."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.random.default_rng(0).shuffle(bits)
    assert (through(bits, dtype) == bits.astype(WIDE[dtype]) << (8 * WIDE[dtype].itemsize - 16)).all()


@pytest.mark.parametrize("count", [0, 1, 2, 65535, 65536, 65537, 200_000])
def test_one_exponent_only(count):
    bits = np.full(count, 0x3F80, np.uint16)
    assert (through(bits) == bits).all()
    made = compressed(torch.full((count,), 1.0, dtype=torch.bfloat16))
    assert (made is None) == (count < 60) or made.nbytes < 0.6 * 2 * count


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), max_size=300))
def test_any_bits(values):
    bits = np.array(values, np.uint16)
    assert (through(bits) == bits).all() and (through(bits, torch.float32) >> 16 == bits).all()


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.6635), (torch.float32, 0.3318)])
def test_normal_weights_take_two_thirds(dtype, share):
    """The entropy of their exponents is 2.547 bits, and that of the bytes 65.9 %."""
    x = normal(500, 2000).to(dtype)
    made = compressed(x)
    assert made is not None and made.dtype == torch.uint8 and 0.659 * 2 * x.numel() < made.nbytes < share * x.nbytes
    again = restored(made, dtype, x.shape)
    assert again.dtype == dtype and again.shape == x.shape and torch.equal(again.view(torch.int16), x.view(torch.int16))


def test_what_is_not_coded():
    noise = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
    assert compressed(noise) is None and WORTH < 1  # every exponent as often
    others = (torch.randn(1000), normal(1000).half(), torch.ones(1000, dtype=torch.int16), torch.ones(1000, dtype=torch.float64))
    assert [compressed(x) for x in (*others, normal(0), normal(1).reshape(()), torch.tensor(2.0))] == [None] * 7


def test_codes_that_do_not_decode():
    made = compressed(normal(1000))
    assert made is not None
    for data in (made[:999], made[:-1], made[:1100], torch.cat([made, made[:1]]), made[:0], torch.full_like(made, 255)):
        with pytest.raises(ValueError, match="its codes"):
            restored(data, torch.bfloat16, (1000,))
    for count in (999, 1001, 0, 1 << 40):
        with pytest.raises(ValueError, match="its codes"):
            restored(made, torch.bfloat16, (count,))
    for dtype, shape in ((torch.float16, (1000,)), (torch.bfloat16, (-1, -1000)), (torch.bfloat16, (1000.0,)), (torch.bfloat16, ("x",))):
        with pytest.raises(ValueError, match="is no"):
            restored(made, dtype, shape)
    with pytest.raises(ValueError, match="is no code"):
        restored(made.view(-1, 1), torch.bfloat16, (1000,))


def test_a_bomb_unpacks_to_no_more_than_was_said():
    """Matches, which the code never has, could make much of little."""
    import zlib

    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(1 << 26)) + coder.flush()
    with pytest.raises(ValueError, match="its codes are not those of 100 values"):
        restored(torch.frombuffer(bytearray(100) + bomb, dtype=torch.uint8), torch.bfloat16, (100,))


# -- in artifacts


class Net(torch.nn.Module):
    """In bfloat16, with a weight that is used twice, and one in float32 as read from bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 64, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(64, 100, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.table.weight
        self.wide = torch.nn.Parameter(normal(64, 64).float())
        self.count = torch.nn.Buffer(torch.zeros(1, dtype=torch.bfloat16))

    def forward(self, ids):
        self.count.add_(1)
        h = self.table(ids)
        return self.head(h), h.float() @ self.wide


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    measure.MEASURE_SECONDS, before = 0.01, measure.MEASURE_SECONDS
    made = tilewright.optimize(Net().eval(), (IDS,), tuning_seconds=0)
    measure.MEASURE_SECONDS = before
    return made


IDS = torch.arange(12).reshape(3, 4)


@pytest.fixture
def path(model, tmp_path):
    model.save(tmp_path / "a.tw", (), compress=True)
    return tmp_path / "a.tw"


def weights(made):
    return {name: d.value for name, d in artifact.constants(made.graph).items()}


def test_a_compressed_artifact_is_the_same_model(model, path):
    model.save(path.parent / "plain.tw", ())
    loaded, plain = tilewright.load(path), tilewright.load(path.parent / "plain.tw")
    for name, value in weights(plain).items():
        assert torch.equal(weights(loaded)[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    before = {name: value.clone() for name, value in model.state.items()}
    for a, b in zip(loaded(IDS), model(IDS), strict=True):
        assert torch.equal(a, b)
    for name, value in before.items():
        model.state[name].copy_(value)
    with safe_open(str(path), framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert sum(sizes.values()) < 0.55 * sum(v.nbytes for v in weights(model).values())
    assert artifact.contents(path) == artifact.contents(path.parent / "plain.tw"), "`tilewright diff` finds no difference"


def test_equal_files(model, path):
    model.save(path.parent / "again.tw", (), compress=True)
    assert (path.parent / "again.tw").read_bytes() == path.read_bytes()


def refused(path, words):
    with pytest.raises(BadArtifact, match=words) as caught:
        tilewright.load(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_anywhere_in_codes(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in range(start, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 4
        path.write_bytes(changed)
        refused(path, "does not match the recorded sha256")


def forged(path, tensor=lambda data: data, **about):
    """The first weight that is coded, with other bytes and other things said of it; sums are right."""
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    manifest = json.loads(metadata["tilewright"])
    name = next(iter(manifest["coded"]))
    tensors[name] = tensor(tensors[name]).contiguous()
    manifest["coded"][name] |= about
    manifest["sha256"][f"weight {name}"] = artifact._tensor_digest(tensors[name])
    manifest["sha256"]["manifest"] = artifact._manifest_digest(manifest)
    save_file(tensors, path, metadata=metadata | {"tilewright": json.dumps(manifest)})


@pytest.mark.parametrize(
    "tensor", [lambda x: x[:-1], lambda x: x[:10], lambda x: x[:0], lambda x: x.flip(0), lambda x: x[None], lambda x: x.view(torch.int8)]
)
def test_forged_codes(path, tensor):
    forged(path, tensor)
    refused(path, "it is damaged or no artifact at all")


@pytest.mark.parametrize(
    "about",
    [
        {"shape": [100, 63]},
        {"shape": [1 << 40]},
        {"shape": [-100, -64]},
        {"shape": [1 << 70, 0]},
        {"shape": 3},
        {"shape": None},
        {"dtype": "f16"},
        {"dtype": "x"},
        {"dtype": []},
    ],
)
def test_forged_descriptions(path, about):
    forged(path, **about)
    refused(path, "is not a usable tilewright artifact")


def test_manifests_that_call_other_things_coded(path):
    for coded in ([], 3, {"x": {}}, {"x": {"dtype": "bf16", "shape": [1]}}):
        with safe_open(str(path), framework="pt") as file:
            metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        manifest = json.loads(metadata["tilewright"]) | {"coded": coded}
        manifest["sha256"]["manifest"] = artifact._manifest_digest(manifest)
        save_file(tensors, path, metadata=metadata | {"tilewright": json.dumps(manifest)})
        refused(path, "is not a usable tilewright artifact")


def test_command_line(tmp_path, capsys):
    path = save_program(tmp_path / "net.pt2", torch.nn.Linear(64, 64).bfloat16(), (torch.ones(2, 64, dtype=torch.bfloat16),))
    for name, options in (("a.tw", ["--compress"]), ("b.tw", [])):
        assert run(path, "--tune", 0, "--levels", "none", "-o", tmp_path / name, *options) == 0
    assert os.path.getsize(tmp_path / "a.tw") < os.path.getsize(tmp_path / "b.tw") - 1500
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(tilewright.load(tmp_path / "a.tw")(x), tilewright.load(tmp_path / "b.tw")(x))
