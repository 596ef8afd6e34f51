"""Example inputs from files and from shapes."""

import numpy as np
import pytest
import torch
from offline import Mlp, Tokens
from safetensors.torch import save_file
from tilewright.driver.errors import BadInputs
from tilewright.driver.inputs import Example, parse_inputs

X = torch.linspace(-2, 2, 24).reshape(3, 8)


def test_shapes():
    example = parse_inputs(["x=1x3x4:f16, m=2:bool", "n=scalar:i64"])
    x, m, n = example.kwargs.values()
    assert (x.shape, x.dtype) == ((1, 3, 4), torch.float16) and m.dtype == torch.bool
    assert n.shape == () and n.dtype == torch.int64 and example.dynamic == {}


def test_letters_are_sizes_that_vary():
    example = parse_inputs(["ids=bxs:i64,mask=bxs,y=4xb"])
    assert example.dynamic == {"ids": {0: "b", 1: "s"}, "mask": {0: "b", 1: "s"}, "y": {1: "b"}}
    b, s = example.kwargs["ids"].shape
    assert example.kwargs["mask"].shape == (b, s) and example.kwargs["y"].shape == (4, b) and b != s and min(b, s) > 1


def test_integers_are_valid_indices_of_anything():
    values = parse_inputs(["ids=50x50:i64"]).kwargs["ids"]
    assert set(values.unique().tolist()) == {0, 1}


def test_values_are_the_same_every_time():
    assert torch.equal(parse_inputs(["x=9"]).kwargs["x"], parse_inputs(["x=9"]).kwargs["x"])


@pytest.mark.parametrize("kind", ["npz", "pt", "safetensors"])
def test_files(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    {
        "npz": lambda: np.savez(path, x=X.numpy()),
        "pt": lambda: torch.save({"x": X}, path),
        "safetensors": lambda: save_file({"x": X}, path),
    }[kind]()
    assert torch.equal(parse_inputs([str(path), "y=2"]).kwargs["x"], X)


def test_files_that_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    torch.save([X], tmp_path / "list.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "x.csv").write_text("1,2")
    for name in ("objects.npz", "list.pt", "text.safetensors", "x.csv", "none.npz"):
        with pytest.raises(BadInputs) as caught:
            parse_inputs([str(tmp_path / name)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["x=", "x=3x", "x=3x-1", "x=3:f9", "=3", "x=3.5", "x=3x8:"])
def test_shapes_that_are_refused(spec):
    with pytest.raises(BadInputs):
        parse_inputs([spec])


def test_nothing_given():
    assert parse_inputs([]) is None


def test_names_are_checked():
    with pytest.raises(BadInputs, match="its inputs are ids, mask, scale"):
        Example((), {"id": X}).bound_to(Tokens())
    with pytest.raises(BadInputs, match="no such input"):
        Example((X,), {}, {"y": {0: "b"}}).bound_to(Mlp())


def test_names_of_sizes_are_checked_where_a_model_takes_any_name():
    class Any(torch.nn.Module):
        def forward(self, x, mask=None, **others):
            return x if mask is None else x * mask

    assert Example((X,), {"scale": X}, {"scale": {0: "b"}}).dynamic_shapes(Any())["others"]["scale"].keys() == {0}
    for name in ("ids", "mask"):
        with pytest.raises(BadInputs, match="it has x"):
            Example((X,), {}, {name: {0: "b"}}).dynamic_shapes(Any())


def test_positions_are_filled_without_gaps():
    example = Example((), {"c": 3, "a": 1})
    assert example.positional(("a", "b", "c")) == Example((1,), {"c": 3})
    assert example.positional(("a", "c")) == Example((1, 3), {})


def test_varying_dimensions_of_positional_arguments():
    shapes = Example((X,), {}, {"x": {0: "b"}}).dynamic_shapes(Mlp())
    assert list(shapes) == ["x"] and list(shapes["x"]) == [0]
    with pytest.raises(BadInputs, match="dimension 2"):
        Example((X,), {}, {"x": {2: "b"}}).dynamic_shapes(Mlp())
