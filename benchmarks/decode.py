"""A step of decoding derived from a plain model, against running the whole model again, and against a cache written by hand.

    python benchmarks/decode.py [--rounds 20] [--layers 12] [--out benchmarks/results/decode.json]

A model like Llama of 110 million random weights (12 layers of 768, 12 heads, a vocabulary of 32000), one text of 512 tokens, one thread,
CPU time. All forms are timed in one run, round by round, and the least time of a call counts: the derived step, with weights and with
keys and values in several formats; the whole model over 512 tokens, compiled by us and eager; the same model written by hand with a
static cache, compiled by Inductor as it comes and with its freezing of weights. Errors are those of the last logits against float64,
relative to the largest.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tilewright.driver.compile import compile_graph
from tilewright.driver.stepping import Stepper, stepper
from tilewright.ir.sizes import with_sizes
from tilewright.search.device import identity
from torch import nn
from torch.nn import functional as F

LENGTH, WIDTH, HEADS, INNER, VOCAB = 512, 768, 12, 2048, 32000
COLUMNS = WIDTH // HEADS
FORMS: dict[str, dict[str, Any]] = {
    "derived": {},
    "derived, int4-g64 weights": {"plan": "int4-g64"},
    "derived, int8 weights": {"plan": "int8"},
    "derived, int8 keys and values": {"kv": "int8"},
}
WHOLE, EAGER = "the whole model again", "the whole model again, eager"
BY_HAND, FROZEN = "by hand, Inductor", "by hand, Inductor with freezing"
WHOLE_ROUNDS = 3


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Layer(nn.Module):
    """With `cache`, keys and values of earlier tokens are in it, and those of this one are written to `position`."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Any = None, position: Any = None) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, COLUMNS)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = (c.index_copy_(2, position, t) for c, t in zip(cache, (k, v)))
            y = F.scaled_dot_product_attention(q, keys, values, (torch.arange(LENGTH) <= position)[None])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.after(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """tokens [b, s] -> logits; with `caches`, of one token at `position` [1]."""

    def __init__(self, layers: int, length: int = LENGTH) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(WIDTH, 1e-6), nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, COLUMNS, 2) / COLUMNS)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for p in self.parameters():
            p.requires_grad_(False)
            if p.dim() > 1:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, tokens: torch.Tensor, caches: Any = None, position: Any = None) -> torch.Tensor:
        x = self.tokens(tokens)
        cos, sin = (t[: tokens.shape[1]] if position is None else t[position] for t in (self.cos, self.sin))
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if caches is None else caches[i], position)
        return self.head(self.norm(x))


Form = dict[str, Any]


def derived(model: Model, text: torch.Tensor, options: dict[str, Any]) -> Form:
    """The text is read in one step but for the last token, which is the step that is timed."""
    steps = stepper(model, text, **options)
    state = steps.state(1)
    steps.step(text[:, :-1], torch.zeros(1, dtype=torch.int64), state)
    position = torch.tensor([text.shape[1] - 1])
    size = sum(t.nbytes for t in state.tensors)
    return {"run": lambda: steps.step(text[:, -1:], position, state)[0, -1], "state_mb": size / 1e6, "steps": steps}


def whole(steps: Stepper, text: torch.Tensor) -> Form:
    (batch,) = steps.graph.symbols
    program = compile_graph(with_sizes(steps.graph, {batch: 1})).program
    return {"run": lambda: program([text])[0][0, -1], "rounds": WHOLE_ROUNDS}


def by_hand(model: Model, text: torch.Tensor, freezing: bool) -> Form:
    caches = [tuple(torch.zeros(1, HEADS, LENGTH, COLUMNS) for _ in range(2)) for _ in model.layers]
    step = torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": freezing})
    with torch.no_grad():
        for i in range(LENGTH - 1 - 4, LENGTH - 1):  # what lies before does not change the time
            step(text[:, i : i + 1], caches, torch.tensor([i]))
    position = torch.tensor([LENGTH - 1])
    return {"run": lambda: step(text[:, -1:], caches, position)[0, -1], "errs": False}


def seconds(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measured(layers: int, rounds: int, forms: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model, text = Model(layers).eval(), torch.randint(0, VOCAB, (1, LENGTH))
    exact = copy.deepcopy(model).double()(text)[0, -1]
    made = {name: derived(model, text, options) for name, options in forms.items()}
    made[WHOLE] = whole(made["derived"]["steps"], text)
    made[EAGER] = {"run": lambda: model(text)[0, -1], "rounds": WHOLE_ROUNDS}
    made[BY_HAND], made[FROZEN] = by_hand(model, text, False), by_hand(model, text, True)
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        for i in range(rounds):
            for name, form in made.items():
                if i < form.get("rounds", rounds):
                    times[name].append(seconds(form["run"]))
        base, peer = min(times["derived"]), min(*times[BY_HAND], *times[FROZEN])
        return {
            name: {
                "ms": 1e3 * min(times[name]),
                "times_derived": base / min(times[name]),
                "times_peer": peer / min(times[name]),
                "error": float((form["run"]() - exact).abs().max() / exact.abs().max()) if form.get("errs", True) else 0.0,
                "state_mb": form.get("state_mb", 0.0),
            }
            for name, form in made.items()
        }


def markdown(results: dict[str, Any]) -> str:
    lines = [f"{results['machine']}, torch {results['torch']}; {results['layers']} layers, context {LENGTH}.", ""]
    lines += ["| form | ms a token | of the derived step's speed | of the best by hand | error | MB of state |", "| --- " * 6 + "|"]
    for name, row in results["rows"].items():
        error = f"{row['error']:.1e}" if row["error"] else ""
        state = f"{row['state_mb']:.1f}" if row["state_mb"] else ""
        lines.append(f"| {name} | {row['ms']:.2f} | {row['times_derived']:.3f} | {row['times_peer']:.2f} | {error} | {state} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(options.layers, options.rounds, FORMS)
    results = {"machine": identity(), "torch": torch.__version__, "layers": options.layers, "rows": rows}
    print(markdown(results))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
