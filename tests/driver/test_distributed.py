"""Two processes on gloo: a pipeline of stages and a model in shards compute what one process does. Everything ends within a time limit."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tilewright
import torch
import torch.distributed as dist
from distributed_worker import Mlp
from support import NATIVE
from tilewright.driver.distributed.placements import CannotShard, Plan, whole
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

pytestmark = [NATIVE, pytest.mark.slow, pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")]
SECONDS = 200
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


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "summed",
        "odd",
        "heads",
        "groups",
        "one group",
        "planned",
        "halves",
        "rows",
        "measured",
        "alone",
    ],
)
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


def test_weights_of_a_mesh_are_shared_out_as_torch_places_them(found: list[dict[str, Any]]) -> None:
    mesh = found[0]["mesh"]
    assert mesh["shards"]["off"] < 1e-5 and len(mesh["given"]) == 8
    assert mesh["given"].items() <= mesh["shards"]["placements"].items()
    assert "its parameter up.0.weight lies on a mesh of processes" in mesh["refused"]


def test_a_model_on_a_mesh_is_compiled_and_trained_as_it_is(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["mesh"]["off"] < 1e-5 and one["mesh"]["gradients off"] < 1e-4
        assert len(one["mesh"]["kernels"]) == 2 and all(one["mesh"]["kernels"])


def test_a_plan_says_which_linears_are_shared_out(found: list[dict[str, Any]]) -> None:
    placements = {name: kind for name, kind in found[0]["planned"]["placements"].items() if kind != "R"}
    assert placements == {"up.0.weight": "S(0)", "up.0.bias": "S(0)", "down.0.weight": "S(1)"}
    assert "up.0.weight: it cannot be Shard(dim=0): linear up_0 is read whole by linear down_0" in found[0]["refusals"]["alone"]


PLANS = {
    "other": (ColwiseParallel(), "the model has no such module"),
    "*.0": (ColwiseParallel(), "norms.0: it is a RMSNorm, and linears are shared out"),
    "up.*": (SequenceParallel(), "SequenceParallel is none of the styles that linears have here, ColwiseParallel and RowwiseParallel"),
}


@pytest.mark.parametrize("pattern", PLANS)
def test_plans_that_are_none(pattern: str) -> None:
    style, why = PLANS[pattern]
    with pytest.raises(CannotShard, match=re.escape(why)):
        Plan(Mlp(), {pattern: style})
    assert Plan(Mlp(), {"up.*": ColwiseParallel(), "down.1": RowwiseParallel()}).dims == {
        "up.0.weight": 0,
        "up.1.weight": 0,
        "down.1.weight": 1,
    }


def test_a_plan_holds_for_what_a_weight_became() -> None:
    plan = Plan(Mlp(), {"up.0": ColwiseParallel()})
    plan.require({"up.0.weight.int8": Shard(0), "up.0.weight.int8.scale": Shard(0)}, [])
    plan.require({"up.0.weight[0:16]": Shard(0)}, [])
    with pytest.raises(CannotShard, match="no linear goes with it"):
        plan.require({"up.0.weight": Replicate(), "up.0.weights": Shard(0)}, [])


def test_modules_that_fully_shard_has_are_refused() -> None:
    model = Mlp()
    model.up[0].__class__ = type("FSDPLinear", (FSDPModule, torch.nn.Linear), {})
    with pytest.raises(CannotShard, match=r"up\.0: fully_shard has taken it over"):
        whole(model)
    assert whole(model.down) is model.down


def test_weights_in_8_bits_are_shared_out_within_an_error(found: list[dict[str, Any]]) -> None:
    int8 = found[0]["int8"]
    assert 1e-5 < int8["off"] < 0.05 and int8["bytes"] < found[0]["mlp"]["bytes"] / 2
    assert {int8["placements"][f"down.0.weight.{part}"] for part in ("int8", "int8.scale")} == {"S(1)", "R"}
    assert "results are off by" in found[0]["refusals"]["formats"]


def test_two_parts_where_sums_are_slow(found: list[dict[str, Any]]) -> None:
    halves, rows = found[0]["halves"], found[0]["rows"]
    assert halves["collectives"] == rows["collectives"] == ["all_reduce"] * 2 + ["wait_tensor"] * 2
    assert halves["parts"][0].startswith("input x: ") and "are foretold to take 0." in halves["parts"][1]
    assert rows["parts"][0] == "input x: 1 + 1" and "attention reads all indices together" in rows["whole because"][0]


def test_one_part_where_nothing_overlaps(found: list[dict[str, Any]]) -> None:
    assert found[0]["mlp"]["whole because"] == ["12 tokens are fewer than 1024"]
    assert found[0]["alone"]["whole because"] == ["on one device nothing is waited for"] and not found[0]["alone"]["collectives"]
    assert "Mlp: one process has it all" in found[0]["alone"]["declined"]


def test_what_is_measured_decides_alike_on_all_processes(found: list[dict[str, Any]]) -> None:
    """Whichever way: with its reason."""
    first, second = (one["measured"] for one in found)
    assert first["parts"] == second["parts"] and first["collectives"] == second["collectives"]
    assert bool(first["parts"]) != bool(first["scattered"]) and (first["parts"] or first["whole because"])
