"""The rule engine: what patterns match, that rules run to a fixpoint, and that refusals and loops are reported by name."""

import time

import pytest
import torch
from tilewright.ir import ops
from tilewright.ir.analysis.hashing import equal
from tilewright.ir.graph import Node, is_scalar, order
from tilewright.ir.interpret import interpret
from tilewright.ir.patterns import Pat, Refusal, Rest, Var, pat
from tilewright.ir.provenance import Provenance
from tilewright.ir.rules import Match, Outcome, Rule, RuleError, Site, Tracer, apply_rules, pattern_rule
from tilewright.ir.text import parse

DOUBLE_NEG = pattern_rule("double-neg", pat("neg", pat("neg", Var("x"))), lambda m: m["x"])
MUL_ONE = pattern_rule("mul-one", pat("mul", Var("x"), 1.0), lambda m: m["x"])


def graph_of(body: str, result: str = "y"):
    return parse(f"graph f(x: f32[4], z: f32[4]) {{\n{body}\nreturn {result} }}")


def check(rules: list[Rule], before: str, after: str, result: str = "y", tracer: Tracer | None = None) -> None:
    start, expected = graph_of(before, result), graph_of(after, result)
    done = apply_rules(start, rules, tracer)
    assert equal(done, expected) is None, f"{equal(done, expected)}\n{done}"
    inputs = [torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 1.0, -1.0, 4.0])]
    for left, right in zip(interpret(start, inputs), interpret(done, inputs)):
        torch.testing.assert_close(left, right)


def test_a_nested_pattern_runs_to_a_fixpoint():
    check([DOUBLE_NEG], "a = neg(x) b = neg(a) c = neg(b) d = neg(c) e = neg(d) y = exp(e)", "a = neg(x) y = exp(a)")


def test_rules_feed_each_other_in_either_direction():
    check([DOUBLE_NEG, MUL_ONE], "a = neg(x) b = mul(a, 1.0) c = neg(b) y = exp(c)", "y = exp(x)")


def test_commutative_operands_match_in_both_orders():
    check([MUL_ONE], "a = mul(1.0, x) b = mul(a, 1.0) y = exp(b)", "y = exp(x)")
    div_one = pattern_rule("div-one", pat("div", Var("x"), 1.0), lambda m: m["x"])
    check([div_one], "y = div(1.0, x)", "y = div(1.0, x)")


def test_commutative_patterns_backtrack():
    """(a * k) + b where the product stands on either side and its factor on either side."""
    rule = pattern_rule(
        "pull",
        pat("add", pat("mul", Var("a"), Var("k", where=is_scalar)), pat("mul", Var("b"), Var("k"))),
        lambda m: ops.mul(ops.add(m["a"], m["b"]), m["k"]),
    )
    for product in ("mul(3.0, x)", "mul(x, 3.0)"):
        before = f"p = {product} q = mul(z, 3.0) y = add(p, q)"
        start = graph_of(before)
        done = apply_rules(start, [rule])
        assert [n.op.name for n in order(done) if n.inputs] == ["add", "mul"]
    unequal = graph_of("p = mul(x, 3.0) q = mul(z, 4.0) y = add(p, q)")
    assert equal(apply_rules(unequal, [rule]), unequal) is None


def test_one_name_means_one_value():
    rule = pattern_rule("self-sub", pat("sub", Var("x"), Var("x")), lambda m: ops.mul(m["x"], 0.0))
    check([rule], "y = sub(x, x)", "y = mul(x, 0.0)")
    check([rule], "y = sub(x, z)", "y = sub(x, z)")


def test_literals_are_exact():
    for number in ("1", "true", "1.5", "-1.0"):
        check([MUL_ONE], f"y = mul(x, {number})", f"y = mul(x, {number})")


def test_any_of_ops_attributes_and_names():
    seen = []

    def note(m: Match) -> bool:
        seen.append((m["act"].op.name, m.get("missing")))
        return True

    rule = pattern_rule("drop", pat(("relu", "gelu"), pat("exp", Var("x"), name="e"), name="act"), lambda m: m["e"], note)
    check([rule], "a = exp(x) y = relu(a)", "y = exp(x)")
    assert seen == [("relu", None)]
    exact = pattern_rule("tanh-gelu", pat("gelu", Var("x"), attrs={"approximate": "tanh"}), lambda m: ops.gelu(m["x"]))
    start = graph_of('y = gelu(x, approximate="tanh")')
    assert equal(apply_rules(start, [exact]), graph_of("y = gelu(x)")) is None
    keep = pattern_rule("last", pat("softmax", Var("x"), attrs={"dim": lambda d: d < 0}), lambda m: ops.softmax(m["x"], dim=0))
    assert equal(apply_rules(graph_of("y = softmax(x, dim=-1)"), [keep]), graph_of("y = softmax(x, dim=0)")) is None


def test_the_number_of_operands_is_exact_unless_the_rest_is_taken():
    start = parse("graph f(x: f32[2, 4], w: f32[3, 4], b: f32[3]) { y = linear(x, w, b) return y }")
    plain = pattern_rule("plain", pat("linear", Var("x"), Var("w")), lambda m: m["nothing"])
    assert equal(apply_rules(start, [plain]), start) is None
    caught = []

    def keep(m: Match) -> Refusal:
        caught.append(m["rest"])
        return Refusal("seen")

    any_number = pattern_rule("any", pat("linear", Var("x"), Var("w"), Rest("rest")), lambda m: m.root, keep)
    apply_rules(start, [any_number])
    apply_rules(parse("graph f(x: f32[2, 4], w: f32[3, 4]) { y = linear(x, w) return y }"), [any_number])
    assert [tuple(n.hint for n in rest) for rest in caught] == [("b",), ()]


def test_an_unknown_op_in_a_pattern_is_an_error():
    with pytest.raises(KeyError):
        pat("expo", Var("x"))


# -- reasons


def unshared(m: Match) -> bool | Refusal:
    return True if m.single("inner") else Refusal("another consumer needs the value", m["inner"])


CAREFUL = pattern_rule("careful", pat("neg", pat("neg", Var("x"), name="inner")), lambda m: m["x"], unshared)


def test_a_refusal_names_reason_value_and_source():
    tracer = Tracer()
    check([CAREFUL], "a = neg(x)\nb = neg(a)  # m.py:3\ny = add(a, b)", "a = neg(x) b = neg(a) y = add(a, b)", tracer=tracer)
    (missed,) = tracer.missed
    assert (missed.rule, missed.node.prov.source, missed.refusal.reason) == ("careful", "m.py:3", "another consumer needs the value")
    assert isinstance(missed.refusal.value, Node)
    assert tracer.applied == []


def test_outputs_count_as_readers():
    tracer = Tracer()
    check([CAREFUL], "a = neg(x) y = neg(a)", "a = neg(x) y = neg(a)", result="a, y", tracer=tracer)
    assert len(tracer.missed) == 1


def test_equal_nodes_are_one_before_readers_are_counted():
    tracer = Tracer()
    apply_rules(graph_of("a = neg(x) c = neg(x) y = neg(a) w = exp(c)", "y, w"), [CAREFUL], tracer)
    assert len(tracer.missed) == 1


def test_what_may_not_be_applied_stays():
    asked: list[str] = []

    def may(rule: str, node: Node) -> bool:
        asked.append(f"{rule} at {node.hint}")
        return len(asked) == 1

    graph = graph_of("a = neg(x) b = neg(a) c = exp(b) d = neg(c) y = neg(d)", "y")
    tracer = Tracer(may=may)
    done = apply_rules(graph, [CAREFUL], tracer)
    assert [n.op.name for n in order(done) if n.op.name != "input"] == ["exp", "neg", "neg"]
    assert asked[:2] == ["careful at b", "careful at y"] and len(tracer.applied) == 1 and not tracer.missed


def test_only_refusals_that_stand_at_the_end_are_reported():
    """The inner negation has a second reader until the product with it is rewritten away."""
    drop = pattern_rule("drop", pat("mul", Var("x"), Var("y")), lambda m: ops.abs(m["x"]))
    tracer = Tracer()
    done = apply_rules(graph_of("a = neg(x) b = neg(a) y = mul(z, a)", "b, y"), [CAREFUL, drop], tracer)
    assert [a.rule for a in tracer.applied] == ["drop", "careful"]
    assert tracer.missed == []
    assert done.outputs[0] is done.inputs[0]


def test_a_where_may_refuse_with_a_reason():
    rule = pattern_rule("picky", pat("exp", Var("x", where=lambda n: Refusal("no", n.hint))), lambda m: m["x"])
    tracer = Tracer()
    apply_rules(graph_of("y = exp(x)"), [rule], tracer)
    assert [(m.rule, m.refusal) for m in tracer.missed] == [("picky", Refusal("no", "x"))]


def test_a_check_that_answers_nothing_is_a_defect():
    rule = pattern_rule("vague", pat("exp", Var("x")), lambda m: m["x"], lambda m: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(RuleError, match="'vague' answered None"):
        apply_rules(graph_of("y = exp(x)"), [rule])


# -- what is made


def test_what_is_made_knows_where_it_comes_from():
    spread = pattern_rule(
        "spread",
        pat("mul", pat("add", Var("a"), Var("b")), Var("k", where=is_scalar)),
        lambda m: ops.add(ops.mul(m["a"], m["k"]), ops.mul(m["b"], m["k"])),
    )
    tracer = Tracer()
    start = graph_of("e = exp(x)  # m.py:1\ns = add(e, z)  # m.py:2 block <old>\ny = mul(s, 2.0)  # m.py:3")
    done = apply_rules(start, [spread], tracer)
    made = {n.hint or n.op.name: n for n in order(done) if n.inputs}
    assert made["e"].prov.rules == ()
    for node in done.outputs[0], *done.outputs[0].inputs:
        assert set(node.prov.sources) == {"m.py:2", "m.py:3"}
        assert node.prov.modules == ("block",)
        assert node.prov.rules == ("old", "spread")
    assert done.outputs[0].hint == "y"
    (applied,) = tracer.applied
    assert (applied.rule, applied.before.prov.source) == ("spread", "m.py:3")
    assert "mul(s, 2.0)" in repr(applied.before)


def test_a_rule_that_changes_a_type_is_named():
    rule = pattern_rule("retype", pat("exp", Var("x")), lambda m: ops.cast(m["x"], dtype=torch.float64))
    with pytest.raises(RuleError, match=r"'retype' turns f32\[4\] .* into f64\[4\]"):
        apply_rules(graph_of("y = exp(x)"), [rule])


def test_a_function_marks_what_it_makes_with_all_that_it_replaces():
    """The exponential is read still, and the sum beside it is not on the way to it: neither is an origin."""

    def merge(node: Node, site: Site) -> Outcome:
        inner = node.inputs[0]
        if inner.op.name != "mul":
            return None
        return ops.mul(inner.inputs[0], ops.square(inner.inputs[0])) if site.single(inner) else Refusal("shared", inner)

    body = "e = exp(x)  # m.py:1\ns = add(z, z)  # m.py:2\np = mul(e, s)  # m.py:3 block\ny = neg(p)  # m.py:4"
    done = apply_rules(graph_of(body), [Rule("merge", ("neg",), merge)])
    product = done.outputs[0]
    for node in product, product.inputs[1]:
        assert node.prov == Provenance(("m.py:4", "m.py:3"), ("block",), ("merge",))
    assert product.hint == "y" and product.inputs[0].prov.rules == ()
    tracer = Tracer()
    apply_rules(graph_of(body, "y, p"), [Rule("merge", ("neg",), merge)], tracer)
    assert [(m.rule, m.refusal.reason) for m in tracer.missed] == [("merge", "shared")]


LOOPS = {
    "swap": pattern_rule("swap", pat("add", Var("a"), Var("b")), lambda m: ops.add(m["b"], m["a"])),
    "grow": pattern_rule("grow", pat("neg", Var("x")), lambda m: ops.neg(ops.neg(ops.neg(m["x"])))),
    "same": pattern_rule("same", pat("neg", Var("x"), name="n"), lambda m: m["n"]),
    "again": Rule("again", ("neg",), lambda node, site: ops.neg(node.inputs[0])),
    "deep": pattern_rule("deep", pat("neg", Var("x")), lambda m: ops.abs(ops.abs(ops.neg(ops.abs(m["x"]))))),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_rule_that_loops_is_named(name):
    with pytest.raises(RuleError, match=f"rule '{name}'.*loops"):
        apply_rules(graph_of("a = neg(x) y = add(a, z)"), [LOOPS[name]])


def test_two_rules_that_undo_each_other_are_both_named():
    to_sub = pattern_rule("to-sub", pat("add", Var("a"), pat("neg", Var("b"))), lambda m: ops.sub(m["a"], m["b"]))
    to_add = pattern_rule("to-add", pat("sub", Var("a"), Var("b")), lambda m: ops.add(m["a"], ops.neg(m["b"])))
    with pytest.raises(RuleError, match="to-sub.*to-add|to-add.*to-sub"):
        apply_rules(graph_of("y = sub(x, z)"), [to_sub, to_add])


def test_many_rules_on_a_large_graph_take_little_time():
    lines = "\n".join(f"v{i} = {'neg' if i % 3 else 'exp'}({'x' if i == 0 else f'v{i - 1}'})" for i in range(1500))
    graph = graph_of(lines, "v1499")
    others = [pattern_rule(f"no-{i}", Pat(("log", "sin"), (Var("x"),), "", {}), lambda m: m["x"]) for i in range(300)]
    start = time.process_time()
    done = apply_rules(graph, [*others, DOUBLE_NEG])
    assert time.process_time() - start < 3
    assert [n.op.name for n in order(done) if n.inputs] == ["exp"] * 500
