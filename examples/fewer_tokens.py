"""A small vision transformer with fewer tokens and blocks: how far a limit of error goes in time, and what it does to accuracy.

python examples/fewer_tokens.py
"""

from __future__ import annotations

import tilewright
import torch
from digits_bits import ViT, train, wrong
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

ERRORS = (0.05, 0.1, 0.2, 0.4)
ALLOWED = (("merge-tokens",), ("merge-tokens", "remove-blocks"))


def main() -> None:
    torch.manual_seed(0)
    console = Console(width=150)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    learned, judged = order[:1200], order[1200:]
    console.print(f"training a ViT on {len(learned)} digits")
    model = train(ViT(), images[learned], labels[learned], 60)
    loss = wrong(images[judged], labels[judged])
    calibration = [(images[part],) for part in learned.split(len(judged)) if len(part) == len(judged)]
    table = Table("error allowed", "error", "what was done", "accuracy", "before", "time", title="Digits with fewer tokens and blocks")
    for rewrites in ALLOWED:
        for allowed in ERRORS:
            console.print(f"  {', '.join(rewrites)} within {allowed:g}", highlight=False)
            small = tilewright.simplify(model, (images[judged],), max_error=allowed, calibration=calibration, rewrites=rewrites)
            spent = small.receipt.spent
            done = "; ".join(a.what.removeprefix("encoder.") for a in small.receipt.applied if a.rule in ("merge-tokens", "prune-blocks"))
            accuracy = f"{1 - loss(small):.2%}", f"{1 - loss(model):.2%}"
            table.add_row(f"{allowed:g}", f"{spent.error:.3f}", done or "nothing", *accuracy, f"{spent.seconds / spent.exact_seconds:.0%}")
    console.print(table)


if __name__ == "__main__":
    main()
