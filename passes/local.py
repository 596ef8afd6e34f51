"""Local rules: a function from one node to what replaces it, indexed by the op at its root, driven to a fixpoint.

Where `ir/rules.py` matches shapes of several nodes, these rules decide by attributes, types and numbers of one node and its operands;
a function with guard clauses says that in fewer words than a pattern with a check, and is not even tried at other ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Union

from ..ir.errors import TilewrightError
from ..ir.graph import Graph, Node, users
from ..ir.ops import OPS
from ..ir.provenance import NOWHERE
from ..ir.rewrite import rewrite
from ..ir.rules import Refusal
from .base import Notes


class Site:
    """Where a rule is being tried: makes nodes that remember where they come from, and knows how often a value is needed."""

    def __init__(self, graph: Graph) -> None:
        self.uses = {node: len(readers) for node, readers in users(graph).items()}
        for root in graph.roots:
            self.uses[root] += 1
        self.node: Node | None = None
        self.label = ""
        self.made: set[Node] = set()
        self.followed: set[Node] = set()

    def make(self, op: str, *operands: Any, **attrs: Any) -> Node:
        """A node of that op in place of the one being rewritten; it inherits its provenance."""
        prov = self.node.prov.with_rule(self.label) if self.node else NOWHERE
        node = OPS[op](*operands, prov=prov, **attrs)
        self.made.add(node)
        return node

    def follow(self, node: Node, inputs: tuple[Node, ...]) -> None:
        """`inputs` stand for the operands of the old `node` from now on; their readers are those of all that they stand for."""
        for old, new in zip(node.inputs, inputs):
            if new is not old and old not in self.followed:
                self.followed.add(old)
                self.uses[new] = self.uses.get(new, 0) + self.uses[old]

    def single(self, node: Node) -> bool:
        """Exactly one reader. False for a value made by the rule before this one: it is looked at again in the next round."""
        return self.uses.get(node) == 1

    def shared(self, node: Node) -> bool:
        """Known to have several readers (counting outputs and write-backs)."""
        return self.uses.get(node, 1) > 1


Rule = Callable[[Node, Site], "Node | Refusal | None"]
Table = Mapping[str, "tuple[Rule, ...]"]
Outcome = Union[Node, Refusal, None]

_MAX_ROUNDS = 64
_MAX_STEPS = 32


class EndlessRewriteError(TilewrightError):
    """The rules of a table undo each other."""

    template = "pass {name!r} does not come to rest: rule {rule!r} keeps rewriting {node}"


def settle(graph: Graph, name: str, table: Table, notes: Notes, **changes: Any) -> Graph:
    """The graph on which no rule of `table` (op name -> rules tried in order) applies any more; `changes` as for `rewrite`.

    What was applied goes to `notes` under "name.rule"; of the refusals, those of the last sweep. Raises EndlessRewriteError.
    """
    sweep = None
    for _ in range(_MAX_ROUNDS):
        sweep = _Sweep(name, table, notes, Site(graph))
        graph = rewrite(graph, sweep, **changes)
        if not sweep.last:
            for label, node, refusal in sweep.refusals:
                notes.decline(label, describe(node), refusal.reason, node, str(refusal.value or ""))
            return graph
    raise EndlessRewriteError(name=name, rule=sweep.last if sweep else "", node=graph.name)


class _Sweep:
    """One pass over the nodes, operands first; each node is rewritten until no rule for its op applies."""

    def __init__(self, name: str, table: Table, notes: Notes, site: Site) -> None:
        self.name, self.table, self.notes, self.site = name, table, notes, site
        self.refusals: list[tuple[str, Node, Refusal]] = []
        self.last = ""

    def __call__(self, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        self.site.follow(node, inputs)
        current = node if inputs == node.inputs else node.with_inputs(inputs)
        for _ in range(_MAX_STEPS):
            made = self._step(current)
            if made is None:
                return current
            current = made
        raise EndlessRewriteError(node.prov.source, name=self.name, rule=self.last, node=describe(node))

    def _step(self, node: Node) -> Node | None:
        site = self.site
        refused = []
        for rule in self.table.get(node.op.name, ()):
            site.node, site.label = node, f"{self.name}.{rule_name(rule)}"
            outcome = rule(node, site)
            if isinstance(outcome, Refusal):
                refused.append((site.label, node, outcome))
            elif outcome is not None and outcome is not node:
                self.last = site.label
                self.notes.apply(site.label, describe(node), node)
                return replace(outcome, hint=node.hint) if outcome in site.made and node.hint else outcome
        self.refusals += refused
        return None


def rule_name(rule: Rule) -> str:
    return getattr(rule, "__name__", "rule").strip("_").replace("_", "-")


def describe(node: Node) -> str:
    """A node in a few words, for notes."""
    return f"{node.op.name} {node.hint}".rstrip()
