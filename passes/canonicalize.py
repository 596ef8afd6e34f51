"""`canonicalize`: one way to write each thing, so that later passes need to look for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Graph, Node, Stage
from ..ir.rewrite import rewrite
from .algebra import ALGEBRA
from .base import Notes, Pass
from .contraction_rules import CONTRACTION_RULES
from .rules import rules_at, settle
from .view_rules import VIEW_RULES

RULES = rules_at("canonicalize", VIEW_RULES, ALGEBRA, CONTRACTION_RULES)
"""Tried in that order at each op. The docstring of a rule is its picture."""


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
        return settle(plain, RULES, notes or Notes(), stage=max(graph.stage, Stage.CANONICAL))


def without_layout(node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """Only what leaves the graph has a layout: operands do without."""
    if all(i.op.name != "layout" for i in inputs):
        return None
    return node.with_inputs(tuple(_values(i) for i in inputs))


def _values(node: Node) -> Node:
    while node.op.name == "layout":
        node = node.inputs[0]
    return node
