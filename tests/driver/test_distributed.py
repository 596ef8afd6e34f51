"""Two processes on gloo: a pipeline of stages and a model in shards compute what one process does. Everything ends within a time limit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tilewright
import torch
import torch.distributed as dist
from support import NATIVE

pytestmark = [NATIVE, pytest.mark.slow, pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")]
SECONDS = 150
WORKER = Path(__file__).with_name("distributed_worker.py")


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * mask[..., None]
        return {"x": x, "mask": mask}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    model = Residual().eval()
    tilewright.split(model, (torch.randn(2, 6, 16), torch.ones(2, 6)), measure=False).save(folder / "model.tw", levels=())
    x, mask = torch.randn(8, 6, 16), torch.tensor([[1.0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        wanted = model(x, mask.repeat(4, 1))["x"]
    for name, value in (("x", x), ("mask", mask), ("wanted", wanted)):
        torch.save(value, folder / f"{name}.pt")
    _run_both(folder)
    return [json.loads((folder / f"found.{rank}.json").read_text()) for rank in range(2)]


def _run_both(folder: Path) -> None:
    """As torchrun starts them; what fails or hangs takes the other one with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    logs = [open(folder / f"log.{rank}", "w+") for rank in range(2)]  # noqa: SIM115 (closed below)
    command = [sys.executable, str(WORKER), str(folder)]
    running = [subprocess.Popen(command, env={**shared, "RANK": str(r)}, stdout=log, stderr=log) for r, log in enumerate(logs)]
    try:
        for process, log in zip(running, logs):
            status = process.wait(SECONDS)
            log.seek(0)
            assert status == 0, log.read()[-3000:]
    finally:
        for process, log in zip(running, logs):
            process.kill()
            process.wait()
            log.close()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_pipeline_computes_what_the_model_does(found: list[dict[str, Any]], schedule: str) -> None:
    first, last = (one[schedule] for one in found)
    assert first["results"] == [True] * 3
    assert max(last["off"]) < 1e-5 and last["mask"] == [8, 6]


def test_arguments_that_are_no_micro_batches_are_refused(found: list[dict[str, Any]]) -> None:
    assert "x is (7, 6, 16), and 4 micro-batches take f32[2, 6, 16] each" in found[0]["refused"]


@pytest.mark.parametrize("name", ["mlp", "summed", "odd", "heads", "groups", "one group"])
def test_shards_compute_what_the_model_does(found: list[dict[str, Any]], name: str) -> None:
    assert all(one[name]["off"] < 1e-5 for one in found)


def test_a_shard_is_an_artifact_like_any_other(found: list[dict[str, Any]]) -> None:
    assert [one["file"] for one in found] == [0.0, 0.0]


def test_a_process_holds_half_of_what_is_shared_out(found: list[dict[str, Any]]) -> None:
    whole, each = found[0]["heads"]["whole"], [one["heads"]["bytes"] for one in found]
    assert each[0] == each[1] and each[0] - whole / 2 <= 16 * 4  # but the bias that is added after the sum
    assert found[0]["one group"]["declined"] and not found[0]["groups"]["declined"]


def test_norms_of_sums_are_computed_on_a_share_of_the_tokens(found: list[dict[str, Any]]) -> None:
    mlp, summed = found[0]["mlp"], found[0]["summed"]
    assert mlp["collectives"] == ["all_gather_into_tensor"] * 2 + ["reduce_scatter_tensor"] * 2 + ["wait_tensor"] * 4
    assert summed["collectives"] == ["all_reduce"] * 2 + ["wait_tensor"] * 2 and not summed["scattered"]
    assert mlp["scattered"] == ["2 sums, 2 norms of a share of the tokens, 2 gathered"]


def test_tokens_that_cannot_be_shared_out_evenly_are_summed(found: list[dict[str, Any]]) -> None:
    assert found[0]["odd"]["collectives"] == ["all_reduce"] * 2 + ["wait_tensor"] * 2
