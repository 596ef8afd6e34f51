"""The text form: deterministic, readable, parses back."""

from __future__ import annotations

from .parser import parse
from .printer import name_nodes, print_graph, print_nodes, value_source

__all__ = ["name_nodes", "parse", "print_graph", "print_nodes", "value_source"]
