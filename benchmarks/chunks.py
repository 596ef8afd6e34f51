"""Time to the first token of four stored chunks of 256 tokens in a new order, against reading all of the text.

    python benchmarks/chunks.py [--rounds 7] [--out benchmarks/results/chunks.json]

One thread, CPU time, a Llama-like model of 12 layers of 768 with random weights: of quality examples/rag_chunks.py
tells. In every round the chunks come in another order and both ways take turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tilewright import ChunkStore, Generator
from tilewright.search.device import identity

CHUNKS, TOKENS, QUESTION, RATIO, TARGET = 4, 256, 16, 0.15, 0.35
LENGTH = CHUNKS * TOKENS + 2 * QUESTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chunks.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = _store()
    chunks, question = [torch.randint(32000, (TOKENS,)) for _ in range(CHUNKS)], torch.randint(32000, (QUESTION,))
    seconds: dict[float, list[float]] = {1.0: [], RATIO: [], 0.0: []}
    for turn in range(options.rounds + 1):
        order = torch.randperm(CHUNKS).tolist()
        for ratio in seconds:
            begin = time.process_time()
            store.prefill([chunks[i] for i in order], question, ratio)
            if turn:
                seconds[ratio].append(time.process_time() - begin)
    whole = statistics.median(seconds[1.0])
    rows = {f"{ratio:.0%} computed anew": statistics.median(times) / whole for ratio, times in seconds.items()}
    for name, share in rows.items():
        print(f"{name:22} {share:6.1%} of the time of all")
    print(f"all of it: {whole:.2f} s; target at {RATIO:.0%}: {TARGET:.0%}")
    result = {"machine": identity(), "share": rows, "seconds": whole, "target": TARGET}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def _store() -> ChunkStore:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000,
                         max_position_embeddings=2048, tie_word_embeddings=True)  # fmt: skip
    return ChunkStore(Generator(LlamaForCausalLM(config).eval(), max_length=LENGTH).stepper)


if __name__ == "__main__":
    main()
