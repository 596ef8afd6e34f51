"""Dims agree with Python integers and with sympy, printed and parsed dims included."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilewright.ir.dims import FloorDiv, Mod, SymbolRange, dim, evaluate, floordiv, free_symbols, hint, product, same, symbol, to_source
from tilewright.ir.text import parse

A, B = symbol("a"), symbol("b")
SIZES = st.fixed_dictionaries({"a": st.integers(0, 40), "b": st.integers(0, 40)})


@st.composite
def expressions(draw, depth=3):
    """A dim and its meaning, a function from sizes to an integer computed by Python alone."""
    kind = draw(st.sampled_from(["int", "symbol"] + (["add", "sub", "mul", "floordiv", "mod", "max", "min", "neg"] * 2 if depth else [])))
    if kind == "int":
        value = draw(st.integers(-6, 12))
        return value, lambda env: value
    if kind == "symbol":
        name = draw(st.sampled_from(["a", "b"]))
        return symbol(name), lambda env: env[name]
    left, f = draw(expressions(depth - 1))
    if kind == "neg":
        return dim(-left), lambda env: -f(env)
    if kind in ("floordiv", "mod"):
        right, g = draw(st.sampled_from([(2, lambda env: 2), (6, lambda env: 6), (A + 1, lambda env: env["a"] + 1)]))
        function = FloorDiv if kind == "floordiv" else Mod
        python = (lambda x, y: x // y) if kind == "floordiv" else (lambda x, y: x % y)
        return dim(function(sympy.sympify(left), sympy.sympify(right))), lambda env: python(f(env), g(env))
    right, g = draw(expressions(depth - 1))
    symbolic, python = {
        "add": (lambda x, y: x + y, lambda x, y: x + y),
        "sub": (lambda x, y: x - y, lambda x, y: x - y),
        "mul": (lambda x, y: x * y, lambda x, y: x * y),
        "max": (sympy.Max, max),
        "min": (sympy.Min, min),
    }[kind]
    return dim(symbolic(sympy.sympify(left), right)), lambda env: python(f(env), g(env))


@given(expressions(), SIZES)
@settings(max_examples=250, deadline=None)
def test_value_and_source_agree_with_python(expression, sizes):
    value, meaning = expression
    assert evaluate(value, sizes) == meaning(sizes)
    source = to_source(value)
    assert eval(source, {"max": max, "min": min}, sizes) == meaning(sizes), source


@given(expressions())
@settings(max_examples=150, deadline=None)
def test_a_printed_dim_parses_to_the_same_dim(expression):
    value, _ = expression
    text = f"graph f(x: f32[a, b]) {{ y = full(shape=[{to_source(value)}], value=0, dtype=f32) return y }}"
    assert parse(text).outputs[0].attrs["shape"] == (value,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a - b - 1", A - B - 1),
        ("a - (b - 1)", A - B + 1),
        ("2*a*b // 3 * 4", 4 * FloorDiv(2 * A * B, sympy.Integer(3))),
        ("a % 4 + 1", Mod(A, sympy.Integer(4)) + 1),
        ("-a // 2", FloorDiv(-A, sympy.Integer(2))),
        ("-(a // 2)", -FloorDiv(A, sympy.Integer(2))),
        ("--3", 3),
        ("7 // -2", -4),
        ("7 % 4 * 2", 6),
        ("max(a, 0, 3)", sympy.Max(A, 3)),
        ("min(a + 1, b)", sympy.Min(A + 1, B)),
        ("(a + 1)*(a - 1)", A * A - 1),
        ("(((5)))", 5),
    ],
)
def test_precedence_is_that_of_python(text, expected):
    graph = parse(f"graph f(x: f32[a, b]) {{ y = full(shape=[{text}], value=0, dtype=f32) return y }}")
    assert graph.outputs[0].attrs["shape"] == (dim(expected),)


@pytest.mark.parametrize(
    ("value", "source"),
    [
        (dim(-A), "-a"),
        (dim(2 * A - 3), "2*a - 3"),
        (dim(3 - A), "-a + 3"),
        (dim(B - A), "b - a"),
        (dim(A * A), "a*a"),
        (dim(-FloorDiv(A, sympy.Integer(2))), "-(a // 2)"),
        (dim(A * FloorDiv(B, sympy.Integer(2))), "a*(b // 2)"),
        (FloorDiv(Mod(A, sympy.Integer(4)), sympy.Integer(3)), "(a % 4) // 3"),
        (-5, "-5"),
    ],
)
def test_source_is_written_plainly(value, source):
    assert to_source(value) == source


def test_functions_can_be_respelled():
    source = to_source(dim(FloorDiv(A + 1, sympy.Integer(2)) + 1), {FloorDiv: lambda a, b: f"div({a}, {b})"})
    assert source == "div(a + 1, 2) + 1"


def test_multiples_of_the_divisor_leave_a_quotient():
    assert floordiv(dim(4 * A + 3), 4) == A
    assert floordiv(dim(A * B + B), B) == A + 1
    assert dim(Mod(4 * A + B, sympy.Integer(4))) == Mod(B, sympy.Integer(4))
    assert floordiv(7, 2) == 3
    assert floordiv(-7, 2) == -4


def test_normal_forms_decide_equality():
    assert dim(A - A) == 0
    assert type(dim(sympy.Integer(3))) is int
    assert same((A + 1) * B, A * B + B)
    assert not same(A, B)
    assert product([2, A, 3]) == 6 * A
    assert product([]) == 1
    assert free_symbols([A + 1, 3]) == {A}


@pytest.mark.parametrize("value", [2.5, "a", None, torch.ones(())])
def test_only_integers_and_expressions_are_dims(value):
    with pytest.raises(TypeError, match="a size is an integer"):
        dim(value)


def test_fractions_have_no_value():
    for value in (A / 2, 1 / A):
        with pytest.raises(TypeError):
            evaluate(value, {"a": 4})
    with pytest.raises(KeyError):
        evaluate(A, {})


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (SymbolRange(), 64),
        (SymbolRange(100, None), 100),
        (SymbolRange(0, 10), 10),
        (SymbolRange(0, None, 48), 48),
        (SymbolRange(60, None, 48), 96),
    ],
)
def test_a_hint_lies_in_the_range_of_its_symbol(known, expected):
    assert hint(A, {"a": known}) == expected
    assert hint(dim(2 * A + 1), {"a": known}) == 2 * expected + 1
