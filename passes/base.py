"""The pass protocol: a frozen dataclass whose fields are its options, `Graph -> Graph`, and the notes it leaves for the receipt."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.graph import Graph, Node, Stage


class Exactness(enum.Enum):
    """EXACT keeps the function up to floating-point reassociation; BOUNDED changes it and needs an error budget."""

    EXACT = "exact"
    BOUNDED = "bounded"


class Reason(enum.Enum):
    """Why a rewrite was declined: the closed list that receipts draw from. The value is the sentence a user reads."""

    TILED_AXIS = "reduction over a tiled axis"
    DIFFERENT_SPACE = "the loops of the two have different extents"
    RECOMPUTE = "recomputation would cost more than the bytes saved"
    CYCLE = "fusing would make the kernels wait for each other"
    TOO_LARGE = "the kernel would grow too large"
    LIBRARY_CALL = "one side is a library call"
    NOT_EXPRESSIBLE = "no scalar form for this operation"
    RUNTIME_INTEGER_DIVISION = "integer division by a value known only at run time"
    UNSUPPORTED_DTYPE = "dtype without native arithmetic"
    NOT_CONSTANT = "an operand is not a constant"
    SHARED = "another consumer needs the original value"
    OVERWRITTEN = "it cannot be updated in place"
    DIFFERENT_DEVICE = "operands live on different devices"
    PROLOGUE = "an operand of a contraction is computed"
    SECOND_WALK = "one kernel walks one contraction or window"
    SHAPE_MISMATCH = "the shapes do not fit the pattern"
    LAYOUT = "the memory layout cannot be expressed in the index"
    NO_GAIN = "no gain by the cost model"
    SIGNED_ZERO = "the result would differ for -0.0"
    NOT_FINITE = "NaN and infinities would be lost"
    ROUNDING = "the result would be rounded differently"
    MEMORY = "the result takes more memory than what it is made of"
    STATE = "the operation depends on state of training"
    TRAINING = "gradients are recorded"
    WRITTEN = "the graph writes to it"
    RETURNED = "the graph returns its memory"
    CHANGES = "it changes between calls"


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


@dataclass
class Notes:
    """What passes did and declined, in order; handed in by the caller, never global."""

    applied: list[Applied] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)

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
