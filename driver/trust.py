"""What a file may ask for. A model file is data from strangers: whatever in it could become code, or reach a file, is refused by name.

An artifact is text that we parse and weights that we map; a `.pt2` is JSON that torch parses. Three ways lead from such text to code, and
each is closed here: operators that touch files, words that end up in generated source, and expressions that torch evaluates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch._C import PyTorchFileReader
from torch.utils._pytree import tree_leaves

from ..ir.graph import Graph, Node, order

NAMESPACES = frozenset({"aten", "prims"})
"""Operators of these come with torch and compute on tensors."""

FILE_OPERATORS = ("aten.from_file", "aten.save", "aten.load", "debugprims.")
"""Operators that read or write files, by the beginning of their name."""

_PLAIN = re.compile(r"[\w .,+\-<>/:@]*")  # no quote, bracket or line break: such a word can call nothing wherever it is printed


def unsafe_in_graph(graph: Graph, allowed: Collection[str] = ()) -> str | None:
    """Why a graph read from a file must not be run, or None. allowed: further namespaces of operators."""
    for node in all_nodes(graph):
        target = node.attrs["target"] if node.op.name == "extern" else "aten."
        if target.startswith(FILE_OPERATORS):
            return f"it calls {target}, which reaches files"
        if target.split(".")[0] not in NAMESPACES | set(allowed):
            namespace = target.split(".")[0]
            return f"it calls {target}, which is not torch's own; import what defines it and load with operators=({namespace!r},)"
        odd = next((w for w in _words(node) if not _PLAIN.fullmatch(w)), None)
        if odd is not None:
            return f"its graph holds the word {odd[:40]!r}, which tilewright never writes there"
    return None


def all_nodes(graph: Graph) -> Iterator[Node]:
    """Those of regions too."""
    for node in order(graph):
        yield node
        for value in node.attrs.values():
            if isinstance(value, Graph):
                yield from all_nodes(value)


def _words(node: Node) -> Iterator[str]:
    """Every string of a node that may be printed outside quotes."""
    yield node.hint
    if node.op.name != "extern":  # its arguments are printed as quoted literals
        yield from (v for v in tree_leaves(list(node.attrs.values())) if isinstance(v, str))


# -- .pt2

_SYMPY = (
    "Symbol|Integer|Rational|Float|Mul|Add|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv|TruncToInt|"
    "TruncToFloat|RoundToInt|RoundDecimal|FloorToInt|CeilToInt|ToFloat|ModularIndexing|Where|PowByNatural|FloatPow|LShift|RShift|"
    "Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|Piecewise|Identity|"
    "BitwiseFn_[a-z_]+|OpaqueUnaryFn_[a-z0-9]+|precision"
)
_WORD = rf"Symbol\('\w+'|(?:{_SYMPY}|[a-z]{{1,4}}\d+|positive|negative|nonnegative|integer|real|zero|True|False|true|false|int_oo|oo)\b"
_EXPRESSION = re.compile(rf"(?:{_WORD}|\d+(?:\.\d*)?(?:e[+-]?\d+)?|[-+*/%(), <>=!&|~])*")
_NAME = re.compile(r"[\w.$\-/]*")
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(?:\.\w+)?|_operator\.\w+|math\.\w+|torch\._?sym_\w+|torch\._sym_\w+")

_STRINGS: Mapping[str, Callable[[str], Any]] = {
    "expr_str": _EXPRESSION.fullmatch,  # torch gives these to sympy, which evaluates them as Python
    "target": lambda text: _OPERATOR.fullmatch(text) and not text.removeprefix("torch.ops.").startswith(FILE_OPERATORS),
    "as_operator": lambda text: _OPERATOR.fullmatch(text),
    "in_spec": lambda text: "__enum__" not in text and "\\u" not in text,  # torch imports the module that an enum names
    "out_spec": lambda text: "__enum__" not in text and "\\u" not in text,
} | dict.fromkeys(
    ("name", "as_name", "graph_name", "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"), _NAME.fullmatch
)  # fmt: skip
"""Key of a program's JSON -> what its strings may be. Names become identifiers and attribute paths of generated Python."""


def unsafe_in_program(path: str) -> str | None:
    """What in a .pt2 archive would run code when it is read, in words; None if nothing does.

    Raises RuntimeError, ValueError or AttributeError for a damaged one.
    """
    reader: Any = PyTorchFileReader(path)
    names = reader.get_all_records()
    if len({n.lower() for n in names}) != len(names):
        return "two members of one name"
    compiled = [n for n in names if "aotinductor" in n.lower()]
    if compiled:
        return f"compiled code ({compiled[0]})"
    for name in names:
        found = _unsafe_member(name, reader)
        if found:
            return found
    return None


def _unsafe_member(name: str, reader: Any) -> str | None:
    if name == "version":
        return "a program in the format of torch 2.7"
    if name.endswith("_constants_config.json"):
        entries = json.loads(reader.get_record(name)).get("config", {})
        odd = [k for k, meta in entries.items() if not str(meta.get("path_name", "")).startswith("tensor_")]
        return f"the pickled object {odd[0]!r}" if odd else None
    if name.startswith("models/"):
        strings = _strings(json.loads(reader.get_record(name)))
        return next((f"the {key} {text[:60]!r}" for key, text in strings if not _STRINGS[key](text)), None)
    return None


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """The strings of a JSON document that a rule is about."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            stack += [v for v in item.values() if not isinstance(v, str)]
            yield from ((k, v) for k, v in item.items() if isinstance(v, str) and k in _STRINGS)
