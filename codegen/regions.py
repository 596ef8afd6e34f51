"""Regions of a fused graph: each distinct one is lowered and compiled once, and called wherever it stands."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Union

import sympy
import torch

from ..ir.dims import hint, to_source
from ..ir.errors import DeviceLost
from ..ir.graph import Graph, Node, order
from ..ir.interpret import interpret
from ..ir.op import Category
from ..ir.rewrite import attr_key
from ..ir.types import TensorType
from .calls import Fault, KernelCall, Operand, PositionFault
from .host import Host, Scope, Value
from .kernel import Kernel
from .target import Address, Argument, ByAmount, ByMultiples, Compiled, Failed, Native, NativeCall, Target, Usage


@dataclass
class KernelInfo:
    """A generated kernel, for receipts.

    nodes: ops of the graph that one call computes; uses: places that call it; flops and bytes: of all its calls together, with
    symbolic sizes at a plausible value. notes: how it was compiled, where not as planned. usage: as in `Compiled`.
    """

    name: str
    label: str
    sources: tuple[str, ...]
    text: str
    nodes: int
    uses: int = 0
    flops: int = 0
    bytes: int = 0
    notes: tuple[str, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Unit:
    """What one distinct region became: a compiled kernel, or the reason why there is none (no reason: nothing to compute)."""

    kernel: Kernel | None
    compiled: Compiled | None
    reason: str = ""


@dataclass
class Built:
    """unit of each region, the kernels for receipts, and seconds spent in lower and compile."""

    units: dict[Node, Unit] = field(default_factory=dict)
    kernels: list[KernelInfo] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def build_regions(graph: Graph, targets: Mapping[str, Target]) -> Built:
    """Lowers and compiles the regions of the graph. Nothing here raises for a region's sake: it gets a reason instead.

    Raises DeviceLost.
    """
    start = time.perf_counter()
    lowered = lowered_regions(graph, targets)
    middle = time.perf_counter()
    units = _compile(lowered, targets)
    built = Built(seconds={"lower": middle - start, "compile": time.perf_counter() - middle})
    for unit, (_, nodes) in zip(units, lowered):
        built.units.update(dict.fromkeys(nodes, unit))
        if unit.compiled is not None:
            built.kernels.append(_info(graph, unit.compiled, nodes))
    return built


Lowered = tuple[Union[Kernel, str], list[Node]]
"""A kernel, or why there is none, and the regions that it is for."""


def lowered_regions(graph: Graph, devices: Container[str]) -> list[Lowered]:
    """Each distinct region of the graph as a kernel; those on other `devices` ("cpu", "cuda") have none."""
    return [(_lower(i, nodes, devices, pairs), nodes) for i, ((*_, pairs), nodes) in enumerate(_distinct(graph).items())]


Pairs = tuple[tuple[int, int], ...]


def _distinct(graph: Graph) -> dict[tuple[Any, str, Pairs], list[Node]]:
    """The regions that are one kernel: those that compute the same, under one schedule, and write over the same operands or over none."""
    steps = order(graph)
    results: dict[Node, list[Node | None]] = {}
    for node in steps:
        if node.op.name == "item" and node.inputs[0].op.name == "region":
            source = node.inputs[0]
            results.setdefault(source, [None] * len(source.attrs["body"].outputs))[node.attrs["index"]] = node
    regions = [(n, region_key(n.attrs["body"]), _in_place(graph, n, results.get(n, [n]))) for n in steps if n.op.name == "region"]
    usual = {key: pairs for _, key, pairs in reversed(regions) if pairs}
    places: dict[tuple[Any, str, Pairs], list[Node]] = {}
    for node, key, pairs in regions:  # a kernel that may write over an operand need not
        places.setdefault((key, node.attrs["schedule"], pairs or usual.get(key, ())), []).append(node)
    return places


def _in_place(graph: Graph, region: Node, results: Sequence[Node | None]) -> Pairs:
    """(output, tensor operand), by number: those to which plan-memory gave the same memory."""
    operands = [n for n in region.inputs if isinstance(n.type, TensorType)]
    slots = [(k, graph.arena[n]) for k, n in enumerate(results) if n is not None and n in graph.arena]
    return tuple((k, i) for k, slot in slots for i, n in enumerate(operands) if n in graph.arena and graph.arena[n].offset == slot.offset)


def region_key(body: Graph) -> Any:
    """Equal for bodies that compute the same, whatever their values are called and wherever they came from."""
    steps = order(body)
    number = {node: i for i, node in enumerate(steps)}
    rows = tuple(
        (n.op.name, tuple(number[i] for i in n.inputs), tuple((k, attr_key(v)) for k, v in n.attrs.items()), str(n.type)) for n in steps
    )
    return rows, tuple(number[n] for n in body.outputs)


def _lower(index: int, nodes: Sequence[Node], devices: Container[str], pairs: Pairs) -> Kernel | str:
    """The kernel of a region, or the reason why there is none."""
    device = device_type(nodes[0])
    if _empty(nodes[0]):
        return ""
    if device not in devices:
        return f"no code generation for {device}"
    from .lower import LoweringError, lower

    label = nodes[0].attrs["label"]
    words = re.sub(r"\W+", "_", label).strip("_")[:48].rstrip("_")
    try:
        kernel = lower(nodes[0].attrs["body"], f"k{index}_{words}" if words else f"k{index}", label, _sources(nodes), pairs)
        return replace(kernel, schedule=nodes[0].attrs["schedule"])
    except LoweringError as error:
        return str(error)
    except Exception as error:  # a fault of ours costs this region its kernel, not the user the model
        return internal_error(label, error)


def internal_error(what: str, error: Exception) -> str:
    """The reason that a receipt lists for a fault of ours; warns once per fault."""
    reason = f"internal error: {type(error).__name__}: {error}"
    warnings.warn(f"tilewright could not compile {what!r}, which now runs by eager; please report this. {reason}", RuntimeWarning, 3)
    return reason


def _sources(nodes: Sequence[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_one_line(s) for n in nodes for s in n.prov.sources))


def _one_line(text: str) -> str:
    """As it may stand in a comment of generated source: where a node came from is text from the model's file."""
    return "".join(c if c.isprintable() else " " for c in text).rstrip("\\")


def _compile(units: Sequence[Lowered], targets: Mapping[str, Target]) -> list[Unit]:
    """All kernels of one device in one batch."""
    batches: dict[str, list[Kernel]] = {}
    for kernel, nodes in units:
        if isinstance(kernel, Kernel):
            batches.setdefault(_device(nodes[0]), []).append(kernel)
    done: dict[Kernel, Unit] = {}
    for device, kernels in batches.items():
        for kernel, result in zip(kernels, _attempt(targets[device.split(":")[0]], kernels, device), strict=True):
            ok = isinstance(result, Compiled)
            done[kernel] = Unit(kernel, result if ok else None, "" if ok else result.reason)
    return [done[kernel] if isinstance(kernel, Kernel) else Unit(None, None, kernel) for kernel, _ in units]


def _attempt(target: Target, kernels: Sequence[Kernel], device: str) -> Sequence[Compiled | Failed]:
    """All at once; one by one where that shows a fault of ours. Raises DeviceLost."""
    try:
        return target.compile(kernels, device)
    except DeviceLost:
        raise
    except Exception as error:  # as above
        if len(kernels) == 1:
            return [Failed(kernels[0], internal_error(kernels[0].name, error))]
        return [result for kernel in kernels for result in _attempt(target, [kernel], device)]


def device_type(region: Node) -> str:
    """ "cpu" or "cuda": where the region's results live."""
    return _device(region).split(":")[0]


def _device(region: Node) -> str:
    return region.attrs["body"].outputs[0].tensor.device


def covered(body: Graph) -> list[Node]:
    """The nodes of a body that compute something."""
    return [n for n in order(body) if n.op.category not in (Category.VIEW, Category.CONSTANT)]


def _info(graph: Graph, compiled: Compiled, nodes: Sequence[Node]) -> KernelInfo:
    kernel, body = compiled.kernel, nodes[0].attrs["body"]
    info = KernelInfo(kernel.name, kernel.label, _sources(nodes), compiled.source, len(covered(body)), len(nodes))
    info.notes, info.usage = compiled.notes, compiled.usage
    for node in nodes:
        flops, moved = cost(graph, node)
        info.flops += flops
        info.bytes += moved
    return info


def cost(graph: Graph, node: Node) -> tuple[int, int]:
    """flops and bytes of a node, symbolic sizes at a plausible value."""
    price = node.op.cost(tuple(n.type for n in node.inputs), node.type, node.attrs)
    return hint(price.flops, graph.symbols), hint(price.bytes, graph.symbols)


# -- in the host program


def emit_region(host: Host, node: Node, unit: Unit) -> None:
    """A call of the region's kernel, or its ops one by one."""
    if unit.compiled is not None:
        _emit_kernel(host, node, unit.compiled)
    elif _empty(node):
        _results(host, node)
    else:
        _emit_ops(host, node)


def _empty(region: Node) -> bool:
    """Whether its results are known to have no elements."""
    return all(n.tensor.numel == 0 for n in region.attrs["body"].outputs)


def _emit_kernel(host: Host, node: Node, compiled: Compiled) -> None:
    kernel, native = compiled.kernel, compiled.native
    operands = [_operand(host, node, i, native.alignment if native else 1) for i in _read(node, kernel)]
    results = _results(host, node)
    if native is None:
        text = f"{host.bind(kernel.name, compiled.launch)}({', '.join([*(v.name for v in (*operands, *results)), *kernel.sizes])})"
        host.line(text, reads=[*operands, *results])
        return
    if native.empty is not None:
        host.names["empty"] = native.empty
    scratch = [host.memory(None, TensorType(b.dtype, (b.size,), _device(node)), f"{kernel.name}_{b.name}") for b in native.scratch]
    names = [b.name for b in (*kernel.inputs, *kernel.outputs, *native.scratch)]
    buffers = dict(zip(names, map(host.operand_of_kernel, [*operands, *results, *scratch]), strict=True))
    written = {buffers[b.name].value for b in (*kernel.outputs, *native.scratch)}
    asked = f"{host.bind(native.asking, native.asked)}()"
    for call in native.calls:
        arguments = tuple(_argument(host, a, buffers) for a in call.arguments)
        writes = tuple(dict.fromkeys(a.value for a in arguments if a.value in written and a.value))
        host.call(KernelCall(call.name, call.entry, arguments, writes, asked, _fault(node, kernel, native, call)), native.run)


def _argument(host: Host, argument: Argument, buffers: Mapping[str, Operand]) -> Operand:
    """What a native function takes, as the host program writes it. Buffers and sizes are shown, other numbers are not."""
    if isinstance(argument, str):
        return buffers[argument]
    if isinstance(argument, (Address, ByMultiples, ByAmount)):
        return Operand("", _address(host, argument))
    text = to_source(argument)
    return Operand(text if isinstance(argument, sympy.Symbol) else "", text)


def _address(host: Host, argument: Address | ByMultiples | ByAmount) -> str:
    """The expression of an address, or of which one sizes ask for."""
    if isinstance(argument, Address):
        return host.bind(argument.name, argument.value)
    then, otherwise = (_address(host, a) for a in (argument.then, argument.otherwise))
    if isinstance(argument, ByAmount):
        return f"({then} if {to_source(argument.amount)} < {argument.below} else {otherwise})"
    rest = " or ".join(f"{size} % {argument.multiples_of}" for size in argument.sizes)
    return f"({otherwise} if {rest} else {then})"


def _fault(node: Node, kernel: Kernel, native: Native, call: NativeCall) -> Fault | None:
    if native.failed is not None:
        return partial(native.failed, call.name)
    return PositionFault(node.attrs["body"]) if kernel.faults else None


def _read(node: Node, kernel: Kernel) -> list[int]:
    """Which operands the kernel takes, in its order: buffers are named after the body's inputs."""
    tensors = [i for i, n in enumerate(node.attrs["body"].inputs) if isinstance(n.type, TensorType)]
    assert len(tensors) == len(kernel.inputs), f"{kernel.name} takes {len(kernel.inputs)} buffers for {len(tensors)} operands"
    return tensors


def _operand(host: Host, node: Node, i: int, alignment: int) -> Value:
    return host.dense(host.values[node.inputs[i]], node.attrs["body"].inputs[i].attrs["strides"], alignment)


def _results(host: Host, node: Node) -> list[Value]:
    """Memory for the region's results; several results are named by their `item` nodes."""
    if not isinstance(node.type, tuple):
        return [host.memory(node, node.tensor, node.hint or _word(node))]
    return [host.memory(host.items.get((node, i)), t, f"{_word(node)}_{i}") for i, t in enumerate(node.type)]


def _word(node: Node) -> str:
    return (node.hint or node.attrs["label"].split(" ")[-1] or "r").split("+")[-1]


def _emit_ops(host: Host, node: Node) -> None:
    """The body run op by op; its results are new memory, as a kernel's are."""
    operands = [host.operand(n) for n in node.inputs]
    function = host.bind(f"eager_{_word(node)}", interpreted(node.attrs["body"]))
    sizes = ", ".join(f"{s}={s}" for s in host.symbols)
    text = f"{function}({', '.join(operands)}{', ' if operands and sizes else ''}{sizes})"
    if isinstance(node.type, tuple):
        host.define(node, text, Scope.CALL, host.tensors(node.inputs))
    else:
        host.define(node, f"{text}[0]", Scope.CALL, host.tensors(node.inputs), True)


def interpreted(body: Graph) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The body as a function of its operands and the sizes; each result is contiguous and shares memory with nothing else."""

    def run(*operands: Any, **sizes: int) -> tuple[torch.Tensor, ...]:
        taken = {t.untyped_storage().data_ptr() for t in operands if isinstance(t, torch.Tensor)}
        results: list[torch.Tensor] = []
        for value in interpret(body, operands, sizes=sizes):
            value = value.contiguous()
            if value.untyped_storage().data_ptr() in taken:
                value = value.clone()
            taken.add(value.untyped_storage().data_ptr())
            results.append(value)
        return tuple(results)

    return run
