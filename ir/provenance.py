"""Where a node came from: the user's source lines, the module path, and the rules that made it. Survives every rewrite (union)."""

from __future__ import annotations

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
        parts = [",".join(self.sources), ",".join(self.modules), " ".join(f"<{r}>" for r in self.rules)]
        return " ".join(p for p in parts if p)


NOWHERE = Provenance()


def _merge(*tuples: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(x for t in tuples for x in t))
