"""`capture_fx`: walks a functional ATen fx graph and builds ours, op by op through the tables, everything else as `extern`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.fx
from torch._ops import HigherOrderOperator, OpOverload

from ..checks import assert_checks
from ..dims import Dim, contiguous_strides, free_symbols, same
from ..errors import CaptureError, TypeInferenceError
from ..graph import Data, Graph, Node, graph_input, lift, make_graph, order, visit
from ..op import Category
from ..ops import OPS
from ..types import NATIVE_DTYPES, ScalarType, TensorType, same_type
from .call import Call, Converter, cast
from .extern import extern, results, target_name
from .origin import identifier, input_hint, provenance, value_hint
from .sizes import Sizes
from .sparse import BlockMatrix, Opaque, block_matrix
from .tables import ASSERTIONS, EFFECT_FREE, NATIVE

TOGETHER = frozenset({"_c10d_functional", "_c10d_functional_autograd", "_dtensor"})
"""Of operators that several processes call together, in one order."""


@dataclass(frozen=True)
class Binding:
    """What the placeholders and return values of an fx graph stand for, where they are not just inputs and outputs.

    constants: placeholder or attribute -> the tensor behind it. ignored: placeholders nobody reads (literals of the call).
    aside: placeholders that are no values (meshes); where one is returned, None is. last: placeholders that become the graph's last
    inputs. written: position of a return value -> the placeholder it is written to.
    names: what the user calls the inputs, by the number AOTAutograd's descriptions give.
    """

    constants: Mapping[str, Data] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    aside: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    written: Mapping[int, str] = field(default_factory=dict)
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Captured:
    """A graph and how its outputs fill the fx graph's return values: for each the number of the graph's output, or None for None.

    checks: outputs that are assertions of the model (0-d conditions), with the message of the error where one is false.
    """

    graph: Graph
    returns: tuple[int | None, ...]
    checks: tuple[tuple[int, str], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the return values are the graph's outputs."""
        return not self.checks and self.returns == tuple(range(len(self.graph.outputs)))

    def restore(self, outputs: Sequence[Any]) -> list[Any]:
        """The fx graph's return values from those of the graph; raises RuntimeError where an assertion of the model fails."""
        assert_checks(self.checks, outputs)
        return [None if i is None else outputs[i] for i in self.returns]


def from_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any] = (), name: str = "graph", binding: Binding | None = None) -> Graph:
    """A functional ATen graph (AOTAutograd's: inference, forward or backward) as ours. See `capture_fx`."""
    return capture_fx(gm, example_inputs, name, binding).graph


def capture_fx(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any] = (), name: str = "graph", binding: Binding | None = None
) -> Captured:
    """`example_inputs` type the placeholders that carry no fake tensor.

    Raises CaptureError, with the reason, for what cannot be expressed at all; the caller then runs `gm` itself.
    """
    walker = _Walker(gm, tuple(example_inputs), binding or Binding())
    for node in gm.graph.nodes:
        walker.step(node)
    return walker.finish(name)


class _Walker:
    def __init__(self, gm: torch.fx.GraphModule, example_inputs: tuple[Any, ...], binding: Binding) -> None:
        self.gm = gm
        self.examples = iter(example_inputs)
        self.binding = binding
        self.sizes = Sizes()
        self.values: dict[torch.fx.Node, Any] = {}
        self.inputs: list[Node] = []
        self.late: list[Node] = []
        self.placeholders: dict[torch.fx.Node, Node] = {}
        self.writes: dict[Node, Node] = {}
        self.made: set[Node] = set()
        self.constants: dict[str, Node] = {}
        self.checks: list[tuple[Node, str]] = []
        self.draws = 0
        self.returned: tuple[Any, ...] = ()

    def step(self, node: torch.fx.Node) -> None:
        handler = getattr(self, f"_{node.op}", None)
        if handler is None:
            raise CaptureError(reason=f"the graph calls {node.op} {node.target}")
        handler(node)

    # leaves

    def _placeholder(self, node: torch.fx.Node) -> None:
        example = next(self.examples, None)
        if node.name in self.binding.ignored or node.name in self.binding.aside:
            self.values[node] = Opaque(f"the argument {node.name}, which is no tensor")
            return
        if node.name in self.binding.constants:
            self.values[node] = self._state(self.binding.constants[node.name], node)
            return
        value = node.meta.get("val", example)
        made = self._input(node, value)
        self.inputs.append(made)
        self.made.add(made)
        self.late += [made] if node.name in self.binding.last else []
        self.values[node] = self.placeholders[node] = made

    def _input(self, node: torch.fx.Node, value: Any) -> Node:
        hint = input_hint(node, self.binding.names)
        if isinstance(value, torch.Tensor):
            self._dense(node, value)
            return graph_input(hint, self.sizes.tensor_type(value), _uncommon_strides(value, self.sizes))
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            size = self.sizes.dim(value)
            return graph_input(hint, ScalarType(torch.int64, size))
        raise CaptureError(reason=f"input {node.name} is a {type(value).__name__}, neither a tensor nor a size")

    def _dense(self, node: torch.fx.Node, value: torch.Tensor) -> None:
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise CaptureError(reason=f"{node.name} is no dense tensor ({value.layout})")

    def _get_attr(self, node: torch.fx.Node) -> None:
        value = operator.attrgetter(str(node.target))(self.gm)
        if not isinstance(value, torch.Tensor):
            self.values[node] = Opaque(f"attribute {node.target} ({type(value).__name__})")
            return
        name = str(node.target)
        self.values[node] = self._state(self.binding.constants.get(name) or Data(name, value.detach()), node)

    def _state(self, data: Data, node: torch.fx.Node) -> Node | BlockMatrix:
        return block_matrix(data, lambda part: self._constant(part, node)) or self._constant(data, node)

    def _constant(self, data: Data, node: torch.fx.Node) -> Node:
        """One constant node per tensor."""
        if data.name not in self.constants:
            value = data.value if data.value is not None else node.meta["val"]
            self._dense(node, value)
            made = OPS["constant"](data=data, type=self.sizes.tensor_type(value), hint=identifier(data.name))
            self.constants[data.name] = made
            self.made.add(made)
        return self.constants[data.name]

    # calls

    def _call_function(self, node: torch.fx.Node) -> None:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(provenance(node).source, reason=f"higher-order operator {node.target}")
        if node.target is operator.getitem and isinstance(self.values.get(node.args[0]), list):  # type: ignore[arg-type]
            self.values[node] = self.values[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        value = node.meta.get("val")
        if isinstance(value, (bool, float, torch.SymBool, torch.SymFloat)):
            self.values[node] = Opaque(f"{node.name}, a {type(value).__name__}")
        elif isinstance(value, (int, torch.SymInt)):
            self.values[node] = self.sizes.dim(value)
        elif isinstance(node.target, OpOverload):
            self._aten(node, node.target)
        else:
            raise CaptureError(provenance(node).source, reason=f"the graph calls the Python function {node.target}")

    def _aten(self, node: torch.fx.Node, target: OpOverload) -> None:
        name = target_name(target)
        if name in EFFECT_FREE:
            return
        raw = _bind(target, node)
        if name in ASSERTIONS:
            self.checks.append((self._value(raw[0], node), str(raw[1]) if len(raw) > 1 else "assertion failed"))
            return
        if name == "aten.copy_.default" and raw[0] in self.placeholders:
            self._write(node, raw)
            return
        if target._schema.is_mutable:
            raise CaptureError(provenance(node).source, reason=f"{name} writes into its argument")
        args = tuple(self._value(a, node) for a in raw)
        value = node.meta.get("val")
        leaves = [value] if isinstance(value, torch.Tensor) else [v for v in _flat(value) if isinstance(v, torch.Tensor)]
        if not leaves:
            raise CaptureError(provenance(node).source, reason=f"{name} returns no tensor")
        for leaf in leaves:
            self._dense(node, leaf)
        call = Call(node, raw, tuple(self.sizes.tensor_type(v) for v in leaves), self.sizes, self.values.__getitem__)
        made = self._convert(call, NATIVE.get(name), args) or self._extern(call, args)
        made = self._stamped(made, node)
        self.values[node] = made[0] if isinstance(value, torch.Tensor) else self._structured(value, iter(made))

    def _structured(self, value: Any, leaves: Iterable[Node | None]) -> Any:
        """The op's results in the structure torch returns them in."""
        if isinstance(value, (list, tuple)):
            return [self._structured(v, leaves) for v in value]
        if isinstance(value, torch.Tensor):
            return next(iter(leaves))
        return self.sizes.dim(value) if isinstance(value, (int, torch.SymInt)) else value

    def _convert(self, call: Call, converter: Converter | None, args: tuple[Any, ...]) -> list[Node | None] | None:
        """The native form; None where there is none, or its type would not be the one torch promises."""
        if converter is None or not _native_types((*_tensor_types(args), *call.types)):
            return None
        try:
            made = converter(call, *args)
        except (TypeInferenceError, ValueError, IndexError):
            return None
        if made is None:
            return None
        leaves = list(made) if isinstance(made, tuple) else [made]
        fitted = [None if leaf is None else _fit(leaf, t) for leaf, t in zip(leaves, call.types)]
        missing = [i for i, leaf in enumerate(fitted) if leaf is None and (call.used(i) or leaves[i] is not None)]
        return None if missing or len(leaves) != len(call.types) else fitted

    def _extern(self, call: Call, args: tuple[Any, ...]) -> list[Node | None]:
        """Random draws, and what several processes do together, are numbered: they happen in the order of the program."""
        sequence, target = None, call.node.target
        if torch.Tag.nondeterministic_seeded in target.tags or target.namespace in TOGETHER:  # type: ignore[union-attr]
            sequence = self.draws
            self.draws += 1
        return list(results(extern(call, args, sequence), len(call.types)))

    def _write(self, node: torch.fx.Node, raw: tuple[Any, ...]) -> None:
        value = self._value(raw[1], node)
        self.values[raw[0]] = self.values[node] = self._written(self.placeholders[raw[0]], value, node)

    def _write_back(self, placeholder: str, value: torch.fx.Node) -> None:
        target = next(made for node, made in self.placeholders.items() if node.name == placeholder)
        self._written(target, self.values[value], value)

    def _written(self, target: Node, value: Node, node: torch.fx.Node) -> Node:
        """`value` as the input's new contents: its dtype and shape, as copy_ has it."""
        moved = cast(value, target.tensor.dtype)
        if not same_type(moved.type, target.type):
            moved = OPS["expand"](moved, shape=target.shape)
        (written,) = self._stamped([moved], node)
        assert written is not None
        self.writes[target] = written
        return written

    def _value(self, argument: Any, reader: torch.fx.Node) -> Any:
        """An fx argument with our nodes and sizes in place of fx nodes."""
        if isinstance(argument, (list, tuple)):
            return tuple(self._value(a, reader) for a in argument)
        if isinstance(argument, torch.SymInt):
            return self.sizes.dim(argument)
        if not isinstance(argument, torch.fx.Node):
            return argument
        value = self.values[argument]
        if isinstance(value, Opaque) and not (isinstance(value, BlockMatrix) and _is_weight(argument, reader)):
            raise CaptureError(provenance(reader).source, reason=f"{reader.name} depends on {value.what}")
        if isinstance(value, Node) and isinstance(value.type, ScalarType) and value.type.value is not None:
            return value.type.value
        return value

    def _stamped(self, leaves: Sequence[Node | None], origin: torch.fx.Node) -> list[Node | None]:
        """The nodes just made under `leaves`, with their origin; the leaves get a name."""
        prov = provenance(origin)
        fresh: list[Node] = []
        seen: set[Node] = set()
        for leaf in leaves:
            if leaf is not None:
                visit(leaf, seen, fresh, self.made)
        new: dict[Node, Node] = {}
        for node in fresh:
            inputs = tuple(new.get(n, n) for n in node.inputs)
            known = isinstance(node.type, ScalarType)
            new[node] = node if known else replace(node, inputs=inputs, prov=prov, hint=value_hint(origin, node) if node in leaves else "")
        self.made.update(new.values())
        return [None if leaf is None else new.get(leaf, leaf) for leaf in leaves]

    # results

    def _output(self, node: torch.fx.Node) -> None:
        flat = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
        self.returned = tuple(flat)

    def finish(self, name: str) -> Captured:
        outputs: list[Node] = []
        returns: list[int | None] = []
        numbers: dict[Any, int] = {}
        memory = {made: {_storage(fx)} for fx, made in self.placeholders.items()}
        for i, value in enumerate(self.returned):
            if i in self.binding.written:
                self._write_back(self.binding.written[i], value)
                returns.append(None)
                continue
            fixed = value is None or isinstance(value, str) or getattr(value, "name", "") in self.binding.aside
            key = (type(value), value)  # True is not 1, nor 1 is 1.0
            if not fixed and key not in numbers:
                numbers[key] = len(outputs)
                outputs.append(self._returned(value, memory))
            returns.append(None if fixed else numbers[key])
        checks = tuple((len(outputs) + i, message) for i, (_, message) in enumerate(self.checks))
        outputs += [condition for condition, _ in self.checks]
        inputs = [n for n in self.inputs if n not in self.late] + self.late
        graph = make_graph(identifier(name) or "graph", inputs, outputs, writes=tuple(self.writes.items()))
        return Captured(replace(graph, symbols=self._symbols(graph)), tuple(returns), checks)

    def _returned(self, value: Any, memory: dict[Node, set[int]]) -> Node:
        """`memory`: the fake storages that each input and each value returned so far lies in.

        A copy is its operand here; where it leaves the graph beside its operand, it is given memory of its own.
        """
        if not isinstance(value, torch.fx.Node):
            return lift(value)
        made = self.placeholders.get(value, self.values[value])
        if isinstance(made, Opaque):
            raise CaptureError(reason=f"the graph returns {made.what}")
        if not isinstance(made, Node):
            return lift(made)
        fake = value.meta.get("val")
        if not isinstance(fake, torch.Tensor) or value in self.placeholders:
            return made
        strides, held = _uncommon_strides(fake, self.sizes), memory.setdefault(_viewed(made), {_storage(value)})
        own = _storage(value) not in held
        held.add(_storage(value))
        if strides is None and not own:
            return made
        return OPS["layout"](made, strides=strides or contiguous_strides(made.shape), own=own, prov=made.prov, hint=made.hint)

    def _symbols(self, graph: Graph) -> dict[str, Any]:
        """Ranges of the symbols the graph uses; every one must be bindable from the inputs."""
        used: set[str] = set()
        for node in order(graph):
            used |= {s.name for s in free_symbols(_dims_of(node))}
        bound = {d.name for node in graph.inputs for d in _bare(node) if isinstance(d, sympy.Symbol)}
        if used - bound:
            raise CaptureError(reason=f"size {sorted(used - bound)[0]} is not known from the inputs")
        return {s: self.sizes.ranges[s] for s in sorted(used)}


def _bind(target: OpOverload, node: torch.fx.Node) -> tuple[Any, ...]:
    """The call's arguments in the order of the schema, defaults filled in."""
    bound: list[Any] = []
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound.append(node.args[i])
        else:
            bound.append(node.kwargs.get(argument.name, argument.default_value))
    return tuple(bound)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in _flat(v)]
    return [value]


def _tensor_types(args: Any) -> list[TensorType]:
    return [a.type for a in _flat(args) if isinstance(a, Node) and isinstance(a.type, TensorType)]


def _is_weight(argument: torch.fx.Node, reader: torch.fx.Node) -> bool:
    """Whether the argument is the weight of a linear, and nothing else of it."""
    return reader.target is torch.ops.aten.linear.default and reader.args[1] is argument and reader.args.count(argument) == 1


def _native_types(types: Iterable[TensorType]) -> bool:
    return all(t.dtype in NATIVE_DTYPES for t in types)


def _fit(node: Node, want: TensorType) -> Node | None:
    """The node with exactly the type torch promises, by a cast if need be; None if that cannot be had."""
    if not isinstance(node.type, TensorType):
        return None
    found = cast(node, want.dtype)
    return found if same_type(found.type, want) else None


def _uncommon_strides(value: torch.Tensor, sizes: Sizes) -> tuple[Dim, ...] | None:
    """The tensor's strides unless they are row-major; those of dimensions of size 1 do not matter."""
    shape, strides = sizes.dims(value.shape), sizes.dims(value.stride())
    common = contiguous_strides(shape)
    if any(isinstance(n, int) and n == 0 for n in shape):
        return None
    return None if all(same(n, 1) or same(a, b) for n, a, b in zip(shape, strides, common)) else strides


def _storage(node: torch.fx.Node) -> int:
    """Identity of the memory of an fx value, as the fake tensors share it; 0 for what is no tensor."""
    fake = node.meta.get("val")
    return fake.untyped_storage()._cdata if isinstance(fake, torch.Tensor) else 0


def _viewed(node: Node) -> Node:
    """What a chain of views looks at."""
    while node.op.category is Category.VIEW:
        node = node.inputs[0]
    return node


def _bare(node: Node) -> tuple[Any, ...]:
    return node.type.shape if isinstance(node.type, TensorType) else (node.type.value,) if isinstance(node.type, ScalarType) else ()


def _dims_of(node: Node) -> list[Any]:
    """Every size a node mentions, in its type and its attributes."""
    types = node.type if isinstance(node.type, tuple) else (node.type,)
    found = [d for t in types for d in (t.shape if isinstance(t, TensorType) else (t.value,))]
    return found + _flat(tuple(node.attrs.values()))
