"""Reading models: every kind of file, and files that are damaged or hostile."""

import copy
import dataclasses
import json
import pickle
import re
import shutil
import warnings
import zipfile

import offline
import pytest
import tilewright
import torch
from offline import Mlp, Nested, Running, Tokens, Whole, run, save_program, sentence
from tilewright.driver import loading, measure
from tilewright.driver.errors import BadOption, CannotOptimize, ModelFails, NoInputs, NotAModel, PickleRefused
from tilewright.driver.inputs import Example, parse_inputs
from tilewright.driver.loading import captured_of, export_module, load_model
from tilewright.driver.optimize import optimize_model


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    torch.manual_seed(0)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor | None = None


torch.export.register_dataclass(Pair, serialized_type_name="test_loading.Pair")


class Paired(torch.nn.Module):
    def forward(self, x):
        return Pair(x + 1, None)


def opened(path, *inputs, trust=False):
    return load_model(str(path), parse_inputs(list(inputs)), trust)


def same(optimized, module, *args, **kwargs):
    """The artifact's model gives what the module gives."""
    with torch.no_grad():
        want = module.eval()(*args, **kwargs)
    got = optimized(*args, **kwargs)
    leaves = [torch.utils._pytree.tree_leaves(v) for v in (got, want)]
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a, b) if isinstance(b, torch.Tensor) else None
        assert isinstance(b, torch.Tensor) or a == b
    return got


def round_trip(tmp_path, path, *inputs, **options):
    optimize_model(opened(path, *inputs, **options)).save(tmp_path / "a.tw")
    return tilewright.load(tmp_path / "a.tw")


X = torch.linspace(-2, 2, 24).reshape(3, 8)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])

PROGRAMS = {
    "mlp": (Mlp(), (X,), {}),
    "bf16": (Mlp().bfloat16(), (X.bfloat16(),), {}),
    "empty": (Mlp(), (torch.zeros(0, 8),), {}),
    "tokens": (Tokens(), (IDS,), {"mask": torch.ones(2, 3)}),
    "nested": (Nested(), (X, (X + 1, X * 2)), {"options": {"bias": X}}),
    "whole": (Whole(), (IDS, IDS.flip(0)), {}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(tmp_path, name):
    module, args, kwargs = PROGRAMS[name]
    same(round_trip(tmp_path, save_program(tmp_path / "m.pt2", module, args, kwargs)), module, *args, **kwargs)


def test_results_of_named_classes_become_records(tmp_path):
    optimized = tilewright.optimize(Paired(), (X,))
    optimized.save(tmp_path / "a.tw")
    got = tilewright.load(tmp_path / "a.tw")(X)
    assert torch.equal(got.first, X + 1) and got.second is None and got["second"] is None


def test_results_of_classes_that_are_not_here(tmp_path):
    path = save_program(tmp_path / "m.pt2", Paired(), (X,))
    optimize_model(opened(rewritten(path, tmp_path / "n.pt2", lambda n, d: d.replace(b"test_loading.Pair", b"elsewhere.Pair")))).save(
        tmp_path / "a.tw"
    )
    got = tilewright.load(tmp_path / "a.tw")(X)
    assert torch.equal(got.first, X + 1) and got.second is None


def test_state_goes_on_from_where_it_was(tmp_path):
    module = Running()
    module(X)
    loaded = round_trip(tmp_path, save_program(tmp_path / "m.pt2", module, (X,)))
    assert module.count == 1  # neither exporting nor measuring has run the user's module
    for _ in range(3):
        for a, b in zip(loaded(X), module(X)):
            torch.testing.assert_close(a, b)


def test_measuring_leaves_the_users_module_alone():
    module = Running()
    tilewright.optimize(module, (X,))
    assert module.count == 0


@pytest.mark.parametrize("save", [lambda m: torch.jit.trace(m, X), torch.jit.script])
def test_torchscript(tmp_path, save):
    module = Mlp().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(module).save(str(tmp_path / "m.ts"))
    same(round_trip(tmp_path, tmp_path / "m.ts", "x=3x8"), module, X)
    same(round_trip(tmp_path, tmp_path / "m.ts", "x=bx8"), module, torch.randn(7, 8))
    with pytest.raises(ModelFails, match="cannot be multiplied"):
        opened(tmp_path / "m.ts", "x=3x9")
    with pytest.raises(NoInputs):
        opened(tmp_path / "m.ts")


def test_callables(tmp_path):
    same(round_trip(tmp_path, "offline:whole", "a=bx3:i64,b=bx3:i64"), offline.whole, IDS, IDS)
    same(round_trip(tmp_path, "offline:tokens", "ids=bxs:i64", "mask=bxs"), offline.tokens, IDS, torch.ones(2, 3))
    assert optimize_model(opened("offline:with_inputs")).receipt.error.ok
    assert optimize_model(opened("offline:with_keywords")).convention.names == ("ids", "mask")


def test_sizes_that_the_model_limits(tmp_path):
    loaded = round_trip(tmp_path, "offline:table", "x=bxsx4")
    same(loaded, offline.table, torch.randn(1, 12, 4))
    with pytest.raises(TypeError, match="argument 'x' must be"):
        loaded(torch.randn(1, 13, 4))


def test_pickled_modules(tmp_path):
    torch.save(Mlp(), tmp_path / "m.pt")
    with pytest.raises(PickleRefused):
        opened(tmp_path / "m.pt")
    with pytest.raises(NoInputs):
        opened(tmp_path / "m.pt", trust=True)
    assert opened(tmp_path / "m.pt", "x=3x8", trust=True).names == ("x",)
    torch.save(Mlp().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(NotAModel, match="OrderedDict"):
        opened(tmp_path / "weights.pt", trust=True)


@pytest.mark.parametrize(
    "name, words",
    [
        ("offline:not_a_model", "gives an int"),
        ("offline:fails", "KeyError: 'weights'"),
        ("offline:nope", "no attribute 'nope'"),
        ("nowhere:nope", "No module named 'nowhere'"),
        ("offline:mlp", "carries no example inputs"),
        ("missing.pt2", "there is no file missing.pt2"),
        (".", "it is a directory"),
    ],
)
def test_what_is_no_model(capsys, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    assert run(name, "-o", "a.tw") == 2
    assert words in sentence(capsys)


def test_what_cannot_be_exported():
    with pytest.raises(CannotOptimize, match="data-dependent"):
        opened("offline:branches", "x=3x3")


# -- damaged and hostile files


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    batch = torch.export.Dim("batch")
    return save_program(tmp_path_factory.mktemp("programs") / "m.pt2", Mlp(), (X,), dynamic={"x": {0: batch}})


def rewritten(source, target, change):
    """A copy of an archive; change(name, bytes) gives each member's new bytes, or a dict of members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            found = change(name, old.read(name))
            for member, data in (found if isinstance(found, dict) else {name: found}).items():
                new.writestr(member, data)
    return target


def test_cut_short(program, tmp_path):
    (tmp_path / "m.pt2").write_bytes(program.read_bytes()[:-3000])
    with pytest.raises(NotAModel, match="cut short"):
        opened(tmp_path / "m.pt2")


def test_a_damaged_member(program, tmp_path):
    data = bytearray(program.read_bytes())
    with zipfile.ZipFile(program) as archive:
        weight = next(i for i in archive.infolist() if i.filename.endswith("weight_0"))
    data[weight.header_offset + 200] ^= 1
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(NotAModel, match="weight_0 is damaged"):
        opened(tmp_path / "m.pt2")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_constants_are_refused(program, tmp_path):
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    def change(name, data):
        if not name.endswith("_constants_config.json"):
            return data
        where = name.rsplit("/", 1)[0]
        return {name: json.dumps({"config": {"bomb": entry}}), f"{where}/opaque_obj_0": pickle.dumps(Bomb(tmp_path / "boom"))}

    with pytest.raises(PickleRefused, match="the pickled object 'bomb'"):
        opened(rewritten(program, tmp_path / "m.pt2", change))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("member", ["weights", "inputs"])
def test_pickles_that_are_more_than_weights_are_not_run(program, tmp_path, member):
    torch.save([Bomb(tmp_path / "boom")], tmp_path / "bomb")
    bomb = (tmp_path / "bomb").read_bytes()

    def change(name, data):
        if member == "inputs":
            return bomb if "sample_inputs" in name else data
        if name.endswith("weights_config.json"):
            config = json.loads(data)
            config["config"]["up.weight"]["use_pickle"] = True
            return json.dumps(config)
        return bomb if name.endswith("weight_0") else data

    with pytest.raises(NotAModel, match="torch.export cannot read it"):
        opened(rewritten(program, tmp_path / "m.pt2", change))
    assert not (tmp_path / "boom").exists()


HOSTILE = {
    "an expression": (r'"expr_str": "[^"]*"', "\"expr_str\": \"open('boom', 'w')\""),
    "an operator that reads files": (r"torch\.ops\.aten\.gelu\.default", "torch.ops.aten.from_file.default"),
    "a function of Python": (r"torch\.ops\.aten\.gelu\.default", "torch.os.system"),
    "a name with code in it": (r'"name": "gelu"', "\"name\": \"gelu):\\n    open('boom', 'w')\""),
    "a module to import": (r'\\"context\\": \\"null\\"', r"\"context\": \"{\\\"__enum__\\\": 1}\""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_text_that_would_run_is_refused(program, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    before, after = HOSTILE[kind]

    def change(name, data):
        if not name.endswith("models/model.json"):
            return data
        text, count = re.subn(before, lambda match: after, data.decode())
        assert count
        json.loads(text)
        return text

    with pytest.raises(PickleRefused):
        opened(rewritten(program, tmp_path / "m.pt2", change))
    assert not (tmp_path / "boom").exists()


def test_guards_are_not_run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def change(name, data):
        if not name.endswith("models/model.json"):
            return data
        return json.dumps(json.loads(data) | {"guards_code": ["open('boom', 'w')"]})

    optimize_model(opened(rewritten(program, tmp_path / "m.pt2", change)))
    assert not (tmp_path / "boom").exists()


def test_source_lines_stay_in_comments(program, tmp_path):
    def change(name, data):
        return data.replace(b"offline.py", b"a\\rint evil = 1;\\\\") if name.endswith("models/model.json") else data

    optimized = optimize_model(opened(rewritten(program, tmp_path / "m.pt2", change)))
    source = optimized.program.source
    assert "evil" in source and all("evil" not in line or line.lstrip().startswith(("//", "#")) for line in source.split("\n"))
    assert "\r" not in source


def test_compiled_code_is_refused(program, tmp_path):
    def change(name, data):
        root = name.split("/")[0]
        return {name: data, f"{root}/data/aotinductor/model/x.so": b""} if name.endswith("archive_version") else data

    with pytest.raises(PickleRefused, match="compiled code"):
        opened(rewritten(program, tmp_path / "m.pt2", change))


def test_other_archives(tmp_path):
    shutil.make_archive(str(tmp_path / "a"), "zip", root_dir=offline.__file__.rsplit("/", 1)[0], base_dir="offline.py")
    with pytest.raises(NotAModel, match="without a torch model"):
        opened(tmp_path / "a.zip")
    (tmp_path / "a.pt2").write_text("hello")
    with pytest.raises(NotAModel, match="no torch archive"):
        opened(tmp_path / "a.pt2")


class Fixed(torch.nn.Module):
    def forward(self, x):
        return x + 1, 1, True, 1.0, "text", None, torch.arange(3)


def test_results_that_are_no_tensors(tmp_path):
    tilewright.optimize(Fixed(), (X,)).save(tmp_path / "a.tw")
    y, *fixed, positions = tilewright.load(tmp_path / "a.tw")(X)
    assert torch.equal(y, X + 1) and positions.tolist() == [0, 1, 2]
    assert [(type(v), v) for v in fixed] == [(int, 1), (bool, True), (float, 1.0), (str, "text"), (type(None), None)]


def bomb(path, name, content=bytes(4 << 20)):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path.read_bytes()


def test_archives_that_unpack_to_far_more(program, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MOST_UNPACKED", 1 << 20)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)  # nothing is unpacked
    path = tmp_path / "m.pt2"
    content = bomb(path, "m/archive_format")
    with pytest.raises(NotAModel, match="it would unpack to 4 MB more than it takes$"):
        opened(path)
    rewritten(program, path, lambda name, data: {name: data} | ({"m/evil.pt": content} if "archive_format" in name else {}))
    with pytest.raises(NotAModel, match="unpack to 4 MB more than it takes .in m/evil.pt"):
        opened(path)


def test_archives_whose_members_overlap(program, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for row in old.infolist():
            new.writestr(row.filename, old.read(row))
        largest = max(new.filelist, key=lambda row: row.compress_size)
        for i in range(100):
            row = copy.copy(largest)
            row.filename = f"m/again{i}"
            new.filelist.append(row)
    with pytest.raises(NotAModel, match="its members overlap$"):
        opened(path)


def test_kinds_of_compression_that_torch_never_writes(program, tmp_path):
    data = bytearray(program.read_bytes())
    where = data.rindex(b"PK\x01\x02")
    data[where + 10 : where + 12] = (99).to_bytes(2, "little")
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(NotAModel, match="it cannot be unpacked|is damaged|cut short"):
        opened(tmp_path / "m.pt2")


class Apart(torch.nn.Module):
    """Each input by itself: it takes any two sizes."""

    def forward(self, x, y):
        return x.exp(), y.exp()


@pytest.mark.parametrize(("names", "count"), [(("b", "b"), 1), (("b", "c"), 2)])
def test_dimensions_of_one_name_have_one_size(names, count):
    example = Example((torch.ones(3), torch.ones(3)), {}, {"x": {0: names[0]}, "y": {0: names[1]}})
    captured = captured_of(export_module("apart", Apart(), example))
    assert len(captured.graph.symbols) == count


def test_a_model_in_training_stays_so():
    """Some of it may be frozen: each part goes back to its own mode."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.BatchNorm1d(4).eval())
    x = torch.ones(2, 4)
    made = tilewright.optimize(model, (x,), tuning_seconds=0)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    torch.testing.assert_close(made(x), model.eval()(x))


def test_a_model_that_is_none():
    with pytest.raises(BadOption, match=r"model: it is a str, not a torch\.nn\.Module"):
        tilewright.optimize("gpt2", (torch.ones(2),))
