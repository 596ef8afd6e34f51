"""`prune-blocks`: residual units that change little are left out, or compute with the weights of a neighbour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.analysis.residuals import Unit, units
from ..ir.graph import Graph, Node
from ..ir.reasons import Reason
from ..ir.rewrite import rewrite
from .base import Exactness, Notes, Pass


@dataclass(frozen=True)
class PruneBlocks(Pass):
    """A residual unit is removed, or takes the weights of the unit before it that is its equal but for weights.

        x = add(h, attention(norm(h)))                                         x = add(h, attention(norm(h)))
        y = add(x, mlp1(norm(x)))           removed: mlp1, shared: mlp2 -->
        z = add(y, attention(norm(y)))                                         z = add(x, attention(norm(x)))
        u = add(z, mlp2(norm(z)))                                              u = add(z, mlp1(norm(z)))

    A unit is known by the module of the last product in it (`ir/analysis/residuals.py`). What is shared are matrices: norms and biases,
    which are small, stay its own. Both change what the model computes; who asks for them should know by how much.

    removed, shared: names of units. Source: "BlockPruner" (Zhong et al., 2024), whose units these are; sharing as in "FoldGPT" (Liu et
    al., 2024).
    """

    removed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    name: ClassVar[str] = "prune-blocks"
    exactness: ClassVar[Exactness] = Exactness.BOUNDED

    def run(self, graph: Graph, notes: Notes | None = None) -> Graph:
        notes = notes if notes is not None else Notes()
        if not self.removed and not self.shared:
            return graph
        found = units(graph)
        known = {unit.name for unit in found}
        for name in (n for n in dict.fromkeys((*self.removed, *self.shared)) if n not in known):
            notes.decline(self.name, name, Reason.SHAPE_MISMATCH, value=f"there is no such unit; there are {', '.join(sorted(known))}")
        gone = [u for u in found if u.name in self.removed and notes.may(self.name, u.result, f"remove {u.name}")]
        for unit in gone:
            notes.apply(self.name, f"{unit.name} is left out", unit.result)
        weights = self._shared([u for u in found if u not in gone], found, notes)
        kept = {u.result: u.result.inputs.index(u.kept) for u in gone}
        if not kept and not weights:
            return graph

        def rule(node: Node, inputs: tuple[Node, ...]) -> Node | None:
            return inputs[kept[node]] if node in kept else weights.get(node)

        return rewrite(graph, rule)

    def _shared(self, left: Sequence[Unit], found: Sequence[Unit], notes: Notes) -> Mapping[Node, Node]:
        """Matrix -> that of a neighbour. Of several in a row that share, all have the weights of the first."""
        replaced: dict[Node, Node] = {}
        for unit in (u for u in left if u.name in self.shared):
            model = neighbour(unit, found)
            if model is None:
                notes.decline(self.name, unit.name, Reason.SHAPE_MISMATCH, unit.result, "no unit before it is its equal but for weights")
            elif notes.may(self.name, unit.result, f"share {unit.name}"):
                pairs = matrices(unit, model)
                notes.apply(self.name, f"{unit.name} computes with {model.name}", unit.result)
                replaced |= {mine: replaced.get(other, other) for mine, other in pairs}
        return replaced


def neighbour(unit: Unit, found: Sequence[Unit]) -> Unit | None:
    """The last unit before this one that is equal to it modulo weights, and has matrices of its own."""
    before = found[: found.index(unit)]
    return next((u for u in reversed(before) if u.digest == unit.digest and matrices(unit, u)), None)


def matrices(unit: Unit, model: Unit) -> list[tuple[Node, Node]]:
    """The weights of two units that correspond, those with two dimensions and more."""
    pairs = zip(unit.branch, model.branch, strict=True)
    return [(a, b) for a, b in pairs if a.op.name == "constant" and a.tensor.rank > 1 and a is not b]
