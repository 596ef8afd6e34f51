"""The pass protocol: a frozen dataclass whose fields are its options, `Graph -> Graph`, and the notes it leaves for the receipt."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.graph import Graph, Node, Stage
from ..ir.reasons import Reason


class Exactness(enum.Enum):
    """EXACT keeps the function up to floating-point reassociation; BOUNDED changes it and needs an error budget."""

    EXACT = "exact"
    BOUNDED = "bounded"


def describe(node: Node) -> str:
    """A node in a few words, for notes."""
    return f"{node.op.name} {node.hint}".rstrip()


@dataclass(frozen=True)
class Applied:
    """One rewrite that happened: by whom, to what (in words), where in the user's source, bytes of memory traffic saved."""

    rule: str
    what: str
    source: str = ""
    bytes_saved: int = 0


@dataclass(frozen=True)
class Declined:
    """One rewrite that did not: `value` is the guilty value in words."""

    rule: str
    what: str
    reason: Reason
    source: str = ""
    value: str = ""


@dataclass(frozen=True)
class Step:
    """What a pass does at one place: by which rule, to what (in words), where in the user's source and in which module.

    rule: "" for entering the pass: what it does to every graph, beside its rewrites.
    """

    item: str
    rule: str = ""
    what: str = ""
    source: str = ""


@dataclass
class Steps:
    """What passes do, step by step, and how far they may go: the same steps in the same order, up to the limit.

    limit: None is no limit. node: of the first step beyond it.
    """

    limit: int | None = None
    taken: list[Step] = field(default_factory=list)
    node: Node | None = None
    _item: str = ""

    def enter(self, item: str) -> bool:
        """Whether the pass may run at all."""
        self._item = item
        return self.take("")

    def take(self, rule: str, node: Node | None = None, what: str = "") -> bool:
        """Whether the next step may be taken; it then is."""
        if self.limit is not None and len(self.taken) >= self.limit:
            self.node = self.node or node
            return False
        where = (*node.prov.sources[:1], *node.prov.modules[:1]) if node else ()
        self.taken.append(Step(self._item, rule, what or (describe(node) if node else ""), " ".join(where)))
        return True


@dataclass
class Notes:
    """What passes did and declined, in order; handed in by the caller, never global. steps: counted where somebody asks for them."""

    applied: list[Applied] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    steps: Steps | None = None

    def may(self, rule: str, node: Node | None = None, what: str = "") -> bool:
        """Whether a rewrite that a pass has decided on is to be done: asked once for each, in an order that depends on the graph only."""
        return self.steps is None or self.steps.take(rule, node, what)

    def apply(self, rule: str, what: str, node: Node | None = None, bytes_saved: int = 0) -> None:
        self.applied.append(Applied(rule, what, node.prov.source if node else "", bytes_saved))

    def decline(self, rule: str, what: str, reason: Reason, node: Node | None = None, value: str = "") -> None:
        self.declined.append(Declined(rule, what, reason, node.prov.source if node else "", value))


@dataclass(frozen=True)
class Pass:
    """Base of all passes. A subclass is a frozen dataclass; its fields are the options of `--passes "name{field=value}"`.

    name: as on the command line. needs: the stage its input must have reached. leaves: the stage of its result (None: unchanged).
    """

    name: ClassVar[str]
    needs: ClassVar[Stage] = Stage.CANONICAL
    leaves: ClassVar[Stage | None] = None
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        """The rewritten graph; `notes` collects what was done and declined."""
        raise NotImplementedError
