"""A step of decoding with keys and values in each format that they can be kept in, by the length of the text.

    python benchmarks/kv.py [--rounds 20] [--layers 12] [--weights int4-g64] [--out benchmarks/results/kv.json]

The model of benchmarks/decode.py, one text, one thread, CPU time. All formats are timed in one run, round by round, and the least time of
a step counts. Errors are those of the last logits against a step with keys and values as they are computed, relative to the largest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from decode import LENGTH, VOCAB, Model, derived, seconds
from tilewright.passes.kv_formats import KV_FORMATS
from tilewright.search.device import identity

LENGTHS = (LENGTH, 4 * LENGTH)
EXACT = "same"
FORMATS = [name for name in KV_FORMATS if name != "f32"]  # which is how they are computed


def measured(layers: int, length: int, weights: str, rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model, text = Model(layers, length).eval(), torch.randint(0, VOCAB, (1, length))
    plan = {"plan": weights} if weights else {}
    with torch.no_grad():
        made = {kv: derived(model, text, {"kv": kv, **plan}) for kv in FORMATS}
        times: dict[str, list[float]] = {kv: [] for kv in made}
        for i in range(rounds):
            first = i % len(FORMATS)
            for kv in (*FORMATS[first:], *FORMATS[:first]):  # what ran before leaves caches as they are
                times[kv].append(seconds(made[kv]["run"]))
        exact = made[EXACT]["run"]()
        return {
            kv: {
                "ms": 1e3 * min(times[kv]),
                "times_exact": min(times[EXACT]) / min(times[kv]),
                "error": float((form["run"]() - exact).abs().max() / exact.abs().max()),
                "state_mb": form["state_mb"],
            }
            for kv, form in made.items()
        }


def markdown(results: dict[str, Any]) -> str:
    weights = f"weights in {results['weights']}" if results["weights"] else "weights in float32"
    lines = [f"{results['machine']}, torch {results['torch']}; {results['layers']} layers, {weights}.", ""]
    lines += ["| text | keys and values | ms a token | of the exact step's speed | error | MB of state |", "| --- " * 6 + "|"]
    for length, rows in results["rows"].items():
        for kv, row in rows.items():
            error = f"{row['error']:.1e}" if row["error"] else ""
            lines.append(f"| {length} | {kv} | {row['ms']:.2f} | {row['times_exact']:.3f} | {error} | {row['state_mb']:.1f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--weights", default="int4-g64", help="the format of all weights; empty: float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kv.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {str(length): measured(options.layers, length, options.weights, options.rounds) for length in LENGTHS}
    results = {"machine": identity(), "torch": torch.__version__, "layers": options.layers, "weights": options.weights, "rows": rows}
    print(markdown(results))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
