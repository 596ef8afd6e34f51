"""Names of a kernel: readable and unique ones for its buffers, and the size symbols that it is passed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..ir.dims import free_symbols
from .kernel import Axis, Buffer, Load, Position, Store, scalars

RESERVED = frozenset(
    [
        "alignas",
        "auto",
        "bool",
        "break",
        "case",
        "catch",
        "char",
        "class",
        "const",
        "continue",
        "default",
        "delete",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "false",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "namespace",
        "new",
        "operator",
        "or",
        "private",
        "public",
        "register",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "template",
        "this",
        "throw",
        "true",
        "try",
        "typedef",
        "union",
        "unsigned",
        "using",
        "virtual",
        "void",
        "while",
        "and",
        "not",
        "xor",
        "def",
        "del",
        "elif",
        "except",
        "finally",
        "from",
        "global",
        "import",
        "in",
        "is",
        "lambda",
        "None",
        "nonlocal",
        "pass",
        "raise",
        "True",
        "False",
        "with",
        "yield",
        "assert",
        "async",
        "await",
    ]
)


def unique(hint: str, used: set[str]) -> str:
    """A name near `hint` that is not in `used`, which it joins."""
    base = re.sub(r"\W", "_", hint)
    base = base if base and not base[0].isdigit() and not base.startswith("_") else f"v{base}"
    name, k = base, 1
    while name in used:
        k += 1
        name = f"{base}_{k}"
    used.add(name)
    return name


def sizes_of(axes: Sequence[Axis], stores: Sequence[Store], buffers: Sequence[Buffer]) -> tuple[str, ...]:
    """Size symbols that extents, indices and buffers use, sorted."""
    used = [a.extent for a in axes] + [b.size for b in buffers] + [s.index for s in stores]
    used += [v.index for v in scalars(stores) if isinstance(v, (Load, Position))]
    computed = {n for v in scalars(stores) if isinstance(v, Load) for n, _ in v.indirect}
    return tuple(sorted({s.name for s in free_symbols(used)} - {a.name for a in axes} - computed))
