"""Damaged and hostile artifacts: each is refused in one sentence, nothing is run, and nothing is left behind."""

from __future__ import annotations

import json
import os
import struct

import pytest
import tilewright
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offline import Mlp, Running
from tilewright.driver import artifact, measure, native_code
from tilewright.driver.errors import BadArtifact

X = torch.linspace(-2, 2, 24).reshape(3, 8)
RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of an artifact of each of two models, one of them with buffers."""
    measure.MEASURE_SECONDS, before = 0.01, measure.MEASURE_SECONDS
    torch.manual_seed(0)
    made = []
    for name, model in (("mlp", Mlp()), ("running", Running())):
        path = tmp_path_factory.mktemp("good") / name
        tilewright.optimize(model, (X,), tuning_seconds=0).save(path)
        made.append(path.read_bytes())
    measure.MEASURE_SECONDS = before
    return made


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    """What passes all checks is not built: nothing here is about kernels."""
    monkeypatch.setattr(artifact, "build_program", lambda graph: None)
    monkeypatch.setattr(artifact, "program_on_cpu", lambda *arguments: None)


def header_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def file_of(header, content):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def forged(data, **changes):
    """With other members or another manifest, and all sums made right."""
    header, content = header_of(data)
    metadata = header["__metadata__"]
    manifest = json.loads(metadata["tilewright"])
    manifest |= changes.pop("manifest", {})
    metadata |= changes
    manifest["sha256"] |= {name: artifact._digest(text) for name, text in changes.items()} | {
        "manifest": artifact._manifest_digest(manifest)
    }
    metadata["tilewright"] = json.dumps(manifest)
    return file_of(header, content)


def refused(data, tmp_path, words=""):
    path = tmp_path / "a.tw"
    path.write_bytes(data)
    with pytest.raises(BadArtifact, match=words) as caught:
        tilewright.load(path, trust_code=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert os.listdir(tmp_path) == ["a.tw"]


def test_what_is_not_damaged(good, tmp_path):
    for data in good:
        (tmp_path / "a.tw").write_bytes(data)
        assert tilewright.load(tmp_path / "a.tw").code is not None or not native_code.compiler_available()


# -- accidents


@pytest.mark.parametrize("which", [0, 1])
def test_cut_short(good, which, tmp_path):
    data = good[which]
    header = 8 + int.from_bytes(data[:8], "little")
    places = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1} | set(range(0, len(data), len(data) // 40))
    for end in sorted(places):
        refused(data[:end], tmp_path)


def test_longer(good, tmp_path):
    refused(good[0] + b"\0", tmp_path)
    refused(b"\0" + good[0], tmp_path)


@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_bit_in_every_member(good, which, tmp_path):
    data = good[which]
    header, content = header_of(data)
    start = len(data) - len(content)
    places = [
        start + place for row in header.values() if "data_offsets" in row for place in (row["data_offsets"][0], row["data_offsets"][1] - 1)
    ]
    texts = [json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in header["__metadata__"].values()]
    assert len(texts) == 4 and all(text in data for text in texts)
    places += [data.index(text) + len(text) * part // 8 for text in texts for part in range(8)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        refused(bytes(changed), tmp_path)


@RANDOM
@given(st.data())
def test_random_flips(good, tmp_path_factory, data):
    """Every byte of the file is summed, or says where another is: no flip of a bit passes."""
    file = bytearray(data.draw(st.sampled_from(good)))
    header = 8 + int.from_bytes(file[:8], "little")
    place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(file) - 1)))
    file[place] ^= 1 << data.draw(st.integers(0, 7))
    refused(bytes(file), tmp_path_factory.mktemp("a"))


@RANDOM
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(tmp_path_factory, content, framed):
    refused(file_of(content, b"") if framed else content, tmp_path_factory.mktemp("a"))


# -- malice: sums are right


@RANDOM
@given(st.data())
def test_random_forgeries_of_the_graph(good, tmp_path_factory, data):
    """Whatever the text says: a graph, or one sentence."""
    file = data.draw(st.sampled_from(good))
    text = header_of(file)[0]["__metadata__"]["graph"]
    start = data.draw(st.integers(0, len(text)))
    end = min(len(text), start + data.draw(st.integers(0, 12)))
    put = data.draw(st.one_of(st.text(st.sampled_from('()[]{}:,=%#@*/-+.0919eaxf \n"\\\0\u2028'), max_size=8), st.just(text[:start][-40:])))
    path = tmp_path_factory.mktemp("a") / "a.tw"
    path.write_bytes(forged(file, graph=text[:start] + put + text[end:]))
    try:
        tilewright.load(path, trust_code=True)
    except BadArtifact as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "row",
    [
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [-1]},
        {"shape": [1.5]},
        {"shape": [1 << 70]},
        {"shape": "x"},
        {"data_offsets": [0, 1 << 62]},
        {"data_offsets": [8, 4]},
        {"data_offsets": [-8, 4]},
        {"data_offsets": [0, 8]},
        {"dtype": "F31"},
        {"dtype": "I32"},
        {"dtype": "F8_E4M3"},
        {"dtype": 3},
    ],
)
def test_tensors_that_do_not_fit(good, row, tmp_path):
    header, content = header_of(good[0])
    name = next(n for n, described in header.items() if described.get("dtype") == "F32")
    header[name] |= row
    refused(file_of(header, content), tmp_path)


def test_overlapping_tensors(good, tmp_path):
    header, content = header_of(good[0])
    first, second = [n for n, described in header.items() if described.get("dtype") == "F32"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    refused(file_of(header, content), tmp_path)


@pytest.mark.parametrize("size", [1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_sizes_of_the_header(good, size, tmp_path):
    refused(struct.pack("<Q", size) + good[0][8:], tmp_path)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a\0b", "a\nb", "binary ../../evil", "x" * 100_000])
def test_foreign_names(good, name, tmp_path):
    header, content = header_of(good[0])
    end = max(row["data_offsets"][1] for row in header.values() if "data_offsets" in row)
    header[name] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    refused(file_of(header, content + b"evil"), tmp_path)
    header, content = header_of(good[0])
    header["__metadata__"][name] = "evil"
    refused(file_of(header, content), tmp_path, "which tilewright never writes")


def test_names_that_occur_twice(good, tmp_path):
    header, content = header_of(good[0])
    name = next(n for n, described in header.items() if described.get("dtype") == "F32")
    text = json.dumps(header)
    twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
    path = tmp_path / "a.tw"
    path.write_bytes(file_of(twice.encode(), content))
    try:
        loaded = tilewright.load(path)  # the same thing said twice
    except BadArtifact as error:
        assert "\n" not in str(error)
    else:
        assert str(loaded.graph) == header["__metadata__"]["graph"]


DEEP = 200_000


@pytest.mark.parametrize(
    "text", ["[" * DEEP, '{"format":' * DEEP, "NaN", "Infinity", "1e999", "null", "[]", '"x"', "", "{", '{"format": 1}', '{"format": NaN}']
)
def test_manifests_of_others(good, text, tmp_path):
    header, content = header_of(good[0])
    header["__metadata__"]["tilewright"] = text
    refused(file_of(header, content), tmp_path)


@pytest.mark.parametrize("found", [0, 2, 99, -1, None, "1", [1], 1e999])
def test_other_versions(good, found, tmp_path):
    refused(forged(good[0], manifest={"format": found}), tmp_path, "this version reads 1")


@pytest.mark.parametrize(
    "manifest",
    [
        {"weights": {}},
        {"weights": {"x": 3}},
        {"weights": []},
        {"weights": {"x": "../../evil"}},
        {"convention": {"result": [[]]}},
        {"code": {}},
        {"code": {"target": "x86-64", "binaries": {"../../evil": {"compiler": "x"}}}},
        {"code": {"target": "x86-64", "binaries": {"x86-64-v3": {"compiler": "x", "image": "y"}}}},
        {"code": {"target": "../../evil", "binaries": {}}},
        {"sha256": []},
    ],
)
def test_forged_manifests(good, manifest, tmp_path):
    header, content = header_of(good[0])
    whole = json.loads(header["__metadata__"]["tilewright"]) | manifest
    if isinstance(whole["sha256"], dict):
        whole["sha256"]["manifest"] = artifact._manifest_digest(whole)
    header["__metadata__"]["tilewright"] = json.dumps(whole)
    refused(file_of(header, content), tmp_path)


@pytest.mark.parametrize(
    "graph",
    [
        "graph g(x: f32[3, 8]) {\n  y = relu(" + "(" * DEEP + "x) : f32[3, 8]\n  return y\n}",
        "graph g(x: f32[" + "(" * DEEP + "3]) {\n  return x\n}",
        "graph g(x: f32[9**9**9**9]) {\n  return x\n}",
        "graph g(x: f32[1//0]) {\n  return x\n}",
        "graph g(x: f32[nan]) {\n  return x\n}",
        "graph g(x: f32[-3]) {\n  return x\n}",
        "graph g(x: f32[" + "9" * 100_000 + "]) {\n  return x\n}",
        "",
        "\0",
    ],
)
def test_forged_graphs(good, graph, tmp_path):
    refused(forged(good[0], graph=graph), tmp_path)


@pytest.mark.parametrize("receipt", ["", "[]", "NaN", "[" * DEEP, '{"graph": 3}', "null"])
def test_forged_receipts(good, receipt, tmp_path):
    refused(forged(good[0], receipt=receipt), tmp_path)
