"""`python -m tilewright.ir.ops > docs/ops.md`: the table of all ops, made from their definitions."""

from __future__ import annotations

import inspect

import torch

from ..op import Category, Op
from . import OPS

_HEAD = """# The ops

One line per op, made by `python -m tilewright.ir.ops` from the definitions in `ir/ops/`. Operands are values; attributes are constants
of the node. What has no op here runs as `extern`, by ATen.
"""


def table() -> str:
    """The text of docs/ops.md."""
    parts = [_HEAD]
    for category in Category:
        rows = [_row(op) for op in OPS.values() if op.category is category]
        if rows:
            parts.append("\n".join((f"## {category.value}\n", "| op | operands | attributes | meaning |", "|---|---|---|---|", *rows, "")))
    return "\n".join(parts)


def _row(op: Op) -> str:
    required = inspect.Parameter.empty
    attributes = ", ".join(k if v is required else f"{k}={v}" for k, v in op.attributes.items())
    return f"| `{op.name}` | {_operands(op)} | {attributes} | {_meaning(op)} |"


def _operands(op: Op) -> str:
    """Operand names: of the element expression for pointwise ops, else of `infer`; optional ones in brackets."""
    parameters = inspect.signature(op.scalar or op.infer).parameters.values()
    shown = [_operand(p) for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    return ", ".join(shown)


def _operand(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"{parameter.name}..."
    return parameter.name if parameter.default is inspect.Parameter.empty else f"[{parameter.name}]"


def _meaning(op: Op) -> str:
    text = _NOTES.get(op.name) or inspect.getdoc(op.infer)
    if text:
        return text.splitlines()[0].replace("|", "\\|")
    place = next((m for m in ("torch", "torch.nn.functional") if hasattr(_MODULES[m], op.name)), "")
    return f"`{place}.{op.name}`" if place else ""


_NOTES = {
    "trunc_divide": "`torch.div(x, y, rounding_mode='trunc')`",
    "input": "a graph input",
    "scalar": "a Python number or size; promotes weakly",
}
_MODULES = {"torch": torch, "torch.nn.functional": torch.nn.functional}

if __name__ == "__main__":
    print(table(), end="")
