"""Time to the first token of a prompt of 1024 tokens, nine tenths of which were read before.

    python benchmarks/prefixes.py [--rounds 7] [--out benchmarks/results/prefixes.json]

One thread, CPU time, a Llama-like model of 110 million parameters with random weights. In every round the last tenth of the prompt is
new, and all ways to read it take turns, so that each pays for the same moments; medians count. What is kept comes from a prompt with
another last tenth, so that the store has to find where the two part. transformers is measured without a cache and with a copy of one
that holds the nine tenths, which is how one does it by hand.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tilewright import Generator, PrefixStore
from tilewright.search.device import identity

TOKENS, SHARED, VOCABULARY = 1024, 921, 32000
TARGET = 0.15
"""Of the time that reading the whole prompt takes."""

Read = Callable[[list[int]], int]
"""A prompt -> the token that follows."""


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, intermediate_size=2048,
                         vocab_size=VOCABULARY, max_position_embeddings=TOKENS, tie_word_embeddings=True, eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def first_token(generator: Generator) -> Read:
    return lambda prompt: next(generator.steps([prompt], max_new_tokens=1))[0][0]


def by_transformers(llama: Any, cache: Any = None) -> Read:
    """With a cache: of the first SHARED tokens, which stays as it is."""

    def read(prompt: list[int]) -> int:
        kept = copy.deepcopy(cache)
        tokens = torch.tensor([prompt if kept is None else prompt[SHARED:]])
        with torch.no_grad():
            return int(llama(tokens, past_key_values=kept, use_cache=kept is not None, logits_to_keep=1).logits[0, -1].argmax())

    return read


def ways(llama: Any, shared: list[int], folder: str) -> dict[str, tuple[Read, Read]]:
    """Of each way what comes before, untimed, and what is timed. Both stores know a text that begins with `shared`; the second has room
    for one text, so that reading another one in between sends it to a file."""
    plain = Generator(llama, max_length=TOKENS)
    each = sum(t.nbytes for t in plain.stepper.state(1).tensors) // TOKENS
    kept, spilled = (Generator(plain.stepper, prefixes=store) for store in (PrefixStore("1GB"), PrefixStore(each * TOKENS, folder)))
    other = torch.randint(VOCABULARY, (2, TOKENS)).tolist()
    for generator in (kept, spilled):
        first_token(generator)([*shared, *other[0][SHARED:]])
    with torch.no_grad():
        cache = llama(torch.tensor([shared]), use_cache=True, logits_to_keep=1).past_key_values

    def nothing(prompt: list[int]) -> int:
        return 0

    def other_text(prompt: list[int]) -> int:
        return first_token(spilled)(other[1])

    return {
        "tilewright, all of it": (nothing, first_token(plain)),
        "tilewright, kept in memory": (nothing, first_token(kept)),
        "tilewright, kept in a file": (other_text, first_token(spilled)),
        "transformers, all of it": (nothing, by_transformers(llama)),
        "transformers, kept by hand": (nothing, by_transformers(llama, cache)),
    }


def measured(rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round; all must say the same token."""
    llama, seconds = model(), dict[str, list[float]]()
    shared = torch.randint(VOCABULARY, (SHARED,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        readers = ways(llama, shared, folder)
        for i in range(rounds + 1):
            prompt = [*shared, *torch.randint(VOCABULARY, (TOKENS - SHARED,)).tolist()]
            tokens = set[int]()
            for name, (before, read) in readers.items():
                before(prompt)
                begin = time.process_time()
                tokens.add(read(prompt))
                seconds.setdefault(name, []).append(time.process_time() - begin)
            assert len(tokens) == 1, tokens
            print(f"round {i}: " + ", ".join(f"{s[-1]:.3f} s" for s in seconds.values()), flush=True)
    return {name: taken[1:] for name, taken in seconds.items()}  # the first round compiles


def markdown(results: dict[str, Any]) -> str:
    lines = [f"{results['machine']}, torch {results['torch']}. {SHARED} of {TOKENS} tokens were read before.", ""]
    lines += ["| first token of a prompt | ms | of all of it |", "| --- | --- | --- |"]
    seconds = results["seconds"]
    for name, taken in seconds.items():
        lines.append(f"| {name} | {1e3 * taken:.1f} | {taken / seconds[name.split(',')[0] + ', all of it']:.1%} |")
    return "\n".join([*lines, "", f"Kept in memory: {results['share']:.1%} of the time; the target is {TARGET:.0%} at most."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prefixes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = {name: statistics.median(taken) for name, taken in measured(options.rounds).items()}
    share = seconds["tilewright, kept in memory"] / seconds["tilewright, all of it"]
    results = {"machine": identity(), "torch": torch.__version__, "seconds": seconds, "share": share}
    print(markdown(results))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results) + "\n")


if __name__ == "__main__":
    main()
