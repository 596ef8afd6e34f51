"""One of two processes of `test_distributed.py`: does everything that takes two, and prints what it found as JSON."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import tilewright
import torch
import torch.distributed as dist
from tilewright.driver.artifact import load
from tilewright.driver.distributed.pipeline import CannotPipeline, Pipeline
from tilewright.driver.distributed.shards import shard
from tilewright.driver.errors import CannotOptimize, UserError
from tilewright.driver.receipt import receipts
from tilewright.ir.graph import constants, order
from tilewright.passes.scatter_norms import ScatterNorms
from tilewright.search.simulate import Cluster
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Mlp(torch.nn.Module):
    """Residual layers with norms, as decoders have them; one with a bias that must not be added twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.ModuleList(torch.nn.Linear(16, 32) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(32, 16) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(16) for _ in range(3))
        self.head = torch.nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down, norm in zip(self.up, self.down, self.norms):
            x = x + down(torch.nn.functional.gelu(up(norm(x))))
        return self.head(self.norms[2](x))


class Attention(torch.nn.Module):
    """Heads in one product of q, k and v; queries share keys in groups."""

    def __init__(self, groups: int, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.kv, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(16, 2 * groups * 8), torch.nn.Linear(32, 16)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        k, v = (t.view(b, s, self.groups, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, s, 32))


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.eval()


def in_shards(module: torch.nn.Module, x: torch.Tensor, **options: Any) -> dict[str, Any]:
    made = shard(module, (x,), **options)
    with torch.no_grad():
        wanted = module(x)
    return {
        "off": float((made(x) - wanted).abs().max() / wanted.abs().max()),
        "bytes": sum(d.value.nbytes for d in constants(made.graph).values() if d.value is not None),
        "whole": sum(p.nbytes for p in module.parameters()),
        "collectives": sorted(n.attrs["target"].split(".")[1] for n in order(made.graph) if "c10d" in n.attrs.get("target", "")),
        "declined": [f"{r.what}: {r.value}" for r in made.receipt.refused if r.rule == "shard-linears"],
        "scattered": [a.what for a in made.receipt.applied if a.rule == ScatterNorms.name],
        "parts": [a.what for a in made.receipt.applied if a.rule in PARTS],
        "whole because": sorted({r.value for r in made.receipt.refused if r.rule in PARTS}),
        "placements": {name: str(p) for name, p in made.placements.items()},
    }


PARTS = ("split-halves", "split-batch")
STYLES = {"up.*": ColwiseParallel(), "down.*": RowwiseParallel()}
SLOW = Cluster(devices=2, rate=1e9, wave=1, link=1e7)
"""Of which a sum takes about as long as what is computed between two."""


def on_a_mesh(x: torch.Tensor) -> dict[str, Any]:
    """A model whose parameters are DTensors: compiled and trained as it is, and shared out anew."""
    plain = seeded(Mlp())
    placed = parallelize_module(seeded(Mlp()), init_device_mesh("cpu", (2,)), STYLES)
    found = {"shards": in_shards(placed, x, scatter=False)}
    found["given"] = {name: str(p.placements[0]) for name, p in placed.named_parameters() if hasattr(p, "placements")}
    try:
        tilewright.optimize(placed, (x,))
    except CannotOptimize as error:
        found["refused"] = str(error)
    before, compiled = len(receipts()), torch.compile(placed, backend="tilewright")
    results = [run(x) for run in (plain, compiled)]
    for y in results:
        y.square().sum().backward()
    found["off"] = float((results[1] - results[0]).abs().max())
    grads = [(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) - q.grad for p, q in both(placed, plain)]
    found["gradients off"] = max(float(g.abs().max()) for g in grads)
    found["kernels"] = [len(r.kernels) for r in receipts()[before:] if not r.failure]
    return found


def both(one: torch.nn.Module, other: torch.nn.Module) -> Any:
    return zip(one.parameters(), other.parameters(), strict=True)


def refusals(x: torch.Tensor) -> dict[str, str]:
    """Of a linear without one that ends its shards, and of formats that cost too much."""
    found: dict[str, str] = {}
    for name, asked in {"alone": {"plan": {"up.0": ColwiseParallel()}}, "formats": {"formats": "*:int8", "max_error": 1e-6}}.items():
        try:
            shard(seeded(Mlp()), (x,), **asked)
        except UserError as error:
            found[name] = str(error)
    return found


def from_a_file(folder: Path, module: torch.nn.Module, x: torch.Tensor) -> float:
    """A shard as an artifact: its collectives are operators that are not ATen's, which the reader has to allow."""
    made = shard(module, (x,))
    path = folder / f"shard.{dist.get_rank()}.tw"
    made.save(path, levels=())
    return float((load(path, operators=("_c10d_functional",))(x) - made(x)).abs().max())


def in_a_pipeline(folder: Path, schedule: str) -> dict[str, Any]:
    paths = [folder / f"model.{i + 1}.tw" for i in range(2)]
    x, mask, wanted = (torch.load(folder / f"{name}.pt") for name in ("x", "mask", "wanted"))
    pipeline = Pipeline.load(paths, 4, schedule)
    results = [pipeline(x, mask=mask) if pipeline.rank == 0 else pipeline() for _ in range(3)]
    if pipeline.rank == 0:
        return {"results": [r is None for r in results]}
    return {"off": [float((r["x"] - wanted).abs().max()) for r in results], "mask": list(results[0]["mask"].shape)}


def refused(folder: Path) -> str:
    """Of arguments that are no four micro-batches; nothing is sent."""
    pipeline = Pipeline.load([folder / f"model.{i + 1}.tw" for i in range(2)], 4)
    if pipeline.rank:
        return ""
    try:
        pipeline(torch.zeros(7, 6, 16), torch.zeros(2, 6))
    except CannotPipeline as error:
        return str(error)
    return "not refused"


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    long = torch.randn(2, 768, 16, generator=torch.Generator().manual_seed(0))
    alone = [dist.new_group([rank]) for rank in range(2)]
    found = {
        "gpipe": in_a_pipeline(folder, "gpipe"),
        "1f1b": in_a_pipeline(folder, "1f1b"),
        "refused": refused(folder),
        "file": from_a_file(folder, seeded(Mlp()), x),
        "mlp": in_shards(seeded(Mlp()), x),
        "summed": in_shards(seeded(Mlp()), x, scatter=False),
        "odd": in_shards(seeded(Mlp()), x[:1, :5]),
        "heads": in_shards(seeded(Attention(4)), x),
        "groups": in_shards(seeded(Attention(2)), x),
        "one group": in_shards(seeded(Attention(1)), x),
        "planned": in_shards(seeded(Mlp()), x, plan={"up.0": ColwiseParallel(), "down.0": RowwiseParallel()}),
        "int8": in_shards(seeded(Mlp()), x, formats="*:int8"),
        "halves": in_shards(seeded(Attention(4)), long, cluster=SLOW),
        "rows": in_shards(seeded(Attention(4, causal=False)), long, cluster=SLOW),
        "measured": in_shards(seeded(Mlp()), long),
        "alone": in_shards(seeded(Mlp()), x, group=alone[dist.get_rank()]),
        "mesh": on_a_mesh(x),
        "refusals": refusals(x),
    }
    (folder / f"found.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
