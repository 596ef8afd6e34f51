"""One of two processes of `test_distributed.py`: does everything that takes two, and prints what it found as JSON."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tilewright.driver.artifact import load
from tilewright.driver.distributed.pipeline import CannotPipeline, Pipeline
from tilewright.driver.distributed.shards import shard
from tilewright.ir.graph import constants, order
from tilewright.passes.scatter_norms import ScatterNorms


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

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.q, self.kv, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(16, 2 * groups * 8), torch.nn.Linear(32, 16)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        k, v = (t.view(b, s, self.groups, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
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
    }


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
    }
    (folder / f"found.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
