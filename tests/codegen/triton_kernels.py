"""Hand-written kernels of every sort, with what torch computes for them. Shared by the tests of the Triton printer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import torch
from tilewright.codegen.kernel import Axis, Buffer, Kernel, Load, Position, Reduce, Scan, Store
from tilewright.ir.dims import FloorDiv, Mod, symbol
from tilewright.ir.scalar import Const, Scalar, apply, cast, lift, where

F32, F64, BF16, F16, I64, I32, U8, BOOL = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)  # fmt: skip
i, j, r, s, n, m = (symbol(x) for x in "ijrsnm")


# The interpreter of older releases cannot invert uint8
OLD_INTERPRETER = tuple(int(n) for n in version("triton").split(".")[:2]) < (3, 9)


@dataclass(frozen=True)
class Case:
    """A kernel, inputs for it (flat when launched) and its outputs by torch."""

    kernel: Kernel
    inputs: dict[str, torch.Tensor]
    expected: Callable[..., tuple[torch.Tensor, ...]]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.name


def load(buffer: str, index, dtype: torch.dtype = F32, **options) -> Load:
    return Load(dtype, buffer, index, **options)


def case(
    name: str, axes: str, stores: list[Store], inputs: dict[str, torch.Tensor], outputs: dict[str, tuple], expected, **options
) -> Case:
    """`axes` reads "i:4 r:100!" with ! for inner axes; an extent may name a size."""
    sizes = options.pop("sizes", {})

    def extent(text: str):
        return int(text) if text.isdigit() else symbol(text)

    parsed = tuple(Axis(a.split(":")[0], extent(a.split(":")[1].rstrip("!")), a.endswith("!")) for a in axes.split())
    symbolic = options.pop("symbolic", {})
    buffers = tuple(Buffer(k, v.dtype, symbolic.get(k, v.numel())) for k, v in inputs.items())
    kernel = Kernel(name, parsed, buffers, tuple(Buffer(k, *v) for k, v in outputs.items()), tuple(stores), tuple(sizes), **options)
    return Case(kernel, inputs, expected, sizes)


def randn(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


def special(*shape: int) -> torch.Tensor:
    """Normal values with NaN, both infinities and equal largest values among them."""
    x = randn(*shape)
    x.view(-1)[::7] = 3.0
    x[1, 2], x[1, 5], x[2, 0], x[2, 3], x[3, :] = float("nan"), float("nan"), float("inf"), float("-inf"), float("-inf")
    return x


def _pointwise() -> list[Case]:
    x, y = load("x", i), load("y", i)
    add = case(
        "add_relu",
        "i:1000",
        [Store("out", i, apply("max", x + y * 2, 0))],
        {"x": randn(1000), "y": randn(1000)},
        {"out": (F32, 1000)},
        lambda x, y: (torch.relu(x + y * 2),),
        label="relu(x + 2 y)",
        sources=("model.py:7  y = relu(x + 2 * y)",),
    )
    xb, bias = load("x", 24 * i + j), load("bias", j)
    broadcast = case(
        "add_bias",
        "i:10 j:24",
        [Store("out", 24 * i + j, xb + bias)],
        {"x": randn(10, 24), "bias": randn(24)},
        {"out": (F32, 240)},
        lambda x, bias: (x + bias,),
    )
    transposed = case(
        "transpose",
        "i:10 j:24",
        [Store("out", 24 * i + j, load("x", 10 * j + i) * 2)],
        {"x": randn(24, 10)},
        {"out": (F32, 240)},
        lambda x: (x.t() * 2,),
    )
    half = case(
        "half_mix",
        "i:100",
        [Store("out", i, load("x", i) * load("y", i)), Store("wide", i, load("x", i))],
        {"x": randn(100, dtype=BF16), "y": randn(100, dtype=F16)},
        {"out": (BF16, 100), "wide": (F32, 100)},
        lambda x, y: ((x.float() * y.float()).to(BF16), x.float()),
    )
    a, b = load("a", i, BOOL), load("x", i) > 0.25
    logic = case(
        "logic",
        "i:77",
        [Store("out", i, (a & b) ^ ~a), Store("number", i, where(a, cast(b, I32) + 1, -5))],
        {"a": randn(77) > 0, "x": randn(77)},
        {"out": (BOOL, 77), "number": (I32, 77)},
        lambda a, x: ((a & (x > 0.25)) ^ ~a, torch.where(a, (x > 0.25).int() + 1, -5)),
    )
    few = (load("n", 0 * i, I64) < 5) & (load("x", i) > 0.25)  # one number decides about a block
    decided = case(
        "decided_by_one",
        "i:77",
        [Store("out", i, where(few, load("x", i, mask=few), 1.0))],
        {"n": torch.tensor([3]), "x": randn(77)},
        {"out": (F32, 77)},
        lambda n, x: (torch.where((n < 5) & (x > 0.25), x, 1.0),),
    )
    double = case(
        "double",
        "i:50",
        [Store("out", i, where(load("x", i, F64) > 0.1, 0.1, load("x", i, F64) / 3))],
        {"x": randn(50, dtype=F64)},
        {"out": (F64, 50)},
        lambda x: (torch.where(x > 0.1, 0.1, x / 3),),
    )
    scalar = case("scalar", "", [Store("out", 0 * i, load("x", 0 * i) + 1)], {"x": randn(1)}, {"out": (F32, 1)}, lambda x: (x + 1,))
    empty = case("empty", "i:0", [Store("out", i, load("x", i) + 1)], {"x": randn(0)}, {"out": (F32, 0)}, lambda x: (x + 1,))
    constant = case(
        "fill",
        "i:9",
        [Store("out", i, Const(F64, 0.1)), Store("yes", i, Const(BOOL, True))],
        {},
        {"out": (F64, 9), "yes": (BOOL, 9)},
        lambda: (torch.full((9,), 0.1, dtype=F64), torch.ones(9, dtype=BOOL)),
    )
    byte = case(
        "bytes",
        "i:60",
        [
            Store("out", i, load("x", i, U8) * 3 + 250),
            Store("q", i, apply("floordiv", load("y", i, I32), -3)),
            Store("rest", i, apply("mod", load("y", i, I32), 7)),
        ],
        {"x": torch.arange(60, dtype=U8) * 4, "y": torch.arange(60, dtype=I32) - 30},
        {"out": (U8, 60), "q": (I32, 60), "rest": (I32, 60)},
        lambda x, y: (x * 3 + 250, y // -3, y % 7),
    )
    update = case(
        "update",
        "i:40",
        [Store("out", i, load("x", i) * 0.5)],
        {"x": randn(40)},
        {"out": (F32, 40)},
        lambda x: (x * 0.5,),
        inplace=(("out", "x"),),
    )
    return [add, broadcast, transposed, half, logic, decided, double, scalar, empty, constant, byte, update]


def _memory() -> list[Case]:
    left = apply("lt", Position(I64, j), Const(I64, 3))
    halves = where(left, load("x", 3 * i + j, mask=left), load("y", 5 * i + j - 3, mask=~left))
    cat = case(
        "cat",
        "i:6 j:8",
        [Store("out", 8 * i + j, halves)],
        {"x": randn(6, 3), "y": randn(6, 5)},
        {"out": (F32, 48)},
        lambda x, y: (torch.cat([x, y], 1),),
    )
    inside = apply("ge", Position(I64, i), Const(I64, 2)) & apply("lt", Position(I64, i), Const(I64, 12))
    pad = case(
        "pad",
        "i:15",
        [Store("out", i, load("x", i - 2, mask=inside, other=-1.5))],
        {"x": randn(10)},
        {"out": (F32, 15)},
        lambda x: (torch.nn.functional.pad(x, (2, 3), value=-1.5),),
    )
    row = load("ids", i, I64)
    gather = case(
        "embedding",
        "i:7 j:12",
        [Store("out", 12 * i + j, load("table", 12 * symbol("row") + j, indirect=(("row", row),)))],
        {"ids": torch.tensor([3, 0, 4, 4, 1, 2, 0]), "table": randn(5, 12)},
        {"out": (F32, 84)},
        lambda ids, table: (table[ids],),
    )
    positions = case(
        "positions",
        "i:6 j:5",
        [Store("out", 5 * i + j, Position(I64, 10 * i + j) * 3), Store("f", 5 * i + j, cast(Position(I64, i), F32))],
        {},
        {"out": (I64, 30), "f": (F32, 30)},
        lambda: ((10 * torch.arange(6)[:, None] + torch.arange(5)) * 3, torch.arange(6.0)[:, None].expand(6, 5)),
    )
    roll = case("roll", "i:11", [Store("out", i, load("x", Mod(i - 4, 11)))], {"x": randn(11)}, {"out": (F32, 11)}, lambda x: (x.roll(4),))
    repeat = case(
        "repeat",
        "i:12",
        [Store("out", i, load("x", FloorDiv(i, 3)))],
        {"x": randn(4)},
        {"out": (F32, 12)},
        lambda x: (x.repeat_interleave(3),),
    )
    return [cat, pad, gather, positions, roll, repeat]


def _softmax(rows, columns) -> list[Store]:
    x = load("x", columns * i + r)
    e = apply("exp", x - Reduce(F32, "max", x, ("r",)))
    return [Store("out", columns * i + r, e / Reduce(F32, "sum", e, ("r",)))]


def _layer_norm(x: Scalar, length, gamma: Scalar, beta: Scalar) -> Scalar:
    count = cast(Position(I64, length), F32) if not isinstance(length, int) else lift(length, F32)
    centered = x - Reduce(F32, "sum", x, ("r",)) / count
    variance = Reduce(F32, "sum", centered * centered, ("r",)) / count
    return centered * apply("rsqrt", variance + 1e-5) * gamma + beta


def _reductions() -> list[Case]:
    softmax = case("softmax", "i:5 r:100!", _softmax(5, 100), {"x": randn(5, 100)}, {"out": (F32, 500)}, lambda x: (x.softmax(-1),))
    residual = load("x", 48 * i + r) + load("y", 48 * i + r)
    norm = case(
        "add_layer_norm",
        "i:6 r:48!",
        [Store("out", 48 * i + r, _layer_norm(residual, 48, load("gamma", r), load("beta", r)))],
        {"x": randn(6, 48), "y": randn(6, 48), "gamma": randn(48), "beta": randn(48)},
        {"out": (F32, 288)},
        lambda x, y, gamma, beta: (torch.nn.functional.layer_norm(x + y, (48,), gamma, beta),),
    )
    column = case(
        "column_sum",
        "i:20 r:30!",
        [Store("out", i, Reduce(F32, "sum", load("x", 20 * r + i), ("r",)))],
        {"x": randn(30, 20)},
        {"out": (F32, 20)},
        lambda x: (x.sum(0),),
    )
    z = load("x", 10 * i + r)
    extremes = case(
        "extremes",
        "i:6 r:10!",
        [
            Store(o, i, Reduce(I64 if "arg" in o else F32, o.replace("arg_", "arg"), z, ("r",)))
            for o in ("max", "min", "arg_max", "arg_min")
        ],
        {"x": special(6, 10)},
        {"max": (F32, 6), "min": (F32, 6), "arg_max": (I64, 6), "arg_min": (I64, 6)},
        lambda x: (x.amax(1), x.amin(1), x.argmax(1), x.argmin(1)),
    )
    positive = load("x", 9 * i + r) > 1.5
    integers = case(
        "counts",
        "i:6 r:9!",
        [
            Store("any", i, Reduce(BOOL, "any", positive, ("r",))),
            Store("all", i, Reduce(BOOL, "all", ~positive, ("r",))),
            Store("count", i, Reduce(I64, "sum", cast(positive, I64), ("r",))),
            Store("largest", i, Reduce(I32, "max", load("k", 9 * i + r, I32), ("r",))),
            Store("product", i, Reduce(F32, "prod", load("x", 9 * i + r), ("r",))),
        ],
        {"x": randn(6, 9), "k": torch.arange(54, dtype=I32).flip(0) - 100},
        {"any": (BOOL, 6), "all": (BOOL, 6), "count": (I64, 6), "largest": (I32, 6), "product": (F32, 6)},
        lambda x, k: ((x > 1.5).any(1), (x <= 1.5).all(1), (x > 1.5).sum(1), k.view(6, 9).amax(1), x.prod(1)),
    )
    total = case(
        "mean_of_all",
        "r:130!",
        [Store("out", 0 * i, Reduce(F32, "sum", load("x", r), ("r",)) / 130)],
        {"x": randn(130)},
        {"out": (F32, 1)},
        lambda x: (x.mean(),),
    )
    two = case(
        "batch_statistics",
        "i:3 r:4! s:6!",
        [
            Store("mean", i, Reduce(F32, "sum", load("x", 18 * r + 6 * i + s), ("r", "s")) / 24),
            Store("at", i, Reduce(I64, "argmax", load("x", 18 * r + 6 * i + s), ("r", "s"))),
        ],
        {"x": randn(4, 3, 6)},
        {"mean": (F32, 3), "at": (I64, 3)},
        lambda x: (x.mean((0, 2)), x.transpose(0, 1).reshape(3, 24).argmax(1)),
    )
    nested = case(
        "sum_then_max",
        "i:3 r:4! s:6!",
        [Store("out", i, Reduce(F32, "max", Reduce(F32, "sum", load("x", 24 * i + 6 * r + s), ("s",)), ("r",)))],
        {"x": randn(3, 4, 6)},
        {"out": (F32, 3)},
        lambda x: (x.sum(2).amax(1),),
    )
    none = case(
        "empty_rows",
        "i:4 r:0!",
        [
            Store("sum", i, Reduce(F32, "sum", load("x", r), ("r",))),
            Store("max", i, Reduce(F32, "max", load("x", r), ("r",))),
            Store("all", i, Reduce(BOOL, "all", load("x", r) > 0, ("r",))),
        ],
        {"x": randn(0)},
        {"sum": (F32, 4), "max": (F32, 4), "all": (BOOL, 4)},
        lambda x: (torch.zeros(4), torch.full((4,), -torch.inf), torch.ones(4, dtype=BOOL)),
    )
    scan = case(
        "cumulative",
        "i:3 r:21!",
        [
            Store("sum", 21 * i + r, Scan(F32, "cumsum", load("x", 21 * i + r), "r")),
            Store("product", 21 * i + r, Scan(F32, "cumprod", load("x", 21 * i + r), "r")),
        ],
        {"x": randn(3, 21)},
        {"sum": (F32, 63), "product": (F32, 63)},
        lambda x: (x.cumsum(1), x.cumprod(1)),
    )
    half = load("x", 33 * i + r)
    rms = case(
        "rms_half",
        "i:4 r:33!",
        [Store("out", 33 * i + r, half * apply("rsqrt", Reduce(F32, "sum", half * half, ("r",)) / 33 + 1e-6))],
        {"x": randn(4, 33, dtype=BF16)},
        {"out": (BF16, 132)},
        lambda x: (torch.nn.functional.rms_norm(x, (33,), eps=1e-6),),
    )
    ones = case(
        "count_points",
        "i:3 r:10!",
        [Store("out", i, Reduce(F64, "sum", Const(F64, 0.1), ("r",)))],
        {},
        {"out": (F64, 3)},
        lambda: (torch.full((3,), 1.0, dtype=F64),),
    )
    return [softmax, norm, column, extremes, integers, total, two, nested, none, scan, rms, ones]


def _symbolic() -> list[Case]:
    pointwise = case(
        "symbolic_add",
        "i:n j:m",
        [Store("out", m * i + j, load("x", m * i + j) + load("b", j))],
        {"x": randn(7, 9), "b": randn(9)},
        {"out": (F32, n * m)},
        lambda x, b: (x + b,),
        sizes={"n": 7, "m": 9},
        symbolic={"x": n * m, "b": m},
    )
    softmax = case(
        "symbolic_softmax",
        "i:n r:m!",
        _softmax(n, m),
        {"x": randn(3, 37)},
        {"out": (F32, n * m)},
        lambda x: (x.softmax(-1),),
        sizes={"n": 3, "m": 37},
        symbolic={"x": n * m},
    )
    one = replace(softmax, kernel=replace(softmax.kernel, name="symbolic_one"), inputs={"x": randn(1, 1)}, sizes={"n": 1, "m": 1})
    empty = replace(softmax, kernel=replace(softmax.kernel, name="symbolic_empty"), inputs={"x": randn(0, 4)}, sizes={"n": 0, "m": 4})
    norm = case(
        "symbolic_norm",
        "i:n r:m!",
        [Store("out", m * i + r, _layer_norm(load("x", m * i + r), m, load("g", r), load("b", r)))],
        {"x": randn(3, 20), "g": randn(20), "b": randn(20)},
        {"out": (F32, n * m)},
        lambda x, g, b: (torch.nn.functional.layer_norm(x, x.shape[1:], g, b),),
        sizes={"n": 3, "m": 20},
        symbolic={"x": n * m, "g": m, "b": m},
    )
    return [pointwise, softmax, one, empty, norm]


CASES: list[Case] = [*_pointwise(), *_memory(), *_reductions(), *_symbolic()]
