"""Where a node came from: the user's source lines, the module path, and the rules that made it. Survives every rewrite (union)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """`sources`: "model.py:41"; `modules`: "encoder.layer.3.attention.q"; `rules`: names of the rewrites that made the node."""

    sources: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    def union(self, *others: Provenance) -> Provenance:
        if all(o is self or o == NOWHERE for o in others):
            return self
        return Provenance(*(_merge(getattr(self, f), *(getattr(o, f) for o in others)) for f in ("sources", "modules", "rules")))

    def with_rule(self, rule: str) -> Provenance:
        return self if rule in self.rules else Provenance(self.sources, self.modules, (*self.rules, rule))

    @property
    def source(self) -> str:
        return self.sources[0] if self.sources else ""

    def __str__(self) -> str:
        """`model.py:41,model.py:42 fc,act <rule>`; what this notation would misread is written `source="..."`. `read` inverts it."""
        sources = ",".join(x if _SOURCE.fullmatch(x) else f"source={json.dumps(x)}" for x in self.sources)
        modules = ",".join(x if _MODULE.fullmatch(x) and not _SOURCE.fullmatch(x) else f"module={json.dumps(x)}" for x in self.modules)
        rules = " ".join(f"<{x}>" if _RULE.fullmatch(x) else f"rule={json.dumps(x)}" for x in self.rules)
        return " ".join(p for p in (sources, modules, rules) if p)

    @classmethod
    def read(cls, text: str) -> Provenance:
        """The provenance that prints as `text`; words that are no sources are modules."""
        found: dict[str, list[str]] = {"source": [], "module": [], "rule": []}
        for key, quoted, rule, word in _ENTRY.findall(text):
            if key:
                found[key].append(json.loads(quoted))
            elif rule:
                found["rule"].append(rule)
            else:
                found["source" if _SOURCE.fullmatch(word) else "module"].append(word)
        return cls(*(tuple(found[k]) for k in ("source", "module", "rule"))) if any(found.values()) else NOWHERE


_SOURCE = re.compile(r"[^\s,<>\"=]+:\d+")
_MODULE = re.compile(r"[^\s,<>\"=]+")
_RULE = re.compile(r"[^\s<>\"]+(?: [^\s<>\"]+)*")
_ENTRY = re.compile(r"(source|module|rule)=(\"(?:[^\"\\]|\\.)*\")|<([^<>\"]+)>|([^\s,<>\"=]+)")
NOWHERE = Provenance()


def _merge(*tuples: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(x for t in tuples for x in t))
