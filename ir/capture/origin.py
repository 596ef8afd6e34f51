"""Where an fx node came from: the user's line, the module path and a readable name, read from the node's `meta`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch.fx

from ..graph import Node
from ..op import Category
from ..provenance import NOWHERE, Provenance

_NAMED = (Category.CONTRACTION, Category.COMPOSITE, Category.GATHER)
_LOCAL = re.compile(r"^[LG]\['([^']*)'\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_LIBRARY = ("/torch/", "<eval_with_key>", "<frozen ")
_WRAPPERS = ("/transformers/utils/", "/transformers/modeling_layers.py", "/transformers/integrations/", "/transformers/pytorch_utils.py")
_PATH_NOISE = (
    (re.compile(r"L\['[^']*'\]"), ""),
    (re.compile(r"@\d+$"), ""),
    (re.compile(r"_(?:modules|parameters|buffers)\['([^']*)'\]"), r"\1"),
    (re.compile(r"\[['\"]?([^'\"\]]*)['\"]?\]"), r".\1"),
    (re.compile(r"\.{2,}"), "."),
)


def provenance(node: torch.fx.Node) -> Provenance:
    """The source line and module of an fx node, NOWHERE if it names neither."""
    source, module = source_line(node.meta), module_path(node.meta)
    if not source and not module:
        return NOWHERE
    return Provenance((source,) if source else (), (module,) if module else ())


def source_line(meta: dict[str, Any]) -> str:
    """ "model.py:41": the deepest frame that is not torch's. A model library's frame counts: it is where the model is written."""
    frames = [(path, line) for path, line in _FRAME.findall(meta.get("stack_trace") or "") if not any(part in path for part in _LIBRARY)]
    own = [f for f in frames if not any(part in f[0] for part in _WRAPPERS)] or frames
    return f"{PurePath(own[-1][0]).name}:{own[-1][1]}" if own else ""


def module_path(meta: dict[str, Any]) -> str:
    """ "encoder.layer.3.attention": the innermost module that ran the node."""
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    entries = list(stack.values())
    return clean_path(entries[-1][0]) if entries else ""


def clean_path(path: str) -> str:
    """A module or attribute path as the user would write it."""
    for pattern, by in _PATH_NOISE:
        path = pattern.sub(by, path)
    return path.strip(".")


def input_names(gm: torch.fx.GraphModule) -> tuple[str, ...]:
    """What the user calls each input of a Dynamo graph: "fc.weight", "input_ids"; "" where Dynamo does not say."""
    return tuple(_argument_name(node.meta.get("grapharg")) for node in gm.graph.nodes if node.op == "placeholder")


def _argument_name(argument: Any) -> str:
    name: Any = getattr(getattr(argument, "source", None), "name", "")
    path = str(name() if callable(name) else name)
    owned = any(kind in path for kind in ("_modules[", "_parameters[", "_buffers["))
    return "" if "(" in path else clean_path(path if owned else _LOCAL.sub(r"\1", path))


def input_hint(node: torch.fx.Node, names: Sequence[str]) -> str:
    """The name of a placeholder: by AOTAutograd's description of it, else its own."""
    description = node.meta.get("desc")
    position = getattr(description, "idx", None) if type(description).__name__ == "PlainAOTInput" else None
    known: Any = names[position] if position is not None and position < len(names) else getattr(description, "target", "")
    return identifier(clean_path(known or "")) or identifier(str(node.target)) or "x"


def value_hint(node: torch.fx.Node, made: Node) -> str:
    """The name of a value: the module's where the module is one op (a linear, a norm), else left to the op."""
    if made.op.category not in _NAMED:
        return ""
    path = module_path(node.meta).split(".")
    return identifier("_".join(path[-2:] if path[-1].isdigit() else path[-1:]))


def identifier(text: str) -> str:
    """A name for the text form: letters, digits and underscores."""
    name = re.sub(r"\W+", "_", text).strip("_")
    return f"_{name}" if name[:1].isdigit() else name
