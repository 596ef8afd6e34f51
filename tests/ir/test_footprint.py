"""Footprint: what values hold at a time, by hand: kernels hold their last value, results that die are written over, views hold nothing."""

from tilewright.ir.analysis.footprint import Footprint, held_bytes, peak_bytes
from tilewright.ir.text import parse

IMAGE = 4 * 4 * 32 * 32  # bytes of f32[1, 4, 32, 32]
CONV = "stride=[1, 1], padding=[1, 1], dilation=[1, 1]"
SIGNATURE = "x: f32[1, 4, 32, 32], w: f32[4, 4, 3, 3]"


def peak(*lines: str) -> int:
    return peak_bytes(parse("\n".join([f"graph g({SIGNATURE}) {{", *lines[:-1], f"return {lines[-1]}", "}"])))


def test_a_chain_holds_two():
    assert peak(f"a = conv(x, w, {CONV})", f"b = conv(a, w, {CONV})", f"c = conv(b, w, {CONV})", "m = mean(c)", "m") == 2 * IMAGE


def test_pointwise_ops_join_what_they_read():
    assert peak(f"a = conv(x, w, {CONV})", "b = relu(a)", "c = add(b, 1.0)", "m = mean(c)", "m") == IMAGE


def test_a_residual_is_held_beside_what_is_added_to_it():
    lines = (f"a = conv(x, w, {CONV})", f"b = conv(a, w, {CONV})", f"c = conv(b, w, {CONV})", "d = add(c, a)", "m = mean(d)", "m")
    assert peak(*lines) == 3 * IMAGE


def test_pointwise_kernels_write_over_what_dies():
    assert peak(f"a = conv(x, w, {CONV})", "m = mean(a)", "b = mul(a, m)", "n = mean(b)", "n") == IMAGE + 4


def test_views_and_pads_hold_nothing():
    lines = (f"a = conv(x, w, {CONV})", "s = slice(a, dim=2, start=0, stop=16)", "p = pad(s, low=[0, 0, 0, 0], high=[0, 0, 16, 0])")
    assert peak(*lines, f"b = conv(p, w, {CONV})", "m = mean(b)", "m") == 2 * IMAGE


def test_results_are_not_counted():
    assert peak(f"a = conv(x, w, {CONV})", f"b = conv(a, w, {CONV})", "b") == IMAGE


def test_what_a_returned_view_shows_is_returned():
    lines = (f"a = conv(x, w, {CONV})", f"b = conv(a, w, {CONV})", "v = reshape(b, shape=[4096])", "v")
    assert peak(*lines) == IMAGE


def test_all_that_is_held_is_what_is_given_and_returned_beside_that():
    lines = [f"graph g({SIGNATURE}) {{", f"a = conv(x, w, {CONV})", f"b = conv(a, w, {CONV})", "v = reshape(b, shape=[4096])"]
    weight = 4 * 4 * 4 * 3 * 3
    assert held_bytes(parse("\n".join([*lines, "return v", "}"]))) == 3 * IMAGE + weight
    assert held_bytes(parse("\n".join([*lines, "return v, b, x", "}"]))) == 3 * IMAGE + weight


def test_a_step_may_take_more_itself():
    graph = parse(
        "\n".join([f"graph g({SIGNATURE}) {{", f"a = conv(x, w, {CONV})", f"b = conv(a, w, {CONV})", "m = mean(b)", "return m", "}"])
    )
    found = Footprint(graph)
    steps = [s.node for s in found.steps]
    assert found.peak(found.bytes, steps[1:], {steps[1]: 5 * IMAGE}) == 5 * IMAGE
    assert found.peak(lambda n: found.bytes(n) // 4) == 2 * IMAGE // 4
