"""Contractions whose programs walk several tiles, copy blocks by descriptors, and divide the work among their warps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contractions import BF16, CASES, F16, F32, F64, HAND, I8, I32, dot, load
from lowering import assert_close, graph_of
from support import NATIVE
from test_triton_contractions import KERNELS, check, check_hand

pytest.importorskip("triton")

from fake_driver import FakeGpu
from tilewright.codegen.kernel import Axis, Buffer, Kernel, Store
from tilewright.codegen.lower import lower
from tilewright.codegen.program import compile_program
from tilewright.codegen.target import Compiled
from tilewright.codegen.triton import offline, spaces, toolchain
from tilewright.codegen.triton.features import FEATURES, lacking
from tilewright.codegen.triton.legalize import UnsupportedByTriton
from tilewright.codegen.triton.matrices import Matrix, matrices
from tilewright.codegen.triton.product import find_product, is_contraction, without_matrix
from tilewright.codegen.triton.runtime import run
from tilewright.codegen.triton.smaller import smaller
from tilewright.codegen.triton.templates import build
from tilewright.codegen.triton.tiles import ANY, Tiles, refusal, space
from tilewright.ir import ops
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Graph, Stage, graph_input, make_graph
from tilewright.ir.ops import OPS
from tilewright.ir.scalar import cast
from tilewright.ir.types import TensorType

SMALL = Tiles(16, 16, 16)
TILES = {
    "turns": replace(SMALL, programs=2, group_m=2),
    "turns of columns": replace(SMALL, programs=3, group_m=1, wide=True),
    "copied": replace(SMALL, descriptors=True),
    "copied, wide": replace(SMALL, block_k=32, descriptors=True, wide=True, group_m=2),
    "copied, in parts": replace(SMALL, descriptors=True, split_k=2),
    "copied in turns": replace(SMALL, descriptors=True, programs=2),
    "specialized": Tiles(64, 16, 16, num_stages=2, descriptors=True, specialized=True),
    "specialized in turns": Tiles(64, 16, 16, num_stages=2, descriptors=True, specialized=True, programs=1),
}


def legal(kernel: Kernel, tiles: Tiles) -> bool:
    return is_contraction(without_matrix(kernel)) and refusal(kernel, tiles) is None


GRAPHS = [(c, t) for c in CASES for t in TILES if legal(KERNELS[c], TILES[t])]
HANDS = [(c, t) for c in HAND for t in TILES if legal(HAND[c].kernel, TILES[t])]


@pytest.mark.parametrize(("name", "tiles"), [*GRAPHS, *HANDS])
def test_the_same_results(name: str, tiles: str) -> None:
    if name in CASES:
        check(CASES[name], TILES[tiles])
    else:
        check_hand(HAND[name], TILES[tiles])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "tiles"), [*GRAPHS, *HANDS])
def test_on_gpu(name: str, tiles: str) -> None:
    if any(lacking(option, "sm_{}{}".format(*torch.cuda.get_device_capability())) for option in FEATURES if getattr(TILES[tiles], option)):
        pytest.skip("this GPU has no such option")
    if name in CASES:
        check(CASES[name], TILES[tiles], "cuda")
    else:
        check_hand(HAND[name], TILES[tiles], "cuda")


def test_every_option_is_tried() -> None:
    assert {t for _, t in GRAPHS} == set(TILES)
    assert {c for c, t in GRAPHS if t == "copied"} >= {"layer_bf16", "whole", "heads", "both_turned", "some_rows"}
    assert {c for c, t in HANDS if t == "turns"} >= {"gate_and_up", "dequantized", "gathered", "update"}


# ---- what is printed and compiled


def layer(rows: int = 1000, columns: int = 4096, depth: int = 1024, dtype: torch.dtype = BF16) -> Kernel:
    shapes = {"x": (rows, depth), "w": (columns, depth), "b": (columns,)}
    x, w, b = (graph_input(name, TensorType(dtype, s)) for name, s in shapes.items())
    return lower(Graph("g", (x, w, b), (ops.gelu(ops.linear(x, w, b)),)), "linear_gelu")


LARGE = Tiles(128, 128, 64, num_warps=8)
COPIED = replace(LARGE, descriptors=True)
SPECIALIZED = replace(COPIED, num_warps=4, specialized=True)


@pytest.mark.parametrize("programs", [0, 132])
def test_blocks_are_copied(programs: int) -> None:
    tiles = replace(COPIED, programs=programs)
    text = build(layer(), tiles).source
    assert "x_blocks = tl.make_tensor_descriptor(x_ptr, [1000, 1024], [1024, 1], [BLOCK_M, BLOCK_K])" in text
    assert "w = w_blocks.load([n_start, k_start])" in text and "tl.load(x_ptr" not in text and "n_down" not in text
    (compiled,) = offline.compile_program(build(layer(), tiles), "sm_90")
    assert "cp.async.bulk.tensor" in compiled.stages["ptx"] and "wgmma" in compiled.stages["ptx"] and compiled.spills == 0


@pytest.mark.parametrize("programs", [0, 132])
def test_warps_are_given_work_of_their_own(programs: int) -> None:
    program = build(layer(), replace(SPECIALIZED, programs=programs))
    (compiled,) = offline.compile_program(program, "sm_90")
    assert {"setmaxnreg.dec", "setmaxnreg.inc"} <= {line.strip()[:14] for line in compiled.stages["ptx"].splitlines()}
    assert compiled.spills == 0 and program.source.count("warp_specialize=True") == 1
    binary = offline.compile_binary(program, program.launches[0], "sm_90")
    assert binary.threads == 3 * 4 * 32, "warps that copy, and two groups that multiply"


def test_programs_walk_tiles() -> None:
    tiles = replace(LARGE, programs=132)
    program = build(layer(), tiles)
    assert "for turn in tl.range(tl.program_id(0), 256, tl.num_programs(0), flatten=True):" in program.source
    assert program.launches[0].grid == (132,) and build(layer(rows=100), tiles).launches[0].grid == (32,)
    plain, flat = (offline.compile_program(build(layer(), t), "sm_90")[0] for t in (LARGE, tiles))
    assert plain.stages["ttgir"].count("scf.for") == flat.stages["ttgir"].count("scf.for") == 1, "both loops are one"
    assert offline.compile_program(program, "sm_80")[0].spills == 0


SAMPLES = [
    (BF16, Tiles(64, 64, 64, num_stages=2, descriptors=True, specialized=True)),
    (BF16, Tiles(128, 128, 64, num_stages=4, descriptors=True, specialized=True, programs=132)),
    (F16, Tiles(256, 64, 32, num_stages=4, descriptors=True, specialized=True)),
    (F16, Tiles(64, 256, 128, num_warps=8, num_stages=2, descriptors=True, programs=132)),
    (F64, Tiles(32, 32, 16, descriptors=True)),
    (F64, Tiles(32, 32, 16, descriptors=True, split_k=4)),
    (F32, Tiles(32, 64, 16, programs=132)),
]


@pytest.mark.parametrize(("dtype", "tiles"), SAMPLES, ids=str)
def test_what_is_legal_compiles(dtype: torch.dtype, tiles: Tiles) -> None:
    kernel = layer(dtype=dtype)
    assert refusal(kernel, tiles, "sm_90") is None
    assert all(compiled.spills == 0 for compiled in offline.compile_program(build(kernel, tiles), "sm_90"))


def test_integers_are_copied() -> None:
    x, w = (load(name, 64 * symbol(axis) + symbol("a"), I8) for name, axis in (("x", "i"), ("w", "j")))
    total = dot(cast(x, I32), cast(w, I32), dtype=I32)
    buffers = tuple(Buffer(name, I8, 64 * 64) for name in ("x", "w"))
    axes = (Axis("i", 64), Axis("j", 64), Axis("a", 64, True))
    kernel = Kernel("bytes", axes, buffers, (Buffer("out", I32, 64 * 64),), (Store("out", 64 * symbol("i") + symbol("j"), total),))
    tiles = Tiles(64, 64, 32, num_stages=2, descriptors=True)
    values = {name: torch.randint(-128, 128, (64, 64), dtype=I8) for name in ("x", "w")}
    (out,) = run(build(kernel, tiles), {name: v.reshape(-1) for name, v in values.items()}).values()
    assert out.view(64, 64).equal(values["x"].int() @ values["w"].int().T)
    for chosen in (tiles, replace(tiles, specialized=True)):
        (compiled,) = offline.compile_program(build(kernel, chosen), "sm_90")
        assert "cp.async.bulk.tensor" in compiled.stages["ptx"] and "wgmma" in compiled.stages["ptx"] and compiled.spills == 0


# ---- what is refused


def test_other_targets_copy_no_blocks() -> None:
    sentence = "has no unit that copies blocks \\(TMA\\)"
    for target in ("sm_80", "gfx942"):
        with pytest.raises(offline.OfflineError, match=f"cannot compile linear_gelu for {target}: {target} {sentence}"):
            offline.compile_program(build(layer(), COPIED), target)
        limit = refusal(layer(), COPIED, target)
        assert limit is not None and limit.startswith(f"{target} has no unit that copies blocks (TMA)")
    assert "sm_120" in (lacking("specialized", "sm_120") or "") and lacking("descriptors", "sm_120") is None
    assert [option for option in FEATURES if lacking(option, "sm_90")] == []


def test_an_old_triton_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEATURES, "programs", replace(FEATURES["programs"], parameter="of_tomorrow"))
    lacking.cache_clear()
    try:
        assert (
            refusal(layer(), replace(LARGE, programs=132), "sm_90") == "the Triton that is installed does not offer programs: programs <= 0"
        )
        assert refusal(layer(), LARGE, "sm_90") is None
    finally:
        monkeypatch.undo()
        lacking.cache_clear()


@NATIVE
def test_what_does_not_compile_is_tried_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of warps multiplied, so twice as many warps do without them; afterwards blocks become smaller, as ever."""
    tiles = replace(SPECIALIZED, block_n=256, programs=132)
    plain = smaller(tiles)
    assert plain == replace(LARGE, block_n=256) and refusal(layer(), plain) is None
    assert smaller(plain) == replace(plain, block_n=128, num_stages=1)
    gpu, printed = FakeGpu("sm_80", shared=166_912), toolchain.print_program
    monkeypatch.setattr(toolchain, "print_program", lambda kernel, schedule=None: printed(kernel, schedule or COPIED))
    (made,) = toolchain.compile_kernels([layer()], "cuda", gpu.driver)
    assert isinstance(made, Compiled) and "sm_80 has no unit that copies blocks (TMA)" in made.notes[0] and len(made.notes) == 1


REFUSED = {
    "programs that walk all tiles have the whole depth": replace(LARGE, programs=4, split_k=2),
    "warps that copy do so by descriptors": replace(SPECIALIZED, descriptors=False),
    "warps that copy do so in the loop over the whole depth": replace(SPECIALIZED, split_k=2),
    "warps that copy are ahead of those that multiply": replace(SPECIALIZED, num_stages=1),
    "groups of warps that multiply have four": replace(SPECIALIZED, block_m=64, block_n=64, num_warps=2),
    "groups of warps that multiply have 64 rows": replace(SPECIALIZED, block_m=32),
    "groups of warps that multiply have twice as many columns": replace(SPECIALIZED, block_m=64, block_n=256),
    "programs is one of 0": replace(LARGE, programs=-1),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with pytest.raises(UnsupportedByTriton, match=reason):
        build(layer(), REFUSED[reason])


def operand(x: tuple[int, ...], build_, dtype: torch.dtype = BF16) -> dict[tuple[int, int], Matrix]:
    """The matrices of a product of what is made from x with a weight."""
    graph = graph_of(lambda a, w: ops.relu(ops.linear(build_(a), w)), (torch.empty(x, dtype=dtype), torch.empty(24, 64, dtype=dtype)))
    return matrices(find_product(lower(graph, "k")))


def test_what_is_a_matrix() -> None:
    whole = {(0, 0): Matrix("x0", 0, 64), (0, 1): Matrix("x1", 0, 64)}
    assert operand((32, 64), lambda x: x) == whole
    assert operand((4, 8, 64), lambda x: x) == whole, "rows of several axes"
    part = operand((32, 200), lambda x: ops.slice(x, dim=1, start=64, stop=128))
    assert part[0, 0] == Matrix("x0", 64, 200)
    turned = operand((64, 32), lambda x: ops.permute(x, dims=(1, 0)))
    assert turned[0, 0] == Matrix("x0", 0, 32)


NO_MATRICES = {
    "rows that do not begin at lines": ((32, 65), lambda x: ops.slice(x, dim=1, start=0, stop=64)),
    "a start between lines": ((32, 200), lambda x: ops.slice(x, dim=1, start=1, stop=65)),
    "every other element": ((32, 128), lambda x: ops.slice(x, dim=1, start=0, stop=128, step=2)),
    "computed": ((32, 64), lambda x: ops.relu(x)),
    "backwards": ((32, 64), lambda x: ops.flip(x, dims=(0,))),
    "the same row": ((1, 64), lambda x: ops.expand(x, shape=(32, 64))),
    "padded": ((32, 60), lambda x: ops.pad(x, low=(0, 2), high=(0, 2))),
}


@pytest.mark.parametrize("what", NO_MATRICES)
def test_what_is_no_matrix(what: str) -> None:
    assert (0, 0) not in operand(*NO_MATRICES[what])


def test_sizes_known_at_the_launch() -> None:
    """Rows may be any number; a depth must be known, since its rows begin where it says."""
    s = symbol("s")
    x, w = graph_input("x", TensorType(BF16, (s, 64))), graph_input("w", TensorType(BF16, (32, 64)))
    rows = lower(Graph("g", (x, w), (ops.relu(ops.linear(x, w)),), symbols={"s": SymbolRange()}), "k")
    assert len(matrices(find_product(rows))) == 2
    x, w = graph_input("x", TensorType(BF16, (32, s))), graph_input("w", TensorType(BF16, (32, s)))
    depth = lower(Graph("g", (x, w), (ops.relu(ops.linear(x, w)),), symbols={"s": SymbolRange()}), "k")
    assert not matrices(find_product(depth))


# ---- choosing and launching


def test_a_tuner_sees_them() -> None:
    for target, options in {"sm_90": {"descriptors", "specialized", "programs"}, "sm_80": {"programs"}}.items():
        (offer,) = spaces.offers(layer(), target)
        tiles = COPIED if target == "sm_90" else LARGE
        values = {name: int(getattr(replace(tiles, programs=0), name)) for name in offer.space.variables} | {"num_stages": 3}
        chosen = [values, *({**values, option: max(offer.space.variables[option])} for option in options - {"specialized"})]
        for one in chosen:
            assert offer.space.broken(one) is None
            assert isinstance(offer.schedule(one).descriptors, bool)
    assert space(find_product(layer()), "dot").variables["programs"] == (0, ANY.processors)


@NATIVE
@pytest.mark.parametrize("programs", [0, 3])
def test_descriptors_have_memory_of_their_own(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program makes its descriptors where the launch gives it memory: 128 bytes for each."""
    gpu = FakeGpu("sm_90")
    gpu.watch(monkeypatch)
    tiles, printed = Tiles(16, 16, 16, descriptors=True, programs=programs), toolchain.print_program
    monkeypatch.setattr(toolchain, "print_program", lambda kernel, schedule=None: printed(kernel, tiles))
    rows = symbol("s")
    x, w = graph_input("x", TensorType(F16, (rows, 64))), graph_input("w", TensorType(F16, (32, 64)))
    a, b = graph_input("a", TensorType(F16, (rows, 64))), graph_input("b", TensorType(F16, (32, 64)))
    body = make_graph("body", [a, b], [OPS["relu"](OPS["linear"](a, b))], symbols={"s": SymbolRange()})
    graph = make_graph("g", [x, w], [OPS["region"](x, w, body=body)], stage=Stage.FUSED, symbols={"s": SymbolRange()})
    program = compile_program(graph, gpu.targets)
    assert not program.fallbacks
    for n in (40, 64):
        left, right = torch.randn(n, 64, dtype=F16), torch.randn(32, 64, dtype=F16)
        (ours,) = program([left, right])
        assert_close(ours, (left @ right.T).relu(), (left.double() @ right.double().T).relu())
        launched = gpu.launches.pop()
        memory = launched.words[4]
        tiles_in_all = -(-n // 16) * 2
        assert launched.grid == (min(tiles_in_all, programs or tiles_in_all), 1, 1)
        assert memory % 64 == 0 and memory not in (0, *launched.words[:3]) and launched.words[5:] == (0,)
    assert ("256*min(3, 2*((s + 15) // 16))" if programs else "512*((s + 15) // 16)") in program.source
