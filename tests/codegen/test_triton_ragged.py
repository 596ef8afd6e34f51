"""Contractions of uneven parts through lowering and the Triton printer: groups of any number of rows, blocks of a sparse matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lowering import Case, assert_close, graph_of, memory
from ragged import BF16, CASES, F32, I32, sparse, x

pytest.importorskip("triton")

from tilewright.codegen.kernel import Dot, Kernel, Load, Position, Store, scalars
from tilewright.codegen.lower import lower
from tilewright.codegen.triton.legalize import UnsupportedByTriton, rewritten
from tilewright.codegen.triton.offline import TARGETS, compile_program
from tilewright.codegen.triton.product import find_product
from tilewright.codegen.triton.ragged_roles import Blocks, Groups
from tilewright.codegen.triton.runtime import launch, run
from tilewright.codegen.triton.spaces import offers
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import Tiles, default_tiles, refusal
from tilewright.ir import ops
from tilewright.ir.dims import symbol
from tilewright.ir.graph import Graph, graph_input
from tilewright.ir.interpret import bind_sizes, interpret
from tilewright.ir.scalar import Const, Scalar
from tilewright.ir.types import TensorType

TILES: dict[str, Tiles | None] = {
    "default": None,
    "blocks": Tiles(16, 16, 16, group_m=2),
    "deep": Tiles(16, 32, 64, group_m=1),
    "wide": Tiles(32, 16, 64, wide=True),
}


def kernel_of(case: Case) -> Kernel:
    return lower(graph_of(case.build, case.tensors, case.shapes, case.symbols), "k")


def computed(case: Case, tiles: Tiles | None, device: str = "cpu") -> list[torch.Tensor]:
    graph = graph_of(case.build, case.tensors, case.shapes, case.symbols)
    kernel = lower(graph, "k")
    inputs = {b.name: memory(t).to(device) for b, t in zip(kernel.inputs, case.tensors)}
    found = run(build(kernel, tiles), inputs, bind_sizes(graph, case.tensors), torch.device(device)).values()
    return [o.cpu().reshape(e.shape) for o, e in zip(found, interpret(graph, case.tensors))]


def check(case: Case, tiles: Tiles | None, device: str = "cpu") -> None:
    graph = graph_of(case.build, case.tensors, case.shapes, case.symbols)
    both = zip(interpret(graph, case.tensors), interpret(graph, case.tensors, torch.float64))
    for ours, (eager, exact) in zip(computed(case, tiles, device), both, strict=True):
        assert ours.dtype == eager.dtype
        assert_close(ours, eager, exact)


def lowered(build_, *inputs: tuple[torch.dtype, tuple[int, ...]]) -> Kernel:
    nodes = tuple(graph_input(f"x{n}", TensorType(dtype, shape)) for n, (dtype, shape) in enumerate(inputs))
    return lower(Graph("g", nodes, (build_(*nodes),)), "k")


KERNELS = {name: kernel_of(case) for name, case in CASES.items()}
ALL = [(c, t) for c in CASES for t, tiles in TILES.items() if tiles is None or refusal(KERNELS[c], tiles) is None]


@pytest.mark.parametrize(("name", "tiles"), ALL)
def test_computed(name: str, tiles: str) -> None:
    check(CASES[name], TILES[tiles])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "tiles"), ALL)
def test_on_gpu(name: str, tiles: str) -> None:
    check(CASES[name], TILES[tiles], "cuda")


def test_all_tiles_are_tried() -> None:
    assert {t for _, t in ALL} == set(TILES) and {c for c, t in ALL if t == "deep"} == set(CASES)


@pytest.mark.parametrize("seed", range(12))
def test_any_groups(seed: int) -> None:
    """Sizes of groups at random: many are empty, some have a row, some end where a block of rows does."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0, 0, 1, 15, 16, 17, 32])[torch.randint(7, (6,), generator=generator)]
    ends, rows = counts.cumsum(0).to(I32), int(counts.sum()) + seed % 3
    case = Case(ops.grouped_matmul, (x(rows, 16), x(6, 16, 16), ends))
    check(case, Tiles(16, 16, 16, group_m=1 << seed % 3))


@pytest.mark.parametrize("ends", [[9, 4, 30], [-5, 9, 90], [30, 0, 0], [2**31 - 1, -(2**31), 7], [2**31, 2**40, -(2**40)]])
def test_ends_that_are_wrong_touch_nothing_else(ends: list[int]) -> None:
    """What they give means nothing, but all of it is in the result."""
    limits = torch.tensor(ends, dtype=I32 if max(ends) < 2**31 else torch.int64)
    kernel = lower(graph_of(ops.grouped_matmul, (x(30, 24), x(3, 24, 33), limits)), "k")
    guarded = torch.full((3 * 30 * 33,), 7.0)
    middle = guarded[30 * 33 : 60 * 33]
    rows = torch.full((3 * 30 * 24,), float("nan"))
    rows[30 * 24 : 60 * 24] = 1.0
    inputs = {"x0": rows[30 * 24 : 60 * 24], "x1": torch.ones(3 * 24 * 33), "x2": limits, "out": middle}
    launch(build(kernel, Tiles(16, 16, 16)), inputs)
    assert (guarded[: 30 * 33] == 7).all() and (guarded[60 * 33 :] == 7).all()
    assert not torch.isnan(middle).any()


@pytest.mark.parametrize(("starts", "columns"), [([0, 9, -4], [0, 1, 0]), ([-3, 2, 3], [5, -1, 0])])
def test_a_matrix_that_is_wrong_touches_nothing_else(starts: list[int], columns: list[int]) -> None:
    case = Case(CASES["nan_columns"].build, (x(16, 32), x(3, 16, 16), torch.tensor(columns), torch.tensor(starts)))
    graph = graph_of(case.build, case.tensors)
    rows = torch.full((3 * 512,), float("nan"))
    rows[512:1024] = 1.0
    inputs = {"x0": rows[512:1024], "x1": torch.ones(3 * 256), "x2": torch.tensor(columns), "x3": torch.tensor(starts)}
    (out,) = run(build(lower(graph, "k"), Tiles(16, 16, 16)), inputs).values()
    assert not torch.isnan(out).any()


# ---- what is printed


def test_one_launch_has_as_many_programs_as_there_can_be_blocks_of_rows() -> None:
    (one,) = build(KERNELS["grouped_f32"], Tiles(16, 64, 16)).launches  # 70 rows, 5 groups and what is behind them
    assert one.grid == ((70 + 6 * 15) // 16,)
    (one,) = build(KERNELS["one_row_each"], Tiles(16, 16, 16)).launches  # 3 rows are in 3 groups at most
    assert one.grid == (3 * 3,)
    (one,) = build(KERNELS["sizes"], Tiles(16, 64, 16)).launches
    assert str(one.grid[0]) == "FloorDiv(s + 90, 16)"


def test_what_is_printed() -> None:
    text = build(KERNELS["grouped_bf16"], Tiles(16, 64, 16)).source
    assert "if group > 5:\n        return\n" in text and "atomic" not in text
    assert "tl.dot(x0, x1, acc, out_dtype=tl.float32)" in text and "tl.where(group < 5, 24, 0)" in text
    turned = build(KERNELS["transposed"], Tiles(16, 64, 16)).source
    assert "24*n_down" in turned and "x1.T" in turned, "weights [experts, n, k] are read along their depth"
    routed = build(KERNELS["routed"], Tiles(16, 64, 16)).source
    body = routed.split("for k_start")
    assert "tl.load(x1_ptr + m, mask_m)" in body[0] and "x1_ptr" not in body[1], "which rows are gathered is read once"
    blocks = build(KERNELS["blocks_bf16"], Tiles(16, 16, 16)).source
    assert "for a in range(begin, end):\n        x2 = tl.load(x2_ptr + a)\n" in blocks and "mask_k" not in blocks


def test_results_are_the_same_every_time() -> None:
    for name in ("grouped_f32", "blocks_f32"):
        first, second = (computed(CASES[name], Tiles(16, 16, 16))[0] for _ in range(2))
        assert torch.equal(first, second)


# ---- legality


def test_roles() -> None:
    found = find_product(KERNELS["transposed"])
    assert isinstance(found.parts, Groups) and found.parts.ends == "x2" and found.parts.first == 0
    assert [[a.name for a in axes] for axes in (found.batch, found.rows, found.columns, found.depth)] == [["a"], ["i"], ["j"], ["b"]]
    found = find_product(KERNELS["selected_ends"])
    assert isinstance(found.parts, Groups) and found.parts.first == 3
    found = find_product(KERNELS["blocks_f32"])
    assert isinstance(found.parts, Blocks) and found.parts.axis.name == "a"
    assert [[a.name for a in axes] for axes in (found.batch, found.rows, found.columns, found.depth)] == [["j1"], ["i"], ["j"], ["b"]]


REFUSED = {
    "the depth of uneven parts is not shared": ("grouped_f32", Tiles(16, 16, 16, split_k=2)),
    "uneven parts are multiplied by matrix units": ("grouped_f32", Tiles(4, 16, 16, walk="sum")),
    "a sparse block is multiplied at once": ("wide_blocks", Tiles(16, 16, 32)),
    "every program has a part of the depth": ("blocks_f32", Tiles(16, 16, 16, split_k=2)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_illegal_tiles_are_refused(reason: str) -> None:
    name, tiles = REFUSED[reason]
    assert reason in (refusal(KERNELS[name], tiles) or "")
    with pytest.raises(UnsupportedByTriton, match="these tiles"):
        build(KERNELS[name], tiles)


def test_many_groups_and_large_blocks_are_refused() -> None:
    kinds = ((BF16, (64, 32)), (BF16, (5000, 32, 32)), (I32, (5000,)))
    _refused(lowered(ops.grouped_matmul, *kinds), "every program looks at all groups")
    large = Case(CASES["nan_columns"].build, (x(2, 1024), *sparse((32, 1024), (16, 512), [0], [1])))
    _refused(kernel_of(large), "a sparse block is multiplied at once")


def _refused(kernel: Kernel, reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(kernel)


def _with(kernel: Kernel, **changes: object) -> Kernel:
    """The kernel with another contraction."""
    known: dict[Scalar, Scalar] = {v: replace(v, **changes) for v in scalars(kernel.stores) if isinstance(v, Dot)}  # type: ignore[arg-type]
    return replace(kernel, stores=rewritten(kernel.stores, known))


def test_what_has_no_form_is_refused() -> None:
    kernel, blocks = KERNELS["all_rows_in_one_group"], KERNELS["nan_columns"]
    (dot,) = (v for v in scalars(kernel.stores) if isinstance(v, Dot))
    at, begin, end = dot.within
    i, a = symbol("i"), symbol("a")
    _refused(_with(kernel, within=(Position(torch.int64, 69 - i), begin, end)), "rows of its groups are not the rows")
    _refused(_with(kernel, within=(at, end, end)), "does not begin where the one before ends")
    _refused(_with(kernel, within=(at, Const(torch.int64, 0), end)), "the limits of its groups are computed")
    first = next(v for v in scalars(kernel.stores) if isinstance(v, Load) and v.mask is not None)
    apart = [replace(first, index=2 * a - 2), replace(first, index=2 * a)]
    _refused(_with(kernel, within=(at, *apart)), "not side by side")
    _refused(_with(kernel, within=(at, Const(torch.int64, 0), Const(torch.int64, 5))), "not numbered by one axis of the sum")
    unknown = tuple(replace(x, extent=symbol("e")) if x.name == "a" else x for x in kernel.axes)
    _refused(replace(kernel, axes=unknown, sizes=("e",)), "the number of its groups is known at the launch only")
    _, begin, end = next(v.within for v in scalars(blocks.stores) if isinstance(v, Dot))
    _refused(_with(blocks, within=(Position(torch.int64, 4 - a), begin, end)), "not about their numbers")
    unknown = tuple(replace(x, extent=symbol("e")) if x.name == "b" else x for x in blocks.axes)
    _refused(replace(blocks, axes=unknown, sizes=("e",)), "the width of its blocks is known at the launch only")
    row = Load(torch.int64, "x3", symbol("j"))
    _refused(_with(blocks, within=(Position(torch.int64, a), row, row)), "depend on more than the blocks of a row")
    other = replace(dot, within=(at, end, end))
    _refused(replace(kernel, stores=(*kernel.stores, Store("out", 33 * i + symbol("j"), other))), "of different parts")


# ---- compiled


def _experts(dtype: torch.dtype, rows: int, experts: int, turned: bool = True) -> Kernel:
    weights = (experts, 1408, 2048) if turned else (experts, 2048, 1408)

    def layer(a, w, e, s):
        w = ops.permute(w, dims=(0, 2, 1)) if turned else w
        return ops.mul(ops.silu(ops.grouped_matmul(a, w, e)), ops.reshape(s, shape=(rows, 1)))

    return lowered(layer, (dtype, (rows, 2048)), (dtype, weights), (I32, (experts,)), (dtype, (rows,)))


def _sparse(dtype: torch.dtype, rows: int, side: int, count: int) -> Kernel:
    def layer(*xs):
        return ops.gelu(ops.op("block_sparse_linear")(*xs))

    return lowered(layer, (dtype, (rows, 2048)), (dtype, (count, side, side)), (I32, (count,)), (I32, (2048 // side + 1,)))


COMPILED = {
    "experts": _experts(BF16, 4096, 8),
    "experts_across": _experts(BF16, 4096, 8, turned=False),
    "experts_decode": _experts(torch.float16, 16, 60),
    "experts_f32": _experts(F32, 1024, 8),
    "blocks_of_32": _sparse(BF16, 2048, 32, 1000),
    "blocks_of_64": _sparse(torch.float16, 2048, 64, 300),
    "blocks_decode": _sparse(BF16, 1, 64, 300),
    "blocks_f32": _sparse(F32, 2048, 64, 300),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name: str, target: str) -> None:
    kernel = COMPILED[name]
    assert refusal(kernel, default_tiles(kernel), target) is None
    (compiled,) = compile_program(build(kernel), target)
    assert compiled.binary and compiled.spills == 0
    if target == "sm_80":
        assert "cp.async" in compiled.stages["ptx"], "blocks are loaded while others are multiplied"


def test_schedules_are_offered() -> None:
    for name in ("experts_decode", "blocks_decode"):
        kernel = COMPILED[name]
        (offer,) = offers(kernel, "sm_90")
        start = default_tiles(kernel)
        assert offer.space.broken({k: getattr(start, k) for k in offer.space.variables}) is None
