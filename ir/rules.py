"""The rule engine: rules are tried at every node, operands first, until none applies; a trace says what applied and what nearly did.

A rule is a function from one node to what replaces it, or a pattern over several nodes with a rewrite and a check:

    Rule("neg-of-neg", ("neg",), lambda node, site: node.inputs[0].inputs[0] if node.inputs[0].op.name == "neg" else None)
    pattern_rule("neg-of-neg", pat("neg", pat("neg", Var("x"))), lambda m: m["x"])

A function says in fewer words what depends on the attributes, types and numbers of one node; a pattern shows the shape of many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Union

from .errors import TilewrightError
from .graph import Graph, Node, use_counts, visit
from .patterns import Matcher, Pat, Refusal, Trial
from .provenance import Provenance
from .rewrite import cleaned, rewrite, structural_key
from .types import same_type, type_source

Outcome = Union[Node, Refusal, None]


class Site:
    """Where rules are being tried: how often each value is needed, counting the nodes that read it, outputs and write-backs."""

    def __init__(self, uses: dict[Node, int]) -> None:
        self.uses = uses
        self.matched: tuple[Node, ...] = ()
        self._root: Node | None = None
        self._root_uses = 0

    def enter(self, root: Node, uses: int) -> None:
        """`root` is the node to rewrite from now on; no value of the new graph has counted its readers yet."""
        self._root, self._root_uses, self.matched = root, uses, ()

    def count(self, node: Node) -> int | None:
        """The number of readers; None or 0 while that is unknown, for a value made in the current sweep: the next sweep asks again."""
        return self._root_uses if node is self._root else self.uses.get(node)

    def single(self, node: Node) -> bool:
        """Known to have exactly one reader."""
        return self.count(node) == 1

    def shared(self, node: Node) -> bool:
        """Known to have several readers."""
        return (self.count(node) or 0) > 1


# -- rules


@dataclass(frozen=True)
class Rule:
    """A rewrite, tried at nodes of `ops`.

    attempt(node, site): what replaces the node, of the same type; a Refusal that says why not; None where there is nothing to do.
    """

    name: str
    ops: tuple[str, ...]
    attempt: Callable[[Node, Site], Outcome]


class Match:
    """What a pattern matched: `match["x"]` is the value bound to a name, `root` the matched root, `nodes` all matched nodes."""

    def __init__(self, root: Node, trial: Trial, site: Site) -> None:
        self.root = root
        self.nodes = trial.nodes
        self._bound = trial.bound
        self._site = site

    def __getitem__(self, name: str) -> Any:
        return self._bound[name]

    def get(self, name: str) -> Any:
        return self._bound.get(name)

    def single(self, name: str) -> bool:
        """The value bound to `name` has exactly one reader, as far as known."""
        return self._site.single(self._bound[name])

    def escaping(self, *more: Node) -> Node | None:
        """An inner matched node (or one of `more`, found by a check) that something outside of the match reads too, or may read."""
        inner = set(self.nodes) | set(more)
        for node in inner - {self.root}:
            if self._site.count(node) != sum(node in reader.inputs for reader in inner):
                return node
        return None


def pattern_rule(name: str, pattern: Pat, rewrite: Callable[[Match], Node], check: Callable[[Match], bool | Refusal] | None = None) -> Rule:
    """`rewrite(match)` replaces the root wherever `pattern` matches and `check(match)` is True; otherwise it gives a Refusal."""

    def attempt(node: Node, site: Site) -> Outcome:
        matcher = Matcher()
        for trial in matcher.match(pattern, node, Trial()):
            match = Match(node, trial, site)
            answer = check(match) if check else True
            if answer is True:
                site.matched = match.nodes
                return rewrite(match)
            if not isinstance(answer, Refusal):
                raise RuleError(node.prov.source, rule=name, reason=f"answered {answer!r} where True or a Refusal is due")
            matcher.refusal = answer
        return matcher.refusal

    return Rule(name, pattern.ops, attempt)


class RuleError(TilewrightError):
    """A rule is wrong: that is a defect of this package, not of the model."""

    template = "rule {rule!r} {reason}"


@dataclass(frozen=True)
class Applied:
    """One rewrite: the rule, the root it matched, and what it made of that."""

    rule: str
    before: Node
    after: Node


@dataclass(frozen=True)
class Missed:
    """The nearest miss of a rule: what it was refused for at a node."""

    rule: str
    node: Node
    refusal: Refusal


@dataclass
class Tracer:
    """Collects what `apply_rules` did. `missed` holds the refusals that stand in the final graph.

    may(rule, node): whether a rule that applies there is to be applied.
    """

    applied: list[Applied] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    may: Callable[[str, Node], bool] = lambda rule, node: True


# -- the driver

MAX_STEPS = 50
"""Rewrites of one node within a sweep, and sweeps over a graph, before rules count as looping."""


def apply_rules(graph: Graph, rules: Sequence[Rule], tracer: Tracer | None = None, **changes: Any) -> Graph:
    """The graph on which none of `rules` applies any more; `changes` replace fields of the result (`stage=`).

    Rules are tried in order; what a rule makes carries its name and the origins of all that it replaces. Raises RuleError, with the
    rule's name, for rules that loop or change a type.
    """
    index: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.ops:
            index.setdefault(op, []).append(rule)
    trace = Tracer() if tracer is None else tracer
    graph = cleaned(graph)  # equal nodes are one before uses are counted
    fired: list[str] = []
    for _ in range(MAX_STEPS):
        sweep = _Sweep(graph, index, trace)
        graph = rewrite(graph, sweep, **changes)
        if not sweep.fired:
            trace.missed += sweep.missed
            return graph
        fired = sweep.fired
    raise RuleError(rule=_names(fired), reason=f"still rewrites graph {graph.name!r} after {MAX_STEPS} sweeps: it loops")


def _names(fired: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(fired))


class _Sweep:
    """One pass over a graph, operands first, as the callback of `rewrite`; each node is rewritten until no rule for its op applies."""

    def __init__(self, graph: Graph, index: Mapping[str, list[Rule]], trace: Tracer) -> None:
        self.index = index
        self.trace = trace
        self.fired: list[str] = []
        self.missed: list[Missed] = []
        self.old_uses = use_counts(graph)
        self.site = Site({})
        self.followed: set[Node] = set()

    def __call__(self, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        self._follow(node, inputs)
        current = node if inputs == node.inputs else node.with_inputs(inputs)
        for _ in range(MAX_STEPS):
            made = self._step(current, self.old_uses[node])
            if made is None:
                return current
            current = made
        raise RuleError(node.prov.source, rule=_names(self.fired[-MAX_STEPS:]), reason=f"keeps rewriting {node}: it loops")

    def _follow(self, node: Node, inputs: tuple[Node, ...]) -> None:
        """The readers of a new operand are those of the old nodes that became it."""
        uses = self.site.uses
        for old, new in zip(node.inputs, inputs):
            if old not in self.followed:
                self.followed.add(old)
                uses[new] = uses.get(new, 0) + self.old_uses[old]

    def _step(self, node: Node, uses: int) -> Node | None:
        """What the first rule that applies makes of the node."""
        missed: list[Missed] = []
        for rule in self.index.get(node.op.name, ()):
            self.site.enter(node, uses)
            outcome = rule.attempt(node, self.site)
            if isinstance(outcome, Refusal):
                missed.append(Missed(rule.name, node, outcome))
            elif outcome is not None and self.trace.may(rule.name, node):
                return self._replaced(rule, node, outcome)
        self.missed += missed
        return None

    def _replaced(self, rule: Rule, root: Node, made: Node) -> Node:
        self.fired.append(rule.name)
        if not same_type(made.type, root.type):
            reason = f"turns {type_source(root.type)} of {root} into {type_source(made.type)} of {made}"
            raise RuleError(root.prov.source, rule=rule.name, reason=reason)
        if structural_key(made) == structural_key(root):
            raise RuleError(root.prov.source, rule=rule.name, reason=f"yields what it matched, {root}: it loops")
        marked = _marked(made, root, rule.name, self.site)
        self.trace.applied.append(Applied(rule.name, root, marked))
        return marked


def _marked(made: Node, root: Node, rule: str, site: Site) -> Node:
    """`made` with its new nodes marked by the rule and by the origins of all that it replaces; the root keeps its name.

    New is what the graph does not hold; a check may have reached beyond its pattern.
    """
    fresh: list[Node] = []
    visit(made, set(), fresh, site.uses)
    if not fresh:
        return made
    replaced = site.matched or _between(root, fresh)
    origin = Provenance().union(*(n.prov for n in replaced)).with_rule(rule)
    new: dict[Node, Node] = {}
    for node in fresh:
        inputs = tuple(new.get(i, i) for i in node.inputs)
        prov = node.prov if node.op.name in ("scalar", "input") else node.prov.union(origin)
        hint = root.hint if node is made and not node.hint else node.hint
        new[node] = replace(node, inputs=inputs, prov=prov, hint=hint)
        site.uses.setdefault(new[node], 0)
    return new[made]


_DEPTH = 3
"""How far below its root a function looks, at most."""


def _between(root: Node, fresh: Sequence[Node]) -> list[Node]:
    """What a function replaced: the nodes on the ways from its root down to the operands that its result still reads."""
    made = set(fresh)
    kept = {i for node in fresh for i in node.inputs if i not in made}
    found: list[Node] = []
    _leads_to(kept, root, _DEPTH, found)
    return list(dict.fromkeys((root, *found)))


def _leads_to(kept: set[Node], node: Node, depth: int, found: list[Node]) -> bool:
    """Whether a node of `kept` lies at or at most so deep under `node`; adds the nodes above it to `found`."""
    if node in kept or not depth:
        return node in kept
    leads = [_leads_to(kept, i, depth - 1, found) for i in node.inputs]
    if any(leads):
        found.append(node)
    return any(leads)
