"""`canonicalize`: one way to write each thing, so that later passes need to look for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Graph, Node, Stage
from ..ir.rewrite import rewrite
from .algebra import ALGEBRA
from .base import Notes, Pass
from .contraction_rules import CONTRACTION_RULES
from .local import Rule, settle
from .view_rules import VIEW_RULES


def merged(*tables: Mapping[str, tuple[Rule, ...]]) -> dict[str, tuple[Rule, ...]]:
    """One table of rules; where several have rules for an op, those of the first come first."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: tuple(rule for table in tables for rule in table.get(name, ())) for name in names}


RULES = merged(VIEW_RULES, ALGEBRA, CONTRACTION_RULES)
"""Op name -> the rules tried at it, in order. The docstring of a rule is its picture."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Algebra, composition of views and products by weights, each by a local rule; equal nodes merge, unused ones vanish.

        w2 = permute(w, dims=[1, 0])
        h  = reshape(x, shape=[b * s, k])
        m  = matmul(h, w2)
        y  = add(m, bias)                       -->    y = linear(x, w, bias)
        r  = reshape(y, shape=[b, s, n])               return y
        z  = mul(r, 1)
        return z

    Bitwise exact for pointwise ops (NaN, infinities and -0.0 included, dtypes kept), up to the order of summation for contractions.
    """

    name: ClassVar[str] = "canonicalize"
    needs: ClassVar[Stage] = Stage.CAPTURED
    leaves: ClassVar[Stage | None] = Stage.CANONICAL

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        plain = rewrite(graph, without_layout)
        return settle(plain, self.name, RULES, notes or Notes(), stage=max(graph.stage, Stage.CANONICAL))


def without_layout(node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """Only what leaves the graph has a layout: operands do without."""
    if all(i.op.name != "layout" for i in inputs):
        return None
    return node.with_inputs(tuple(_values(i) for i in inputs))


def _values(node: Node) -> Node:
    while node.op.name == "layout":
        node = node.inputs[0]
    return node
