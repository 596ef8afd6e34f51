"""Train a small GPT on the documentation that ships with Python, and let it write: with keys and values kept, prompts that begin alike
read once, and what the text said before drafted.

python examples/generate_text.py [--seconds 90]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import tilewright
import torch
from rich.table import Table
from small_gpt import LENGTH, SmallGpt, trained

PROMPTS, PROMPT, SHARED, NEW = 4, 160, 144, 64
"""Texts; bytes of a prompt, how many of them all begin with, and how many bytes are written."""

Write = Callable[[list[int]], Iterator[int]]
"""A prompt -> the bytes that follow, as they come."""


def rerun(model: SmallGpt) -> Write:
    """Without a generator: the whole model for every byte."""

    def write(prompt: list[int]) -> Iterator[int]:
        tokens = torch.tensor([prompt])
        for _ in range(NEW):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
            yield int(tokens[0, -1])

    return write


def timed(write: Write, prompts: list[list[int]]) -> tuple[list[bytes], float, float]:
    """The texts, the median of seconds to a first byte, and the mean of bytes per second."""
    firsts, texts, begin = list[float](), list[bytes](), time.perf_counter()
    for prompt in prompts:
        start, made = time.perf_counter(), bytearray()
        for token in write(prompt):
            if not made:
                firsts.append(time.perf_counter() - start)
            made.append(token)
        texts.append(bytes(made))
    return texts, statistics.median(firsts), sum(map(len, texts)) / (time.perf_counter() - begin)


def main() -> None:
    torch.manual_seed(0)
    model = SmallGpt()
    _, judged, console = trained(model, __doc__, 90)
    starts = torch.randint(SHARED, len(judged) - PROMPT, (PROMPTS,)).tolist()
    prompts = [[*judged[:SHARED].tolist(), *judged[s : s + PROMPT - SHARED].tolist()] for s in starts]
    plain = tilewright.Generator(model, max_length=LENGTH)
    lookup, store = tilewright.PromptLookup(drafts=7, ngram=4), tilewright.PrefixStore("64MB")
    generators = {
        "keys and values kept": plain,
        "and what the text said before drafted": tilewright.Generator(plain.stepper, speculation=lookup),
        "and beginnings kept": tilewright.Generator(plain.stepper, speculation=lookup, prefixes=store),
    }
    ways = {name: lambda prompt, g=g: g.stream(prompt, max_new_tokens=NEW) for name, g in generators.items()}
    for name, write in ways.items():  # steps are compiled when they are first needed
        timed(write, [[1] * SHARED + [end] * (PROMPT - SHARED) for end in (2, 3)])
        generators[name].statistics = type(plain.statistics)()
    results = {name: timed(write, prompts) for name, write in {"the whole model for every byte": rerun(model), **ways}.items()}

    for prompt, made in zip(prompts[:3], results["and beginnings kept"][0]):
        end, follows = (bytes(part).decode(errors="replace") for part in (prompt[SHARED:], made))
        console.print(f"  ...{end!r} goes on {follows!r}", highlight=False, markup=False)
    for name, generator in generators.items():
        console.print(f"{name}: {generator.statistics}", highlight=False)
    expected, first, rate = results["the whole model for every byte"]
    table = Table("", "first byte, ms", "bytes/s", "", "same texts", title=f"{PROMPTS} texts of {PROMPT} + {NEW} bytes")
    for name, (texts, ours, fast) in results.items():
        same = sum(a == b for a, b in zip(texts, expected))
        table.add_row(name, f"{1e3 * ours:.1f}", f"{fast:.0f}", f"{fast / rate:.1f}x", f"{same} of {PROMPTS}")
    console.print(table)


if __name__ == "__main__":
    main()
