"""Which Triton is here: asked before anything that imports it."""

from __future__ import annotations

import re
from importlib import import_module

LEAST = (3, 6)


def unusable() -> str:
    """What is wrong with the Triton of this machine, as the end of a sentence; "" where it can compile for us."""
    try:
        version = import_module("triton").__version__
    except ImportError:
        return "it is not installed"
    return f"this is {version}" if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < LEAST else ""


def needed(found: str) -> str:
    """The reason for what cannot be done, of what `unusable` found."""
    return f"it takes Triton {'.'.join(map(str, LEAST))} or later, and {found}; pip install triton"
