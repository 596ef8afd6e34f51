"""The command line: real runs, and bad input, which is one sentence, status 2 and nothing left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import offline
import pytest
import tilewright
import torch
from offline import Mlp, run, save_program, sentence
from rich.console import Console
from tilewright.driver import measure

HERE = Path(__file__).parent
OPTIMIZE = [sys.executable, "-m", "tilewright.driver.cli", "optimize"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    batch = torch.export.Dim("batch", max=100)
    return save_program(tmp_path_factory.mktemp("programs") / "mlp.pt2", Mlp(), (torch.randn(3, 8),), dynamic={"x": {0: batch}})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_artifact_and_its_receipt(program, here, capsys):
    assert run(program, "--json", "receipt.json") == 0
    said = capsys.readouterr().out
    assert "mlp.tw" in said and "kernel" in said
    receipt = json.loads(Path("receipt.json").read_text())
    assert receipt["error"]["ours"] <= receipt["error"]["allowed"] and receipt["speed"]["runs"] >= 5
    assert sorted(os.listdir()) == ["mlp.tw", "receipt.json"]
    assert os.stat("mlp.tw").st_mode & 0o777 == 0o666 & ~_umask()
    assert tilewright.load("mlp.tw")(torch.randn(1, 8)).shape == (1, 8)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_explain(program, here, capsys):
    assert run(program, "-o", "a.tw") == 0
    capsys.readouterr()
    assert run("a.tw", command="explain") == 0
    assert "offline.py" in capsys.readouterr().out
    assert run("a.tw", "--graph", command="explain") == 0
    assert capsys.readouterr().out.startswith("graph ")
    assert run("a.tw", "--source", command="explain") == 0
    assert "def call(" in capsys.readouterr().out
    assert run("none.tw", command="explain") == 2
    assert "there is no such file" in sentence(capsys)


@pytest.mark.parametrize(
    "options, words",
    [
        (["-o", "."], "it is a directory"),
        (["-o", "no/such/a.tw"], "No such file or directory"),
        (["--json", "no/such/a.json"], "No such file or directory"),
        (["--passes", "nope"], "there is no pass 'nope'"),
        (["--passes", "fuse-regions{nope=1}"], "has no option 'nope'"),
        (["--passes", "plan-memory"], "needs a graph that is at least fused"),
        (["--nope"], "No such option: --nope"),
        (["-i", "nope.npz"], "there is no such file"),
        (["-i", "y=3x8"], "no such input; its inputs are x"),
        (["-i", "x=3x9"], "must be f32[s"),
        (["-i", "x=300x8"], "in 0..100"),
        (["-i", "x=3x8:f64"], "not f64[3, 8]"),
        (["-i", "x=bx8"], "give a number for b"),
        (["-i", "x=3xx8"], "no list of sizes"),
        (["-i", "x=3x8:f9"], "unknown dtype"),
    ],
)
def test_bad_options(program, here, capsys, options, words):
    assert run(program, *options) == 2
    assert words in sentence(capsys)
    assert os.listdir() == []


def test_no_model(here, capsys):
    assert run() == 2
    assert "Missing argument 'MODEL'" in sentence(capsys)


def test_a_directory_that_cannot_be_written(program, here, capsys, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert run(program) == 2
    assert sentence(capsys) == "cannot write mlp.tw: Permission denied; nothing was left behind"


def test_a_full_disk(program, here):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    # kernels come from the cache of this machine, which the limit must not meet, nor the tuning database
    assert run(program, "-o", "warm.tw") == 0
    made = subprocess.run(
        [*OPTIMIZE, str(program), "--tune", "0"], capture_output=True, text=True, preexec_fn=small_files, env=_environment()
    )
    assert made.returncode == 2
    assert made.stderr.count("\n") == 1 and "cannot write mlp.tw: File too large; nothing was left behind" in made.stderr
    assert os.listdir() == ["warm.tw"]


def _environment(**extra):
    return {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "2", **extra}


def test_two_at_once_with_an_empty_cache(here):
    command = [*OPTIMIZE, "offline:with_inputs", "-o"]
    environment = _environment(TILEWRIGHT_CACHE=str(here / "cache"))
    runs = [subprocess.Popen([*command, f"{i}.tw"], env=environment, stdout=subprocess.DEVNULL) for i in range(2)]
    assert [r.wait(120) for r in runs] == [0, 0]
    module, (x,) = offline.with_inputs()
    for i in range(2):
        torch.testing.assert_close(tilewright.load(f"{i}.tw")(x), module.eval()(x).detach())


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted(here, number, status):
    (here / "slow.py").write_text("import time\ndef model():\n    open('started', 'w').close()\n    time.sleep(60)\n")
    process = subprocess.Popen(
        [*OPTIMIZE, "slow:model", "-o", "a.tw"],
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in a shell's background ignores it otherwise
    )
    while not Path("started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == status and b"Traceback" not in said
    assert sorted(set(os.listdir()) - {"__pycache__"}) == ["slow.py", "started"]


def test_a_receipt_reads_well_in_80_columns(program, here):
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert run(program, "-o", "a.tw") == 0
    receipt = tilewright.load("a.tw").receipt
    receipt.render(console)
    lines = console.export_text(clear=False).splitlines()
    assert lines[0].startswith("mlp  ") and "error" in lines[0] and "native" in "".join(lines[:2])
    assert not any("…" in line for line in lines)
    assert all(any(k.name in line for line in lines) for k in receipt.kernels)
    assert any("because one kernel walks one contraction" in line for line in lines)
    receipt.render(console, details=True)
    details = console.export_text()
    assert "rewrites" in details and "fuse-regions" in details and "allowed" in details
