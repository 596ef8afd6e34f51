"""Every decoder of the zoo, step by step: the derived steps compute what the whole model computes, at every position."""

from __future__ import annotations

import functools

import pytest
import torch
from tilewright.driver.stepping import Stepper, stepper
from tilewright.ir.interpret import interpret
from tilewright.ir.verify import verify
from tilewright.passes.reuse_kv import CannotDerive, Derived, ReuseKV
from zoo import VOCAB, ZOO

DECODERS = ("gpt2", "gpt-neox", "opt", "bloom", "falcon", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "starcoder2",
            "mixtral", "qwen2-moe")  # fmt: skip
WITH_ENCODER = ("t5", "bart", "whisper")
LENGTH, BATCH = 12, 3
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "starcoder2", "mixtral", "qwen2-moe")
HEADS_KEPT = {**dict.fromkeys(DECODERS, 4), **dict.fromkeys(GROUPED, 2), "falcon": 1}


def tokens(batch: int = BATCH) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


@functools.cache
def steps_of(name: str) -> Stepper:
    return stepper(ZOO[name]()[0], tokens(1))


def zeros(made: Derived) -> list[torch.Tensor]:
    return [torch.zeros([d if isinstance(d, int) else BATCH for d in k.node.shape], dtype=torch.float64) for k in made.kept]


@pytest.mark.parametrize("name", DECODERS)
def test_every_position_of_every_row(name):
    """In float64, with steps of one token, rows apart from each other; of five, whose last is cut off; and of the whole text."""
    whole, text = steps_of(name).graph, tokens()
    (expected,) = interpret(whole, [text], torch.float64)
    for size, starts in ((1, (0, 2, 1)), (5, (0, 0, 0)), (LENGTH, (0, 0, 0))):
        made = ReuseKV(size).derive(whole)
        verify(made.step)
        assert {k.node.shape[1] for k in made.kept} == {HEADS_KEPT[name]}
        state, rows = zeros(made), torch.arange(BATCH)[:, None]
        fed = torch.nn.functional.pad(text, (0, size))
        for step in range(-(-LENGTH // size) + max(starts)):
            at = torch.tensor([min(max(step - start, 0) * size, (LENGTH - 1) // size * size) for start in starts])
            (y,) = interpret(made.step, [fed[rows, at[:, None] + torch.arange(size)], at, *state], torch.float64)
            for row, start in enumerate(at.tolist()):
                torch.testing.assert_close(y[row, : LENGTH - start], expected[row, start : start + size], rtol=0, atol=1e-13)


def within(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> bool:
    """No further from float64 than twice eager, up to a few units in the last place."""
    return float((ours - exact).abs().max()) <= 2 * float((eager - exact).abs().max()) + 4e-7 * float(exact.abs().max())


def check_compiled(steps: Stepper, eager: torch.Tensor, exact: torch.Tensor, inputs: tuple[torch.Tensor, ...] = ()) -> None:
    text = tokens()
    for sizes in ((1,) * LENGTH, (7, 5), (LENGTH,)):
        state, at = steps.state(BATCH, *inputs), 0
        for size in sizes:
            logits = steps.step(text[:, at : at + size], torch.full((BATCH,), at), state)
            assert within(logits, eager[:, at : at + size], exact[:, at : at + size])
            at += size


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bloom", "mixtral"])
def test_compiled(name):
    model, _ = ZOO[name]()
    steps = steps_of(name)
    with torch.no_grad():
        eager = model(tokens(), use_cache=False).logits
    (exact,) = interpret(steps.graph, [tokens()], torch.float64)
    check_compiled(steps, eager, exact)


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_what_the_encoder_says_is_kept(name):
    model, _ = ZOO[name]()
    mask = torch.ones(BATCH, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    inputs = {"input_ids": torch.randint(1, VOCAB, (BATCH, 9)), "attention_mask": mask}
    if name == "whisper":
        inputs = {"input_features": torch.randn(BATCH, 16, 64)}
    steps = stepper(model, tokens(1), inputs=inputs)
    with torch.no_grad():
        eager = model(**inputs, decoder_input_ids=tokens(), use_cache=False).logits
    (exact,) = interpret(steps.graph, [tokens(), *inputs.values()], torch.float64)
    check_compiled(steps, eager, exact, tuple(inputs.values()))


@pytest.mark.parametrize(("name", "what"), [("bert", "attention"), ("mamba", "conv|cumsum|scan|attention|reads")])
def test_refused(name, what):
    """What reads both ways, and what has state of another kind, is refused by name and source line."""
    model, _ = ZOO[name]()
    with pytest.raises(CannotDerive, match=what) as error:
        stepper(model, tokens(2))
    assert ".py:" in str(error.value)
