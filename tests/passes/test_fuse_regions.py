"""fuse-regions: which kernels it makes, what it refuses and why, and that the graph means the same."""

from __future__ import annotations

import pytest
import torch
from fusion_checks import bodies, fused, kernels, reasons, same
from tilewright.codegen.lower import lower
from tilewright.ir import ops
from tilewright.ir.graph import Stage, make_graph, order
from tilewright.ir.text import parse
from tilewright.ir.types import TensorType
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes, Reason
from tilewright.passes.contractions import takes_computed
from tilewright.passes.fuse_regions import FuseRegions

# -- what becomes one kernel


def test_residual_and_norm_around_a_linear():
    after = fused("""
        graph g(x: f32[4, 8], w: f32[8, 8], r: f32[4, 8]) stage canonical {
          h = linear(x, w)
          a = add(h, r)
          y = layer_norm(a, axes=1)
          return y
        }""")
    assert [n.op.name for n in order(after)] == ["input", "input", "input", "linear", "region"]
    assert kernels(after) == ["add+layer_norm"]
    kernel = lower(bodies(after)[0], "k")
    assert [(a.extent, a.inner) for a in kernel.axes] == [(4, False), (8, True)]


def test_a_chain_of_row_operations_is_one_kernel():
    after = fused(
        """
        graph g(x: f32[4096, 1024], w: f32[1024], b: f32[1024], r: f32[4096, 1024]) stage canonical {
          n = layer_norm(x, w, b, axes=1)
          g = gelu(n)
          a = add(g, r)
          y = softmax(a, dim=-1)
          return y
        }""".replace("4096", "64")
    )
    assert kernels(after) == ["layer_norm+gelu+add+softmax"]


def test_an_intermediate_with_other_readers_is_a_second_output():
    after = fused("""
        graph g(x: f32[4, 8], w: f32[8, 8]) stage canonical {
          a = exp(x)
          n = softmax(a, dim=1)
          h = linear(a, w)
          return n, h
        }""")
    assert len(bodies(after)) == 1 and len(bodies(after)[0].outputs) == 2


def test_siblings_share_a_read():
    after = fused("""
        graph g(x: f32[64, 64]) stage canonical {
          a = exp(x)
          b = sin(x)
          return a, b
        }""")
    assert len(bodies(after)) == 1


def test_views_between_dissolve_and_views_after_stay_outside():
    after = fused("""
        graph g(x: f32[4, 6]) stage canonical {
          a = exp(x)
          p = permute(a, dims=(1, 0))
          c = sin(p)
          q = reshape(c, shape=(3, 8))
          return q
        }""")
    assert [n.op.name for n in order(after)] == ["input", "region", "reshape"]


def test_columns_rows_and_everything():
    after = fused("""
        graph g(g: f32[6, 4, 8], x: f32[6, 4, 8]) stage canonical {
          d = mul(g, x)
          b = sum(d, dims=(0, 1))
          return d, b
        }""")
    assert len(kernels(after)) == 1
    after = fused("""
        graph g(x: f32[2, 3, 4, 4]) stage canonical {
          m = mean(x, dims=(0, 2, 3), keepdim=True)
          v = var(x, dims=(0, 2, 3), keepdim=True, correction=0.0)
          c = sub(x, m)
          s = rsqrt(v)
          y = mul(c, s)
          return y
        }""")
    assert len(kernels(after)) == 1


def test_a_cheap_mask_is_recomputed_by_each_reader():
    after = fused("""
        graph g(x: f32[2, 8, 8], y: f32[2, 8, 8], w: f32[8, 8]) stage canonical {
          i = iota(length=8)
          r = reshape(i, shape=(8, 1))
          m = ge(r, i)
          a = where(m, x, -1.0)
          h = linear(a, w)
          b = where(m, h, y)
          return b
        }""")
    assert len(bodies(after)) == 2
    assert all("iota" in [n.op.name for n in order(b)] for b in bodies(after))


def test_an_expensive_mask_is_made_once():
    after = fused("""
        graph g(x: f32[64, 64], y: f32[64, 64], w: f32[64, 64]) stage canonical {
          i = iota(length=64)
          r = reshape(i, shape=(64, 1))
          d = sub(r, i)
          f = cast(d, dtype=f32)
          e = exp(f)
          s = sin(e)
          a = mul(s, x)
          h = linear(a, w)
          b = mul(s, h)
          return b
        }""")
    assert sum("exp" in [n.op.name for n in order(b)] for b in bodies(after)) == 1


def test_a_mask_for_a_library_call_is_a_kernel():
    after = fused("""
        graph g(q: f32[2, 8, 6], k: f32[2, 8, 6]) stage canonical {
          i = iota(length=8)
          r = reshape(i, shape=(8, 1))
          m = ge(r, i)
          a = attention(q, k, k, m, scale=0.5)
          return a
        }""")
    assert kernels(after) == ["ge"]


def test_an_attention_takes_its_masks_and_views_and_joins_its_heads():
    after = fused("""
        graph g(x: f32[2, 8, 48], p: bool[2, 8]) stage canonical {
          s = reshape(x, shape=(2, 8, 3, 4, 4))
          t = permute(s, dims=(2, 0, 3, 1, 4))
          q = select(t, dim=0, index=0)
          k = select(t, dim=0, index=1)
          v = select(t, dim=0, index=2)
          r = reshape(p, shape=(2, 1, 1, 8))
          m = logical_not(r)
          a = attention(q, k, v, m, scale=0.5)
          b = permute(a, dims=(0, 2, 1, 3))
          c = reshape(b, shape=(2, 8, 16))
          y = mul(c, c)
          return y
        }""")
    assert kernels(after) == ["logical_not+attention+reshape+mul"]


ATTENTION = """
    graph g(q: {0}[2, 4, {1}], k: {0}[2, {2}, {1}]) stage canonical {{
      a = attention(q, k, k, scale=0.5)
      return a
    }}"""


@pytest.mark.parametrize(
    ("dtype", "columns", "keys", "reason"),
    [("f64", 8, 4, Reason.UNSUPPORTED_DTYPE), ("f32", 6, 4, Reason.LIBRARY_CALL), ("f32", 512, 4, Reason.LIBRARY_CALL),
     ("f32", 8, 1, Reason.LIBRARY_CALL), ("f32", 8, 0, Reason.LIBRARY_CALL)],
)  # fmt: skip
def test_attentions_that_stay_library_calls(dtype, columns, keys, reason):
    notes = Notes()
    after = fused(ATTENTION.format(dtype, columns, keys), notes)
    assert kernels(after) == [] and ("attention", reason) in reasons(notes)


@pytest.mark.parametrize("computed", ["q", "k"])
def test_queries_and_keys_that_are_computed_from_numbers_are_a_kernel_before_the_attention(computed):
    notes = Notes()
    queries, keys = ("e", "k") if computed == "q" else ("q", "e")
    after = fused(f"""
        graph g(q: f32[2, 8, 16], k: f32[2, 8, 16]) stage canonical {{
          e = exp({computed})
          a = attention({queries}, {keys}, k, scale=0.5)
          return a
        }}""", notes)  # fmt: skip
    assert kernels(after) == ["exp", "attention"] and ("exp into attention", Reason.PROLOGUE) in reasons(notes)


def test_keys_and_values_of_few_bits_become_numbers_where_they_are_met():
    after = fused("""
        graph g(q: f32[2, 8, 16], k: i8[2, 8, 16], s: f32[2, 8, 1], v: u8[2, 8, 8], t: f32[2, 8, 1]) stage canonical {
          keys = dequantize(k, s, dtype=f32)
          levels = unpack(v, bits=4)
          values = dequantize(levels, t, dtype=f32)
          a = attention(q, keys, values, scale=0.5)
          return a
        }""")
    assert kernels(after) == ["dequantize+unpack+attention"]


@pytest.mark.parametrize(("dtype", "takes"), [("i8", True), ("u8", True), ("f8e4m3", False), ("f32", False)])
def test_keys_that_an_attention_on_a_cpu_computes(dtype, takes):
    keys = "mul(k, s)" if dtype == "f32" else "dequantize(k, s, dtype=f32)"
    graph = parse(f"""
        graph g(q: f32[2, 8, 16], k: {dtype}[2, 8, 16], s: f32[2, 8, 1]) stage canonical {{
          keys = {keys}
          a = attention(q, keys, keys, scale=0.5)
          return a
        }}""")
    (attention,) = graph.outputs
    assert takes_computed(attention, attention.inputs[1]) == takes


def test_fills_that_are_values_are_kernels():
    after = fused("""
        graph g(x: f32[s, 4]) where s in 2..9 stage canonical {
          z = full(shape=(s, 4), value=0.0, dtype=f32)
          i = iota(length=s)
          return z, i
        }""")
    assert kernels(after) == ["full", "iota"]
    for body in bodies(after):
        assert not lower(body, "k").inputs


def test_sizes_reach_bodies_that_cannot_see_them():
    after = fused("""
        graph g(x: f32[b, s, 4], w: f32[6, 4]) where b in 2..9, s in 2..9 stage canonical {
          f = reshape(x, shape=(b*s, 4))
          h = linear(f, w)
          u = reshape(h, shape=(b, s, 6))
          m = mean(u, dims=(1,))
          return m
        }""")
    body = bodies(after)[0]
    assert [str(i.type) for i in body.inputs[1:]] == ["int=b", "int=s"]
    assert lower(body, "k").sizes == ("b", "s")


def test_equal_layers_share_one_body():
    x = ops.op("input")(type=TensorType(torch.float32, (4, 8)), strides=None, hint="x")
    y, weights = x, []
    for k in range(6):
        w = ops.op("input")(type=TensorType(torch.float32, (8, 8)), strides=None, hint=f"w{k}")
        weights.append(w)
        y = ops.layer_norm(ops.add(y, ops.gelu(ops.linear(y, w))))
    graph = make_graph("g", [x, *weights], [y], stage=Stage.CANONICAL)
    after = FuseRegions().run(graph)
    same(graph, after)
    assert len(bodies(after)) == 6 and len(set(bodies(after))) == 1


def test_copies_for_library_calls():
    after = fused("""
        graph g(a: f32[3, 8], b: f32[2, 8], w: f32[4, 8]) stage canonical {
          c = cat(a, b, dim=0)
          f = flip(c, dims=(0,))
          h = linear(f, w)
          return h
        }""")
    assert len(bodies(after)) == 1


def test_written_back_values_are_results():
    after = fused("""
        graph g(x: f32[4], m: f32[4]) stage canonical {
          a = mul(m, 0.9)
          b = add(a, x)
          c = exp(b)
          write m = b
          return c
        }""")
    assert len(bodies(after)) == 1 and len(after.writes) == 1


def test_zero_sizes_and_scalars():
    fused("""
        graph g(x: f32[0, 4], y: f32[], z: f32[3, 0]) stage canonical {
          a = softmax(x, dim=1)
          b = mul(a, y)
          c = sum(z, dims=(1,))
          d = add(c, y)
          return b, d
        }""")


def test_kernels_are_noted_with_what_they_save():
    notes = Notes()
    fused(
        """
        graph g(x: f32[64, 64]) stage canonical {
          a = exp(x)
          b = sin(a)
          return b
        }""",
        notes,
    )
    assert [(a.what, a.bytes_saved) for a in notes.applied] == [("exp+sin", 2 * 64 * 64 * 4)]


def test_random_graphs_mean_the_same():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.tuples(st.integers(0, 13), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
    def check(steps):
        shape = (3, 4, 2)
        values = [
            ops.op("input")(type=TensorType(torch.float32, s), strides=None, hint=f"x{k}") for k, s in enumerate((shape, shape, (2,)))
        ]
        inputs = list(values)
        for kind, a, b in steps:
            values.append(grown(kind, values[a % len(values)], values[b % len(values)], shape))
        graph = make_graph("g", inputs, values[-3:], stage=Stage.CANONICAL)
        after = FuseRegions().run(graph)
        verify(after)
        same(graph, after)
        for body in bodies(after):
            lower(body, "k")

    check()


def grown(kind, a, b, shape):
    """One more value of a random graph, of full shape."""
    full = a if tuple(a.shape) == shape else ops.expand(a, shape=shape)
    other = b if tuple(b.shape) == shape else ops.expand(b, shape=shape)
    turned = ops.reshape(ops.permute(full, dims=(2, 0, 1)), shape=shape)
    made = [
        lambda: ops.add(full, b), lambda: ops.mul(full, other), lambda: ops.tanh(full), lambda: ops.softmax(full, dim=-1),
        lambda: ops.softmax(full, dim=0), lambda: ops.sub(full, ops.mean(other, dims=(1,), keepdim=True)), lambda: turned,
        lambda: ops.cumsum(full, dim=1), lambda: ops.add(full, ops.amax(other)), lambda: ops.layer_norm(full, axes=2),
        lambda: ops.slice(ops.cat(full, other, dim=0), dim=0, start=1, stop=4), lambda: ops.flip(full, dims=(1,)),
        lambda: ops.exp(ops.neg(ops.abs(full))),
        lambda: ops.where(ops.gt(full, other), full, ops.sum(full, dims=(2,), keepdim=True)),
    ]  # fmt: skip
    return made[kind]()


def test_a_bias_of_positions_is_computed_by_each_attention_that_reads_it():
    """Values with a single reader go with it: the distances and their products with the slopes have no kernel of their own."""
    after = fused("""
        graph g(q: f32[1, 4, 64, 8], k: f32[1, 4, 64, 8], v: f32[1, 4, 64, 8], s: f32[4, 1, 1]) stage canonical {
          i = iota(length=64)
          r = reshape(i, shape=(64, 1))
          d = sub(i, r)
          n = abs(d)
          o = neg(n)
          p = mul(s, o)
          m = le(d, 0)
          w = gt(d, -20)
          l = logical_and(m, w)
          b = where(l, p, -inf)
          y = attention(q, k, v, b, scale=0.5)
          z = attention(q, k, y, b, scale=0.5)
          return z
        }""")
    assert len(bodies(after)) == 2
    assert all("abs" in [n.op.name for n in order(b)] for b in bodies(after))
