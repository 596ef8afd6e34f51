"""Kernels with contractions as Triton functions: blocks of two operands are multiplied and added up, and results follow from the sums.

    linear_gelu[i, j] = gelu(sum over a of x[i, a] * w[j, a] + b[j])

      m, n: the rows and columns of this program, in an order that reads each block from memory about once
      for blocks of k:  x [m, k], w [n, k]; acc += x @ w.T
      store gelu(acc + b [n]) at [m, n]

Both operands and what follows from the sums are printed by `Expressions`, each over its own two dimensions: loads with any index, masks,
gathers, casts, arithmetic. Where rows are few, the walk is another ("sum"): products of one block [m, n, k] are added element by element,
and summed over k after the loop. With `split_k` several programs share the depth of a tile; their sums go to memory, and a second
kernel, an ordinary reduction, adds them and does the rest: in the same order every time, and whatever follows the sum, which additions
in memory (atomics) would allow neither. With `programs` each of them walks several tiles, and with `descriptors` blocks of operands that
are matrices in memory (`matrices.py`) are copied by a unit of the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy
import torch

from ...ir.dims import Dim, dim, product, same, to_source
from ...ir.scalar import Scalar
from ..kernel import Axis, Buffer, Kernel, Load, Reduce, Store, scalars
from ..names import unique
from .expressions import Expressions
from .features import FEATURES
from .indices import Span
from .layout import Dimension, Layout, extent_source, mask_lines
from .legalize import UnsupportedByTriton, rewritten
from .matrices import matrices
from .operands import Operand
from .printer import build_blocks, function_text, module, print_function, widened_sizes
from .product import ACCUMULATORS, Product, as_sum, find_product, is_turned, spreads
from .program import Launch, Program, blocks_of, function_name, pointers
from .scalars import TYPES, Text
from .schedule import default_schedule
from .tiles import Tiles, refusal
from .unpacked import one_term_a_byte


def build_contraction(kernel: Kernel, tiles: Tiles) -> Program:
    """The program of a kernel with contractions. Raises UnsupportedByTriton, also where the tiles are not legal."""
    found = find_product(kernel)
    limit = refusal(kernel, tiles)
    if limit is not None:
        raise UnsupportedByTriton(what=f"{kernel.name} by these tiles", reason=limit)
    if tiles.split_k > 1:
        return _split(kernel, found, tiles)
    printer = _PRINTERS[tiles.walk](found, tiles)
    return Program(kernel, tiles, module([printer.function()]), (printer.launch(),))


class _Printer(ABC):
    """Prints the walk of one product; what is the same in all walks."""

    def __init__(self, found: Product, tiles: Tiles) -> None:
        rows = () if tiles.block_m == 1 else found.rows
        self.found = replace(found, batch=(*found.batch, *(a for a in found.rows if a not in rows)), rows=rows)
        self.kernel, self.tiles = found.kernel, tiles
        self.cast = ".to(tl.int64)" if tiles.wide else ""
        self._taken = {a.name for a in self.kernel.axes} | set(self.kernel.sizes) | set(pointers(self.kernel))
        self.words = {word: self.unused(word) for word in ("tile", "first", "height")}
        self.words |= {"BLOCK_M": self.unused("m_start"), "BLOCK_N": self.unused("n_start")} if tiles.descriptors else {}
        self.program = self.unused("turn") if tiles.programs else self.first_program
        self.batch = self.span(self.found.batch, "batch")
        self.m = Dimension(self.span(self.found.rows, "m"), "BLOCK_M", tiles.block_m, shared=True)
        self.n = Dimension(self.span(self.found.columns, "n"), "BLOCK_N", tiles.block_n, shared=True)
        depth = self.span(self.found.depth, "k")
        whole = tiles.split_k == 1 and isinstance(depth.extent, int) and 0 < depth.extent <= tiles.block_k
        aligned = not whole and not any(d.within for d in found.dots)  # where chunks begin
        self.k = Dimension(depth, "BLOCK_K", tiles.block_k, looped=not whole, start=f"{depth.flat}_start" if aligned else "")

    def unused(self, name: str) -> str:
        return unique(name, self._taken)

    def span(self, axes: tuple[Axis, ...], flat: str) -> Span:
        """The axes as one dimension, whose variable is called `flat` where that is free."""
        return Span(axes, self.unused(flat))

    def launch(self) -> Launch:
        found, tiles = self.found, self.tiles
        count = product((found.size(found.batch), *self.counts()))
        grid = (count,) if tiles.split_k == 1 else (count, tiles.split_k)
        if tiles.programs:
            grid = (dim(sympy.Min(count, tiles.programs)),)
        constants = {d.constant: d.block for d in self.dimensions()}
        name, needs = function_name(self.kernel), tuple(option for option in FEATURES if getattr(tiles, option))
        return Launch(name, pointers(self.kernel), grid, constants, tiles.num_warps, tiles.num_stages, tiles.wide, needs)

    def dimensions(self) -> tuple[Dimension, ...]:
        return (self.m, self.n, self.k)

    def counts(self) -> tuple[Dim, Dim]:
        """Tiles along the rows and columns."""
        return blocks_of(self.m.span.extent, self.m.block), blocks_of(self.n.span.extent, self.n.block)

    def function(self) -> str:
        lines = [*widened_sizes(self.kernel, self.tiles.wide), *self.before(), *self.turns(self.lines())]
        return function_text(self.kernel, pointers(self.kernel), [d.constant for d in self.dimensions()], lines)

    def before(self) -> list[str]:
        """What a program does once."""
        return []

    @abstractmethod
    def lines(self) -> list[str]:
        """What a program does for a tile."""

    def turns(self, lines: Sequence[str]) -> Sequence[str]:
        """The same for every tile of a program that has several. Triton makes one loop of this one and that over the depth, or gives both
        to warps that copy and warps that multiply."""
        if not self.tiles.programs:
            return lines
        count = product((self.found.size(self.found.batch), *self.counts()))
        how = "warp_specialize" if self.tiles.specialized else "flatten"
        head = f"for {self.program} in tl.range({self.first_program}, {to_source(count)}, tl.num_programs(0), {how}=True):"
        return [head, *(f"    {line}" for line in lines)]

    @property
    def first_program(self) -> str:
        return f"tl.program_id(0){self.cast}"

    # ---- where a program is

    def start(self, writer: Expressions) -> None:
        """The lines that say which batch, rows and columns are this program's."""
        lines, word = writer.outer.lines, self.words["tile"]
        tile = self.program
        tiles = product(self.counts())
        if self.found.batch and same(tiles, 1):
            lines.append(f"{self.batch.flat} = {tile}")
        elif self.found.batch:
            lines.extend((f"{word} = {tile}", f"{self.batch.flat} = {word} // {_factor(tiles)}", f"{word} %= {to_source(tiles)}"))
            tile = word
        elif not any(same(count, 1) for count in self.counts()):
            lines.append(f"{word} = {tile}")
            tile = word
        self.tile(lines, tile)

    def tile(self, lines: list[str], tile: str) -> None:
        """Positions along the rows and columns. Programs of `group_m` rows of tiles follow each other, column by column."""
        group, (down, across) = self.tiles.group_m, self.counts()
        row, column, (first, height) = "0", "0", (self.words[w] for w in ("first", "height"))
        if same(down, 1) or same(across, 1):
            row, column = ("0" if same(down, 1) else tile), ("0" if same(across, 1) else tile)
        elif group == 1:
            row, column = f"{tile} // {_factor(across)}", f"{tile} % {_factor(across)}"
        elif isinstance(down, int) and down <= group:
            row, column = f"{tile} % {down}", f"{tile} // {down}"
        else:
            together = _factor(dim(across * group))
            lines.append(f"{first} = {tile} // {together} * {group}")
            lines.append(f"{height} = tl.minimum({to_source(down)} - {first}, {group})")
            lines.append(f"{tile} %= {to_source(dim(across * group))}")
            row, column = f"{first} + {tile} % {height}", f"{tile} // {height}"
        self._at = {"BLOCK_M": row, "BLOCK_N": column}
        for name, at in self._at.items() if self.tiles.descriptors else ():  # they take where a block begins
            if at != "0":
                lines.append(f"{self.words[name]} = {at if at.isidentifier() else f'({at})'} * {name}")
                self._at[name] = self.words[name]

    def position(self, dimension: Dimension, spread: str) -> list[str]:
        """The lines that define the positions along the rows or columns, and their mask."""
        at, block = self._at[dimension.constant], dimension.constant
        points = f"tl.arange(0, {block})"
        plain = at.isidentifier() or at.startswith("tl.program_id")
        start = at if self.tiles.descriptors else f"{at if plain else f'({at})'} * {block}"
        row = f"({start} + {points}){spread}" if at != "0" else f"{points}{spread}{self.cast}"
        return [f"{dimension.span.flat} = {row}", *mask_lines(dimension)]

    # ---- the depth

    def depth_lines(self, depth: Dimension, spread: str) -> list[str]:
        """Positions along the depth, in the loop if there is one."""
        points = f"tl.arange(0, BLOCK_K){spread}"
        at = f"{self.k.span.flat}_start + {points}" if self.k.looped else points
        return [f"{depth.span.flat} = {at}{self.cast}", *mask_lines(depth)]

    def range(self) -> str:
        """The loop over the depth: all of it, or the part of this program."""
        flat, extent, tiles = self.k.span.flat, self.k.span.extent, self.tiles
        if tiles.split_k == 1:
            function, how = ("tl.range", ", warp_specialize=True") if tiles.specialized and not tiles.programs else ("range", "")
            return f"for {flat}_start in {function}(0, {extent_source(self.k.span)}, BLOCK_K{how}):"
        part = dim(sympy.sympify(blocks_of(extent, tiles.split_k * tiles.block_k)) * tiles.block_k)
        first = f"tl.program_id(1) * {_factor(part)}"
        return f"for {flat}_start in range({first}, tl.minimum({first} + {_factor(part)}, {extent_source(self.k.span)}), BLOCK_K):"

    def loop(self, outer: list[str], body: Sequence[str]) -> None:
        outer.append(self.range())
        outer.extend(f"    {line}" for line in body)

    # ---- results

    def store(self, writer: _Results) -> None:
        """What follows from the sums, then the stores: so nothing is overwritten before it was read."""
        for value in [s.value for s in writer.kernel.stores]:
            writer.prepare(value)
        if self.tiles.split_k > 1:
            total = _factor(self.kernel.outputs[0].size)
            writer.outer.lines.extend(f"{b.name}_ptr += tl.program_id(1){self.cast} * {total}" for b in self.kernel.outputs)
        stores = [writer.store(s) for s in writer.kernel.stores]
        writer.outer.lines.extend(stores)


def _factor(size: Dim) -> str:
    text = to_source(size)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


class _Results(Expressions):
    """Values that follow from sums: these have every row and column of the block, whatever axes they are over."""

    def __init__(self, kernel: Kernel, layout: Layout, tiles: Tiles, sums: Iterable[Scalar], beside: Expressions | None = None) -> None:
        super().__init__(kernel, layout, tiles, beside)
        values, sums = scalars(kernel.stores), tuple(sums)
        self._along = {"BLOCK_M": spreads(values, sums, reduced=True), "BLOCK_N": spreads(values, sums, reduced=False)}

    def domain(self, store: Store) -> tuple[Dimension, ...]:
        along = super().domain(store)
        return tuple(d for d in self.layout.dimensions if d in along or store.value in self._along.get(d.constant, ()))


class DotPrinter(_Printer):
    """Blocks [m, k] and [k, n] are multiplied by `tl.dot`; each is loaded along what is contiguous in memory, and transposed if need be.

    With `descriptors`, blocks of operands that are matrices in memory are copied by a unit of the GPU; all others are loaded.
    """

    writer: type[Operand] = Operand

    def __init__(self, found: Product, tiles: Tiles) -> None:
        super().__init__(found, tiles)
        self.turned = tuple(is_turned(found, side) for side in (0, 1))
        self.down = self.variant(self.k, "down") if any(self.turned) else self.k
        self.matrices = matrices(self.found) if tiles.descriptors else {}
        described = dict.fromkeys((matrix, side) for (_, side), matrix in self.matrices.items())
        self.described = {(matrix, side): self.unused(f"{matrix.buffer}_blocks") for matrix, side in described}
        self.loaded = tuple(any((n, side) not in self.matrices for n in range(len(found.dots))) for side in (0, 1))

    def variant(self, dimension: Dimension, word: str) -> Dimension:
        """The same positions along the other dimension of a block, under names of their own."""
        axes = tuple(replace(a, name=self.unused(f"{a.name}_{word}")) for a in dimension.span.axes)
        return replace(dimension, span=self.span(axes, f"{dimension.span.flat}_{word}"))

    def lines(self) -> list[str]:
        across = self.variant(self.m, "across") if self.turned[0] else self.m
        down = self.n if self.turned[1] else self.variant(self.n, "down")
        left = self.operand(0, across)
        right = self.operand(1, down, left)
        results = _Results(self.kernel, Layout(self.batch, None, (self.m, self.n)), self.tiles, self.found.dots, left)
        self.start(left)
        lines = left.outer.lines
        lines.extend(self.position(self.m, "[:, None]"))
        lines.extend(self.position(across, "[None, :]") if self.turned[0] and self.loaded[0] else ())
        lines.extend(self.position(down, "[None, :]" if self.turned[1] else "[:, None]") if self.loaded[1] else ())
        self.multiply(left, right, results)
        lines.extend(() if self.turned[1] and self.loaded[1] else self.position(self.n, "[None, :]"))
        self.store(results)
        return lines

    def operand(self, side: int, fixed: Dimension, beside: Expressions | None = None) -> Operand:
        """The writer of the left (0) or right (1) operand, whose rows or columns are `fixed`."""
        kernel, depth = self.kernel, self.down if self.turned[side] else self.k
        stores = tuple(Store("", sympy.Integer(0), pair[side]) for *pair, _ in self.found.multiplied)
        old = (*(self.m, self.n)[side].span.axes, *self.k.span.axes)
        new = (*fixed.span.axes, *depth.span.axes)
        places = {a.symbol: b.symbol for a, b in zip(old, new) if a != b}
        stores = rewritten(stores, {}, places)
        axes = (*new, *(a for a in kernel.axes if a not in old))
        layout = Layout(self.batch, None, (depth, fixed) if self.turned[side] else (fixed, depth))
        return self.writer(replace(kernel, axes=axes, stores=stores, inplace=()), layout, self.tiles, beside, zero=(depth,))

    @property
    def repeats(self) -> bool:
        """Whether blocks are multiplied in a loop."""
        return self.k.looped

    def multiply(self, left: Operand, right: Operand, results: _Results) -> None:
        """The loop over the depth; afterwards the results know what the sums are called."""
        outer, dtypes = left.outer.lines, [dtype for *_, dtype in self.found.multiplied]
        names = [left.fresh("acc") for _ in dtypes]
        for name, dtype in zip(names, dtypes):
            outer.append(f"{name} = tl.full([BLOCK_M, BLOCK_N], 0, {TYPES[ACCUMULATORS[dtype]]})")
        body = left.enter().lines if self.repeats else outer
        right.body = left.body and left.body.shared()
        positions = body if self.k.looped else outer
        for depth, spread, turned in ((self.k, "[None, :]", False), (self.down, "[:, None]", True)):
            if (True, turned) in zip(self.loaded, self.turned):
                positions.extend(self.depth_lines(depth, spread))
        for writer in (left, right):
            writer.unpack([s.value for s in writer.kernel.stores], self.k)
        for n, (name, dtype) in enumerate(zip(names, dtypes)):
            a, b = (self.factor(writer, n, side, dtype) for side, writer in enumerate((left, right)))
            first, second = (f"{a}.T" if self.turned[0] else a), (b if self.turned[1] else f"{b}.T")
            precision = ', input_precision="ieee"' if dtype == torch.float32 else ""
            body.append(f"{name} = tl.dot({first}, {second}, {name}{precision}, out_dtype={TYPES[ACCUMULATORS[dtype]]})")
        if self.repeats:
            self.loop(outer, body)
            left.leave()
            right.leave()
        for dot, name, dtype in zip(self.found.dots, names, dtypes):
            same_type = dot.dtype == ACCUMULATORS[dtype]
            results.outer.texts[dot] = Text(name if same_type else f"{name}.to({TYPES[dot.dtype]})")

    def factor(self, writer: Operand, number: int, side: int, dtype: torch.dtype) -> str:
        """A variable that holds a block of an operand."""
        matrix = self.matrices.get((number, side))
        if matrix is None:
            return writer.operand(writer.kernel.stores[number].value, dtype)
        start = self._at[("BLOCK_M", "BLOCK_N")[side]]
        start += ".to(tl.int32)" if self.tiles.wide and start != "0" else ""
        at = [start, f"{self.k.span.flat}_start" if self.k.looped else "0"]
        return writer.define(matrix.buffer, f"{self.described[matrix, side]}.load([{', '.join(self.in_order(at, side))}])")

    def before(self) -> list[str]:
        """The descriptors of the matrices."""
        lines: list[str] = []
        for (matrix, side), name in self.described.items():
            both = ((self.m, self.n)[side], self.k)
            start = f"{matrix.buffer}_ptr" + (f" + {to_source(matrix.offset)}" if matrix.offset != 0 else "")
            shape = ", ".join(self.in_order([extent_source(d.span) for d in both], side))
            block = ", ".join(self.in_order([d.constant for d in both], side))
            lines.append(f"{name} = tl.make_tensor_descriptor({start}, [{shape}], [{to_source(matrix.stride)}, 1], [{block}])")
        return lines

    def in_order(self, texts: Sequence[str], side: int) -> Sequence[str]:
        """What is said of the rows or columns and of the depth, the dimension that is contiguous in memory last."""
        return tuple(reversed(texts)) if self.turned[side] else texts


class _SumPrinter(_Printer):
    """Products of a block [m, n, k] are added element by element, and summed over k after the loop. A single row is no dimension.

    Where bytes hold several values, k counts bytes, and a block has as many fewer of them.
    """

    def __init__(self, found: Product, tiles: Tiles) -> None:
        sums = [as_sum(d) for d in found.dots]
        values, depth = one_term_a_byte(found.kernel, [s.value for s in sums], found.depth)
        names = tuple(a.name for a in depth)
        self.sums: dict[Scalar, Scalar] = {d: replace(s, value=v, axes=names) for d, s, v in zip(found.dots, sums, values)}
        terms = product(a.extent for a in found.depth[len(depth) :])
        super().__init__(replace(found, depth=depth), replace(tiles, block_k=max(1, tiles.block_k // int(terms))))

    def dimensions(self) -> tuple[Dimension, ...]:
        return (self.m, self.n, self.k) if self.found.rows or self.tiles.block_m > 1 else (self.n, self.k)

    def lines(self) -> list[str]:
        kernel = replace(self.kernel, stores=rewritten(self.kernel.stores, self.sums))
        made = [v for v in scalars(kernel.stores) if isinstance(v, Reduce)]
        layout = Layout(self.batch, None, self.dimensions())
        writer = _Results(kernel, layout, self.tiles, made)
        self.start(writer)
        lines = writer.outer.lines
        for dimension in layout.dimensions[:-1]:
            lines.extend(self.position(dimension, layout.spread(dimension)))
        body = writer.enter().lines if self.k.looped else lines
        body.extend(self.depth_lines(self.k, layout.spread(self.k)))
        if self.k.looped:
            totals = [(total, self.added(writer, total)) for total in made]
            writer.leave()
            self.loop(lines, body)
            for total, names in totals:
                writer.finish(total, names)
        self.store(writer)
        return lines

    @staticmethod
    def added(writer: Expressions, total: Reduce) -> list[str]:
        writer.prepare(total.value)
        return writer.accumulate(total)


_PRINTERS: dict[str, type[_Printer]] = {"dot": DotPrinter, "sum": _SumPrinter}


# ---- several programs share a tile's depth


def _split(kernel: Kernel, found: Product, tiles: Tiles) -> Program:
    """Two kernels: sums of each part of the depth, and what follows from their sum."""
    legal = found.kernel
    taken = {b.name for b in (*kernel.inputs, *kernel.outputs)} | {a.name for a in legal.axes} | set(kernel.sizes)
    total, index = _row_major(legal.grid)
    part = Axis(unique("part", taken), tiles.split_k, inner=True)
    buffers = [Buffer(unique(f"sums{n or ''}", taken), d.dtype, total) for n, d in enumerate(found.dots)]
    whole = [replace(b, size=dim(sympy.sympify(total) * tiles.split_k)) for b in buffers]
    parts = tuple(Store(b.name, index, d) for b, d in zip(buffers, found.dots))
    label = f"sums over {tiles.split_k} parts of the depth"
    first = replace(legal, name=f"{kernel.name}_parts", label=label, stores=parts, outputs=tuple(buffers), inplace=())
    first = replace(first, inputs=_read(parts, legal.inputs))
    sums: dict[Scalar, Scalar] = {
        d: Reduce(d.dtype, "sum", Load(d.dtype, b.name, index + part.symbol * total), (part.name,)) for d, b in zip(found.dots, buffers)
    }
    stores = rewritten(legal.stores, sums)
    second = replace(legal, axes=(*legal.grid, part), stores=stores, inputs=_read(stores, (*legal.inputs, *whole)))
    printer = _PRINTERS[tiles.walk](replace(found, kernel=first), tiles)
    schedule = replace(default_schedule(second), wide=tiles.wide)
    source = module([printer.function(), print_function(second, schedule)])
    return Program(kernel, tiles, source, (printer.launch(), build_blocks(second, schedule).launches[0]), tuple(whole))


def _read(stores: Sequence[Store], buffers: Iterable[Buffer]) -> tuple[Buffer, ...]:
    """Those of the buffers that the stores read."""
    read = {v.buffer for v in scalars(stores) if isinstance(v, Load)}
    return tuple(b for b in buffers if b.name in read)


def _row_major(axes: Sequence[Axis]) -> tuple[Dim, sympy.Expr]:
    """How many points the axes have, and the number of a point."""
    index: sympy.Expr = sympy.Integer(0)
    for axis in axes:
        index = index * axis.extent + axis.symbol
    return product(a.extent for a in axes), sympy.expand(index)
