"""The tuning database: many writers, a killed one, a damaged file, JSON lines."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from support import in_threads
from tilewright.search.database import Database, Key, Timing

KEY = Key("kernel", "f32[8]", "cpu", "2.13")

WRITER = """
import sys
from tilewright.search.database import Database, Key, Timing
database = Database(sys.argv[1])
for i in range(int(sys.argv[3])):
    database.put(Key(f"{sys.argv[2]}{i}", "s", "d", "v"), {"a": Timing(i + 1.0), "b": Timing(2.0, 0.5)})
    print(i, flush=True)
"""


def writer(path, name: str, count: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE, text=True)


def rows(path) -> int:
    connection = sqlite3.connect(path)
    ((count,),) = connection.execute("SELECT count(*) FROM timings")
    connection.close()
    return count


def test_what_was_put_is_got(tmp_path) -> None:
    database = Database(tmp_path / "t.sqlite")
    assert database.get(KEY) == {}
    database.put(KEY, {"native": Timing(1e-3, 0.01), "vendor": Timing(2e-3)})
    database.put(KEY, {"vendor": Timing(3e-3)})
    assert Database(tmp_path / "t.sqlite").get(KEY) == {"native": Timing(1e-3, 0.01), "vendor": Timing(3e-3)}
    assert database.get(Key("kernel", "f32[9]", "cpu", "2.13")) == {}


def test_two_processes_write_at_once(tmp_path) -> None:
    path = tmp_path / "t.sqlite"
    running = [writer(path, name, 150) for name in "xy"]
    for process in running:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert rows(path) == 2 * 150 * 2


def test_a_killed_writer_loses_nothing(tmp_path) -> None:
    path = tmp_path / "t.sqlite"
    process = writer(path, "x", 100_000)
    assert process.stdout is not None
    done = [int(process.stdout.readline()) for _ in range(20)][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    database = Database(path)
    for i in range(done + 1):
        assert set(database.get(Key(f"x{i}", "s", "d", "v"))) == {"a", "b"}
    assert rows(path) % 2 == 0, "a transaction is written whole"
    database.put(KEY, {"a": Timing(1.0)})


def test_threads(tmp_path) -> None:
    database = Database(tmp_path / "t.sqlite")
    in_threads(lambda i: [database.put(Key(f"{i}.{j}", "s", "d", "v"), {"a": Timing(1.0)}) for j in range(20)])
    assert rows(database.path) == 80


def test_json_lines(tmp_path) -> None:
    one, two = Database(tmp_path / "one.sqlite"), Database(tmp_path / "two.sqlite")
    one.put(KEY, {"a": Timing(1e-3, 0.01), "b": Timing(2e-3)})
    assert one.dump(tmp_path / "t.jsonl") == 2
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["candidate"] == "a"
    two.put(KEY, {"a": Timing(5.0)})
    assert two.load(tmp_path / "t.jsonl") == 2 and two.get(KEY) == one.get(KEY)


@pytest.mark.parametrize("line", ["{", "[]", '{"kernel": "k"}', '{"kernel": 1, "shapes": "", "device": "", "version": "", "candidate": "", '
                                  '"seconds": 1, "noise": 0}', "null"])  # fmt: skip
def test_bad_lines_are_refused_whole(tmp_path, line: str) -> None:
    database = Database(tmp_path / "t.sqlite")
    database.put(KEY, {"a": Timing(1.0)})
    database.dump(tmp_path / "t.jsonl")
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write(line + "\n")
    other = Database(tmp_path / "other.sqlite")
    with pytest.raises(ValueError, match=r"t.jsonl:2 is no timing"):
        other.load(tmp_path / "t.jsonl")
    assert other.get(KEY) == {}


def test_a_damaged_file_is_put_aside(tmp_path) -> None:
    path = tmp_path / "t.sqlite"
    path.write_bytes(b"no database at all, and long enough to be read as one" * 20)
    with pytest.warns(UserWarning, match="damaged"):
        assert Database(path).get(KEY) == {}
    Database(path).put(KEY, {"a": Timing(1.0)})
    assert Database(path).get(KEY) == {"a": Timing(1.0)} and (tmp_path / "t.damaged").exists()


def test_a_writer_waits_for_another(tmp_path) -> None:
    path = tmp_path / "t.sqlite"
    Database(path).put(KEY, {"a": Timing(1.0)})
    holder = sqlite3.connect(path, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")

    def work(i: int) -> None:
        if i:
            Database(path).put(KEY, {"b": Timing(2.0)})
        else:
            time.sleep(0.3)
            holder.rollback()

    in_threads(work, 2)
    holder.close()
    assert set(Database(path).get(KEY)) == {"a", "b"}
