"""The artifact: runs alone in a new process, and is never executed, whatever was done to the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tilewright
import torch
from offline import Mlp, Tokens
from safetensors import safe_open
from safetensors.torch import save_file
from tilewright.driver import artifact, measure
from tilewright.driver.errors import BadArtifact, CannotWrite
from tilewright.driver.trust import unsafe_in_graph
from tilewright.ir.text import parse

X = torch.linspace(-2, 2, 24).reshape(3, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    measure.MEASURE_SECONDS, before = 0.01, measure.MEASURE_SECONDS
    made = tilewright.optimize(Mlp(), (X,))
    measure.MEASURE_SECONDS = before
    return made


@pytest.fixture
def path(model, tmp_path):
    model.save(tmp_path / "a.tw")
    return tmp_path / "a.tw"


def changed(path, **members):
    """The artifact with other members, and their sums made right: what a forger would do."""
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    manifest = json.loads(metadata["tilewright"]) | members.pop("manifest", {})
    manifest["sha256"] |= {k: artifact._digest(v) for k, v in members.items()} | {"manifest": artifact._manifest_digest(manifest)}
    save_file(tensors, path, metadata=metadata | members | {"tilewright": json.dumps(manifest)})
    return path


def member(path, name="graph"):
    return artifact.member(path, name)


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("transformers", "offline"), name
sys.meta_path.insert(0, Blocked())
import torch, tilewright
x = torch.linspace(-2, 2, 24).reshape(3, 8)
print(tilewright.load(sys.argv[1])(x).double().sum().item())
"""


def test_a_new_process_without_the_source(path, model):
    made = subprocess.run([sys.executable, "-I", "-c", ALONE, str(path)], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert float(made.stdout) == pytest.approx(model(X).double().sum().item(), abs=1e-6)


def test_one_file_and_no_pickle(path, model):
    assert os.listdir(path.parent) == [path.name]
    loaded = tilewright.load(path)
    assert torch.equal(loaded(X), model(X)) and loaded.receipt == model.receipt and str(loaded.graph) == str(model.graph)


def test_tied_weights_are_stored_once(tmp_path):
    made = tilewright.optimize(Tokens(), (torch.tensor([[1, 2]]),))
    made.save(tmp_path / "a.tw")
    with safe_open(str(tmp_path / "a.tw"), framework="pt") as file:
        assert len([name for name in file.keys() if not name.startswith("binary ")]) == 1  # noqa: SIM118


def test_weights_are_mapped_not_copied(path):
    values = [d.value for d in artifact.constants(tilewright.load(path).graph).values() if d.value is not None]
    assert values
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert all(any(int(a, 16) <= v.data_ptr() < int(b, 16) for a, b in ranges) for v in values)


def refused(path, words):
    with pytest.raises(BadArtifact, match=words) as caught:
        tilewright.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "at, words",
    [
        ("weights", "weight .* does not match"),
        ("code", "binary x86-64-v4 does not match"),
        ("graph", "graph does not match"),
        ("header", "damaged or no artifact"),
    ],
)
def test_flipped_bits(path, at, words):
    data = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    where = {"weights": first, "code": len(data) - 5, "graph": data.index(b"= region("), "header": 3}[at]
    data[where] ^= 1
    path.write_bytes(data)
    refused(path, words)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_cut_short(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "damaged or no artifact")


def test_other_files(path):
    refused(path.parent / "none.tw", "no such file")
    refused(path.parent, "no such file")
    save_file({"x": X}, path)
    refused(path, "not one that tilewright wrote")
    path.write_text("hello")
    refused(path, "no artifact at all")


def test_newer_formats(path):
    refused(changed(path, manifest={"format": 99}), "format 99, this version reads 1; a newer tilewright wrote it")
    refused(changed(path, manifest={"format": "x"}), "format 'x'")


@pytest.mark.parametrize("convention", [{}, {"names": 3}, {"names": [], "arguments": [], "tensors": [7], "outputs": [], "state": []}])
def test_forged_conventions(path, convention):
    refused(changed(path, manifest={"convention": convention}), "damaged or no artifact")


def test_forged_graphs(path):
    refused(changed(path, graph="graph g() {"), "line")
    refused(changed(path, graph="graph g(x: f32[3, 8]) {\n  y = nope(x) : f32[3, 8]\n  return y\n}"), "no op named 'nope'")


EXTERN = "graph g(x: f32[3, 8]) {{\n  y = extern[{}](x) : f32[3, 8]\n  return y\n}}"


@pytest.mark.parametrize(
    "target, words",
    [
        ("aten.from_file.default", "aten.from_file.default, which reaches files"),
        ("aten.save.default", "reaches files"),
        ("image.read_file.default", r"not torch's own.*operators=\('image',\)"),
        ("aten", "damaged|does not"),
    ],
)
def test_operators_that_reach_beyond_tensors(path, target, words):
    refused(changed(path, graph=EXTERN.format(target)), words)


def test_custom_operators_are_allowed_by_name(path):
    graph = parse(EXTERN.format("mine.op.default"))
    assert unsafe_in_graph(graph) and unsafe_in_graph(graph, ("mine",)) is None
    assert unsafe_in_graph(parse(EXTERN.format("debugprims.load_tensor.default")), ("debugprims",))


@pytest.mark.parametrize("injected", [r"gelu\nextern int evil;", r"gelu\r__import__('os')", "gelu */ (evil)", "x\u2028y"])
def test_words_that_would_leave_their_comment(path, injected):
    text = member(path)
    assert 'label="' in text
    at = text.index('label="') + 7
    refused(changed(path, graph=f"{text[:at]}{injected}{text[at:]}"), "which tilewright never writes")


def test_source_lines_that_would_leave_their_comment(path):
    text = member(path)
    at = text.index("= region(")
    end = text.index("#", at) + 1
    forged = f'{text[:end]} source="a.py:1\\n#error evil\\\\" {text[end:]}'
    source = tilewright.load(changed(path, graph=forged)).program.source
    assert all(line.lstrip().startswith(("//", "#   ")) for line in source.splitlines() if "evil" in line)


def test_failed_writes_leave_nothing(model, tmp_path, monkeypatch):
    with pytest.raises(CannotWrite, match="it is a directory"):
        model.save(tmp_path)
    with pytest.raises(CannotWrite, match="No such file"):
        model.save(tmp_path / "no" / "a.tw")

    def interrupted(*args, **options):
        Path(args[1]).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "a.tw")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(model, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CannotWrite, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_wrong_calls(path):
    loaded = tilewright.load(path)
    for call, words in [
        (lambda: loaded(), "argument 'x' is missing"),
        (lambda: loaded(X, X), "takes 1 arguments"),
        (lambda: loaded(y=X), "no argument 'y'; its arguments are x"),
        (lambda: loaded(X[:, :7]), r"argument 'x' must be f32\[3, 8\], not f32\[3, 7\]"),
        (lambda: loaded(X.double()), r"not f64\[3, 8\]"),
        (lambda: loaded(3), "not a int"),
    ]:
        with pytest.raises(TypeError, match=words):
            call()


class Positive(torch.nn.Module):
    def forward(self, x):
        torch._assert_async((x > 0).all(), "x must be positive")
        return x.sqrt()


def test_assertions_of_the_model_are_kept(tmp_path):
    made = tilewright.optimize(Positive(), (X.abs() + 1,))
    made.save(tmp_path / "a.tw")
    for model in (made, tilewright.load(tmp_path / "a.tw")):
        assert torch.equal(model(X.abs() + 1), (X.abs() + 1).sqrt())
        with pytest.raises(RuntimeError, match="x must be positive"):
            model(X)
