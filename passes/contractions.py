"""Contractions that become kernels of ours: a table entry for each type of device.

On a CPU mostly those whose constant weight lies in panels. `pack-weights` puts it there: that decides.

    w [n, k]  -->  panels [n / 48, k, 48]

The 48 columns that one register block of a kernel reads stand together for each k. Linears of many rows turn any weight into panels as
they go. On a GPU those that a pointwise value follows, which then costs no memory traffic; the library's are faster where nothing
does, and at convolutions. Products of uneven parts (experts, blocks of a sparse matrix) are ours there in any case. A weight of few bits
is turned into numbers where it is multiplied, so that its bytes are all that is read; the library could not:

    linear(x, dequantize(unpack(packed, bits=4), scale, dtype=bf16))  -->  region(x, packed, scale) { ..., linear }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..ir.dims import hint, product
from ..ir.graph import Node
from ..ir.op import Category
from ..ir.types import FLOAT8, TensorType, category
from .facts import device_type

PANELS = {48: 1.0, 32: 1.04, 16: 1.35}
"""Columns of a panel -> time for one column, relative: narrower ones leave registers idle, a wider one (64) comes from the second-level
cache too slowly. Measured with AVX-512."""

WINDOW_PANELS = {48: 1.0, 64: 1.0, 32: 1.06, 16: 1.35}
"""The same for convolutions, which copy nothing and so have room in the cache."""

PRODUCTS = frozenset({"linear", "int_linear", "matmul", "conv"})

RAGGED = frozenset({"grouped_matmul", "block_sparse_linear"})
"""Products of uneven parts. The library multiplies one part after the other, when it has waited for their limits; a kernel of ours reads
them where they are."""


def panel_of(columns: int, times: Mapping[int, float] = PANELS) -> int:
    """The panel that wastes least: padding, and registers that narrower blocks leave unused."""
    return min(times, key=lambda width: -(-columns // width) * width * times[width])


FEW_ROWS = 4
"""So few rows read the weight once, as it is: memory sets the time, and no panel is needed."""

MIN_WEIGHT_BYTES = 1 << 16
"""A smaller weight is in the cache, where the library's start is all that counts."""

MANY_ROWS, LONGEST_DEPTH = 256, 2048
"""So many rows pay for turning a weight that is an input into panels with every call, and what follows joins the kernel. Longer depths
leave too few rows near the core."""


GPU_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""What matrix units, or as many multipliers, take."""


def is_native(node: Node) -> bool:
    """Whether the contraction can be a kernel of ours."""
    if node.op.name in RAGGED:
        return device_type(node) == "cuda" and node.dtype in GPU_DTYPES
    if node.op.name not in PRODUCTS:
        return False
    rule = NATIVE.get(device_type(node))
    return rule is not None and rule(node)


def signature(node: Node) -> str:
    """A contraction or attention by its name and types: what was measured of one holds for all that are alike."""
    texts = [f"{n.type}{' packed' if is_low_bit(n) else ''}" for n in node.inputs if isinstance(n.type, TensorType)]
    return "/".join(text.replace(", ", "x").replace(" ", "-") for text in (node.op.name, *texts, str(node.type)))


def needs_follower(node: Node) -> bool:
    """Whether a contraction is the library's where no pointwise value follows it."""
    return device_type(node) == "cuda" and node.op.name not in {"int_linear", *RAGGED} and not is_low_bit(node.inputs[1])


def can_be_offered(node: Node) -> bool:
    """Whether a contraction that a GPU's library computes by default may be a kernel of ours there, if that is measured to be faster."""
    if node.op.name not in PRODUCTS or device_type(node) != "cuda" or node.dtype not in GPU_DTYPES:
        return False
    return node.op.name != "conv" or not node.attrs["transposed"] and node.attrs["groups"] == 1


def takes_computed(node: Node, operand: Node) -> bool:
    """Whether a kernel of ours may compute the operand of a contraction, or the keys or values of an attention, where it multiplies it."""
    rule = COMPUTED.get(device_type(node))
    return rule is not None and rule(node, operand)


def is_low_bit(operand: Node) -> bool:
    """Whether an operand is computed, by pointwise ops and views, mostly from integers or 8-bit floats that take less memory than it."""
    return _low_bit_dtype(operand) is not None


def _low_bit_dtype(operand: Node) -> torch.dtype | None:
    """What an operand of few bits is stored as."""
    stack, seen, leaves = [operand], set[Node](), dict[Node, int]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_pointwise(node):
            stack.extend(i for i in node.inputs if isinstance(i.type, TensorType))
        elif node.op.name not in ("full", "iota"):
            leaves[node] = _bytes(node)
    largest = max(leaves, key=leaves.__getitem__, default=operand)
    if largest is operand or sum(leaves.values()) >= _bytes(operand):
        return None
    return largest.dtype if largest.dtype in FLOAT8 or category(largest.dtype) == 1 else None


def _is_pointwise(node: Node) -> bool:
    return node.op.category in (Category.POINTWISE, Category.VIEW) or node.op.name in ("unpack", "dequantize")


def _bytes(node: Node) -> int:
    """With symbolic sizes at a plausible value."""
    return 0 if isinstance(node.type, tuple) else hint(node.tensor.nbytes, {})


def _on_cpu(node: Node) -> bool:
    """Its weight is packed, few rows stream it, or many rows share what turning it takes."""
    weight = node.inputs[1]
    stored = weight.inputs[0] if weight.op.name == "cast" else weight
    return is_packed(stored) or is_in_words(weight) or has_few_rows(node) or has_many_rows(node)


def _is_cache(operand: Node) -> bool:
    """Whether keys or values are computed from integers; other numbers of 8 bits have no form in C++."""
    return _low_bit_dtype(operand) not in (None, *FLOAT8)


def _on_gpu(node: Node) -> bool:
    return node.op.name == "int_linear" or node.op.name != "conv" and node.dtype in GPU_DTYPES


NATIVE: dict[str, Callable[[Node], bool]] = {"cpu": _on_cpu, "cuda": _on_gpu}
"""Device type -> which contractions can be kernels of ours there."""

COMPUTED: dict[str, Callable[[Node, Node], bool]] = {
    "cpu": lambda node, operand: _is_cache(operand) if node.op.name == "attention" else is_in_words(operand),
    "cuda": lambda node, operand: node.op.name != "conv" and is_low_bit(operand),
}
"""Device type -> which operands of them (contraction, operand) are computed in the kernel. Others are read: it would compute them once for
every block of the result."""


def has_few_rows(node: Node) -> bool:
    """Whether a linear with a matrix in memory has at most FEW_ROWS rows, as a step of decoding has."""
    if node.op.name != "linear" or node.tensor.device != "cpu" or node.dtype != torch.float32:
        return False
    rows, weight = product(node.shape[:-1]), node.inputs[1]
    size = weight.tensor.nbytes
    in_memory = weight.op.name in ("input", "constant")
    return in_memory and isinstance(rows, int) and 0 < rows <= FEW_ROWS and isinstance(size, int) and size >= MIN_WEIGHT_BYTES


def has_many_rows(node: Node) -> bool:
    """Whether a linear with a matrix that is an input has MANY_ROWS rows, and sizes that fill registers."""
    if node.op.name != "linear" or node.tensor.device != "cpu" or node.dtype != torch.float32:
        return False
    rows, weight = product(node.shape[:-1]), node.inputs[1]
    if weight.op.name != "input" or not isinstance(rows, int) or rows < MANY_ROWS or not all(isinstance(d, int) for d in weight.shape):
        return False
    columns, depth = weight.shape
    return columns >= max(PANELS) and depth <= LONGEST_DEPTH and weight.tensor.nbytes >= MIN_WEIGHT_BYTES


def is_packed(weight: Node) -> bool:
    """Whether a weight is a view of panels: a permuted constant whose last dimension is a panel."""
    first = weight
    while weight.op.category is Category.VIEW:
        first, weight = weight, weight.inputs[0]
    if weight.op.name != "constant" or first.op.name != "permute" or weight.tensor.rank < 3:
        return False
    return weight.shape[-1] in WINDOW_PANELS


def is_in_words(weight: Node) -> bool:
    """Whether a weight is computed from words: bytes that `pack-weights` laid so, as [panels, words, columns, 4]."""
    stack, seen = [weight], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or not _is_pointwise(node):
            continue
        seen.add(node)
        if node.op.name == "permute" and node.attrs["dims"] == (0, 2, 1, 3) and _is_words(node.inputs[0]):
            return True
        stack.extend(i for i in node.inputs if isinstance(i.type, TensorType))
    return False


def _is_words(node: Node) -> bool:
    in_memory = node.op.name in ("constant", "input")
    return in_memory and node.tensor.rank == 4 and node.dtype.itemsize == 1 and node.shape[-1] == 4 and node.shape[-2] in PANELS
