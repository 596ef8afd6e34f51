"""The rule engine: `pattern` / `check` / `rewrite`, driven to a fixpoint, with a trace of what applied and what nearly did.

    MERGE = Rule(
        "double-neg",
        pat("neg", pat("neg", Var("x"))),
        rewrite=lambda m: m["x"],
    )
    graph = apply_rules(graph, [MERGE], tracer := Tracer())

A pattern is matched from its root down against operands already rewritten. Commutative ops match in either order.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Union

from .errors import TilewrightError
from .graph import Graph, Node, users, visit
from .ops import OPS
from .provenance import Provenance
from .rewrite import attr_key, cleaned, rewrite, structural_key
from .types import same_type, type_source

# -- patterns


@dataclass(frozen=True)
class Var:
    """Any value, bound to `name`; the same name twice means the same value. `where` may object with False or a Refusal."""

    name: str
    where: Callable[[Node], Any] | None = None


@dataclass(frozen=True)
class Rest:
    """All remaining operands (none, too), bound to `name` as a tuple; the last operand of a pattern only."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A scalar of exactly this value; a plain number in a pattern means this."""

    value: Any


@dataclass(frozen=True)
class Pat:
    """One of `ops` on operands; `attrs` gives the value of an attribute or a predicate on it."""

    ops: tuple[str, ...]
    operands: tuple[Any, ...]
    name: str
    attrs: Mapping[str, Any]


Pattern = Union[Var, Rest, Literal, Pat]


def pat(ops: str | tuple[str, ...], *operands: Any, name: str = "", attrs: Mapping[str, Any] | None = None) -> Pat:
    """A pattern: `pat("linear", Var("x"), Var("w"), name="lin")`, `pat(("relu", "gelu"), Var("x"))`, `pat("mul", Var("x"), 1.0)`.

    The matched node is bound to `name`. Raises KeyError for an unknown op.
    """
    names = (ops,) if isinstance(ops, str) else ops
    for op in names:
        OPS[op]
    return Pat(names, tuple(o if isinstance(o, (Var, Rest, Literal, Pat)) else Literal(o) for o in operands), name, attrs or {})


@dataclass(frozen=True)
class Refusal:
    """Why a rule that matched must not apply: a reason (from the caller's closed list, or a sentence) and the guilty value."""

    reason: Any
    value: Any = None

    def __bool__(self) -> bool:
        return False


class Match:
    """What a pattern matched: `match["x"]` is the value bound to a name, `root` the matched root, `nodes` all matched nodes."""

    def __init__(self, root: Node, bound: Mapping[str, Any], nodes: tuple[Node, ...], uses: Mapping[Node, int]) -> None:
        self.root = root
        self.nodes = nodes
        self._bound = bound
        self._uses = uses

    def __getitem__(self, name: str) -> Any:
        return self._bound[name]

    def get(self, name: str) -> Any:
        return self._bound.get(name)

    def single(self, name: str) -> bool:
        """True if exactly one node, output or write-back reads the value bound to `name`.

        False while that is unknown, for a value made in the current sweep: the next sweep asks again.
        """
        return self._uses.get(self._bound[name]) == 1

    def escaping(self, *more: Node) -> Node | None:
        """An inner matched node (or one of `more`, found by a check) that something outside of the match reads too, or may read."""
        inner = set(self.nodes) | set(more)
        for node in inner - {self.root}:
            if self._uses.get(node) != sum(node in reader.inputs for reader in inner):
                return node
        return None


@dataclass(frozen=True)
class _Trial:
    """A partial match: immutable, so that alternatives do not disturb each other."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def bind(self, name: str, value: Any) -> _Trial | None:
        if not name:
            return self
        if name in self.bound:
            return self if self.bound[name] == value else None
        return replace(self, bound={**self.bound, name: value})


class _Matcher:
    """Enumerates the ways in which a pattern matches; keeps the last refusal of a `where` for the trace."""

    def __init__(self) -> None:
        self.refusal: Refusal | None = None

    def match(self, pattern: Pattern, node: Node, trial: _Trial) -> Iterator[_Trial]:
        if isinstance(pattern, Pat):
            yield from self._pat(pattern, node, trial)
        elif isinstance(pattern, Literal):
            if node.op.name == "scalar" and attr_key(node.attrs["value"]) == attr_key(pattern.value):
                yield trial
        elif isinstance(pattern, Var) and self._accepts(pattern, node):
            found = trial.bind(pattern.name, node)
            if found is not None:
                yield found

    def _accepts(self, pattern: Var, node: Node) -> bool:
        answer = pattern.where(node) if pattern.where else True
        if isinstance(answer, Refusal):
            self.refusal = answer
        return bool(answer)

    def _pat(self, pattern: Pat, node: Node, trial: _Trial) -> Iterator[_Trial]:
        if node.op.name not in pattern.ops or not _attributes_fit(pattern, node):
            return
        found = trial.bind(pattern.name, node)
        if found is None:
            return
        found = replace(found, nodes=(*found.nodes, node))
        for operands in _arrangements(pattern, node):
            yield from self._operands(pattern.operands, operands, found)

    def _operands(self, patterns: tuple[Pattern, ...], nodes: tuple[Node, ...], trial: _Trial) -> Iterator[_Trial]:
        if not patterns:
            if not nodes:
                yield trial
            return
        first = patterns[0]
        if isinstance(first, Rest):
            found = trial.bind(first.name, nodes)
            if found is not None:
                yield found
        elif nodes:
            for found in self.match(first, nodes[0], trial):
                yield from self._operands(patterns[1:], nodes[1:], found)


def _attributes_fit(pattern: Pat, node: Node) -> bool:
    for name, wanted in pattern.attrs.items():
        actual = node.attrs[name]
        if not (wanted(actual) if callable(wanted) else attr_key(actual) == attr_key(wanted)):
            return False
    return True


def _arrangements(pattern: Pat, node: Node) -> Iterator[tuple[Node, ...]]:
    yield node.inputs
    if node.op.commutative and len(node.inputs) == len(pattern.operands) == 2:
        yield node.inputs[::-1]


# -- rules


@dataclass(frozen=True)
class Rule:
    """`rewrite(match)` gives what replaces the root wherever `pattern` matches and `check(match)` is True.

    check: True, or a Refusal that says why not. The replacement must have the root's type.
    """

    name: str
    pattern: Pat
    rewrite: Callable[[Match], Node]
    check: Callable[[Match], bool | Refusal] | None = None


class RuleError(TilewrightError):
    """A rule is wrong: that is a defect of this package, not of the model."""

    template = "rule {rule!r} {reason}"


@dataclass(frozen=True)
class Applied:
    """One rewrite: the rule, what it matched and made, in words, and the source line of the matched root."""

    rule: str
    before: str
    after: str
    source: str


@dataclass(frozen=True)
class Missed:
    """The nearest miss of a rule at a node: it matched, and was refused."""

    rule: str
    node: Node
    refusal: Refusal
    source: str


@dataclass
class Tracer:
    """Collects what `apply_rules` did. `missed` holds the refusals that stand in the final graph."""

    applied: list[Applied] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)


MAX_STEPS = 50
"""Rewrites of one node within a sweep, and sweeps over a graph, before rules count as looping."""


def apply_rules(graph: Graph, rules: Sequence[Rule], tracer: Tracer | None = None) -> Graph:
    """The graph on which none of `rules` applies any more. Rules are tried in order; what a rule makes carries its name.

    Raises RuleError, with the rule's name, for rules that loop or change a type.
    """
    index: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.pattern.ops:
            index.setdefault(op, []).append(rule)
    trace = Tracer() if tracer is None else tracer
    graph = cleaned(graph)  # equal nodes are one before uses are counted
    fired: list[str] = []
    for _ in range(MAX_STEPS):
        sweep = _Sweep(graph, index, trace)
        graph = rewrite(graph, sweep)
        if not sweep.fired:
            trace.missed += sweep.missed
            return graph
        fired = sweep.fired
    raise RuleError(rule=_names(fired), reason=f"still rewrites graph {graph.name!r} after {MAX_STEPS} sweeps: it loops")


def _names(fired: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(fired))


class _Sweep:
    """One pass over a graph, operands first, as the callback of `rewrite`."""

    def __init__(self, graph: Graph, index: Mapping[str, list[Rule]], trace: Tracer) -> None:
        self.index = index
        self.trace = trace
        self.fired: list[str] = []
        self.missed: list[Missed] = []
        self.old_uses = {n: len(readers) for n, readers in users(graph).items()}
        for root in graph.roots:
            self.old_uses[root] += 1
        self.uses: dict[Node, int] = {}
        self.image: dict[Node, Node] = {}

    def __call__(self, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        self._correspond(node, inputs)
        current = node if inputs == node.inputs else node.with_inputs(inputs)
        for _ in range(MAX_STEPS):
            made = self._step(current, self.old_uses[node])
            if made is None:
                return current
            current = made
        raise RuleError(node.prov.source, rule=_names(self.fired[-MAX_STEPS:]), reason=f"keeps rewriting {node}: it loops")

    def _correspond(self, node: Node, inputs: tuple[Node, ...]) -> None:
        """The uses of an image are those of the old nodes that became it."""
        for old, new in zip(node.inputs, inputs):
            if old not in self.image:
                self.image[old] = new
                self.uses[new] = self.uses.get(new, 0) + self.old_uses[old]

    def _step(self, node: Node, uses: int) -> Node | None:
        """What the first rule that applies makes of the node."""
        missed: list[Missed] = []
        for rule in self.index.get(node.op.name, ()):
            found = self._try(rule, node, uses)
            if isinstance(found, Match):
                return self._rewritten(rule, found)
            if found is not None:
                missed.append(Missed(rule.name, node, found, node.prov.source))
        self.missed += missed
        return None

    def _try(self, rule: Rule, node: Node, uses: int) -> Match | Refusal | None:
        """The first match that the rule's check accepts, else the last refusal, else None."""
        matcher = _Matcher()
        for trial in matcher.match(rule.pattern, node, _Trial()):
            match = Match(node, trial.bound, trial.nodes, ChainMap({node: uses}, self.uses))
            answer = rule.check(match) if rule.check else True
            if answer is True:
                return match
            if not isinstance(answer, Refusal):
                raise RuleError(node.prov.source, rule=rule.name, reason=f"answered {answer!r} where True or a Refusal is due")
            matcher.refusal = answer
        return matcher.refusal

    def _rewritten(self, rule: Rule, match: Match) -> Node:
        root = match.root
        self.fired.append(rule.name)
        made = rule.rewrite(match)
        if not same_type(made.type, root.type):
            raise RuleError(
                root.prov.source, rule=rule.name, reason=f"turns {type_source(root.type)} of {root} into {type_source(made.type)} of {made}"
            )
        if structural_key(made) == structural_key(root):
            raise RuleError(root.prov.source, rule=rule.name, reason=f"yields what it matched, {root}: it loops")
        self.trace.applied.append(Applied(rule.name, repr(root), repr(made), root.prov.source))
        return _marked(made, match, rule.name, self.uses)


def _marked(made: Node, match: Match, rule: str, known: Container[Node]) -> Node:
    """The new nodes under `made` with the provenance of everything matched and the name of the rule; the root keeps its name.

    known: the nodes of the graph, which a check may have reached beyond the pattern.
    """
    fresh: list[Node] = []
    visit(made, set(), fresh, known)
    origin = Provenance().union(*(n.prov for n in match.nodes)).with_rule(rule)
    new: dict[Node, Node] = {}
    for node in fresh:
        inputs = tuple(new.get(i, i) for i in node.inputs)
        prov = node.prov if node.op.name in ("scalar", "input") else node.prov.union(origin)
        hint = match.root.hint if node is made and not node.hint else node.hint
        new[node] = replace(node, inputs=inputs, prov=prov, hint=hint)
    return new.get(made, made)
