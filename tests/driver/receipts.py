"""Receipts in which every section of a report has something to say, of a made-up encoder; and the same with hostile names."""

from __future__ import annotations

from tilewright.codegen.program import Fallback, LibraryCall
from tilewright.driver.accuracy import ErrorCheck
from tilewright.driver.budget import Attempt, LayerLine, Point, Spent
from tilewright.driver.outline import Machine, Outline
from tilewright.driver.receipt import Coverage, KernelLine, Receipt, Refusal, Share, Speed, Trial
from tilewright.passes.base import Applied
from tilewright.search.bench import Searched

HOSTILE = '</script></style></template><img src=http://evil.example/x onerror="alert(1)">\'"`{{7*7}}&\x00\x1b[31m\u202e\ud800'


def encoder(layers: int = 6, each: int = 8, before: bool = True) -> Outline:
    """A chain of equal layers with a residual connection each; each op but the input is of a module."""
    words = {"ids": 0, "": 1, "i64[b, 128]": 2, "f32[b, 128, 384]": 3}
    rows = ["i0 1 2"]
    for layer in range(layers):
        start = len(rows) - 1
        for k in range(each):
            op, path = f"op{k}" if k < each - 1 else "add", f"encoder.layer.{layer}" + (f".part{k % 2}" if k < each - 1 else "")
            numbers = [words.setdefault(text, len(words)) for text in (op, path)]
            operands = [len(rows) - 1] + ([start] if k == each - 1 else [])
            kind = "o" if before else "kle"[k % 3]
            rows.append(f"{kind}{numbers[0]} {numbers[1]} 3 {' '.join(map(str, operands))}")
    return Outline(tuple(words), tuple(rows), (len(rows) - 1,), 90_000_000 if before else 30_000_000)


def full(name: str = "encoder", layers: int = 6) -> Receipt:
    """name: of the model; it is in every text that a model has a say in."""
    lines = tuple(
        LayerLine(f"{name}.{i}", f"{name}.py:{i}", ("exact", "int8", "int4-g64")[i % 3], (400, 102, 56)[i % 3], 400, 1e-4, 2e-4, 1e-3 * i)
        for i in range(layers)
    )
    spent = Spent(
        metric="relative", objective="latency", limits={"error": 1e-2, "bytes": 4e7, "time": 0.05}, error=8e-3, bytes=30_000_000,
        exact_bytes=90_000_000, seconds=0.02, exact_seconds=0.031, held_out=True, layers=lines,
        attempts=(Attempt(0.012, 0.013, 0.018, 0.0, "declined: over the error"), Attempt(0.009, 0.008, 0.019, 0.02, "kept")),
        front=(Point(0.031, 9e7, 0.0), Point(0.02, 3e7, 0.009), Point(0.015, 2e7, 0.03)), prices={"bytes": 1e-10},
    )  # fmt: skip
    before = encoder(layers)
    after = encoder(layers, 5, before=False)
    return Receipt(
        graph=name,
        kernels=(
            KernelLine(f"k0_{name}", name, (f"{name}.py:1", "model.py:2"), 12, 6, 4_000_000, 2_000_000),
            KernelLine("k1_gelu", "gelu", ("model.py:3",), 1, 6, 1_000_000, 8_000_000),
        ),
        library=(LibraryCall("linear", "model.py:4", 10**9, 10**7), LibraryCall("linear", "model.py:5", 10**9, 10**7)),
        fallbacks=(Fallback(name, f"{name}.py:6", "no native form", 1, 10, 10),),
        applied=(Applied("merge-linears", f"{name} q, k, v", "model.py:7", 1000), Applied("fuse-regions", "linear+gelu", "model.py:8")),
        refused=(Refusal("fuse-regions", name, "the kernel would grow too large", "model.py:9", f"{name} 12", 3),),
        seconds={"canonicalize": 0.02, "fuse-regions": 0.3, "lower": 0.1, "compile": 1.2, "total": 1.7},
        coverage=Coverage(Share(78, 2, 1), Share(5_000_000, 2 * 10**9, 10), Share(10**7, 2 * 10**7, 10)),
        arena="1048576",
        copies=(name,),
        error=ErrorCheck(8e-3, 2e-7, 1e-2),
        speed=Speed(0.06, 0.02, 51),
        trials=(Trial(name, True, 0.02, 0.03, 0.01), Trial("fusion", False, 0.02, 0.018), Trial("late", True, note="no time was left")),
        schedules=(Searched("k1_gelu", name, 12, 3, 1e-4, 2e-4, True, "memory"),),
        unmeasured=(f"{name} was not",),
        spent=spent,
        before=Outline(
            (*before.words, name), (*before.rows, f"o{len(before.words)} {len(before.words)} 3 0"), before.results, before.weights
        ),
        after=Outline((*after.words, name), (*after.rows, f"k{len(after.words)} 1 3 0"), after.results, after.weights),
        machine=Machine(f"{name} CPU", 1e10, 1e11),
    )
