"""Calling conventions: arguments in, results out, through JSON."""

import json

import pytest
import torch
from tilewright.driver.calling import CallingConvention, Record, flatten, tree_of, unflatten
from tilewright.ir.text import parse
from torch.utils import _pytree as pytree

GRAPH = parse("graph g(ids: i64[b, s], a: f32[b, 4], n: int) where b in 2..64, s in 8..512, s % 8 == 0 {\n  return a\n}")
PAIR = {"kind": "tuple", "items": ["leaf", "leaf"]}
CALL = CallingConvention(
    names=("ids", "options", "n"),
    arguments=("leaf", {"kind": "dict", "keys": ["unused", "a"], "items": ["leaf", "leaf"]}, "leaf"),
    tensors=(0, 2, 3),
    result={"kind": "record", "keys": ["logits", "cache", "loss"], "items": ["leaf", PAIR, "none"]},
    outputs=(0, 1, None),
    constants={2: "fixed"},
)
IDS, A = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 4)


@pytest.mark.parametrize("value", [1, (1, [2, {"a": None, "b": 3}]), [], {"x": (4,)}])
def test_trees(value):
    leaves, spec = pytree.tree_flatten(value)
    tree = json.loads(json.dumps(tree_of(spec)))
    assert unflatten(tree, iter(leaves)) == value and flatten(tree, value, "x") == leaves


def test_it_survives_json():
    assert CallingConvention.from_json(json.loads(json.dumps(CALL.to_json()))) == CALL


def test_bind_by_name_and_position():
    want = [IDS, A, 3]
    for args, kwargs in [((IDS, {"unused": 1, "a": A}, 3), {}), ((IDS,), {"n": 3, "options": {"a": A, "unused": None}})]:
        assert all(x is y for x, y in zip(CALL.bind(args, kwargs), want, strict=True))


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((), {}, "argument 'ids' is missing; the model takes ids, options, n"),
        ((1, 2, 3, 4), {}, "takes 3 arguments .* 4 were given"),
        ((IDS,), {"x": 1}, "no argument 'x'"),
        ((IDS, A), {}, "argument options must be a dict with keys unused, a, not Tensor"),
        ((IDS,), {"ids": IDS}, "argument 'ids' is given twice"),
    ],
)
def test_calls_that_do_not_fit(args, kwargs, words):
    with pytest.raises(TypeError, match=words):
        CALL.bind(args, kwargs)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ([IDS.int(), A, 3], r"argument 'ids' must be i64\[b, s\], not i32\[2, 16\]"),
        ([IDS[0], A, 3], r"not i64\[16\]"),
        ([IDS, A[:1], 3], r"argument 'options' \(value 2 of 2\) must be f32\[b, 4\], not f32\[1, 4\] \(b in 0..64\)"),
        ([IDS[:, :9], A, 3], "s in 8..512, a multiple of 8"),
        ([IDS.repeat(33, 1), A.repeat(33, 1), 3], "b in 0..64"),
        ([IDS, A, "three"], "argument 'n' must be a number, not a str"),
        ([IDS, [1.0], 3], "not a list"),
    ],
)
def test_values_that_do_not_fit(inputs, words):
    with pytest.raises(TypeError, match=words):
        CALL.checked(inputs, GRAPH)


def test_values_that_fit():
    assert CALL.checked([IDS, A, 3], GRAPH)
    assert CALL.checked([IDS[:1], A[:1], 3], GRAPH)  # a size that varies may be 1


def test_results():
    got = CALL.pack([1, 2])
    assert (got.logits, got["cache"], got.loss) == (1, (2, "fixed"), None)
    with pytest.raises(AttributeError, match="no field 'nope'; it has logits, cache, loss"):
        _ = got.nope


def test_records_are_pytrees():
    record = Record(a=1, b=(2, 3))
    doubled = pytree.tree_map(lambda x: 2 * x, record)
    assert doubled == {"a": 2, "b": (4, 6)} and isinstance(doubled, Record)
