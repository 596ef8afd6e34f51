"""quantize: every format on every reader, what it makes of the graph, sizes, and every reason not to."""

from __future__ import annotations

import pytest
import torch
from pass_checks import assert_becomes, body, refusals, run
from tilewright.driver.compile import Options, compile_graph
from tilewright.ir.graph import Graph, constants, order
from tilewright.ir.interpret import interpret
from tilewright.ir.reasons import Reason
from tilewright.ir.text import parse
from tilewright.passes.base import Exactness, Notes
from tilewright.passes.formats import FORMATS
from tilewright.passes.manager import parse_passes
from tilewright.passes.quantize import Plan, PlanError, Quantize

ERROR = {
    "bf16": 4e-3, "fp16": 5e-4, "fp8": 5e-2, "int8": 1.5e-2, "int8-g32": 8e-3, "int8-dynamic": 2.5e-2, "int4-g32": 0.12, "int4-g64": 0.13,
    "int4-g128": 0.14, "int4-split3": 0.05, "int2-split3": 0.25, "bfp6": 5e-2, "bfp6-sorted": 4e-2, "rank-half": 0.8, "rank-quarter": 0.95,
    "int4-g64-rank16": 0.09, "int2-g32": 0.5, "int2-g64": 0.55,
}  # fmt: skip
"""Format -> relative error that random weights may have in it, for one layer."""

BITS = {
    "bf16": 16, "fp16": 16, "fp8": 8.25, "int8": 8.25, "int8-g32": 8.75, "int8-dynamic": 8.25, "int4-g32": 4.75, "int4-g64": 4.375,
    "int4-g128": 4.1875, "int4-split3": 6.75, "int2-split3": 4.75, "bfp6": 6.5, "bfp6-sorted": 6.5 + 64 / 96,
    "rank-half": 27 * 224 * 32 / (96 * 128), "rank-quarter": 13 * 224 * 32 / (96 * 128),
    "int4-g64-rank16": 4.375 + 16 * 224 * 16 / (96 * 128), "int2-g32": 2.75, "int2-g64": 2.375,
}  # fmt: skip
"""Format -> bits for a weight of a layer of 96 x 128, everything included."""

for base in ("bf16", "int8", "int4-g32", "int4-g64", "int4-g128"):
    ERROR[f"{base}-bf16"], BITS[f"{base}-bf16"] = ERROR[base] + 8e-3, BITS[base]

LINEAR = body("x: f32[b, 128]", 'w = constant "w"', 'c = constant "c"', "y = linear(x, w, c)", "y")
CONV = "y = conv(x, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1])"
READERS = {
    "linear": (LINEAR, (96, 128)),
    "linear without bias": (body("x: f32[b, 128]", 'w = constant "w"', "y = linear(x, w)", "y"), (96, 128)),
    "linear of odd depth": (body("x: f32[b, 77]", 'w = constant "w"', "y = linear(x, w)", "y"), (96, 77)),
    "matmul": (body("x: f32[b, 3, 128]", 'w = constant "w"', "y = matmul(x, w)", "y"), (128, 96)),
    "embedding": (body("x: i64[b]", 'w = constant "w"', "y = embedding(w, x)", "y"), (50, 96)),
    "conv": (body("x: f32[b, 7, 6, 6]", 'w = constant "w"', CONV, "y"), (12, 7, 3, 3)),
    "tied": (body("x: i64[b]", 'w = constant "w"', "e = embedding(w, x)", "y = linear(e, w)", "y"), (50, 96)),
}  # fmt: skip


def _inputs(graph: Graph) -> list[torch.Tensor]:
    (x,) = graph.inputs
    shape = [5 if not isinstance(d, int) else d for d in x.shape]
    return [torch.randint(0, 50, shape) if x.dtype == torch.int64 else torch.randn(shape)]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str, reader: str) -> None:
    torch.manual_seed(0)
    text, shape = READERS[reader]
    values = {"w": torch.randn(shape), "c": torch.randn(96)}
    old, new, notes = run(Quantize(Plan.parse(f"w:{name}")), text, values)
    if not {"tied": {"embedding", "linear"}}.get(reader, {reader.split()[0]}) <= FORMATS[name].readers:
        assert refusals(notes) == {("quantize", Reason.NOT_EXPRESSIBLE)} and new is old
        return
    if notes.declined:
        assert refusals(notes) == {("quantize", Reason.NO_GAIN)} and new is old
        return
    inputs = _inputs(old)
    (exact,), (result,) = interpret(old, inputs, torch.float64), interpret(new, inputs, torch.float64)
    assert result.shape == exact.shape and _distance(result, exact) <= ERROR[name] * (1.5 if reader == "tied" else 1)
    assert _distance(interpret(new, inputs)[0], result) < (2e-2 if FORMATS[name].bits < 32 else 1e-5)
    assert new.outputs[0].type == old.outputs[0].type
    (compiled,) = compile_graph(new, Options()).program.run(inputs)
    assert _distance(compiled, result) < (2e-2 if FORMATS[name].bits < 32 else 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_size_counts_every_part(name: str) -> None:
    torch.manual_seed(0)
    values = {"w": torch.randn(96, 128), "c": torch.randn(96)}
    old, new, notes = run(Quantize(Plan.parse(f"w:{name}")), LINEAR, values)
    parts = {n: d.value for n, d in constants(new).items() if n != "c"}
    stored = sum(v.nbytes for v in parts.values() if v is not None)
    assert stored * 8 / (96 * 128) == pytest.approx(BITS[name]) and all(n.startswith(f"w.{name}") for n in parts)
    assert notes.applied[0].bytes_saved == 96 * 128 * 4 - stored and old is not new


def test_picture() -> None:
    _, new, notes = run(Quantize(Plan.parse("w:int8")), LINEAR, {"w": torch.randn(96, 128), "c": torch.randn(96)})
    assert_becomes(new, body(
        "x: f32[b, 128]", 'q = constant "w.int8" : i8[96, 128]', 's = constant "w.int8.scale" : f32[96, 1]', 'c = constant "c" : f32[96]',
        "d = dequantize(q, s, dtype=f32)", "y = linear(x, d, c)", "y",
    ))  # fmt: skip
    assert [a.what for a in notes.applied] == ["w f32 -> int8"]
    assert Quantize.exactness is Exactness.BOUNDED


def test_only_what_the_plan_names() -> None:
    text = body("x: f32[b, 64]", 'v = constant "v"', 'w = constant "w"', "h = linear(x, v)", "y = linear(h, w)", "y")
    values = {"v": torch.randn(64, 64), "w": torch.randn(64, 64)}
    assert set(constants(run(Quantize(Plan.parse("v:bf16")), text, values)[1])) == {"v.bf16", "w"}
    assert set(constants(run(Quantize(Plan.parse("v:bf16 *:fp16")), text, values)[1])) == {"v.bf16", "w.fp16"}
    graph = parse(text, values)
    assert Quantize().run(graph) is graph


def test_a_gram_matrix_keeps_the_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 128) @ (torch.eye(128) + torch.randn(128, 128) / 8)
    values = {"w": torch.randn(96, 128), "c": torch.zeros(96)}
    graph = parse(LINEAR, values)
    (exact,) = interpret(graph, [x])
    plans = [Plan((("w", "int4-g32"),)), Plan((("w", "int4-g32"),), {"w": x.T @ x})]
    near, gptq = (_distance(interpret(Quantize(p).run(graph), [x])[0], exact) for p in plans)
    assert gptq < 0.85 * near


REFUSED = {
    "an input": (body("x: f32[b, 64], w: f32[64, 64]", "y = linear(x, w)", "y"), Reason.NOT_CONSTANT),
    "read elsewhere": (body("x: f32[b, 64]", 'w = constant "w"', "y = linear(x, w)", "s = sum(w)", "y, s"), Reason.SHARED),
    "returned": (body("x: f32[b, 64]", 'w = constant "w"', "y = linear(x, w)", "y, w"), Reason.SHARED),
    "two sides": (body("x: f32[b, 64]", 'w = constant "w"', "y = linear(x, w)", "z = matmul(y, w)", "z"), Reason.SHARED),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_weights(case: str) -> None:
    text, reason = REFUSED[case]
    old, new, notes = run(Quantize(Plan.parse("*:int8")), text, {"w": torch.randn(64, 64)})
    assert new is old and {d.reason for d in notes.declined} == {reason}


@pytest.mark.parametrize(
    ("weight", "name", "reason"),
    [
        (torch.full((64, 64), float("nan")), "int8", Reason.NOT_FINITE),
        (torch.full((64, 64), float("inf")), "bf16", Reason.NOT_FINITE),
        (torch.randn(64, 64, dtype=torch.float64), "int8", Reason.UNSUPPORTED_DTYPE),
        (torch.randn(64, 64, dtype=torch.bfloat16), "bf16", Reason.NO_GAIN),
        (torch.randn(64, 0), "int8", Reason.SHAPE_MISMATCH),
    ],
)
def test_refused_values(weight: torch.Tensor, name: str, reason: Reason) -> None:
    kind = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}[weight.dtype]
    text = body(f"x: {kind}[b, {weight.shape[1]}]", 'w = constant "w"', "y = linear(x, w)", "y")
    old, new, notes = run(Quantize(Plan.parse(f"w:{name}")), text, {"w": weight})
    assert new is old and {d.reason for d in notes.declined} == {reason}


def test_16_bit_models() -> None:
    torch.manual_seed(0)
    text = body("x: bf16[b, 128]", 'w = constant "w"', "y = linear(x, w)", "y")
    for name in ("int8", "int4-g64", "int8-dynamic"):
        old, new, _ = run(Quantize(Plan.parse(f"w:{name}")), text, {"w": torch.randn(96, 128).bfloat16()})
        x = [torch.randn(4, 128).bfloat16()]
        assert new.outputs[0].type == old.outputs[0].type and "linear" in "".join(n.op.name for n in order(new))
        assert _distance(interpret(new, x)[0], interpret(old, x, torch.float64)[0]) < ERROR[name] + 1e-2


def test_plans_as_text() -> None:
    assert parse_passes("quantize{plan=fc.weight:int8 *:int4-g32}") == [Quantize(Plan((("fc.weight", "int8"), ("*", "int4-g32"))))]
    with pytest.raises(PlanError, match="'fc.weight:int5' is not name:format, where formats are bf16, int8"):
        Plan.parse("fc.weight:int5")
    with pytest.raises(PlanError, match="'int8' is not name:format"):
        Plan.parse("int8")


def test_notes_are_optional() -> None:
    graph = parse(LINEAR, {"w": torch.randn(96, 128), "c": torch.zeros(96)})
    notes = Notes()
    assert str(Quantize(Plan.parse("*:int8")).run(graph)) == str(Quantize(Plan.parse("*:int8")).run(graph, notes))
