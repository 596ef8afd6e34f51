"""The structural hash sees what a graph computes and nothing else; `equal` says what differs."""

import subprocess
import sys

import pytest
import torch
from tilewright.ir.analysis.hashing import canonical, equal, structural_hash
from tilewright.ir.graph import order
from tilewright.ir.text import parse

BASE = """graph f(x: f32[b, 8], y: f32[b, 8]) where b in 1..64 {
  w = constant "w" : f32[8, 8]
  h = linear(x, w)  # model.py:1 fc
  s = add(h, y)
  e = mul(exp_of_y, s)
  return e
}
"""
BASE = BASE.replace("  s = add", "  exp_of_y = exp(y)\n  s = add")

SAME = {
    "names": lambda t: t.replace("exp_of_y", "q").replace("h =", "zz =").replace("(h,", "(zz,").replace("graph f", "graph g"),
    "provenance": lambda t: t.replace("model.py:1 fc", "other.py:9 <rule>"),
    "commuted": lambda t: t.replace("add(h, y)", "add(y, h)").replace("mul(exp_of_y, s)", "mul(s, exp_of_y)"),
    "symbol names": lambda t: t.replace("[b,", "[n,").replace("where b", "where n"),
    "order of lines": lambda t: t.replace("  exp_of_y = exp(y)\n", "").replace("  h =", "  exp_of_y = exp(y)\n  h ="),
    "stage": lambda t: t.replace("64 {", "64 stage planned {"),
}
DIFFERENT = {
    "op": (lambda t: t.replace("exp(y)", "log(y)"), "exp 'exp_of_y' and log 'exp_of_y'"),
    "operand": (lambda t: t.replace("exp(y)", "exp(x)"), "input 'y' and input 'x' are shared differently|shared differently"),
    "not commutative": (lambda t: t.replace("add(h, y)", "sub(h, y)"), "add 's' and sub 's'"),
    "dtype": (lambda t: t.replace("y: f32[b, 8]", "y: f64[b, 8]"), r"f32\[b, 8\] and f64\[b, 8\]"),
    "range": (lambda t: t.replace("1..64", "1..65"), "size b"),
    "device": (lambda t: t.replace("f32[b, 8],", "f32[b, 8]@cuda,").replace("y: f32[b, 8]", "y: f32[b, 8]@cuda")
               .replace("f32[8, 8]", "f32[8, 8]@cuda"), "cuda"),
    "strides": (lambda t: t.replace("x: f32[b, 8]", "x: f32[b, 8] strides [1, b]"), "strides"),
    "outputs": (lambda t: t.replace("return e", "return e, s"), "1 outputs and 2"),
    "write": (lambda t: t.replace("  return", "  write x = e\n  return"), "0 writes and 1"),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_does_not_count(change):
    assert change(BASE) != BASE
    assert structural_hash(parse(change(BASE)), True) == structural_hash(parse(BASE), True)


@pytest.mark.parametrize(("change", "difference"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_counts(change, difference):
    left, right = parse(BASE), parse(change(BASE))
    assert structural_hash(left, True) != structural_hash(right, True)
    assert structural_hash(left, False) != structural_hash(right, False)
    with pytest.raises(AssertionError, match=difference):
        assert equal(left, right) is None, equal(left, right)


def test_weights_count_only_when_asked():
    one, two = (parse(BASE, {"w": torch.full((8, 8), v)}) for v in (1.0, 2.0))
    again = parse(BASE.replace('"w"', '"renamed"'), {"renamed": torch.full((8, 8), 1.0)})
    assert structural_hash(one, False) == structural_hash(two, False) == structural_hash(parse(BASE), False)
    assert structural_hash(one, True) != structural_hash(two, True)
    assert structural_hash(one, True) == structural_hash(again, True)
    assert equal(one, again) is None
    assert "constants" in (equal(one, two) or "")


def test_one_weight_used_twice_is_not_two_weights():
    text = 'graph f(x: f32[2]) {{ a = constant "a" : f32[2] b = constant "{}" : f32[2] y = add(x, a) z = mul(y, b) return z }}'
    assert structural_hash(parse(text.format("b")), False) != structural_hash(parse(text.format("a")), False)


def test_numbers_are_told_apart():
    hashes = {
        structural_hash(parse(f"graph f(x: f64[2]) {{ y = add(x, {v}) return y }}"), True) for v in ("0", "0.0", "-0.0", "nan", "1", "true")
    }
    assert len(hashes) == 6


def test_region_bodies_count():
    text = "graph f(x: f32[2]) { y = region(x) body b(x: f32[2]) { y = exp(x) return y } return y }"
    assert structural_hash(parse(text), True) == structural_hash(parse(text.replace("body b(x", "body c(x")), True)
    assert structural_hash(parse(text), True) != structural_hash(parse(text.replace("exp", "log")), True)


def test_the_hash_is_the_same_in_another_process():
    code = (
        "import sys\nfrom tilewright.ir.text import parse\nfrom tilewright.ir.analysis.hashing import structural_hash\n"
        "print(structural_hash(parse(sys.argv[1]), True))"
    )
    out = subprocess.run([sys.executable, "-c", code, BASE], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert out.stdout.strip() == structural_hash(parse(BASE), True)


def test_equal_groups_of_nodes_align():
    graph = parse("""graph f(x: f32[4], y: f32[4]) {
      a1 = exp(x)
      b1 = add(a1, y)
      c1 = mul(b1, 2.0)
      a2 = exp(c1)
      b2 = add(y, a2)
      c2 = mul(2.0, b2)
      return c2
    }""")
    by_name = {n.hint: n for n in order(graph)}
    first, second = (canonical([by_name[n + i] for n in "abc"], weights=False) for i in "12")
    assert first.digest == second.digest
    assert [n.hint for n in first.nodes] == ["a1", "b1", "c1"]
    assert [n.hint for n in second.nodes] == ["a2", "b2", "c2"]
    assert [n.hint for n in first.leaves] == ["x", "y"]
    assert [n.hint for n in second.leaves] == ["c1", "y"]


def test_groups_that_read_alike_operands_in_either_order_are_equal():
    text = "graph f(x: f32[4], y: f32[4]) {{ a = exp(x) b = exp(y) p = sub(a, b) q = add({}) r = div(p, q) return r }}"
    groups = [[n for n in order(parse(text.format(operands))) if n.inputs] for operands in ("a, b", "b, a", "a, a")]
    digests = [structural_hash(group, False) for group in groups]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_sharing_is_part_of_equality():
    shared = parse("graph f(x: f32[4]) { a = exp(x) y = add(a, a) return y }")
    copied = parse("graph f(x: f32[4]) { a = exp(x) b = exp(x) y = add(a, b) return y }")
    assert "shared differently" in (equal(shared, copied) or "")
    assert "shared differently" in (equal(copied, shared) or "")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda t: t.replace("graph f", "graph g"), "graph f"),
        (lambda t: t.replace("64 {", "64 stage fused {"), "FUSED"),
        (lambda t: t.replace("model.py:1", "model.py:2"), "model.py:2"),
        (lambda t: t.replace("add(h, y)", "add(h, y) @ 0+64"), "offset=0"),
    ],
)
def test_exact_equality_sees_everything(change, difference):
    left, right = parse(BASE), parse(change(BASE))
    assert equal(left, right) is None
    assert difference in (equal(left, right, exact=True) or "")
