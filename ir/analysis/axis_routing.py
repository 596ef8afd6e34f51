"""Rows that are sorted, worked on in groups, and put back: mixtures of experts. In the end each row is computed alone.

    ids, p = sort(experts of the tokens)      rows in the order p
    x' = x[p // k]                            row r is token p[r] // k                  parallel: each row reads its token
    ends = cumsum(count(ids == group))        how many rows each group has              read by the grouped product only
    y' = grouped_matmul(x', w, ends)          row r by its own expert
    y = y'[q], q[p[r]] = r                    every row back in its place               parallel

A sort gives its results the places of its operand in an order named after it; rows that are read back by the inverse lose it. All this
is parallel only if nothing reads the order itself, or counts, in another way: then the sort, or the sum that counts, is MIXING.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..graph import Graph, Node, is_scalar, scalar_value, users
from ..op import Category
from .axis_dims import is_every_index, quotient
from .places import PARALLEL, Along, End, Label, Link, mixing

SORTS = ("aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable")


def sort_of(node: Node) -> Node | None:
    """The sort of rows whose permutation this value is, element for element."""
    while node.op.name == "cast" or (node.op.name == "reshape" and node.tensor.rank == 1):
        node = node.inputs[0]
    if node.op.name == "item":
        made, index = node.inputs[0], node.attrs["index"]
        return made if _is_sort(made) and index == 1 else None
    return node if _is_sort(node) and not isinstance(node.type, tuple) else None


def _is_sort(node: Node) -> bool:
    return node.op.category is Category.EXTERN and node.attrs["target"] in SORTS and node.inputs[0].tensor.rank == 1


def source_rows(index: Node) -> tuple[Node, int] | None:
    """(sort, k) for an index that is the permutation of that sort divided by k: which source each sorted row comes from."""
    while index.op.name in ("cast", "reshape") and index.tensor.rank == 1 and sort_of(index) is None:
        index = index.inputs[0]
    if index.op.name == "floor_divide" and is_scalar(index.inputs[1]):
        sort, k = sort_of(index.inputs[0]), scalar_value(index.inputs[1])
        return (sort, k) if sort is not None and isinstance(k, int) and k > 0 else None
    sort = sort_of(index)
    return None if sort is None else (sort, 1)


def inverse_of(index: Node) -> Node | None:
    """The sort whose permutation this value inverts."""
    while index.op.name == "cast":
        index = index.inputs[0]
    if index.op.name == "index_put" and len(index.inputs) == 3 and not index.attrs["accumulate"]:
        value, at = index.inputs[1:]
        sort = sort_of(at)
        return sort if sort is not None and is_every_index(value, sort.inputs[0].shape[0]) and index.shape == value.shape else None
    outer = sort_of(index)
    return None if outer is None else sort_of(outer.inputs[0])


def puts_back(node: Node) -> bool:
    """Whether an index_put writes sorted rows where they came from, each once."""
    sort = sort_of(node.inputs[2]) if len(node.inputs) == 3 and node.attrs["dims"] == (0,) and not node.attrs["accumulate"] else None
    return sort is not None and sort.inputs[0].shape[0] == node.shape[0] == node.inputs[1].shape[0]


class Routing:
    """What of a graph is routing: which mixing links need not count."""

    def __init__(self, graph: Graph, ends: Mapping[Node, Mapping[End, Along]]) -> None:
        self.readers, self.ends = users(graph), ends
        self.returned = set(graph.roots)

    def label(self, node: Node, link: Link, ends: Mapping[End, Along]) -> Label:
        """The label of a mixing link, PARALLEL where rows are sorted, counted or read back."""
        if _is_sort(node):
            return self._sort(node)
        if node.op.name == "index" and self._reads_rows(node, ends):
            return PARALLEL
        if node.op.name == "sum" and self._counts(node):
            return PARALLEL
        return link.label

    def _sort(self, node: Node) -> Label:
        if sort_of(node.inputs[0]) is not None:
            return PARALLEL  # the inverse
        results = self.readers[node] if isinstance(node.type, tuple) else [node]
        orders = [r for r in results if sort_of(r) is node]
        reader = next((found for r in orders if (found := self._reads_order(r)) is not None), None)
        if reader is not None:
            return mixing(f"it is sorted, and {reader.op.name} reads the order")
        kept = any(along.order is node for n in self.returned for along in self.ends.get(n, {}).values())
        return mixing("it is sorted, and rows are not put back") if kept else PARALLEL

    def _reads_order(self, node: Node) -> Node | None:
        """A reader of a permutation, or of its inverse, that uses it as anything but rows to read or write."""
        if node in self.returned:
            return node
        for reader in self.readers[node]:
            if reader.op.name in ("cast", "reshape", "floor_divide", "item") or _is_sort(reader):
                found = self._reads_order(reader)
            elif reader.op.name == "index" and node is not reader.inputs[0]:
                found = None
            elif reader.op.name == "index_put" and node is not reader.inputs[1]:
                found = self._reads_order(reader) if inverse_of(reader) is not None else None if puts_back(reader) else reader
            else:
                found = reader
            if found is not None:
                return found
        return None

    def _reads_rows(self, node: Node, ends: Mapping[End, Along]) -> bool:
        """x[p // k], or y'[q]."""
        along = ends.get((0, node.attrs["dims"][0]))
        if along is None or len(node.inputs) != 2:
            return False
        inverse = inverse_of(node.inputs[1])
        if along.order is not None:
            return inverse is along.order
        found = source_rows(node.inputs[1])
        rows = None if found is None else self.ends.get(found[0], {}).get((0, 0))
        return rows is not None and rows.whole and rows.outer == along.outer and quotient(rows.inner, found[1]) == along.inner  # type: ignore[index]

    def _counts(self, node: Node) -> bool:
        """sum(ids == group) for each group, which is read as the ends of groups of rows in the order of these ids, and nowhere else."""
        equal = node.inputs[0]
        while equal.op.name == "cast":
            equal = equal.inputs[0]
        if equal.op.name != "eq" or node.tensor.rank != 1:
            return False
        ids, groups = (_viewed(x) for x in equal.inputs)
        if not is_every_index(groups, node.shape[0]):
            return False
        return self._are_ends(node, ids, 0)

    def _are_ends(self, node: Node, ids: Node, summed: int) -> bool:
        """Whether all readers are grouped products of rows sorted by `ids`, behind one cumsum."""
        if node in self.returned or not self.readers[node]:
            return False
        for reader in self.readers[node]:
            if reader.op.name == "grouped_matmul":
                order = self.ends.get(reader, {}).get((0, 0), Along()).order
                fits = reader.inputs[2] is node and summed == 1 and order is not None and _sorted_by(order, ids)
            else:
                fits = reader.op.name in ("cast", "cumsum") and self._are_ends(reader, ids, summed + (reader.op.name == "cumsum"))
            if not fits:
                return False
        return True


def _viewed(node: Node) -> Node:
    while node.op.name in ("reshape", "expand", "cast"):
        node = node.inputs[0]
    return node


def _sorted_by(sort: Node, ids: Node) -> bool:
    """Whether a sort is one of these ids, upwards, or yields them."""
    if sort.attrs["args"][2:3] == (True,) or dict(sort.attrs["kwargs"]).get("descending"):
        return False
    return (ids.op.name == "item" and ids.inputs[0] is sort) or _viewed(sort.inputs[0]) is ids
