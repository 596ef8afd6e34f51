"""Small models, files of them, and the command line run in this process: shared by the tests of the offline door."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

import torch
from tilewright.driver import cli
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, 16), nn.LayerNorm(16), nn.Linear(16, width)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.norm(self.up(x)))) + x


class Tokens(nn.Module):
    """ids, an optional mask and a number -> a dict with a tuple, None, a number and an input in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, mask=None, scale: float = 2.0):
        h = self.embedding(ids)
        h = h if mask is None else h * mask.unsqueeze(-1)
        return {"logits": self.head(h) * scale, "pooled": (h.mean(1), None), "layers": 3, "ids": ids}


class Running(nn.Module):
    """Updates two buffers as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        self.count.add_(1)
        self.average.mul_(0.9).add_(x.mean(0))
        return x - self.average, self.count * 2


class Nested(nn.Module):
    def forward(self, x, pair, *, options):
        return {"sum": x + pair[0] * pair[1], "list": [options["bias"] - 1.0, x]}


class Whole(nn.Module):
    def forward(self, a, b):
        return (a * b + 1) // 2, (a > b).sum(-1), a.argmax(-1)


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Table(nn.Module):
    """Positions up to 12."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(12, 4))

    def forward(self, x):
        return x + self.positions[: x.shape[1]]


def with_inputs():
    torch.manual_seed(0)
    return Mlp(), (torch.randn(3, 8),)


def with_keywords():
    return Tokens(), {"ids": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2, 2)}


def mlp():
    return Mlp()


def not_a_model():
    return 3


def fails():
    raise KeyError("weights")


branches, whole, tokens, table = Branches(), Whole(), Tokens(), Table()


def save_program(path: Path, module: nn.Module, args, kwargs=None, dynamic=None) -> Path:
    """Exports to a .pt2 file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic, strict=False), path)
    return path


def run(*arguments: object, command: str = "optimize") -> int:
    """The exit status of the command; the process is left as it was."""
    handler, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    try:
        with warnings.catch_warnings():
            cli._run([command, *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        import logging

        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGTERM, handler)
        warnings.showwarning = show
    raise AssertionError("the command did not exit")


def sentence(capsys) -> str:
    """What the command said on stderr: one line, no traceback."""
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text, text
    return text.removeprefix("error: ").strip()
