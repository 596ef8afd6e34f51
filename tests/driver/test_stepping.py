"""Steps of a small model by the programs that are made of them: in place, for any batch, with weights and state in formats."""

from __future__ import annotations

import re

import pytest
import torch
from tilewright.driver.errors import BadInputs
from tilewright.driver.stepping import OutOfPlace, Stepper, size_class, stepper
from tilewright.ir.graph import order
from torch import nn
from torch.nn import functional as F

LENGTH, VOCAB, WIDTH = 24, 50, 64


class Tiny(nn.Module):
    """Learned positions, two layers of attention with four heads."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x)


class Spoiled(Tiny):
    """Attention by an op and attention written out; tokens 0 and 1 are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens.weight.data[:2] = float("nan")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        later = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        for i, layer in enumerate(self.layers):
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            if i:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = (torch.tanh(q @ k.mT * 0.2) + later).softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x)


MODEL = Tiny().eval().requires_grad_(False)
TEXT = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def steps() -> Stepper:
    return stepper(MODEL, TEXT)


def test_what_it_says_of_itself(steps):
    assert (steps.max_length, steps.vocab) == (LENGTH, VOCAB)
    state = steps.state(5)
    assert [t.shape for t in state.tensors] == [(5, 4, LENGTH, 16)] * 4 and state.dims == (2,) * 4


def test_steps_of_any_size_write_in_place(steps):
    expected, state, at = MODEL(TEXT), steps.state(3), 0
    places = [t.data_ptr() for t in state.tensors]
    for size in (5, 1, 1, 3, 14):
        logits = steps.step(TEXT[:, at : at + size], torch.full((3,), at), state)
        torch.testing.assert_close(logits, expected[:, at : at + size], rtol=1e-4, atol=1e-5)
        at += size
    assert [t.data_ptr() for t in state.tensors] == places
    program = steps.program(3, 1).program
    assert not program.fallbacks and not program.library
    assert program.source.split("def call")[1].count("run(calls") == 1, "a step is one call of kernels"


def test_rows_stand_where_they_stand(steps):
    expected, state = MODEL(TEXT), steps.state(3)
    steps.step(TEXT[:, :4], torch.zeros(3, dtype=torch.int64), state)
    at = torch.tensor([4, 2, 0])
    logits = steps.step(TEXT[torch.arange(3)[:, None], at[:, None] + torch.arange(2)], at, state)
    for row, position in enumerate(at.tolist()):
        torch.testing.assert_close(logits[row], expected[row, position : position + 2], rtol=1e-4, atol=1e-5)


def test_weights_are_in_memory_once(steps):
    for size in (1, 2):
        steps.program(3, size)
    tensors = [{v.data_ptr() for v in p.program._prepare.__globals__.values() if isinstance(v, torch.Tensor) and v.numel() > 4000}
               for p in (steps.program(3, 1), steps.program(3, 2))]  # fmt: skip
    assert tensors[0] and len(tensors[0] & tensors[1]) >= 2


@pytest.mark.parametrize(("kv", "most"), [("bf16", 2e-2), ("int8", 2e-2), ("int4", 0.3)])
def test_formats_of_state(kv, most):
    made = stepper(MODEL, TEXT, kv=kv)
    expected, state = MODEL(TEXT), made.state(3)
    for at in range(0, 8, 2):
        logits = made.step(TEXT[:, at : at + 2], torch.full((3,), at), state)
        error = (logits - expected[:, at : at + 2]).abs().max() / expected.abs().max()
        assert float(error) < most
    assert not made.program(3, 2).program.fallbacks


def test_formats_of_weights():
    made = stepper(MODEL, TEXT, plan="int8")
    logits = made.step(TEXT, torch.zeros(3, dtype=torch.int64), made.state(3))
    expected = MODEL(TEXT)
    error = float((logits - expected).abs().max() / expected.abs().max())
    assert 1e-4 < error < 5e-2
    assert any("int8" in a.what for a in made.notes.applied)


def test_out_of_place(steps):
    state = steps.state(1)
    for tokens, position in ((TEXT[:1, :2], LENGTH - 1), (TEXT[:1, :1], -1), (TEXT[:1, :0], 0)):
        with pytest.raises(OutOfPlace, match=f"at most {LENGTH}"):
            steps.step(tokens, torch.tensor([position]), state)


def test_what_is_not_finite_stays_with_its_text():
    """A text with such tokens leaves nothing to the next one in the same state, and what fills a step up to its size is finite."""
    model = Spoiled().eval().requires_grad_(False)
    steps, text, start = stepper(model, TEXT), TEXT.clamp(min=2), torch.zeros(3, dtype=torch.int64)
    expected, state = model(text), steps.state(3)
    assert bool(expected.isfinite().all())
    for _ in range(2):
        for at, count in ((0, 3), (3, 1), (4, 3)):
            logits = steps.step(text[:, at : at + count], start + at, state)
            torch.testing.assert_close(logits, expected[:, at : at + count], rtol=1e-4, atol=1e-5)
        assert steps.step(torch.ones(3, 3, dtype=torch.int64), start + 7, state).isnan().all()


@pytest.mark.parametrize("kv", ["same", "int8"])
def test_what_lies_behind_a_position_is_not_read(kv):
    """So the time of a step does not depend on how long texts may be."""
    long = Tiny(256).eval().requires_grad_(False)
    steps, text = stepper(long, TEXT[:, :1].expand(3, 256), kv=kv), TEXT[:, :6]
    clean, nonsense = steps.state(3), steps.state(3)
    for tensor in nonsense.tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 127)
    for at, count in ((0, 4), (4, 1), (5, 1)):
        logits = [steps.step(text[:, at : at + count], torch.full((3,), at), state) for state in (clean, nonsense)]
        assert torch.equal(*logits) and bool(logits[0].isfinite().all())


def test_asked_wrongly():
    with pytest.raises(BadInputs, match="example tokens"):
        stepper(MODEL)


def test_sizes():
    assert [size_class(n, 28) for n in (1, 2, 3, 5, 9, 16, 17, 24, 25)] == [1, 2, 4, 8, 16, 16, 24, 24, 28]
    assert [size_class(n, 999) for n in (33, 102, 129, 250, 256, 257)] == [40, 104, 144, 256, 256, 288]
    assert all(n <= size_class(n, 10**9) <= max(n * 9 / 8, n + 7) for n in range(1, 3000))
    assert len({size_class(n, 999) for n in range(1, 257)}) == 27


def test_logits_of_last_tokens(steps):
    """Those of a step, of one token of each row; the state takes all tokens."""
    position, at = torch.tensor([0, 3, 1]), torch.tensor([4, 0, 2])
    for count in (5, 1):
        ours, theirs = (steps.state(3) for _ in range(2))
        at = at.clamp(max=count - 1)
        expected = steps.step(TEXT[:, :count], position, theirs)
        logits = steps.last(TEXT[:, :count], position, at, ours)
        torch.testing.assert_close(logits, expected[torch.arange(3), at], rtol=1e-5, atol=1e-6)
        for mine, its in zip(ours.tensors, theirs.tensors):
            assert torch.equal(mine, its)


ONE = torch.zeros(1, dtype=torch.int64)
WRONG = {
    "float tokens": (torch.zeros(2, 1), ONE.expand(2), "argument 'tokens' must be int64[2, n], as the state has 2 rows, not float32[2, 1]"),
    "tokens of one row": (ONE[None], ONE.expand(2), "argument 'tokens' must be int64[2, n], as the state has 2 rows, not int64[1, 1]"),
    "tokens without a batch": (
        ONE.expand(2),
        ONE.expand(2),
        "argument 'tokens' must be int64[2, n], as the state has 2 rows, not int64[2]",
    ),
    "a number": (ONE.expand(2, 1), 0, "argument 'position' must be a tensor int64[2], not int"),
    "a position for all": (ONE.expand(2, 1), ONE, "argument 'position' must be int64[2], as the state has 2 rows, not int64[1]"),
    "narrow positions": (
        ONE.expand(2, 1),
        ONE.expand(2).int(),
        "argument 'position' must be int64[2], as the state has 2 rows, not int32[2]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_steps_do_not_take(steps, case):
    """A program would read past the end of it, or take its bits for integers."""
    tokens, position, message = WRONG[case]
    for run in (steps.step, lambda *given: steps.last(*given[:2], ONE.expand(2), given[2])):
        with pytest.raises(TypeError, match=re.escape(message)):
            run(tokens, position, steps.state(2))


def test_the_formats_that_a_budget_chose_are_those_of_the_steps():
    import tilewright

    budget = tilewright.Budget(max_error=0.5, memory="80%", latency="1s", formats=("int8",), calibration=[(TEXT,)])
    small = tilewright.optimize(MODEL, (TEXT,), tuning_seconds=0, budget=budget)
    steps = stepper(MODEL, TEXT, plan=small.plan)
    assert small.plan.entries and not [d for d in steps.notes.declined if d.rule == "quantize" and "no such" in d.value]
    logits = steps.step(TEXT, torch.zeros(3, dtype=torch.int64), steps.state(3))
    torch.testing.assert_close(logits, small(TEXT), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="1 weights of the plan are none of tiny's .*: other.weight"):
        stepper(MODEL, TEXT, plan="other.weight:int8 head.weight:int8")


def test_inputs_of_steps_are_not_rounded():
    """Matrix units want many rows; a step has one."""
    rounded, plain = (stepper(MODEL, TEXT, plan=plan) for plan in ("int8-bf16", "int8"))
    assert not [n for n in order(rounded.graph) if n.op.name == "cast" and n.dtype == torch.bfloat16]
    first, second = (s.step(TEXT, torch.zeros(3, dtype=torch.int64), s.state(3)) for s in (rounded, plain))
    assert torch.equal(first, second)
