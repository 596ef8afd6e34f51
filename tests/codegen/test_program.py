"""The host program: library calls, views, memory, writes, threads and fallbacks, against the interpreter. With kernels and without."""

import copy
import weakref

import pytest
import torch
from support import NATIVE, ON_GPU, in_threads
from tilewright.codegen.program import compile_program
from tilewright.codegen.target import TARGETS, Failed, Target
from tilewright.ir.dims import SymbolRange, symbol
from tilewright.ir.graph import Data, Stage, graph_input, make_graph
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import OPS, Ref
from tilewright.ir.retarget import retarget
from tilewright.ir.types import ScalarType, TensorType
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.plan_memory import PlanMemory

S = symbol("s")
ANY_S = {"s": SymbolRange(0, 64)}
WAYS = [pytest.param(TARGETS, marks=NATIVE, id="kernels"), pytest.param({}, id="eager")]
BOTH = pytest.mark.parametrize("targets", WAYS)
GPU = {"cuda": TARGETS["cuda"]}
EVERY = pytest.mark.parametrize("targets", [*WAYS, pytest.param(GPU, marks=ON_GPU, id="gpu")])
"""The same on a GPU, where there is one."""


def t(*shape, dtype=torch.float32):
    return TensorType(dtype, shape)


def fused(inputs, outputs, device="cpu", **fields):
    graph = make_graph("g", inputs, outputs, stage=Stage.CANONICAL, **fields)
    return PlanMemory().run(FuseRegions().run(retarget(graph, device, lambda data: data.to(device))))


def on_device(value, device):
    """The value with its strides, and what lies in memory around it."""
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def device_of(targets):
    return "cuda:0" if targets is GPU else "cpu"


def assert_same(program, graph, values, **tolerance):
    """Outputs and written inputs as the interpreter has them; eager's strides come from `layout` nodes, else row-major."""
    mine, theirs = copy.deepcopy(values), copy.deepcopy(values)
    got, want = program(mine), interpret(graph, theirs)
    for a, b in zip([*got, *mine], [*want, *theirs], strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
        else:
            assert a == b
    return got


def check(targets, inputs, outputs, *calls, **fields):
    device = device_of(targets)
    graph = fused(inputs, outputs, device, **fields)
    program = compile_program(graph, targets)
    for values in calls:
        assert_same(program, graph, [on_device(v, device) for v in values])
    if targets:
        assert not [f for f in program.fallbacks if f.reason != "no native form"]
    return program


PRODUCTS = {
    "mm": ((4, 5), (5, 6)), "rows": ((2, 3, 4, 5), (5, 6)), "bmm": ((3, 4, 5), (3, 5, 6)), "heads": ((2, 3, 4, 5), (2, 3, 5, 6)),
    "broadcast": ((2, 1, 4, 5), (3, 5, 6)), "vector": ((4, 5), (5,)), "dot": ((5,), (5,)), "empty": ((0, 5), (5, 6)),
    "no_inner": ((4, 0), (0, 6)),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize("a, b", PRODUCTS.values(), ids=PRODUCTS)
def test_products(targets, a, b):
    x, y = graph_input("x", t(*a)), graph_input("y", t(*b))
    product = OPS["matmul"](OPS["exp"](x), y)
    check(targets, [x, y], [OPS["add"](product, 1.0)], [torch.randn(a), torch.randn(b)])


@EVERY
def test_products_of_transposed_operands(targets):
    x, y = graph_input("x", t(2, 3, 4, 5)), graph_input("y", t(2, 3, 4, 5))
    turned = OPS["permute"](OPS["exp"](x), dims=(0, 1, 3, 2))
    check(targets, [x, y], [OPS["matmul"](turned, y)], [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)])


@EVERY
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_linear(targets, shape):
    x, w, b = graph_input("x", t(*shape)), graph_input("w", t(6, 5)), graph_input("b", t(6))
    both = [OPS["linear"](x, w), OPS["relu"](OPS["linear"](x, w, b))]
    check(targets, [x, w, b], both, [torch.randn(shape), torch.randn(6, 5), torch.randn(6)])


@BOTH
def test_convolution_pool_and_attention(targets):
    x, w, b = graph_input("x", t(2, 3, 8, 8)), graph_input("w", t(4, 3, 3, 3)), graph_input("b", t(4))
    y = OPS["relu"](OPS["conv"](x, w, b, stride=(1, 1), padding=(1, 1), dilation=(1, 1)))
    pooled = OPS["max_pool"](y, kernel=(2, 2), stride=(2, 2), padding=(0, 0))
    q = OPS["reshape"](pooled, shape=(2, 4, 8, 2))
    out = OPS["attention"](q, OPS["exp"](q), q, causal=True, scale=0.5)
    mean = OPS["avg_pool"](out, kernel=(2, 2), stride=(2, 2), padding=(0, 0))
    program = check(targets, [x, w, b], [OPS["neg"](mean)], [torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)])
    assert [c.node for c in program.library] == ["conv", "max_pool", "attention", "avg_pool"]


@EVERY
def test_convolution_in_channels_last(targets):
    x, w = graph_input("x", t(2, 3, 8, 8), strides=(192, 1, 24, 3)), graph_input("w", t(4, 3, 3, 3))
    y = OPS["exp"](OPS["conv"](x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1)))
    values = [torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.randn(4, 3, 3, 3)]
    check(targets, [x, w], [y, OPS["sin"](x)], values)


@EVERY
def test_views_of_the_arena(targets):
    x = graph_input("x", t(4, 6))
    y = OPS["linear"](x, OPS["constant"](data=Data("w", torch.randn(6, 6))))
    views = [
        OPS["permute"](y, dims=(1, 0)), OPS["reshape"](y, shape=(2, 12)), OPS["slice"](y, dim=1, start=1, stop=6, step=2),
        OPS["select"](y, dim=0, index=2), OPS["expand"](OPS["reshape"](y, shape=(1, 4, 6)), shape=(3, 4, 6)), OPS["flip"](y, dims=(0,)),
        OPS["as_strided"](y, shape=(3, 3), strides=(1, 2), offset=4, of=(6, 1)),
    ]  # fmt: skip
    flat = [OPS["reshape"](v, shape=(v.tensor.numel,)) for v in views]
    sums = [OPS["matmul"](f, OPS["exp"](f)) for f in flat]
    check(targets, [x], sums, [torch.randn(4, 6)])


@EVERY
def test_outputs_are_laid_out_as_asked(targets):
    x = graph_input("x", t(4, 6))
    y = OPS["exp"](x)
    outputs = [OPS["layout"](y, strides=(1, 4)), OPS["permute"](OPS["sin"](x), dims=(1, 0)), OPS["layout"](x, strides=(6, 1), own=True)]
    values, device = [on_device(torch.randn(4, 6), device_of(targets))], device_of(targets)
    program = compile_program(fused([x], outputs, device), targets)
    got = program(values)
    assert [g.stride() for g in got] == [(1, 4), (4, 1), (6, 1)] and got[2].data_ptr() != values[0].data_ptr()
    assert torch.equal(got[0], program(values)[0]) and got[0].data_ptr() != program(values)[0].data_ptr()


@BOTH
def test_an_output_that_is_a_view_of_an_input_shares_its_memory(targets):
    x = graph_input("x", t(4, 6))
    view = OPS["layout"](OPS["permute"](x, dims=(1, 0)), strides=(1, 6))
    value = torch.randn(5, 6)[1:]
    out, same = compile_program(fused([x], [view, x]), targets)([value])
    assert out.data_ptr() == value.data_ptr() and out.storage_offset() == 6 and out.stride() == (1, 6) and same is value


@BOTH
def test_a_returned_constant_is_a_copy(targets):
    weight = torch.randn(3)
    (out,) = compile_program(fused([], [OPS["constant"](data=Data("w", weight))]), targets)([])
    assert torch.equal(out, weight) and out.data_ptr() != weight.data_ptr()


@EVERY
def test_constants_are_not_duplicated(targets):
    device = device_of(targets)
    weight = torch.randn(64, 64).to(device)
    w = OPS["constant"](data=Data("w", weight))
    x = graph_input("x", t(64))
    graph = fused([x], [OPS["add"](OPS["linear"](OPS["reshape"](x, shape=(1, 64)), w), OPS["select"](w, dim=0, index=1))], device)
    program = compile_program(graph, targets)
    weight[1] = 0  # seen by the program: it reads the very tensor
    assert_same(program, graph, [torch.randn(64).to(device)])


@EVERY
def test_written_inputs(targets):
    x, y = graph_input("x", t(4)), graph_input("y", t(4))
    check(targets, [x, y], [], [torch.randn(4), torch.randn(4)], writes=((x, y), (y, x)))
    check(
        targets,
        [x, y],
        [OPS["add"](x, y)],
        [torch.randn(4), torch.randn(4)],
        writes=((x, OPS["mul"](x, 2.0)), (y, OPS["flip"](y, dims=(0,)))),
    )


@EVERY
def test_dynamic_sizes_compile_once(targets):
    x, w = graph_input("x", t(S, 6)), graph_input("w", t(6, 6))
    h = OPS["linear"](OPS["softmax"](x, dim=-1), w)
    row = OPS["sum"](h, dims=(0,))
    outputs = [
        OPS["add"](OPS["linear"](OPS["exp"](h), w), row),
        OPS["reshape"](OPS["exp"](x), shape=(S * 6,)),
        OPS["lift"](S) if "lift" in OPS else row,
    ]
    calls = [[torch.randn(n, 6), torch.randn(6, 6)] for n in (1, 5, 0, 33, 5, 2)]
    check(targets, [x, w], outputs, *calls, symbols=ANY_S)


@EVERY
def test_views_of_constants_by_sizes(targets):
    x, table = graph_input("x", t(S, 4)), OPS["constant"](data=Data("table", torch.randn(64, 4)))
    rows, row = OPS["slice"](table, dim=0, start=0, stop=S), OPS["expand"](OPS["select"](table, dim=0, index=3), shape=(S, 4))
    check(targets, [x], [OPS["linear"](x, rows), OPS["matmul"](x, OPS["permute"](row, dims=(1, 0)))], *_calls(4), symbols=ANY_S)


def _calls(columns):
    return [[torch.randn(n, columns)] for n in (3, 7, 3)]


@EVERY
def test_sizes_as_inputs_operands_and_outputs(targets):
    n = graph_input("n", ScalarType(torch.int64, S))
    x = graph_input("x", t(S, 2))
    scaled = OPS["mul"](x, S)
    check(targets, [n, x], [scaled, n], *[[k, torch.randn(k, 2)] for k in (3, 7)], symbols=ANY_S)


@BOTH
def test_layouts_that_differ_from_the_declared_one(targets):
    x = graph_input("x", t(4, 6))
    wide = torch.randn(4, 12)
    flipped = torch.complex(torch.randn(4, 6), torch.randn(4, 6)).conj().imag
    program = check(targets, [x], [OPS["exp"](x)], [wide[:, ::2]], [torch.randn(6, 4).t()], [wide[:, 3:9]])
    torch.testing.assert_close(program([flipped])[0], flipped.exp())


@EVERY
def test_extern_results(targets):
    x = graph_input("x", t(4, 4))
    y = OPS["exp"](x)
    diagonal = OPS["extern"](y, target="aten.diagonal.default", args=(Ref(0),), types=(t(4),))
    top = OPS["extern"](y, target="aten.topk.default", args=(Ref(0), 2), types=(t(4, 2), t(4, 2, dtype=torch.int64)))
    values, places = OPS["item"](top, index=0), OPS["item"](top, index=1)
    filler = [OPS["matmul"](OPS["sin"](y), y)]
    program = check(targets, [x], [OPS["add"](diagonal, 1.0), OPS["neg"](values), places, *filler], [torch.randn(4, 4)])
    assert {f.node for f in program.fallbacks} >= {"aten.diagonal.default", "aten.topk.default"}


@EVERY
def test_a_missing_gradient_does_not_shift_the_others(targets):
    g, x, w = graph_input("g", t(1, 2, 4, 4)), graph_input("x", t(1, 2, 4, 4)), graph_input("w", t(2, 2, 3, 3))
    one = (1, 1)
    args = (Ref(0), Ref(1), Ref(2), None, one, one, one, False, (0, 0), 1, (False, True, False))
    dw = OPS["extern"](g, x, w, target="aten.convolution_backward.default", args=args, types=(t(2, 2, 3, 3),))
    check(targets, [g, x, w], [OPS["mul"](dw, 2.0)], [torch.randn(n.shape) for n in (g, x, w)])


@NATIVE
def test_equal_regions_are_one_kernel():
    x, w = graph_input("x", t(8, 8)), graph_input("w", t(8, 8))
    h = x
    for _ in range(3):
        h = OPS["gelu"](OPS["linear"](h, w), hint=f"h{_}")
    program = check(TARGETS, [x, w], [h], [torch.randn(8, 8), torch.randn(8, 8)])
    assert [(k.uses, k.nodes) for k in program.kernels] == [(3, 1)]


@EVERY
def test_zero_elements(targets):
    x = graph_input("x", t(0, 4))
    total = OPS["sum"](x, dims=(0,))
    check(targets, [x], [OPS["exp"](x), total, OPS["amax"](OPS["exp"](x), dims=(1,))], [torch.randn(0, 4)])


@BOTH
def test_threads_do_not_share_memory(targets):
    x, w = graph_input("x", t(S, 32)), graph_input("w", t(32, 32))
    h = OPS["linear"](OPS["linear"](OPS["softmax"](x, dim=-1), w), w)
    program = compile_program(fused([x, w], [OPS["layer_norm"](h)], symbols=ANY_S), targets)
    weight = torch.randn(32, 32)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for n in range(1, 40):
            value = torch.randn(n, 32, generator=generator)
            want = torch.nn.functional.layer_norm(value.softmax(-1) @ weight.t() @ weight.t(), (32,))
            assert torch.allclose(program([value, weight])[0], want, atol=1e-4), n

    in_threads(work)


@BOTH
def test_gradients_autocast_and_inference_mode_do_not_matter(targets):
    x, w = graph_input("x", t(4, 8)), graph_input("w", t(8, 8))
    graph = fused([x, w], [OPS["linear"](OPS["linear"](x, w), w)])
    program = compile_program(graph, targets)
    values = [torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)]
    with torch.inference_mode():
        first = program(values)[0]
    with torch.autocast("cpu", torch.bfloat16):
        second = program(values)[0]
    assert torch.is_grad_enabled() and not second.requires_grad and second.dtype == torch.float32
    torch.testing.assert_close(first, second)


def test_inputs_and_intermediates_are_freed_at_their_last_use():
    x = graph_input("x", t(4))
    alive = []
    OP = torch.library.custom_op("tilewright_test::spy", lambda y: spy(y), mutates_args=(), schema="(Tensor y) -> Tensor")

    def spy(y):
        alive.append(reference() is not None)
        return y.clone()

    assert OP is not None
    seen = OPS["extern"](OPS["exp"](x), target="tilewright_test.spy.default", args=(Ref(0),), types=(t(4),))
    program = compile_program(fused([x], [seen]), {})
    values = [torch.randn(4)]
    reference = weakref.ref(values[0])
    program.run(values)
    assert alive == [False] and values == []


def test_what_cannot_be_compiled_runs_by_eager_and_is_listed():
    x = graph_input("x", t(4, 4))
    y = OPS["exp"](OPS["matmul"](OPS["sin"](x), x))
    broken = Target("cpp", lambda kernels, device: [Failed(k, "it is Tuesday") for k in kernels])
    graph = fused([x], [y])
    program = compile_program(graph, {"cpu": broken})
    assert_same(program, graph, [torch.randn(4, 4)])
    assert [f.reason for f in program.fallbacks] == ["it is Tuesday"] * 2 and not program.kernels


def test_a_fault_in_code_generation_is_a_listed_fallback():
    x = graph_input("x", t(4, 4))
    graph = fused([x], [OPS["exp"](x)])

    def compile_kernels(kernels, device):
        raise ZeroDivisionError("oops")

    with pytest.warns(RuntimeWarning, match="please report this.*ZeroDivisionError: oops"):
        program = compile_program(graph, {"cpu": Target("cpp", compile_kernels)})
    assert_same(program, graph, [torch.randn(4, 4)])
    assert program.fallbacks[0].reason == "internal error: ZeroDivisionError: oops"


def test_a_fallback_does_not_alias_its_operand():
    x = graph_input("x", t(4))
    inner = graph_input("x", t(4))
    body = make_graph("same", [inner], [OPS["cast"](inner, dtype=torch.float32)])
    value = torch.randn(4)
    (out,) = compile_program(make_graph("g", [x], [OPS["region"](x, body=body)], stage=Stage.FUSED), {})([value])
    assert out.data_ptr() != value.data_ptr()


def test_a_graph_that_was_never_fused_runs():
    x = graph_input("x", t(4, 4))
    graph = make_graph("g", [x], [OPS["softmax"](OPS["add"](x, 1.0), dim=0), OPS["full"](shape=(2,), value=3.0, dtype=torch.float32)])
    program = compile_program(graph, {})
    assert_same(program, graph, [torch.randn(4, 4)])
    assert {f.node for f in program.fallbacks} == {"softmax", "add"}


def test_triton_kernels_run_in_the_same_host_program():
    x, w = graph_input("x", t(S, 8)), graph_input("w", t(8, 8))
    graph = fused([x, w], [OPS["softmax"](OPS["linear"](OPS["gelu"](x), w), dim=-1)], symbols=ANY_S)
    program = compile_program(graph, {"cpu": TARGETS["cuda"]})  # CPU tensors: Triton's interpreter
    for n in (3, 5):
        assert_same(program, graph, [torch.randn(n, 8), torch.randn(8, 8)])
    assert len(program.kernels) == 2 and "@triton.jit" in program.source


@NATIVE
def test_the_listing_reads_like_a_module():
    x, w = graph_input("x", t(4, 8)), graph_input("w", t(8, 8))
    source = compile_program(fused([x, w], [OPS["gelu"](OPS["linear"](x, w, hint="hidden"))])).source
    assert "void k0_gelu(" in source and "def call(inputs, frame):" in source
    assert "mm(x, w_t, out=hidden)" in source and "# calls_0: k0_gelu(hidden, gelu)" in source


def chain(x, count=3):
    """Kernels that read each other's results: each sum needs all of the softmax before it."""
    for _ in range(count):
        x = OPS["flip"](OPS["softmax"](OPS["mul"](x, 2.0), dim=-1), dims=(1,))
        x = OPS["softmax"](x, dim=0)
    return x


@NATIVE
@pytest.mark.parametrize("rows", [5, S], ids=["static", "dynamic"])
def test_a_graph_of_kernels_and_views_is_one_call(rows):
    x = graph_input("x", t(rows, 6))
    y = chain(x)
    outputs = [OPS["permute"](y, dims=(1, 0)), OPS["reshape"](OPS["exp"](y), shape=(rows * 6,)), OPS["sum"](y, dims=(1,))]
    fields = {"symbols": ANY_S} if rows is S else {}
    calls = [[torch.randn(n, 6)] for n in ((5, 5) if rows == 5 else (5, 1, 9, 5))]
    program = check(TARGETS, [x], outputs, *calls, **fields)
    assert program.source.count("run(calls_") == 1 and program.source.count("# calls_0: ") >= 4
    assert "slot(" not in program.source  # nothing reads the intermediate values as tensors


@NATIVE
def test_a_fault_stops_the_run_and_names_its_line():
    x, at, table = graph_input("x", t(4, 6)), graph_input("at", t(4, dtype=torch.int64)), graph_input("table", t(8, 6))
    first = OPS["embedding"](table, at)
    rows = OPS["softmax"](OPS["add"](OPS["softmax"](x, dim=0), first), dim=0)
    later = OPS["embedding"](OPS["slice"](table, dim=0, start=0, stop=3), OPS["argmax"](rows, dims=(1,)))
    program = compile_program(fused([x, at, table], [rows, later]))
    assert program.source.count("run(calls_") == 1
    values = [torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(8, 6)]
    assert program(values)[1].shape == (4, 6)
    with pytest.raises(IndexError, match="embedding"):
        program([values[0], values[1] + 8, values[2]])
    values[0][0, 5] = 9.0
    with pytest.raises(IndexError, match="embedding"):
        program(values)


@NATIVE
def test_a_run_ends_where_large_operands_can_be_freed():
    inputs = [graph_input(f"x{i}", t(1024, 1024)) for i in range(6)]
    outputs = [OPS["amax"](n, dims=(i % 2,)) for i, n in enumerate(inputs)]
    program = check(TARGETS, inputs, outputs, [torch.randn(1024, 1024) for _ in inputs])
    assert program.source.count("run(calls_") == 2


@BOTH
@pytest.mark.parametrize("rows", [4, S], ids=["static", "dynamic"])
def test_kernels_write_over_operands_that_die(targets, rows):
    x, w, b = graph_input("x", t(rows, 33)), graph_input("w", t(33, 33)), graph_input("b", t(33))
    h = OPS["add"](OPS["linear"](x, w), b)
    total, product = OPS["add"](h, x), OPS["mul"](h, x)  # two results, one of them over h
    again = OPS["linear"](OPS["gelu"](OPS["linear"](OPS["gelu"](OPS["linear"](total, w)), w)), w)
    graph = fused([x, w, b], [OPS["linear"](OPS["exp"](OPS["linear"](product, w)), w), again], **({"symbols": ANY_S} if rows is S else {}))
    program = compile_program(graph, targets)
    offsets = [str(slot.offset) for slot in graph.arena.values()]
    assert len(set(offsets)) < len(offsets)
    for n in (4,) if rows == 4 else (4, 1, 0, 9):
        assert_same(program, graph, [torch.randn(n, 33), torch.randn(33, 33) / 6, torch.randn(33)], rtol=1e-4, atol=1e-5)
    assert not program.fallbacks or not targets


@NATIVE
def test_regions_that_compute_the_same_are_one_kernel_in_place_or_not():
    x, w = graph_input("x", t(8, 8)), graph_input("w", t(8, 8))
    first = OPS["gelu"](OPS["linear"](x, w))
    second = OPS["gelu"](OPS["linear"](first, w))
    graph = fused([x, w], [OPS["linear"](second, w), first])  # `first` is a result: it has memory of its own
    program = compile_program(graph)
    assert_same(program, graph, [torch.randn(8, 8), torch.randn(8, 8)])
    assert [k.uses for k in program.kernels] == [2]
