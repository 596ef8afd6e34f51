"""The backward of attention as kernels: which calls of torch become gradients of ours on a GPU, and why others stay. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_checks import bodies
from pass_checks import refusals
from tilewright.codegen.lower import lower
from tilewright.ir.capture.aot import compile_fx
from tilewright.ir.graph import Graph, graph_input, make_graph, order
from tilewright.ir.interpret import interpret
from tilewright.ir.ops import OPS, Ref
from tilewright.ir.reasons import Reason
from tilewright.ir.retarget import retarget
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.recognize import Recognize


def trained(forward: Callable[..., torch.Tensor], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Graph, list[Any]]:
    """The backward graph that torch.compile captures of it, and the values it was called with."""
    found: list[tuple[Graph, list[Any]]] = []

    def compiled(graph: Graph, held: object) -> Callable[[list[Any]], Any]:
        def run(args: list[Any]) -> Any:
            if graph.name.endswith("_backward"):
                found.append((graph, [a.clone() if isinstance(a, torch.Tensor) else a for a in args]))
            return interpret(graph, args)

        return run

    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    torch._dynamo.reset()
    model = torch.compile(forward, backend=lambda gm, inputs: compile_fx(gm, inputs, compiled, on_failure=pytest.fail))
    (model(*leaves) ** 2).sum().backward()
    return found[0]


def recognized(graph: Graph, notes: Notes | None = None) -> Graph:
    """After the passes, as if captured on a GPU."""
    return Recognize().run(Canonicalize().run(retarget(graph, "cuda:0")), notes)


def names(graph: Graph) -> list[str]:
    return [n.op.name for n in order(graph)]


QKV = (2, 4, 33, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_training_has_gradients_that_are_kernels(causal: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from tilewright.codegen.triton.templates import build

    graph, values = trained(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), QKV, QKV, QKV, dtype=dtype)
    after = recognized(graph)
    assert "extern" in names(graph) and "extern" not in names(after) and names(after).count("attention_gradient") == 3
    fused = FuseRegions().run(after)
    verify(fused)
    kernels = [b for b in bodies(fused) if "attention_gradient" in [n.op.name for n in order(b)]]
    assert len(kernels) == 3 and all("tl.dot" in build(lower(b, "k")).source for b in kernels)
    here = retarget(fused, "cpu")
    for ours, theirs, exact in zip(interpret(here, values), interpret(graph, values), interpret(here, values, torch.float64)):
        scale = exact.abs().max()
        assert ours.dtype == theirs.dtype and (theirs - exact).abs().max() <= 0.02 * scale
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 4 * torch.finfo(dtype).eps * scale


def test_a_mask_of_the_graph_is_in_the_kernels() -> None:
    def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[-2])
        away = i[:, None] - i[None, :]
        return F.scaled_dot_product_attention(q, k, v, (away >= 0) & (away < 9))

    graph, values = trained(windowed, QKV, QKV, QKV)
    after = recognized(graph)
    assert "extern" not in names(after) and names(after).count("attention_gradient") == 3
    for ours, theirs in zip(interpret(retarget(after, "cpu"), values), interpret(graph, values)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- calls as they are on a GPU, which is not here

_ORDER = {
    "flash": "grad_out query key value out logsumexp none none 33 33 dropout causal seed seed",
    "efficient": "grad_out query key value none out logsumexp seed seed dropout wanted causal",
    "cudnn": "grad_out query key value out logsumexp seed seed none none none 33 33 dropout causal",
}


def call(
    kind: str = "flash",
    groups: int = 4,
    width: int = 16,
    lse: tuple[int, ...] = (2, 4, 33),
    dtype: torch.dtype = torch.bfloat16,
    **more: Any,
) -> Graph:
    """A backward that returns all three gradients of torch's `kind` of attention."""
    shapes = {"grad_out": (2, 4, 33, width), "query": (2, 4, 33, width), "out": (2, 4, 33, width), "logsumexp": lse, "seed": ()}
    shapes |= dict.fromkeys(("key", "value"), (2, groups, 33, width))
    dtypes = {"logsumexp": torch.float32, "seed": torch.int64}
    inputs = {name: graph_input(name, TensorType(dtypes.get(name, dtype), s, "cuda:0")) for name, s in shapes.items()}
    literals = {"none": None, "dropout": 0.0, "causal": True, "wanted": (True, True, True, False), "33": 33, **more}
    args = tuple(Ref(list(inputs).index(a)) if a in inputs else literals[a] for a in _ORDER[kind].split())
    types = tuple(inputs[name].tensor for name in ("query", "key", "value"))
    target = f"aten._scaled_dot_product_{kind}_attention_backward.default"
    node = OPS["extern"](*inputs.values(), target=target, args=args, kwargs=(("scale", 0.5),), types=types)
    return make_graph("g", list(inputs.values()), [OPS["item"](node, index=i) for i in range(3)])


@pytest.mark.parametrize(("kind", "lse"), [("flash", (2, 4, 33)), ("efficient", (2, 4, 64)), ("cudnn", (2, 4, 33, 1))])
def test_each_library_of_a_gpu(kind: str, lse: tuple[int, ...]) -> None:
    graph = call(kind, lse=lse)
    after = Recognize().run(graph)
    found = [n for n in order(after) if n.op.name == "attention_gradient"]
    assert [n.attrs["of"] for n in found] == ["query", "key", "value"] and all(n.attrs["causal"] and n.attrs["scale"] == 0.5 for n in found)
    assert "extern" not in names(after) and [str(o.type) for o in after.outputs] == [str(o.type) for o in graph.outputs]


def test_heads_that_share_keys_add_up() -> None:
    graph = call(groups=2)
    after = Recognize().run(graph)
    assert "extern" not in names(after) and [str(o.type) for o in after.outputs] == [str(o.type) for o in graph.outputs]
    assert [o.op.name for o in after.outputs] == ["attention_gradient", "cast", "cast"]


REFUSED: dict[str, tuple[Graph, Reason]] = {
    "dropout": (call(dropout=0.1), Reason.STATE),
    "the gradient of a mask": (call("efficient", wanted=(True, True, True, True)), Reason.NOT_EXPRESSIBLE),
    "gradients of keys alone": (call("efficient", wanted=(False, True, True, False)), Reason.NOT_EXPRESSIBLE),
    "wide heads": (call(width=256), Reason.LIBRARY_CALL),
    "rows of another shape": (call(lse=(2, 33)), Reason.SHAPE_MISMATCH),
    "too few rows": (call(lse=(2, 4, 32)), Reason.SHAPE_MISMATCH),
    "a CPU": (retarget(call(dtype=torch.float32), "cpu"), Reason.LIBRARY_CALL),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_because_of(why: str) -> None:
    graph, reason = REFUSED[why]
    notes = Notes()
    assert "extern" in names(Recognize().run(graph, notes))
    assert refusals(notes) == {("recognize.attention-gradient", reason)}
