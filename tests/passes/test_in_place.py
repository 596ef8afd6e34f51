"""plan-memory: an input that gets a new value at few positions is updated where it lies, unless something would read what was there."""

from dataclasses import replace

import pytest
import torch
from tilewright.codegen.program import compile_program
from tilewright.codegen.updates import OwnMemory
from tilewright.driver.compile import compile_graph, kept_apart
from tilewright.driver.receipt import receipts
from tilewright.ir.analysis.hashing import equal
from tilewright.ir.errors import VerificationError
from tilewright.ir.graph import Graph
from tilewright.ir.interpret import interpret
from tilewright.ir.text import parse
from tilewright.ir.verify import verify
from tilewright.passes.base import Notes, Reason
from tilewright.passes.fuse_regions import FuseRegions
from tilewright.passes.plan_memory import PlanMemory

INPUTS = "cache: f32[2, 8, 4], new: f32[2, 1, 4], at: i64[1]"
UPDATE = "c = index_put(cache, new, at, dims=[1])"
WRITE = "write cache = c"


def graph(*lines: str, inputs: str = INPUTS) -> Graph:
    return parse(f"graph g({inputs}) stage fused {{\n" + "\n".join(lines) + "\n}")


def planned(*lines: str, inputs: str = INPUTS) -> Graph:
    made = PlanMemory().run(graph(*lines, inputs=inputs))
    verify(made)
    return made


def names(made: Graph) -> dict[str, str]:
    return {node.hint: target.hint for node, target in made.inplace.items()}


def refusals(*lines: str, inputs: str = INPUTS) -> list[str]:
    notes = Notes()
    made = PlanMemory().run(graph(*lines, inputs=inputs), notes)
    assert not made.inplace
    assert all(d.reason is Reason.OVERWRITTEN for d in notes.declined)
    return [d.value for d in notes.declined]


def values(at=3):
    torch.manual_seed(at)
    return [torch.randn(2, 8, 4), torch.randn(2, 1, 4), torch.tensor([at])]


def check_run(made: Graph, given: list, expected_inputs: list | None = None) -> None:
    """The program's outputs and the inputs after it are those of the graph's meaning."""
    functional = replace(made, inplace={}, arena={})
    kept = [t.clone() for t in given] if expected_inputs is None else expected_inputs
    outputs = interpret(replace(functional, outputs=functional.roots, writes=()), [t.clone() for t in given])
    results = compile_program(made)(given)
    for got, want in zip(results, outputs):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    after = {target: want for (target, _), want in zip(made.writes, outputs[len(made.outputs) :])}
    for node, got, old in zip(made.inputs, given, kept):
        torch.testing.assert_close(got, after.get(node, old), rtol=0, atol=0)


def test_an_update_that_is_read_afterwards_lies_in_the_input():
    notes = Notes()
    made = PlanMemory().run(graph(UPDATE, "y = exp(c)", WRITE, "return y"), notes)
    assert names(made) == {"c": "cache"}
    assert notes.applied[0].what == "index_put c in place of cache" and notes.applied[0].bytes_saved == 4 * 256
    check_run(made, values())


def test_it_writes_nothing_but_the_positions():
    made = planned(UPDATE, WRITE, "y = exp(c)", "return y")
    cache, new, at = values()
    before, version = cache.clone(), cache.data_ptr()
    compile_program(made)([cache, new, at])
    assert cache.data_ptr() == version
    torch.testing.assert_close(cache[:, [3]], new)
    rest = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(cache[:, rest], before[:, rest], rtol=0, atol=0)


def test_the_text_form_says_where_values_lie():
    made = planned(UPDATE, WRITE, "y = exp(c)", "return y")
    assert ": f32[2, 8, 4] into cache" in str(made)
    again = parse(str(made))
    assert str(again) == str(made) and not equal(again, made)
    assert "computed in place" in (equal(again, replace(made, inplace={}), exact=True) or "")


@pytest.mark.parametrize(
    "update",
    [
        "c = index_put(cache, new, at, dims=[1])",
        "c = index_put(cache, new, at, dims=[1], accumulate=true)",
        "c = slice_scatter(cache, new, dim=1, start=5, stop=6)",
        "i = expand(at, shape=[2, 1, 4])\n c = scatter(cache, i, new, dim=1)",
        "i = expand(at, shape=[2, 1, 4])\n c = scatter(cache, i, 0.5, dim=1)",
        'i = expand(at, shape=[2, 1, 4])\n c = scatter(cache, i, new, dim=1, reduce="sum")',
        "p = reshape(at, shape=[])\n c = cache_update(cache, new, p, dim=1)",
    ],
)
def test_every_kind_of_update(update):
    made = planned(update, "y = exp(c)", WRITE, "return y")
    assert names(made) == {"c": "cache"}
    check_run(made, values())


ROWS = "cache: f32[3, 2, 8, 4], x: f32[3, 2, 16], at: i64[3]"
VIEWS = ("e = neg(x)", "s = slice(e, dim=2, start=4, stop=12)", "r = reshape(s, shape=[3, 2, 2, 4])", "new = permute(r, dims=[0, 2, 1, 3])")


def fused(*lines: str, inputs: str = INPUTS) -> Graph:
    return PlanMemory().run(FuseRegions().run(parse(f"graph g({inputs}) stage canonical {{\n" + "\n".join(lines) + "\n}")))


@pytest.mark.parametrize("at", [[0, 3, 7], [6, 5, 6]], ids=str)
@pytest.mark.parametrize("read", ["neg(c)", "amax(c, dims=[2])"])
def test_entries_at_positions_of_their_own(at, read):
    """What is written may be a view of what a kernel made, and the update is in the same run of kernels."""
    made = fused(*VIEWS, "c = cache_update(cache, new, at, dim=2)", f"y = {read}", WRITE, "return y", inputs=ROWS)
    assert names(made) == {"c": "cache"}
    given = [torch.randn(3, 2, 8, 4), torch.randn(3, 2, 16), torch.tensor(at)]
    check_run(made, given)
    assert compile_program(made).source.count("run(calls") == 1


def test_a_cache_that_is_not_row_major_is_updated_in_a_copy():
    made = fused(*VIEWS, "c = cache_update(cache, new, at, dim=2)", "y = neg(c)", WRITE, "return y", inputs=ROWS)
    check_run(made, [torch.randn(3, 2, 4, 8).mT, torch.randn(3, 2, 16), torch.tensor([1, 2, 3])])


@pytest.mark.parametrize(
    ("new", "dim", "shape"),
    [("reshape(x, shape=[3, 2])", 1, "[3, 8]"), ("reshape(x, shape=[3, 2, 4, 1])", 3, "[3, 2, 4, 8]"), ("neg(x)", 1, "[3, 8]")],
)
def test_positions_of_entries_for_any_shape(new, dim, shape):
    inputs = f"cache: f32{shape}, x: f32[3, {8 if dim == 3 else 2}], at: i64[3]"
    made = fused(f"new = {new}", f"c = cache_update(cache, new, at, dim={dim})", "y = neg(c)", WRITE, "return y", inputs=inputs)
    assert names(made) == {"c": "cache"}
    check_run(made, [torch.randn(eval(shape)), torch.randn(3, 8 if dim == 3 else 2), torch.tensor([0, 7, 4])])


def test_updates_in_a_row():
    two = "d = slice_scatter(c, new, dim=1, start=0, stop=1)"
    made = planned(UPDATE, "y = exp(c)", two, "z = mul(d, y)", "write cache = d", "return y, z")
    assert names(made) == {"c": "cache", "d": "cache"}
    check_run(made, values())


def test_a_part_of_a_stacked_cache():
    """x[1, 0][:, at] = new: the outer updates only put the part back."""
    lines = (
        "layer = select(stack, dim=0, index=1)", "key = select(layer, dim=0, index=0)", "k = index_put(key, new, at, dims=[1])",
        "k1 = reshape(k, shape=[1, 2, 8, 4])", "l1 = slice_scatter(layer, k1, dim=0, start=0, stop=1)",
        "l2 = reshape(l1, shape=[1, 2, 2, 8, 4])", "c = slice_scatter(stack, l2, dim=0, start=1, stop=2)",
        "y = exp(k)", "z = exp(c)", "write stack = c", "return y, z",
    )  # fmt: skip
    made = planned(*lines, inputs="stack: f32[3, 2, 2, 8, 4], new: f32[2, 1, 4], at: i64[1]")
    assert names(made) == {"k": "stack", "l1": "stack", "c": "stack"}
    check_run(made, [torch.randn(3, 2, 2, 8, 4), *values()[1:]])


def test_another_part_than_the_one_that_is_put_back_is_a_copy():
    lines = ("key = select(stack, dim=0, index=0)", "k = index_put(key, new, at, dims=[1])", "k1 = reshape(k, shape=[1, 2, 8, 4])",
             "c = slice_scatter(stack, k1, dim=0, start=1, stop=2)", "y = exp(c)", "write stack = c", "return y")  # fmt: skip
    made = planned(*lines, inputs="stack: f32[3, 2, 8, 4], new: f32[2, 1, 4], at: i64[1]")
    assert names(made) == {"c": "stack"}
    check_run(made, [torch.randn(3, 2, 8, 4), *values()[1:]])


# -- refused


def test_the_old_value_is_read_later():
    assert refusals(UPDATE, "y = exp(c)", "old = mul(y, cache)", WRITE, "return old") == ["mul old: it reads the old value later"]


def test_a_view_of_the_old_value_is_read_later():
    lines = (UPDATE, "y = sum(c, dims=[1])", "v = select(cache, dim=1, index=0)", "z = add(y, v)", WRITE, "return z")
    (why,) = refusals(*lines)
    assert why.endswith("it reads the old value later")


def test_the_old_value_read_before_is_no_hazard():
    made = planned("old = exp(cache)", UPDATE, "y = mul(c, old)", WRITE, "return old, y")
    assert names(made) == {"c": "cache"}
    check_run(made, values())


def test_it_reads_what_it_overwrites():
    shifted = ("head = slice(cache, dim=1, start=0, stop=7)", "c = slice_scatter(cache, head, dim=1, start=1, stop=8)")
    assert refusals(*shifted, WRITE, "y = exp(c)", "return y") == ["slice_scatter c: it reads what it overwrites"]


def test_it_is_a_result_as_well():
    assert refusals(UPDATE, WRITE, "return c") == ["index_put c: it is a result as well"]
    assert refusals(UPDATE, "v = select(c, dim=0, index=0)", WRITE, "return v") == ["select v: it is a result as well"]


def test_the_input_itself_as_a_result_shows_the_new_value():
    made = planned(UPDATE, WRITE, "return cache")
    assert names(made) == {"c": "cache"}
    given = values()
    (result,) = compile_program(made)(given)
    assert result is given[0]


def test_it_starts_elsewhere():
    lines = ("c = index_put(o, new, at, dims=[1])", WRITE, "y = exp(c)", "return y")
    assert refusals("o = exp(cache)", *lines) == ["exp o: it does not start from cache"]
    turned = "o = permute(cache, dims=[1, 0, 2])"
    assert refusals(turned, *lines, inputs="cache: f32[4, 4, 4], new: f32[4, 1, 4], at: i64[1]") == [
        "permute o: it does not start from cache"
    ]


def test_the_old_value_is_written_to_another_input():
    inputs = f"{INPUTS}, other: f32[2, 8, 4]"
    (why,) = refusals(UPDATE, "y = exp(c)", WRITE, "write other = cache", "return y", inputs=inputs)
    assert why == "input cache: its old value is written to another input"


def test_the_new_value_is_written_to_another_input_too():
    made = planned(UPDATE, "y = exp(c)", WRITE, "write other = c", "return y", inputs=f"{INPUTS}, other: f32[2, 8, 4]")
    assert names(made) == {"c": "cache"}
    check_run(made, [*values(), torch.zeros(2, 8, 4)])


def test_strides_that_overlap():
    expanded = INPUTS.replace("cache: f32[2, 8, 4]", "cache: f32[2, 8, 4] strides [0, 4, 1]")
    assert refusals(UPDATE, "y = exp(c)", WRITE, "return y", inputs=expanded) == ["input cache: strides [0, 4, 1] overlap"]
    windows = INPUTS.replace("cache: f32[2, 8, 4]", "cache: f32[2, 8, 4] strides [32, 1, 1]")
    assert refusals(UPDATE, "y = exp(c)", WRITE, "return y", inputs=windows) == ["input cache: strides [32, 1, 1] overlap"]


def test_strides_that_do_not_overlap():
    turned = INPUTS.replace("cache: f32[2, 8, 4]", "cache: f32[2, 8, 4] strides [4, 8, 1]")
    made = planned(UPDATE, "y = exp(c)", WRITE, "return y", inputs=turned)
    assert names(made) == {"c": "cache"}
    given = values()
    given[0] = torch.randn(8, 2, 4).transpose(0, 1)
    check_run(made, given)


def test_the_verifier_finds_a_plan_that_reads_what_was_overwritten():
    made = graph(UPDATE, "y = exp(c)", "old = mul(y, cache)", WRITE, "return old")
    (target, value) = made.writes[0]
    with pytest.raises(VerificationError, match="cannot be computed in the memory of"):
        verify(replace(made, inplace={value: target}))


def test_an_output_that_becomes_a_copy_of_the_old_value_takes_the_plan_back():
    """x + 0 became x after the result was apart from the input: its copy is made after the update."""
    before = graph(UPDATE, "y = exp(c)", "same = add(cache, 0.0)", WRITE, "return y, same")
    after = planned(UPDATE, "y = exp(c)", WRITE, "return y, cache")
    assert after.inplace
    apart = kept_apart(before, after)
    assert not apart.inplace
    given = values()
    old = given[0].clone()
    torch.testing.assert_close(compile_program(apart)(given)[1], old, rtol=0, atol=0)


# -- memory that the caller shares between inputs


def test_an_input_given_twice_is_read_as_it_was():
    made = planned(UPDATE, "y = exp(c)", "z = add(y, other)", WRITE, "return z", inputs=f"{INPUTS}, other: f32[2, 8, 4]")
    cache, new, at = values()
    old = cache.clone()
    (z,) = compile_program(made)([cache, new, at, cache])
    want = old.clone()
    want[:, 3] = new[:, 0]
    torch.testing.assert_close(z, want.exp() + old)
    torch.testing.assert_close(cache, want, rtol=0, atol=0)


def test_overlapping_inputs_are_copied_and_others_are_not():
    own = OwnMemory()
    block = torch.arange(24.0)
    a, b, c = block[:8], block[8:16], block[4:12]
    for _ in range(2):
        assert own((a, b), (block[16:],))[0] is a
        assert own((a,), (c,))[0] is not a
        assert own((a, c), ())[0] is not a
    assert own((a,), (block[8:8], b))[0] is a
    assert own((a,), (b, b))[0] is a  # what is only read may be given twice
    columns = block.view(3, 8).t()
    assert own((columns[:2],), (columns[6:],))[0] is not columns  # ranges that interleave count as shared


def test_a_tensor_that_grows_over_another_at_the_same_address_is_noticed():
    own = OwnMemory()
    block = torch.arange(24.0)
    assert own((block[:8],), (block[8:],))[0].data_ptr() == block.data_ptr()
    assert own((block[:9],), (block[8:],))[0].data_ptr() != block.data_ptr()
    assert own((block[:16:2],), (block[8:],))[0].data_ptr() != block.data_ptr()


# -- from models


class Stacked(torch.nn.Module):
    """A cache of all layers in one buffer, updated by slices and by indices."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 2, 3, 8, 4))
        self.proj = torch.nn.Linear(4, 8)

    def forward(self, x, at):
        for layer in range(2):
            key, value = self.proj(x).chunk(2, -1)
            self.cache[layer, 0, :, at] = key
            self.cache[layer, 1].index_copy_(1, at, value)
            weights = torch.softmax(x @ self.cache[layer, 0].transpose(1, 2), -1)
            x = weights @ self.cache[layer, 1]
        return x


def test_a_model_with_a_stacked_cache():
    torch.manual_seed(0)
    eager, compiled = Stacked(), Stacked()
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, backend="tilewright", options={"verify": True})
    with torch.no_grad():
        for step in range(3):
            x, at = torch.randn(3, 1, 4), torch.tensor([step])
            torch.testing.assert_close(run(x, at), eager(x, at))
            torch.testing.assert_close(compiled.cache, eager.cache)
    assert sum("in place of" in a.what for a in receipts()[-1].applied) == 12


class Sliced(torch.nn.Module):
    """Positions are Python numbers, which become sizes of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 8, 4))
        self.register_buffer("values", torch.zeros(2, 8, 4))

    def forward(self, x, start: int):
        self.keys[:, start : start + x.shape[1]] = x.sin()
        self.values[:, start] = x[:, 0].cos()
        return torch.softmax(x @ self.keys.transpose(1, 2), -1) @ self.values


def test_a_model_with_positions_as_numbers():
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager, compiled = Sliced(), Sliced()
    run = torch.compile(compiled, backend="tilewright", options={"verify": True}, dynamic=True)
    with torch.no_grad():
        for start, count in ((0, 3), (3, 1), (4, 1), (5, 2)):
            x = torch.randn(2, count, 4)
            torch.testing.assert_close(run(x, start), eager(x, start))
            torch.testing.assert_close(compiled.keys, eager.keys)
            torch.testing.assert_close(compiled.values, eager.values)
    assert sum("in place of" in a.what for a in receipts()[-1].applied) == 2


def test_slices_stay_out_of_kernels_where_they_are_updates_in_place():
    made = parse(f"""graph g({INPUTS}) {{
      row = exp(new)
      c = slice_scatter(cache, row, dim=1, start=2, stop=3)
      y = exp(c)
      write cache = c
      return y
    }}""")
    compiled = compile_graph(made)
    assert list(names(compiled.graph)) == ["c"]
    given = values()
    old = given[0].clone()
    compiled.program.run(list(given))
    old[:, 2] = given[1][:, 0].exp()
    torch.testing.assert_close(given[0], old)
