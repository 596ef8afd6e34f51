"""The attention template: blocks of queries walk the keys with a running softmax (FlashAttention-2); no matrix of scores exists.

    one program: BLOCK_M queries that meet the same keys (of all heads that share them), the keys BLOCK_N at a time
      dot = query @ key^T                                tl.dot, the depth as one block
      score = scale, masks, ...                          the kernel's own scalars over [BLOCK_M, BLOCK_N]
      weights = 2^(score - most); total, attended        rescaled where a block holds a larger score
    the kernel's own stores, over [BLOCK_M, BLOCK_E]

Weights that are given (sigmoid attention, gradients) are added up as they are; their score may be made of several such products.
Limits that masks set (causal, sliding window, filled length) bound the walk. Blocks that lie within all limits come first and have no
masks, then those at the edges. With `splits`, several programs share the keys of their queries, and a second kernel joins the parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import sympy
import torch

from ...ir.dims import product
from ...ir.scalar import Scalar
from ..attention_limits import LOG2_E, find_limits, in_base_two, unscaled
from ..attentions import Attention, attentions, find_attention
from ..errors import Unsupported
from ..kernel import Axis, Dot, Kernel, Store
from ..names import unique
from .attention_parts import Parts, parts_of
from .attention_tiles import AttentionTiles, default_tiles, padded, refusal
from .indices import Span
from .layout import Dimension, Layout, extent_source, flat_name, mask_lines
from .legalize import UnsupportedByTriton, legalize, rewritten
from .operands import Operand, Tile, variable
from .printer import build_blocks, function_text, module, print_function, widened_sizes
from .product import NARROW, multiplied, narrow
from .program import Launch, Program, blocks_of, function_name
from .scalars import TYPES
from .schedule import default_schedule

Writer = TypeVar("Writer", bound=Tile)
_NAMES = (
    "score", "weights", "decay", "largest", "total", "attended",
    "blocks", "block", "part", "begin", "end", "clear_begin", "clear_end", "share", "clear", "at",
)  # fmt: skip
"""Variables of a printed function; what a kernel's own names take is numbered."""


def is_attention(kernel: Kernel) -> bool:
    return bool(attentions(kernel))


def roles(kernel: Kernel) -> Attention:
    """The axes of the kernel by what they are to the attention. Raises UnsupportedByTriton."""
    try:
        return find_attention(kernel)
    except Unsupported as error:
        raise UnsupportedByTriton(what=kernel.name, reason=str(error)) from error


def tiles_of(kernel: Kernel) -> AttentionTiles:
    """The tiles to start from."""
    return default_tiles(kernel, roles(kernel))


def build_attention(kernel: Kernel, tiles: AttentionTiles) -> Program:
    """Raises UnsupportedByTriton where the kernel is no attention that is walked, or its tiles are not legal."""
    found = roles(kernel)
    problem = refusal(kernel, found, tiles)
    if problem is not None:
        raise UnsupportedByTriton(what=kernel.name, reason=problem)
    parts = parts_of(kernel, found, tiles.splits) if tiles.splits > 1 else None
    printer = AttentionPrinter(kernel, found, tiles, parts)
    text = printer.function()
    rows, heads = (product(a.extent for a in axes) for axes in (found.rows, found.batch))
    grid = (product((blocks_of(rows, tiles.block_m), tiles.splits, heads)),)
    first = Launch(function_name(kernel), printer.buffers, grid, printer.constants, tiles.num_warps, tiles.num_stages, tiles.wide)
    if parts is None:
        return Program(kernel, tiles, module([text]), (first,))
    schedule = replace(default_schedule(parts.join), wide=tiles.wide)
    second = build_blocks(parts.join, schedule).launches[0]
    return Program(kernel, tiles, module([text, print_function(parts.join, schedule)]), (first, second), parts.buffers)


@dataclass(frozen=True)
class Walk:
    """A loop over blocks of keys. within: each of them lies within the limits of every query, and needs no mask.

    start: where a block begins, if that is not the variable of the loop.
    """

    begin: str
    end: str
    within: bool
    start: str = ""


@dataclass
class _Product:
    """One product of rows and keys: its operands as they are multiplied; what writes the left one, and the variable that holds it."""

    dot: Dot
    depth: Dimension
    left: Scalar
    right: Scalar
    writer: Tile | None = None
    query: str = ""


class AttentionPrinter:
    """Prints the function of a kernel with one attention."""

    def __init__(self, kernel: Kernel, found: Attention, tiles: AttentionTiles, parts: Parts | None) -> None:
        self.found, self.tiles, self.parts = found, tiles, parts
        taken = {a.name for a in kernel.axes} | set(kernel.sizes)
        rows = tuple(a for a in found.rows if a.extent != 1) or (Axis(unique("row", taken), 1, inner=True),)
        self.kernel = replace(kernel, axes=(*kernel.axes, *(a for a in rows if a not in kernel.axes)))
        self.heads = Span(found.batch, flat_name(found.batch, "head", taken))
        self.rows = Dimension(Span(rows, flat_name(rows, "row", taken)), "BLOCK_M", tiles.block_m, shared=True)
        self.columns = _whole(found.column, "BLOCK_E")
        self.limits = find_limits(kernel, found.attend)
        self.products = [_Product(dot, _whole(axis, f"BLOCK_{letter}"), *multiplied(kernel, dot.left, dot.right, dot.dtype)[:2])
                         for dot, axis, letter in zip(found.dots, found.depths, "DC")]  # fmt: skip
        value = narrow(kernel, found.attend.value)
        self.weighted = value if value.dtype == found.attend.rounded else found.attend.value
        written = kernel.outputs if parts is None else parts.buffers
        self.buffers = tuple(b.name for b in (*kernel.inputs, *written))
        self.whole = (*(p.depth for p in self.products), self.columns)
        blocks = {d.constant: d.block for d in (self.rows, *self.whole)}
        self.constants = blocks | {"BLOCK_N": tiles.block_n} | ({} if parts is None else {"SPLITS": tiles.splits})
        self.type = TYPES[found.attend.dtype]
        self.wide = ".to(tl.int64)" if tiles.wide else ""
        self.beside: Tile | None = None
        first, *others = self.products
        limits = (*self.limits.begins, *self.limits.ends)
        self.first, (first.left, *self.bounds) = self.tile(Operand, (first.left, *limits), (self.rows, first.depth))
        self.beside = first.writer = self.first
        for other in others:
            other.writer, (other.left,) = self.tile(Operand, (other.left,), (self.rows, other.depth))
        self.lines = self.first.outer.lines
        self.names = {name: self.first.fresh(name) for name in _NAMES}
        self.dots = [self.first.fresh("dot") for _ in self.products]
        self.names |= {word: self.first.fresh(f"{found.key.name}_{word}") for word in ("start", "edge", "down")}

    def function(self) -> str:
        self.place()
        for one in self.products:
            assert isinstance(one.writer, Operand)
            one.query = one.writer.operand(one.left)
        begins = len(self.limits.begins)
        walks = self.walks(self.bounds[:begins], self.bounds[begins:])
        names = self.names
        if self.found.softmax:
            self.lines.append(f'{names["largest"]} = tl.full([BLOCK_M, 1], float("-inf"), {self.type})')
            self.lines.append(f"{names['total']} = tl.full([BLOCK_M, 1], 0.0, {self.type})")
        self.lines.append(f"{names['attended']} = tl.full([BLOCK_M, BLOCK_E], 0.0, {self.type})")
        for walk in walks:
            self.walk(walk)
        self.hand_over() if self.parts else self.store()
        return function_text(self.kernel, self.buffers, self.constants, self.lines)

    def tile(
        self, kind: type[Writer], values: Sequence[Scalar], dimensions: Sequence[Dimension], known: Mapping[Scalar, str] = {}
    ) -> tuple[Writer, list[Scalar]]:
        """A writer of the values over two dimensions, and the values as it writes them. known: by which variable some are known."""
        made, stores = self.tile_of(kind, [Store("", sympy.Integer(0), v) for v in values], dimensions, known)
        return made, [s.value for s in stores]

    def tile_of(
        self, kind: type[Writer], stores: Sequence[Store], dimensions: Sequence[Dimension], known: Mapping[Scalar, str]
    ) -> tuple[Writer, Sequence[Store]]:
        axes = sympy.Add(*(a.symbol for d in dimensions for a in d.span.axes))
        blocks: dict[Scalar, Scalar] = {value: variable(value.dtype, name, axes) for value, name in known.items()}
        legal = legalize(replace(self.kernel, stores=rewritten(stores, blocks)))
        made = kind(legal, Layout(self.heads, None, tuple(dimensions)), self.tiles, self.beside)
        made.name_variables()
        return made, legal.stores

    # ---- where this program stands

    def place(self) -> None:
        """Which queries and which part of their keys this program has: queries next to each other run at the same time."""
        rows, names, extent = self.rows, self.names, extent_source(self.rows.span)
        self.lines.extend(widened_sizes(self.kernel, self.tiles.wide))
        program, first = f"tl.program_id(0){self.wide}", ""
        several = not (isinstance(rows.span.extent, int) and rows.span.extent <= rows.block)
        if several:
            self.lines.append(f"{names['blocks']} = ({extent} + BLOCK_M - 1) // BLOCK_M")
            block = f"{program} % {names['blocks']}" if self.heads.axes or self.parts else program
            if self.limits.ends:  # the last queries have most keys: they begin first
                block = f"{names['blocks']} - 1 - {block}"
            self.lines.append(f"{names['block']} = {block}")
            program, first = f"{program} // {names['blocks']}", f"{names['block']} * BLOCK_M + "
        if self.parts:
            self.lines.append(f"{names['part']} = {program}" + (" % SPLITS" if self.heads.axes else ""))
            program = f"{program} // SPLITS"
        if self.heads.axes:
            self.lines.append(f"{self.heads.flat} = {program}")
        row = f"({first}tl.arange(0, BLOCK_M))" if first else "tl.arange(0, BLOCK_M)"
        self.lines.append(f"{rows.span.flat} = {row}[:, None]{'' if first else self.wide}")
        for dimension in self.whole:
            self.lines.append(f"{dimension.span.flat} = tl.arange(0, {dimension.constant})[None, :]")
        for dimension in (rows, *self.whole):
            self.lines.extend(mask_lines(dimension))

    # ---- the loops over the keys

    def walks(self, begins: Sequence[Scalar], ends: Sequence[Scalar]) -> list[Walk]:
        """Prints what bounds the loops: first those blocks that need no mask, then the others."""
        names, extent = self.names, extent_source(Span((self.found.key,), ""))
        begin, end = "0", extent
        if begins:
            least = self.extremes(begins, "min", extent)
            begin = self.define("begin", f"{_joined('tl.maximum', (*least, '0'))} // BLOCK_N * BLOCK_N")
        if ends:
            end = self.define("end", _joined("tl.minimum", (*self.extremes(ends, "max", "0"), extent)))
        clear_begin, clear_end = self.clear(begins, ends, extent)
        if self.parts:
            share = f"({end}{'' if begin == '0' else f' - {begin}'} + BLOCK_N * SPLITS - 1) // (BLOCK_N * SPLITS) * BLOCK_N"
            share, part = self.define("share", share), names["part"]
            start = f"{part} * {share}" if begin == "0" else f"{begin} + {part} * {share}"
            begin = self.define("begin", start)
            end = self.define("end", f"tl.minimum({end}, {begin} + {share})")
        if clear_end is None:
            return [Walk(begin, end, within=self.alike())]
        if self.parts:
            clear_end = self.define("clear_end", f"tl.minimum({clear_end}, {end})")
        if clear_begin is None:
            edge = f"tl.maximum({clear_end}, {begin})" if self.parts else clear_end
            return [Walk(begin, clear_end, True), Walk(edge, end, False)]
        if self.parts:
            clear_begin = self.define("clear_begin", f"tl.maximum({clear_begin}, {begin})")
        clear = self.define("clear", f"tl.maximum({clear_end} - {clear_begin}, 0)")
        start = f"{names['edge']} + tl.where({names['edge']} < {clear_begin}, 0, {clear})"
        return [Walk(clear_begin, clear_end, True), Walk(begin, f"{end} - {clear}", False, start)]

    def clear(self, begins: Sequence[Scalar], ends: Sequence[Scalar], extent: str) -> tuple[str | None, str | None]:
        """Where the blocks without masks begin (None: where all do) and end (None: all blocks are alike)."""
        keys = self.found.key.extent
        if self.alike() or isinstance(keys, int) and keys <= self.tiles.block_n:
            return None, None
        most = _joined("tl.minimum", (*self.extremes(ends, "min", extent), extent))
        clear_end = self.define("clear_end", f"{_bracketed(most)} // BLOCK_N * BLOCK_N")
        if not begins:
            return None, clear_end
        least = _joined("tl.maximum", (*self.extremes(begins, "max", "0"), "0"))
        return self.define("clear_begin", f"({least} + BLOCK_N - 1) // BLOCK_N * BLOCK_N"), clear_end

    def alike(self) -> bool:
        """Whether no block needs a mask."""
        return not self.limits.any and not self.key(within=False).masked

    def extremes(self, limits: Sequence[Scalar], how: str, neutral: str) -> list[str]:
        """The least or largest of each limit over the queries."""
        found = []
        for code, along in map(self.first.limit, limits):
            if along and self.rows.masked:
                code = f"tl.where({self.rows.mask}, {code}, {neutral})"
            found.append(f"tl.{how}({code})" if along else code)
        return found

    def define(self, name: str, code: str) -> str:
        self.lines.append(f"{self.names[name]} = {code}")
        return self.names[name]

    def key(self, within: bool, flat: str = "") -> Dimension:
        """The dimension of a block of keys."""
        span = Span((self.found.key,), flat or self.found.key.name)
        return Dimension(span, "BLOCK_N", self.tiles.block_n, looped=True, within=within)

    def walk(self, walk: Walk) -> None:
        """Prints one loop: scores of a block, their weights, what is attended."""
        first, start = self.first, self.names["start"]
        across, down = self.key(walk.within), self.key(walk.within, self.names["down"])
        before = first.names()
        body = first.enter().lines
        known: dict[Scalar, str] = {p.dot: self.product(name, p, down) for name, p in zip(self.dots, self.products)}
        self.attend((self.soften if self.found.softmax else self.weigh)(walk, across, known), down)
        first.leave()
        first.forget(first.names() - before)
        positions = [line for d, along in ((down, "[:, None]"), (across, "[None, :]")) for line in self.positions(d, start, along)]
        loop = self.names["edge"] if walk.start else start
        self.lines.append(f"for {loop} in range({walk.begin}, {walk.end}, BLOCK_N):")
        self.lines.extend(f"    {line}" for line in _used([f"{start} = {walk.start}"] * bool(walk.start) + positions, body))

    def positions(self, dimension: Dimension, start: str, along: str) -> list[str]:
        """The keys of a block, and which of them exist."""
        flat = dimension.span.flat
        keys = f"{flat} = ({start} + tl.arange(0, BLOCK_N)){along}{self.wide}"
        return [keys, *mask_lines(dimension)]

    def product(self, name: str, product: _Product, down: Dimension) -> str:
        """A variable that holds the products of the rows with a block of keys."""
        keys, (right,) = self.tile(Operand, (product.right,), (down, product.depth))
        return self.first.assign(name, f"tl.dot({product.query}, {keys.operand(right)}.T{_precision(right)})")

    def scored(self, score: Scalar, across: Dimension, known: Mapping[Scalar, str], out: float) -> str:
        """The text of scores or weights, which are `out` beyond the last key."""
        tile, (score,) = self.tile(Tile, (score,), (self.rows, across), known)
        return tile.masked(score, across.mask, out) if across.masked else tile.value(score)

    def soften(self, walk: Walk, across: Dimension, known: Mapping[Scalar, str]) -> str:
        """The running softmax; what came before decays where a score is the largest so far. Scores become exponents of 2."""
        n, dot = self.names, self.found.dots[0]
        factor, score = unscaled(self.limits.inside if walk.within else self.found.attend.score, dot)
        code = self.scored(score, across, known, float("-inf"))
        score = code if code.isidentifier() else self.first.assign(n["score"], code)
        function = "_soften_wide" if self.found.attend.dtype == torch.float64 else "_soften"
        state = f"{n['largest']}, {n['total']}"
        self.first.assign(f"{n['weights']}, {n['decay']}, {state}", f"{function}({score}, {factor * LOG2_E!r}, {state})")
        return n["weights"]

    def weigh(self, walk: Walk, across: Dimension, known: Mapping[Scalar, str]) -> str:
        """Weights that are given."""
        score = in_base_two(self.limits.inside if walk.within else self.found.attend.score, self.found.dots[0])
        code = self.scored(score, across, known, 0.0)
        return code if code.isidentifier() else self.first.assign(self.names["weights"], code)

    def attend(self, weights: str, down: Dimension) -> None:
        """Adds the weighted values of a block."""
        n = self.names
        tile, (value,) = self.tile(Operand, (self.weighted,), (down, self.columns))
        values = tile.operand(value)
        weights = f"{weights}.to({TYPES[value.dtype]})" if value.dtype in NARROW else weights
        before = n["attended"] + (f" * {n['decay']}" if self.found.softmax else "")
        self.first.assign(n["attended"], f"tl.dot({weights}, {values}, {before}{_precision(value)})")

    # ---- results

    def store(self) -> None:
        """The stores of the kernel, where the attention is what was found."""
        attended, total = self.names["attended"], self.names["total"]
        if self.found.softmax:
            self.lines.append(f"{attended} *= 1.0 / tl.where({total} == 0.0, 1.0, {total})")
        known: dict[Scalar, str] = {self.found.attend: attended}
        tile, stores = self.tile_of(Tile, self.kernel.stores, (self.rows, self.columns), known)
        for store in stores:
            tile.prepare(store.value)
        self.lines.extend([tile.store(store) for store in stores])

    def hand_over(self) -> None:
        """This part of the result, in the order of `parts_of`."""
        assert self.parts is not None
        n, row, columns = self.names, self.rows, self.columns
        at = row.span.flat
        if self.heads.axes:
            at = f"({self.heads.flat} * {_bracketed(extent_source(row.span))} + {at})"
        at = self.define("at", f"{at} * SPLITS + {n['part']}")
        rows = f", {row.mask}" if row.masked else ""
        both = " & ".join(d.mask for d in (row, columns) if d.masked)
        place = f"{at} * {self.found.column.extent} + {columns.span.flat}"
        of_rows = [(value, at, rows) for value in ("largest", "total") if self.found.softmax]
        for buffer, (value, where, mask) in zip(self.parts.buffers, [*of_rows, ("attended", place, f", {both}" if both else "")]):
            self.lines.append(f"tl.store({buffer.name}_ptr + {where}, {n[value]}{mask})")


def _whole(axis: Axis, constant: str) -> Dimension:
    return Dimension(Span((axis,), axis.name), constant, padded(axis.extent))


def _precision(operand: Scalar) -> str:
    """Products of float32 are exact, as in eager; those of 16 bits always are. Sums of float64 have to be asked for before Triton 3.9."""
    if operand.dtype == torch.float64:
        return ", out_dtype=tl.float64"
    return "" if operand.dtype in NARROW else ', input_precision="ieee"'


def _joined(function: str, codes: Sequence[str]) -> str:
    """The first of the codes, combined with the others."""
    code = codes[0]
    for other in codes[1:]:
        code = f"{function}({code}, {other})"
    return code


def _bracketed(code: str) -> str:
    return code if re.fullmatch(r"\w+|[\w.]+\(.*\)", code) else f"({code})"


def _used(definitions: Sequence[str], body: Sequence[str]) -> list[str]:
    """The definitions that the body needs, and the body."""
    lines = list(body)
    for definition in reversed(definitions):
        name = definition.split(" = ")[0]
        if any(re.search(rf"\b{name}\b", line) for line in lines):
            lines.insert(0, definition)
    return lines
