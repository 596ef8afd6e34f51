"""Texts are those of the whole model run again for every token, and of transformers' own generate; what is not done is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from steppers import Attends, KeptTokens, Rerun, greedy
from support import NATIVE
from tilewright.driver.errors import BadOption
from tilewright.driver.generate import Generator, Statistics
from tilewright.driver.prefixes import PrefixStore
from tilewright.driver.sampling import NoDistribution
from tilewright.driver.speculation import PromptLookup
from tilewright.passes.reuse_kv import CannotDerive

VOCAB = 50


@pytest.fixture(scope="module")
def model() -> Attends:
    return Attends(VOCAB)


def prompts_of(seed: int, count: int, longest: int = 20) -> list[list[int]]:
    numbers = random.Random(seed)
    return [numbers.choices(range(VOCAB), k=numbers.randint(1, longest)) for _ in range(count)]


def new_tokens(generator: Generator, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in prompts]
    for step in generator.steps(prompts, **options):
        for row, tokens in zip(made, step):
            row.extend(tokens)
    return made


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("stepper", [lambda m: m, lambda m: Rerun(m, m.max_length, m.vocab)], ids=["keys and values", "rerun"])
def test_rows_of_any_lengths_are_each_the_models_own(model: Attends, chunk: int, stepper: Callable[[Attends], Any]) -> None:
    generator = Generator(stepper(model), chunk=chunk, speculation=PromptLookup(4, 2))
    for seed in range(4):
        prompts = prompts_of(seed, 4)
        assert new_tokens(generator, prompts, max_new_tokens=15) == [greedy(model, p, 15) for p in prompts]


def test_rows_are_filled_up_with_tokens_that_they_hold(model: Attends) -> None:
    """Another token might be one of which the model makes numbers that are not finite."""
    fed: list[torch.Tensor] = []

    class Watched(Rerun):
        def step(self, tokens: torch.Tensor, position: torch.Tensor, state: KeptTokens) -> torch.Tensor:
            fed.append(tokens)
            return super().step(tokens, position, state)

    prompts = [[1, 2, 3, 4, 5, 1, 2], [6], [7, 8]]
    generator = Generator(Watched(model, model.max_length, VOCAB), chunk=4, speculation=PromptLookup(4, 2))
    made = new_tokens(generator, prompts, max_new_tokens=6)
    for row, text in enumerate(map(list.__add__, prompts, made)):
        assert {int(t) for tokens in fed for t in tokens[row]} <= set(text)


@pytest.mark.parametrize("speculation", [None, PromptLookup(6, 1)])
def test_a_text_may_reach_the_last_place(model: Attends, speculation: PromptLookup | None) -> None:
    """Where rows are near the end, wide steps begin earlier; the stepper of the test refuses those that reach beyond."""
    stepper = Rerun(model, model.max_length, VOCAB)
    generator = Generator(stepper, chunk=50, speculation=speculation)
    prompts = [prompts_of(0, 1)[0][:3], [1, 2] * 22]
    assert new_tokens(generator, prompts, max_new_tokens=21) == [greedy(model, p, 21) for p in prompts]
    whole = [[3] * 64]
    assert new_tokens(generator, whole, max_new_tokens=1) == [greedy(model, whole[0], 1)], "the token after the last place"


def test_a_row_ends_at_a_stop_token_and_the_others_go_on(model: Attends) -> None:
    prompts = prompts_of(5, 3)
    plain = [greedy(model, p, 12) for p in prompts]
    stop = (plain[0][2], plain[1][7])
    expected = [greedy(model, p, 12, stop) for p in prompts]
    generator = Generator(model)
    assert new_tokens(generator, prompts, max_new_tokens=12, eos_token_id=list(stop)) == expected
    text = generator.generate(prompts, max_new_tokens=12, eos_token_id=list(stop), pad_token_id=49)
    width = max(map(len, prompts))
    for row, prompt, made in zip(text.tolist(), prompts, expected):
        assert row == [49] * (width - len(prompt)) + prompt + made + [49] * (len(row) - width - len(made))


def test_tokens_come_as_they_are_made(model: Attends) -> None:
    stepper = Rerun(model, 64, VOCAB)
    tokens = Generator(stepper).stream([1, 2, 3], max_new_tokens=5)
    expected = greedy(model, [1, 2, 3], 5)
    for count, token in enumerate(tokens, 1):
        assert token == expected[count - 1] and len(stepper.widths) == count
    assert count == 5


def test_prompts_are_tensors_or_lists(model: Attends) -> None:
    generator, expected = Generator(model), [1, 2, 3, *greedy(model, [1, 2, 3], 4)]
    for prompt in (
        [1, 2, 3],
        [[1, 2, 3]],
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        (1, 2, 3),
        np.arange(1, 4),
    ):
        assert generator.generate(prompt, max_new_tokens=4).tolist() == [expected]
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert generator.generate(torch.tensor([[9, 9, 1, 2, 3]]), mask, max_new_tokens=4)[0, 2:].tolist() == expected
    assert generator.generate(torch.tensor([[9, 9, 1, 2, 3]]), pad_token_id=9, max_new_tokens=4)[0, 2:].tolist() == expected


def test_what_a_row_draws_depends_on_its_seed_and_text_alone(model: Attends) -> None:
    prompts, options = prompts_of(1, 3), {"max_new_tokens": 10, "do_sample": True}
    together = new_tokens(Generator(model), prompts, seed=11, **options)
    generator = Generator(model, chunk=4, prefixes=PrefixStore(1e9), speculation=PromptLookup(4, 1))
    assert new_tokens(generator, prompts, seed=11, **options) == together
    assert [new_tokens(generator, [p], seed=11 + i, **options)[0] for i, p in enumerate(prompts)] == together
    assert new_tokens(generator, prompts, seed=12, **options) != together
    torch.manual_seed(3)
    drawn = new_tokens(generator, prompts, **options)
    assert new_tokens(generator, prompts, **options) != drawn
    torch.manual_seed(3)
    assert new_tokens(generator, prompts, **options) == drawn


def test_what_was_done_is_counted(model: Attends) -> None:
    generator = Generator(model, prefixes=PrefixStore(1e9))
    for _ in range(2):
        new_tokens(generator, [[1, 2, 3, 4], [5, 6]], max_new_tokens=6)
    assert (generator.last.reused, generator.last.computed, generator.last.generated, generator.last.steps) == (4, 2, 12, 5)
    total = generator.statistics
    assert (total.reused, total.computed, total.generated, total.drafted) == (4, 8, 24, 0)
    assert total.tokens_per_second > 0 and total.prompt_seconds > 0 and total.step_seconds > 0
    assert str(total).startswith("prompts: 4 tokens reused, 8 computed in ") and "24 tokens in 10 steps" in str(total)
    assert Statistics().tokens_per_second == 0


class Broken(Rerun):
    def __init__(self, after: int) -> None:
        super().__init__(lambda tokens: torch.full((*tokens.shape, VOCAB), float("nan" if tokens.shape[1] > after else "0")), 64, VOCAB)


def test_logits_that_are_no_numbers_are_named_and_what_was_right_is_kept() -> None:
    generator = Generator(Broken(after=5), prefixes=PrefixStore(1e9))
    with pytest.raises(NoDistribution, match="after 6 tokens"):
        generator.generate([[1, 2, 3]], do_sample=True, max_new_tokens=9)
    assert generator.statistics.generated == 3


def llama(**changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=48, bos_token_id=1, eos_token_id=None, initializer_range=0.4)
    made = transformers.LlamaForCausalLM(config).eval()
    for name, value in changes.items():
        setattr(made.generation_config, name, value)
    return made


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, initializer_range=0.4)
    return transformers.GPT2LMHeadModel(config).eval()


def rerun(model: Any) -> Any:
    """A stepper with the options that the model brings."""
    stepper = Rerun(lambda tokens: model(tokens, use_cache=False).logits.detach(), 64, VOCAB)
    stepper.generation_config = model.generation_config  # type: ignore[attr-defined]
    return stepper


def padded(prompts: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 16},
        {"max_new_tokens": 16, "eos_token_id": list(range(7)), "pad_token_id": 3},
        {"max_new_tokens": 16, "eos_token_id": torch.arange(6), "num_return_sequences": 2},
        {"max_new_tokens": 12, "repetition_penalty": 1.3, "use_cache": True, "num_beams": 1},
        {"max_length": 30},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_greedy_texts_are_those_of_transformers(make: Callable[[], Any], options: dict[str, Any]) -> None:
    model = make()
    ids, mask = padded(prompts_of(2, 4))
    # what they are without: num_return_sequences is for sampling there
    theirs = model.generate(ids, attention_mask=mask, do_sample=False, **{k: v for k, v in options.items() if k != "num_return_sequences"})
    ours = Generator(rerun(model)).generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours, theirs.repeat_interleave(options.get("num_return_sequences", 1), 0))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "top_k": 0, "top_p": 0.9}, {"top_k": 6, "min_p": 0.1, "repetition_penalty": 1.5}], ids=str
)
def test_drawn_texts_are_distributed_as_those_of_transformers(options: dict[str, Any]) -> None:
    """Two tokens, drawn so many times by both: how often each pair comes, by the chi-square test of two samples."""
    model, count = llama(temperature=0.7, top_k=4), 2000
    ids = torch.tensor([[1, 7, 3]])
    options = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": count, **options}
    torch.manual_seed(0)
    drawn = [g.generate(ids, **options)[:, 3:] for g in (model, Generator(rerun(model)))]
    theirs, ours = ((d[:, 0] * VOCAB + d[:, 1]).bincount(minlength=VOCAB**2).double() for d in drawn)
    together = ours + theirs
    often = together >= 10
    chi_square = float(((ours - theirs)[often] ** 2 / together[often]).sum())
    freedom = int(often.sum()) - 1
    assert freedom >= 5 and chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 8, (chi_square, freedom)


def test_the_models_own_options_count_where_the_user_says_nothing() -> None:
    model = llama(do_sample=True, temperature=0.01, eos_token_id=None, max_new_tokens=5)
    generator = Generator(rerun(model))
    ids = torch.tensor([[1, 7, 3]])
    assert torch.equal(generator.generate(ids), model.generate(ids, do_sample=False)), "so cold that drawing is greedy"
    assert generator.generate(ids, max_new_tokens=2).shape == (1, 5) and generator.generate(ids, max_length=7).shape == (1, 7)
    several = {tuple(generator.generate(ids, temperature=3.0)[0].tolist()) for _ in range(5)}
    assert len(several) > 1


def test_a_streamer_of_transformers_hears_the_prompt_and_each_token(model: Attends) -> None:
    class Heard:
        def __init__(self) -> None:
            self.values: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.tolist())

        def end(self) -> None:
            self.values.append("end")

    heard = Heard()
    expected = greedy(model, [1, 2, 3], 6)
    Generator(model, speculation=PromptLookup(3, 1)).generate([[1, 2, 3]], max_new_tokens=6, streamer=heard)
    assert heard.values == [[[1, 2, 3]], *([t] for t in expected), "end"]
    with pytest.raises(BadOption, match="streamer: it takes one text, not 2"):
        Generator(model).generate([[1], [2]], streamer=heard)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"num_beams": 4}, "num_beams: 4 is not done here; what can be said is max_new_tokens"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"temprature": 0.7}, "temprature: 0.7 is not done here"),
        ({"stopping_criteria": [print]}, "stopping_criteria"),
        ({"max_length": 2}, "max_length: there is no room for a new token after a prompt of 3: texts have at most 2"),
        ({"max_new_tokens": 63}, "3 tokens of a prompt and 63 new ones are more than the 64 it was made for"),
        ({"top_p": 2.0}, "top_p: it is a probability"),
        ({"prompt_lookup_num_tokens": -3}, "drafts"),
    ],
)
def test_what_is_not_done_is_refused_in_a_sentence(model: Attends, options: dict[str, Any], said: str) -> None:
    for ask in (Generator(model).generate, Generator(model).stream, Generator(model).steps):
        with pytest.raises(BadOption, match=said) as caught:
            ask([1, 2, 3], **options)
        assert "\n" not in str(caught.value)


def test_what_a_model_asks_for_is_refused_too_unless_the_user_says_otherwise() -> None:
    model = llama(num_beams=3)
    ids = torch.tensor([[1, 7, 3]])
    with pytest.raises(BadOption, match="generation_config.num_beams: 3"):
        Generator(rerun(model)).generate(ids)
    assert Generator(rerun(model)).generate(ids, num_beams=1).shape == (1, 23)


@pytest.mark.parametrize(
    "prompts, said",
    [
        ([[1], []], "without tokens"),
        ([], "without tokens"),
        ([[1, VOCAB]], f"there is no token {VOCAB}; the model knows 0 to 49"),
        ([[-1]], "there is no token -1"),
        (torch.zeros(1, 3), "not torch.float32"),
        (torch.zeros(1, 3, 2, dtype=torch.int64), r"shape \[1, 3, 2\]"),
        (torch.zeros(2, 0, dtype=torch.int64), "without tokens"),
    ],
)
def test_what_are_no_prompts_is_refused(model: Attends, prompts: Any, said: str) -> None:
    with pytest.raises(BadOption, match=said):
        Generator(model).generate(prompts)


def test_one_text_is_streamed(model: Attends) -> None:
    with pytest.raises(BadOption, match="one text is streamed, not 2"):
        Generator(model).stream([[1], [2]])


def test_a_prompt_is_read_in_chunks(model: Attends) -> None:
    stepper = Rerun(model, 64, VOCAB)
    new_tokens(Generator(stepper, chunk=8), [[1] * 20, [2] * 3], max_new_tokens=3)
    assert stepper.widths == [8, 8, 4, 1, 1]
    assert isinstance(stepper.state(2), KeptTokens)


@NATIVE
def test_a_compiled_model_writes_what_transformers_writes() -> None:
    """A causal language model as it is, with all that is there: prompts of any lengths, drafts, and what is kept of texts."""
    model, store = llama(), PrefixStore(1e7)
    generator = Generator(model, max_length=64, chunk=16, prefixes=store, speculation=PromptLookup(3, 1))
    for seed in (0, 1):
        ids, mask = padded(prompts_of(seed, 2))
        options = {"max_new_tokens": 64 - ids.shape[1], "repetition_penalty": 1.2 if seed else 1.0}
        expected = model.generate(ids, attention_mask=mask, do_sample=False, **options)
        for _ in range(2):
            assert torch.equal(generator.generate(ids, mask, **options), expected)
        assert (generator.last.reused, generator.last.computed) == (int(mask.sum()) - 2, 2)
    assert generator.statistics.drafted > 0
    again = Generator(llama(), max_length=64, prefixes=store)
    again.generate(ids, mask, max_new_tokens=1)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    changed = Generator(model, max_length=64, prefixes=store)
    changed.generate(ids, mask, max_new_tokens=1)
    assert again.last.reused == int(mask.sum()) - 2 and changed.last.reused == 0, "the same weights elsewhere are the same model"


class Mixing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(5, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        return x + x.mean(1, keepdim=True)


def test_of_a_module_it_is_asked_how_long_a_text_may_be_and_that_tokens_do_not_mix() -> None:
    with pytest.raises(BadOption, match="max_length: say how many tokens"):
        Generator(Mixing())
    with pytest.raises(CannotDerive, match="mean"):
        Generator(Mixing(), max_length=6)
    translating = Mixing()
    translating.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    with pytest.raises(BadOption, match="model: Mixing has an encoder"):
        Generator(translating, max_length=6)
    with pytest.raises(BadOption, match="chunk"):
        Generator(Mixing(), max_length=6, chunk=0)
