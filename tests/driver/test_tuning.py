"""`tilewright tuning`: timings out of one machine's database and into another's."""

from __future__ import annotations

import pytest
from offline import run, sentence
from tilewright.search.database import Database, Key, Timing

KEY = Key.here("kernel", "f32[8]")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "one"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_one_machine_to_another(own_cache, monkeypatch, capsys) -> None:
    Database().put(KEY, {"a": Timing(1e-3, 0.01), "b": Timing(2e-3)})
    assert run("export", "t.jsonl", command="tuning") == 0 and "wrote 2 timings to t.jsonl" in capsys.readouterr().out
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(own_cache / "two"))
    assert Database().get(KEY) == {}
    assert run("import", "t.jsonl", command="tuning") == 0 and "read 2 timings from t.jsonl" in capsys.readouterr().out
    assert Database().get(KEY) == {"a": Timing(1e-3, 0.01), "b": Timing(2e-3)}


def test_what_cannot_be_read(own_cache, capsys) -> None:
    assert run("import", "none.jsonl", command="tuning") == 2
    assert sentence(capsys) == "cannot read timings from none.jsonl: No such file or directory"
    (own_cache / "wrong.jsonl").write_text("[]\n")
    assert run("import", "wrong.jsonl", command="tuning") == 2
    assert sentence(capsys).startswith("cannot read timings from wrong.jsonl: wrong.jsonl:1 is no timing")
    (own_cache / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    assert run("import", "bytes.jsonl", command="tuning") == 2
    assert "bytes.jsonl" in sentence(capsys)


def test_what_cannot_be_written(capsys) -> None:
    assert run("export", "no/such/folder.jsonl", command="tuning") == 2
    assert "No such file or directory" in sentence(capsys)
