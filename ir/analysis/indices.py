"""Index arithmetic: integer polynomials over axes and sizes, with exact floor division and modulo by range knowledge.

sympy is too slow and too eager for the thousands of index expressions of a model, so analyses compute in `Poly` and
convert at the end. `Ranges` knows 0 <= axis < extent and the ranges of size symbols; with it

    (384*i + j) // 384  ->  i        (384*i + j) % 384  ->  j        (s*i + j) // s  ->  i        where 0 <= j < 384, 0 <= j < s
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import sympy

from ..dims import Dim, FloorDiv, Mod, SymbolRange, symbol


class Quotient:
    """An atom `a // b`, `a % b`, `max(a, ...)` or `min(a, ...)` that did not simplify."""

    __slots__ = ("_hash", "args", "op", "text")

    def __init__(self, op: str, args: tuple[Poly, ...]) -> None:
        self.op, self.args = op, args
        self.text = f"({op} {' '.join(map(str, args))})"
        self._hash = hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quotient) and self.text == other.text

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.text


Atom = Union[str, Quotient]
Monomial = tuple[Atom, ...]


class Poly:
    """A sum of integer multiples of products of atoms (names of axes and sizes, and quotients); immutable."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms: dict[Monomial, int] = {m: c for m, c in terms.items() if c}
        self._hash = hash(frozenset(self.terms.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Poly) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return " + ".join("*".join([str(c), *map(str, m)]) for m, c in sorted(self.terms.items(), key=lambda t: str(t[0]))) or "0"

    __repr__ = __str__

    def __add__(self, other: Poly) -> Poly:
        if not self.terms or not other.terms:
            return other if not self.terms else self
        terms = dict(self.terms)
        for m, c in other.terms.items():
            terms[m] = terms.get(m, 0) + c
        return Poly(terms)

    def __neg__(self) -> Poly:
        return Poly({m: -c for m, c in self.terms.items()})

    def __sub__(self, other: Poly) -> Poly:
        return self + -other if other.terms else self

    def __mul__(self, other: Poly) -> Poly:
        if self == ONE or other == ONE:
            return other if self == ONE else self
        terms: dict[Monomial, int] = {}
        for m, c in self.terms.items():
            for n, d in other.terms.items():
                key = tuple(sorted(m + n, key=str)) if m and n else m or n
                terms[key] = terms.get(key, 0) + c * d
        return Poly(terms)

    @property
    def constant(self) -> int | None:
        """Its value where it is a plain number."""
        if not self.terms:
            return 0
        return self.terms.get(()) if len(self.terms) == 1 else None

    def names(self) -> frozenset[str]:
        """Axes and sizes it mentions."""
        return _names(self)

    def substitute(self, values: Mapping[str, Poly], ranges: Ranges) -> Poly:
        """With polynomials in place of names, quotients simplified anew."""
        if not self.names() & values.keys():
            return self
        total = ZERO
        for m, c in self.terms.items():
            term = const(c)
            for atom in m:
                term = term * _substitute_atom(atom, values, ranges)
            total = total + term
        return total


@functools.lru_cache(maxsize=65536)
def _names(p: Poly) -> frozenset[str]:
    found: set[str] = set()
    for m in p.terms:
        for atom in m:
            found |= {atom} if isinstance(atom, str) else frozenset().union(*(_names(a) for a in atom.args))
    return frozenset(found)


@functools.lru_cache(maxsize=65536)
def quotients(p: Poly) -> tuple[Quotient, ...]:
    """Every `//` and `%` in p, inner ones first."""
    found: dict[Quotient, None] = {}
    for m in p.terms:
        for atom in m:
            if isinstance(atom, Quotient):
                found.update(dict.fromkeys(q for a in atom.args for q in quotients(a)))
                if atom.op in ("//", "%"):
                    found[atom] = None
    return tuple(found)


def _substitute_atom(atom: Atom, values: Mapping[str, Poly], ranges: Ranges) -> Poly:
    if isinstance(atom, str):
        return values.get(atom) or variable(atom)
    args = tuple(a.substitute(values, ranges) for a in atom.args)
    if atom.op == "//":
        return ranges.floordiv(*args)
    return ranges.mod(*args) if atom.op == "%" else Poly({(Quotient(atom.op, args),): 1})


ZERO = Poly({})
ONE = Poly({(): 1})


def const(value: int) -> Poly:
    return Poly({(): value})


def variable(name: str) -> Poly:
    return Poly({(name,): 1})


@functools.lru_cache(maxsize=65536)
def poly(value: Dim) -> Poly:
    """A dim as a polynomial."""
    if isinstance(value, int) or value.is_Integer:
        return const(int(value))
    if value.is_Symbol:
        return variable(value.name)  # type: ignore[attr-defined]
    args: tuple[Any, ...] = value.args
    if value.is_Add:
        return functools.reduce(Poly.__add__, map(poly, args))
    if value.is_Mul:
        return functools.reduce(Poly.__mul__, map(poly, args))
    if value.is_Pow and args[1].is_Integer and int(args[1]) > 0:
        return functools.reduce(Poly.__mul__, [poly(args[0])] * int(args[1]))
    op = {FloorDiv: "//", Mod: "%", sympy.Max: "max", sympy.Min: "min"}.get(type(value))
    if op is None:
        raise TypeError(f"{value} is not an integer function of sizes")
    return Poly({(Quotient(op, tuple(map(poly, args))),): 1})


_SYMPY: dict[str, Any] = {"//": FloorDiv, "%": Mod, "max": sympy.Max, "min": sympy.Min}


@functools.lru_cache(maxsize=65536)
def expression(p: Poly) -> sympy.Expr:
    """The polynomial as a sympy expression over `dims.symbol` names."""
    terms = []
    for m, c in p.terms.items():
        factors = [symbol(a) if isinstance(a, str) else _SYMPY[a.op](*map(expression, a.args)) for a in m]
        terms.append(sympy.Mul(sympy.Integer(c), *factors))
    return sympy.Add(*terms)


def linear(index: Sequence[Poly], shape: Sequence[Poly]) -> Poly:
    """Row-major position of `index` in `shape`."""
    total = ZERO
    for i, d in zip(index, shape):
        total = total * d + i
    return total


def product(shape: Iterable[Poly]) -> Poly:
    return functools.reduce(Poly.__mul__, shape, ONE)


@dataclass(frozen=True)
class Bounds:
    """lo <= value <= hi, both polynomials in sizes."""

    lo: Poly
    hi: Poly


class Ranges:
    """What is known of the names in index expressions: axes (and computed positions) by extent, sizes by their `SymbolRange`."""

    def __init__(self, symbols: Mapping[str, SymbolRange]) -> None:
        self.symbols = symbols
        self.extents: dict[str, Poly] = {}
        self._quotients: dict[tuple[str, Poly, Poly], Poly] = {}
        self._bounds: dict[Poly, Bounds | None] = {}

    def add(self, name: str, extent: Poly) -> Poly:
        """Declares 0 <= name < extent; returns the variable."""
        if name in self.extents:  # what was concluded from the old extent no longer holds
            self._quotients.clear()
            self._bounds.clear()
        self.extents[name] = extent
        return variable(name)

    def inside(self, p: Poly, extent: Poly) -> bool:
        """Provably 0 <= p < extent."""
        return self.at_least(p, ZERO) and self.below(p, extent)

    def at_least(self, p: Poly, low: Poly) -> bool:
        bounds = self.bounds(p)
        return bounds is not None and self._nonnegative(bounds.lo - low)

    def below(self, p: Poly, extent: Poly) -> bool:
        bounds = self.bounds(p)
        return bounds is not None and self._nonnegative(extent - ONE - bounds.hi)

    def bounds(self, p: Poly) -> Bounds | None:
        """Least and greatest value in terms of sizes; None where unknown."""
        if p not in self._bounds:
            self._bounds[p] = self._find_bounds(p)
        return self._bounds[p]

    def _find_bounds(self, p: Poly) -> Bounds | None:
        lo = hi = ZERO
        for m, c in p.terms.items():
            low = high = const(c)
            for atom in m:
                known = self._atom_bounds(atom)
                if known is None:
                    return None
                low, high = low * known.lo, high * known.hi
            lo, hi = (lo + low, hi + high) if c > 0 else (lo + high, hi + low)
        return Bounds(lo, hi)

    def _atom_bounds(self, atom: Atom) -> Bounds | None:
        """Bounds of an atom that is never negative, else None."""
        if isinstance(atom, str):
            extent = self.extents.get(atom)
            return Bounds(variable(atom), variable(atom)) if extent is None else Bounds(ZERO, extent - ONE)
        inner = self.bounds(atom.args[0])
        if atom.op == "%":
            small = inner is not None and self._nonnegative(inner.lo) and self._nonnegative(atom.args[1] - inner.hi)
            return Bounds(ZERO, inner.hi if small and inner else atom.args[1] - ONE)
        if atom.op != "//":
            alone = Poly({(atom,): 1})
            return Bounds(alone, alone)
        if inner is None or not self._nonnegative(inner.lo):
            return None
        high, divisor = inner.hi.constant, atom.args[1].constant
        if divisor and high is not None:
            return Bounds(ZERO, const(high // divisor))
        return Bounds(ZERO, self.floordiv(inner.hi, atom.args[1]) if not inner.hi.names() & self.extents.keys() else inner.hi)

    def _nonnegative(self, p: Poly) -> bool:
        """Provably >= 0 for all sizes: every term is, after each symbol s is written as lo + s'."""
        if all(c >= 0 for c in p.terms.values()):
            return True
        shifted = ZERO
        for m, c in p.terms.items():
            term = const(c)
            for atom in m:
                term = term * self._shifted(atom)
            shifted = shifted + term
        if all(c >= 0 for c in shifted.terms.values()):
            return True
        lows = [self._least(m, c) for m, c in p.terms.items()]
        return all(low is not None for low in lows) and sum(low or 0 for low in lows) >= 0

    def _shifted(self, atom: Atom) -> Poly:
        known = self.symbols.get(atom) if isinstance(atom, str) else None
        own = Poly({(atom,): 1})
        return own + const(known.lo) if known and known.lo else own

    def _least(self, m: Monomial, c: int) -> int | None:
        value = c
        for atom in m:
            known = self.symbols.get(atom) if isinstance(atom, str) else None
            bound = (known.lo if known else 0) if c > 0 else (known.hi if known else None)
            if bound is None:
                return None
            value *= bound
        return value

    def floordiv(self, p: Poly, d: Poly) -> Poly:
        return self._quotient("//", p, d)

    def mod(self, p: Poly, d: Poly) -> Poly:
        return self._quotient("%", p, d)

    def _quotient(self, op: str, p: Poly, d: Poly) -> Poly:
        key = (op, p, d)
        if key not in self._quotients:
            self._quotients[key] = (self._floordiv if op == "//" else self._mod)(p, d)
        return self._quotients[key]

    def _floordiv(self, p: Poly, d: Poly) -> Poly:
        if d == ONE or not d.terms:  # division by zero happens only where there is no point at all
            return p if d == ONE else ZERO
        if self.inside(p, d):
            return ZERO
        whole, rest = divide(p, d)
        if whole.terms:
            return whole + self.floordiv(rest, d)
        common = self._common(p, d)
        if common is not None:
            a, _, b, _ = common
            return self.floordiv(a, b)
        inner = _single(p)
        if inner is not None and inner.op == "//":
            return self.floordiv(inner.args[0], inner.args[1] * d)
        return Poly({(Quotient("//", (p, d)),): 1})

    def _mod(self, p: Poly, d: Poly) -> Poly:
        if d == ONE or not d.terms:
            return ZERO
        if self.inside(p, d):
            return p
        whole, rest = divide(p, d)
        if whole.terms:
            return self.mod(rest, d)
        common = self._common(p, d)
        if common is not None:
            a, r, b, g = common
            return g * self.mod(a, b) + r
        inner = _single(p)
        if inner is not None and inner.op == "%" and not divide(inner.args[1], d)[1].terms:
            return self.mod(inner.args[0], d)
        return Poly({(Quotient("%", (p, d)),): 1})

    def _common(self, p: Poly, d: Poly) -> tuple[Poly, Poly, Poly, Poly] | None:
        """(a, r, b, g) with p == g*a + r, d == g*b and 0 <= r < g, for the largest g that is not 1."""
        if len(d.terms) != 1:
            return None
        ((dm, dc),) = d.terms.items()
        candidates = {_divisor(m, c, dm, dc, self.extents) for m, c in p.terms.items() if m}
        for gm, gc in sorted(candidates, key=lambda t: (len(t[0]), t[1]), reverse=True):
            g = Poly({gm: gc})
            if g in (ONE, d):
                continue
            a, r = divide(p, g)
            if a.terms and self.inside(r, g):
                return a, r, divide(d, g)[0], g
        return None

    def delinearize(self, position: Poly, shape: Sequence[Poly]) -> tuple[Poly, ...]:
        """The index in `shape` of row-major `position`."""
        index: list[Poly] = []
        for d in reversed(shape[1:]):
            index.append(self.mod(position, d))
            position = self.floordiv(position, d)
        return (position, *reversed(index)) if shape else ()

    def recombine(self, p: Poly) -> Poly:
        """Puts split positions together again: d*(a // d) + a % d -> a."""
        changed = True
        while changed:
            changed = False
            for m, c in p.terms.items():
                better = next((q for q in (self._join(p, m, c, atom) for atom in m) if q is not None), None)
                if better is not None:
                    p, changed = better, True
                    break
        return p

    def _join(self, p: Poly, m: Monomial, c: int, atom: Atom) -> Poly | None:
        if not isinstance(atom, Quotient) or atom.op != "%":
            return None
        a, d = atom.args
        beside = list(m)
        beside.remove(atom)
        scale = Poly({tuple(beside): c})
        high = self.floordiv(a, d)
        wanted = scale * d * high
        if wanted.terms and all(p.terms.get(k) == v for k, v in wanted.terms.items()):
            return p - Poly({m: c}) - wanted + scale * a
        for other in {x for n in p.terms for x in n if isinstance(x, Quotient) and x.op == "%" and x.args[0] == high}:
            wanted = scale * d * Poly({(other,): 1})
            if all(p.terms.get(k) == v for k, v in wanted.terms.items()):
                return p - Poly({m: c}) - wanted + scale * self.mod(a, d * other.args[1])
        return None


def _single(p: Poly) -> Quotient | None:
    """The quotient that p consists of, if it is one."""
    if len(p.terms) != 1:
        return None
    ((m, c),) = p.terms.items()
    return m[0] if c == 1 and len(m) == 1 and isinstance(m[0], Quotient) else None


def _divisor(m: Monomial, c: int, dm: Monomial, dc: int, axes: Mapping[str, Poly]) -> tuple[Monomial, int]:
    """The greatest common divisor of a term and the monomial dc*dm."""
    rest, shared = list(dm), []
    for atom in m:
        if atom in rest and atom not in axes:
            rest.remove(atom)
            shared.append(atom)
    return tuple(shared), math.gcd(c, dc)


def divide(p: Poly, d: Poly) -> tuple[Poly, Poly]:
    """(q, r) with p == q*d + r, q as large as the terms of p show."""
    lead, leading = max(d.terms.items(), key=lambda t: (len(t[0]), str(t[0])))
    whole, rest = ZERO, p
    for _ in range(8):
        part = Poly({q: n for q, n in (_term_quotient(m, c, lead, leading) for m, c in rest.terms.items()) if n})
        if not part.terms:
            break
        whole, rest = whole + part, rest - part * d
    return whole, rest


def _term_quotient(m: Monomial, c: int, lead: Monomial, leading: int) -> tuple[Monomial, int]:
    left = list(m)
    for atom in lead:
        if atom not in left:
            return (), 0
        left.remove(atom)
    if not m:
        return (), c // leading
    size = abs(c) // abs(leading)
    return tuple(left), size if (c > 0) == (leading > 0) else -size
