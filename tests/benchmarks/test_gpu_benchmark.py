"""benchmarks/gpu.py without a GPU: order, time, resuming, what it says; and every row once, on the CPU in small sizes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from on_gpu import worker
from on_gpu.clock import race
from on_gpu.models import MODELS, PEERS, compared
from on_gpu.place import INTERPRETED, Place
from on_gpu.report import markdown
from on_gpu.rows import ROWS

MACHINE = {"name": "NVIDIA H100 80GB HBM3", "torch": "2.11", "triton": "3.6", "cuda": "13.0"}
SMALL = Place("cpu", 0.0, "eager")


@dataclass(frozen=True)
class Planned:
    table: str
    name: str
    seconds: float


PLAN = (Planned("products", "large", 30.0), Planned("models", "encoder", 60.0), Planned("products", "small", 10.0))


class Fake:
    """A worker whose rows take 25 seconds by the clock, and answer what they are told to."""

    now = 0.0

    def __init__(self, answers):
        self.answers, self.asked, self.alive, self.limits = answers, [], True, []

    def ask(self, command, limit):
        Fake.now += 25.0
        self.asked.append(command)
        self.limits.append(limit)
        answer = self.answers.get(command, {"peers": {}})
        self.alive = "failed" not in answer
        return answer

    def close(self):
        self.alive = False


def measured(results=None, wanted=(), answers=None, seconds=1000.0):
    Fake.now, made, saves = 0.0, [], []

    def start():
        made.append(Fake(answers or {}))
        return made[-1]

    results = results or {"machine": MACHINE, "rows": {}}
    gpu.measure(PLAN, wanted, results, start(), start, lambda: saves.append(len(results["rows"])), seconds, lambda: Fake.now)
    return results["rows"], [w.asked for w in made], saves


def test_rows_are_written_down_one_by_one():
    rows, asked, saves = measured()
    assert asked == [["row 0", "row 1", "row 2"]] and saves == [1, 2, 3]
    assert rows["models: encoder"] == {"table": "models", "name": "encoder", "peers": {}, "took": 25.0}


def test_what_there_is_no_time_for_is_listed_and_shorter_rows_go_on():
    rows, asked, _ = measured(seconds=40.0)
    assert asked == [["row 0", "row 2"]]
    assert rows["models: encoder"]["skipped"] == "it takes about 60 s, and 15 s were left"


def test_a_worker_that_died_is_replaced():
    rows, asked, _ = measured(answers={"row 0": {"failed": "an illegal memory access"}})
    assert asked == [["row 0"], ["row 1", "row 2"]] and rows["products: large"]["failed"] == "an illegal memory access"


def test_resuming_measures_what_is_not_there():
    found = {"products: large": {"table": "products", "peers": {"cudnn": {"failed": "no"}}}, "models: encoder": {"skipped": "no time"},
             "products: small": {"failed": "once"}}  # fmt: skip
    _, asked, _ = measured({"machine": MACHINE, "rows": dict(found)})
    assert asked == [["row 1", "row 2"]]


def test_only_some():
    assert measured(wanted=("products",))[1] == [["row 0", "row 2"]] and measured(wanted=("enc", "small"))[1] == [["row 1", "row 2"]]


def test_results_of_other_versions_are_not_kept(tmp_path):
    path = tmp_path / "deeper" / f"{gpu.file_name(MACHINE['name'])}.json"
    assert path.name == "gpu-nvidia-h100-80gb-hbm3.json"
    results = {"machine": MACHINE, "rows": {"a: b": {"table": "a", "name": "b", "failed": "it does"}}}
    gpu.save(path, results)
    assert gpu.saved(path, MACHINE) == results and "- a: b: it does" in path.with_suffix(".md").read_text()
    assert not gpu.saved(path, MACHINE | {"torch": "2.12"})["rows"] and sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".md"]
    for damaged in ("", "[]", "{}"):
        path.write_text(damaged)
        assert gpu.saved(path, MACHINE) == {"machine": MACHINE, "rows": {}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "benchmarks/gpu.py needs a GPU that torch can use, and there is none here.\n"
    assert not list(tmp_path.iterdir())


BAD = {"--seconds 0": "must be more than 0", "--seconds x": "invalid float", "--rounds 3": "unrecognized"}


@pytest.mark.parametrize(("words", "why"), BAD.items())
def test_bad_arguments(words, why, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(words.split())
    assert caught.value.code == 2 and why in capsys.readouterr().err


def test_a_row_of_no_such_name(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--only", "fastest"]) == 2
    assert "no row begins with fastest; tables are checks, products," in capsys.readouterr().err


def test_a_device_that_cannot_be_used(monkeypatch, capsys, tmp_path):
    """A real worker, on a machine that only seems to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Worker", lambda *_: Fake({"machine": {"failed": "no driver"}}))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "the device cannot be used: no driver\n" and not list(tmp_path.glob("*.json"))


def test_the_worker_is_a_process_that_answers_in_json(tmp_path):
    with gpu.workers(tmp_path) as start:
        process = start()
        answer = process.ask("row 0", 60.0)
        process.close()
    assert "failed" in answer or answer["ok"], "without a GPU it says what is missing"


# -- every row, where there is no GPU


QUICK = [n for n, row in enumerate(ROWS) if not row.table.startswith("models")]


@pytest.mark.parametrize("number", QUICK, ids=lambda n: f"{ROWS[n].table}-{ROWS[n].name}")
def test_row(number):
    row, answer = ROWS[number], worker.answer(f"row {number}", SMALL)
    assert "failed" not in answer, answer
    assert answer.get("note", "") in ("", "schedules are measured on a GPU"), answer
    assert row.table != "checks" or answer["ok"], answer
    for peer, found in answer.get("peers", {}).items():
        assert found.get("seconds") or "No viable backend" in found["failed"], (peer, found)
    text = markdown({"machine": MACHINE, "rows": {row.name: gpu.about(row) | json.loads(json.dumps(answer))}})
    assert f"| {row.name} |" in text or f"- {row.name}: " in text


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    pytest.importorskip("transformers")
    answer = compared(name, tuple(PEERS) if "decode" in name else ("tilewright", "inductor"), SMALL)
    assert all(found["seconds"] and found["first_call"] and found["error"] < 0.02 for found in answer["peers"].values()), answer
    row = {"table": "models", "name": name} | answer
    text = markdown({"machine": MACHINE, "rows": {name: row}})
    assert f"| {name} | " in text and ("tokens per second" in text) == ("decode" in name)


def test_a_candidate_that_fails_leaves_the_others():
    found = race(SMALL, {"a": [lambda: None], "b": [lambda: 1 / 0]})
    assert found["a"]["seconds"] > 0 and found["b"] == {"failed": "ZeroDivisionError: division by zero"}


def test_names_of_rows_differ():
    assert len({(row.table, row.name) for row in ROWS}) == len(ROWS)


@pytest.mark.slow
def test_a_tuned_kernel_has_the_schedule_that_is_found(monkeypatch):
    """Measured by the interpreter's time, which is as good a clock as any."""
    pytest.importorskip("ortools")
    from tilewright.search import bench, schedules
    from tilewright.search.gpus import of_target

    here = bench.Bench(of_target("sm_90"), "the interpreter", time.process_time, INTERPRETED, "cpu")
    monkeypatch.setattr(bench, "bench_of", lambda graph: here)
    monkeypatch.setattr(schedules, "COMPILED", 3)
    row = next(row for row in ROWS if row.name.endswith("head 64, tuned"))
    answer = row.measure(SMALL)
    assert answer["peers"]["tilewright"]["seconds"]
