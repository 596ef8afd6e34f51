"""`Op`: one definition per operation - types (`infer`), meaning (`eager`), price (`cost`), element (`scalar`) or expansion (`expand`)."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import sympy

from .dims import Dim, dim
from .errors import TypeInferenceError
from .provenance import NOWHERE, Provenance
from .types import TensorType, Type

if TYPE_CHECKING:
    from .graph import Node


class Category(enum.Enum):
    """How code generation treats an op."""

    POINTWISE = "pointwise"  # out[i] from in[i]; has `scalar`
    REDUCTION = "reduction"  # drops or keeps-as-1 the axes in attribute `dims`
    SCAN = "scan"  # cumulative along attribute `dim`
    VIEW = "view"  # out[i] = in[f(i)], f known at compile time; never computes
    GATHER = "gather"  # reads or writes at positions given by integer operands
    CONTRACTION = "contraction"  # matmul, linear, convolution
    RECURRENCE = "recurrence"  # a layer's steps one after the other, each reading the state of the one before
    COMPOSITE = "composite"  # has `expand` into the others
    CONSTANT = "constant"  # constants, fills, ranges, inputs
    EXTERN = "extern"  # run by ATen
    STRUCTURE = "structure"  # region, item: how other nodes are grouped


@dataclass(frozen=True)
class Cost:
    """flops: arithmetic operations; bytes: memory read and written once. Dims, so symbolic sizes stay symbolic."""

    flops: Dim = 0
    bytes: Dim = 0


@dataclass(frozen=True, eq=False)
class Op:
    """An operation; calling it on nodes builds a typed node: `y = add(x, 1.0)`.

    infer(*types, **attrs) -> Type: positional parameters are operands (`TensorType` or `ScalarType`), keyword-only ones are the
        attributes with their defaults; raises ValueError or IndexError with the reason where the op is undefined.
    eager(*tensors, **attrs) -> Tensor: the meaning, by torch. Scalars arrive as Python numbers.
    cost(types, out, attrs) -> Cost: for the ideal implementation; default counts one flop per output element.
    scalar(*scalars, **attrs) -> Scalar: element expression of a pointwise op, operands already promoted and in compute dtype.
    expand(*nodes, **attrs) -> Node: a composite in terms of other ops; one node for each of its results if it has several.
    """

    name: str
    category: Category
    infer: Callable[..., Type]
    eager: Callable[..., Any]
    cost_rule: Callable[..., Cost] | None = None
    scalar: Callable[..., Any] | None = None
    expand: Callable[..., Node | tuple[Node, ...]] | None = None
    commutative: bool = False

    def __call__(self, *operands: Any, hint: str = "", prov: Provenance = NOWHERE, **attrs: Any) -> Node:
        """A node of this op; Python numbers and sizes become `scalar` nodes. Raises TypeInferenceError."""
        from .graph import Node, lift

        inputs = tuple(lift(x) for x in operands)
        full = self.complete(attrs)
        return Node(self, inputs, full, self.infer_type(tuple(n.type for n in inputs), full, prov), hint, prov)

    def infer_type(self, types: tuple[Type, ...], attrs: Mapping[str, Any], prov: Provenance = NOWHERE) -> Type:
        try:
            return self.infer(*types, **attrs)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
            shown = ", ".join(str(t) for t in types)
            raise TypeInferenceError(prov.source, op=self.name, operands=f"({shown})", reason=error) from error

    def complete(self, attrs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Attributes in the order of the definition, defaults filled in, lists frozen to tuples."""
        unknown = set(attrs) - set(self.attributes)
        if unknown:
            raise TypeInferenceError(op=self.name, operands=f"attribute {sorted(unknown)[0]!r}", reason="it has no such attribute")
        full = {k: _freeze(attrs.get(k, default)) for k, default in self.attributes.items()}
        missing = [k for k, v in full.items() if v is inspect.Parameter.empty]
        if missing:
            raise TypeInferenceError(op=self.name, operands=f"no {missing[0]!r}", reason="that attribute is required")
        return MappingProxyType(full)

    @functools.cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Attribute name -> default (inspect.Parameter.empty where required), read from the signature of `infer`."""
        parameters = inspect.signature(self.infer).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def cost(self, types: tuple[Type, ...], out: Type, attrs: Mapping[str, Any]) -> Cost:
        return self.cost_rule(types, out, attrs) if self.cost_rule else streaming_cost(types, out)

    def __repr__(self) -> str:
        return f"Op({self.name})"


def streaming_cost(types: tuple[Type, ...], out: Type, flops_per_element: int = 1) -> Cost:
    """Every operand read once, every result written once."""
    outs = out if isinstance(out, tuple) else (out,)
    moved = [t.nbytes for t in (*types, *outs) if isinstance(t, TensorType)]
    elements = [t.numel for t in outs if isinstance(t, TensorType)]
    return Cost(dim(flops_per_element * sum(elements)), dim(sum(moved)))


def no_cost(types: tuple[Type, ...], out: Type, attrs: Mapping[str, Any]) -> Cost:
    return Cost()


def _freeze(value: Any) -> Any:
    """Immutable and in normal form: tuples for lists, plain integers for constant sizes."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    return dim(value) if isinstance(value, sympy.Expr) else value
