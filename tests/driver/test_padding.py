"""Leaving padding out, through both doors: equal at tokens, and every call that computes padding is counted with its reason."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tilewright
import torch
from offline import run, save_program
from support import NATIVE, in_threads
from tilewright.driver import measure, packing
from tilewright.driver.accuracy import check
from tilewright.driver.backend import checked_options
from tilewright.driver.errors import BadArtifact, BadOption
from tilewright.driver.inputs import Example
from tilewright.driver.padding import Way, layout_of
from tilewright.driver.verify import verify
from tilewright.ir.graph import constants
from torch import nn

transformers = pytest.importorskip("transformers")
pytestmark = NATIVE

B, S = 4, 24
DYNAMIC = {"ids": {0: "b", 1: "s"}, "mask": {0: "b", 1: "s"}}
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DISTIL = {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}

ENCODERS = {
    "bert": lambda t: t.BertModel(t.BertConfig(**SMALL), add_pooling_layer=False),
    "distilbert": lambda t: t.DistilBertModel(t.DistilBertConfig(**DISTIL)),
    "roberta": lambda t: t.RobertaModel(t.RobertaConfig(**SMALL), add_pooling_layer=False),
    "llama": lambda t: t.LlamaModel(t.LlamaConfig(**SMALL, use_cache=False)),
}


class Encoder(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ENCODERS[name](transformers)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


class Sentences(Encoder):
    """Unit vectors of sentences, as examples/sentence_encoder.py makes them."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(ids, mask)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


class First(Encoder):
    """The first token of each sentence."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, mask)[:, 0].tanh()


class Layers(nn.Module):
    """torch's own layers; here True stands for padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.layers(x, src_key_padding_mask=padding)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(packing, "MEASURE_SECONDS", 0.01)


def mask_of(lengths, left=False, length=S) -> torch.Tensor:
    at, count = torch.arange(length).expand(len(lengths), length), torch.tensor(lengths)[:, None]
    return (at >= length - count if left else at < count).long()


def ids_like(mask: torch.Tensor) -> torch.Tensor:
    return torch.randint(3, 97, mask.shape, generator=torch.Generator().manual_seed(1))


def optimized(model: nn.Module, mask: torch.Tensor | None = None, dynamic=DYNAMIC, seconds: float = 0):
    mask = mask_of([24, 5, 9, 1]) if mask is None else mask
    args = (ids_like(mask), mask)
    made = tilewright.optimize(model, args, dynamic=dynamic, tuning_seconds=seconds, remove_padding=True)
    assert made.unpadded is not None, made.receipt.refused
    return made


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    model = Encoder(request.param).eval()
    return model, optimized(model)


LENGTHS = {"mixed": [24, 5, 9, 1], "one token each": [1, 1, 1, 1], "an empty row": [24, 0, 3, 7], "equal": [6] * 4, "two rows": [24, 2]}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_tokens_keep_their_values(encoder, lengths, left):
    model, made = encoder
    mask = mask_of(LENGTHS[lengths], left)
    ids, present = ids_like(mask), mask.bool()
    before = made.unpadded.counts[Way.PACKED]
    with torch.no_grad():
        ours, eager = made(ids, mask), model(ids, mask)
        exact = copy.deepcopy(model).double()(ids, mask)
    assert made.unpadded.counts[Way.PACKED] == before + 1
    assert ours.shape == eager.shape and not ours[~present].any()
    assert check(ours[present], eager[present], exact[present]).ok


def holes(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[0, 3] = 0
    return mask


PADDED = {
    Way.LITTLE: mask_of([24, 24, 24, 23]),
    Way.HOLES: holes(mask_of([24, 5, 9, 1])),
    Way.VALUES: 2 * mask_of([24, 5, 9, 1]),
    Way.EMPTY: mask_of([0, 0, 0, 0]),
}


@pytest.mark.parametrize("way", PADDED)
def test_calls_with_padding_are_counted(encoder, way):
    model, made = encoder
    mask = PADDED[way]
    ids, before = ids_like(mask), made.unpadded.counts[way]
    with torch.no_grad():
        assert check(made(ids, mask), made.program.run([ids, mask])[0], made.program.run([ids, mask])[0]).ok
    assert made.unpadded.counts[way] == before + 1
    assert way.value in made.unpadded.statistic()


def test_sentences():
    model = Sentences("bert").eval()
    made = optimized(model)
    for lengths in LENGTHS.values():
        mask = mask_of(lengths)
        ids = ids_like(mask)
        with torch.no_grad():
            ours, eager, exact = made(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
        has = mask.any(1)
        assert check(ours[has], eager[has], exact[has]).ok and not ours[~has].any()
    assert made.unpadded.statistic() == {Way.PACKED.value: len(LENGTHS)}


class Flat(Encoder):
    """Scores of all tokens of all sentences, one after the other."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, mask).flatten(0, 1).relu()


class Turned(Encoder):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, mask).transpose(0, 1)


@pytest.mark.parametrize("kind", [Flat, Turned])
def test_results_of_other_shapes_are_checked(kind):
    model, mask = kind("bert").eval(), mask_of([24, 5, 9, 1])
    made = tilewright.optimize(model, (ids_like(mask), mask), tuning_seconds=0, remove_padding=True)
    assert made.unpadded is not None, made.receipt.refused
    with torch.no_grad():
        ours, eager = made(ids_like(mask), mask), model(ids_like(mask), mask)
    present = (mask if kind is Flat else mask.t()).reshape(-1).bool()
    assert ours.stride() == eager.stride()
    torch.testing.assert_close(ours.reshape(-1, 32)[present], eager.reshape(-1, 32)[present], rtol=1e-4, atol=1e-5)
    assert not ours.reshape(-1, 32)[~present].any()


def test_a_token_that_is_read_by_itself():
    model = First("bert").eval()
    made = optimized(model)
    for mask in (mask_of([24, 5, 9, 1]), mask_of([24, 5, 9, 1], left=True)):
        with torch.no_grad():
            torch.testing.assert_close(made(ids_like(mask), mask), model(ids_like(mask), mask), rtol=1e-4, atol=1e-5)
    assert made.unpadded.statistic() == {Way.PACKED.value: 1, Way.READ.value: 1}


def test_true_stands_for_padding():
    torch.manual_seed(0)
    model, mask = Layers().eval(), mask_of([24, 5, 9, 1]).bool()
    x = torch.randn(B, S, 32)
    made = tilewright.optimize(model, (x, ~mask), tuning_seconds=0, remove_padding=True)
    assert made.unpadded is not None, made.receipt.refused
    with torch.no_grad():
        torch.testing.assert_close(made(x, ~mask)[mask], model(x, ~mask)[mask], rtol=1e-4, atol=1e-5)
    assert made.unpadded.statistic() == {Way.PACKED.value: 1}


def test_nothing_grows_with_the_square_of_the_rows():
    """Masks of rows and keys are computed in the attentions."""
    made = optimized(Encoder("llama").eval())
    program = made.unpadded.program
    assert not program.fallbacks and "n*n" not in str(program.arena_bytes)
    assert not any("bool*" in kernel.text for kernel in program.kernels)


def test_constants_are_in_memory_once():
    made = optimized(Encoder("bert").eval())
    ours, theirs = constants(made.unpadded.plan.graph), constants(made.graph)
    shared = [name for name in ours if name in theirs]
    assert len(shared) > 10 and all(ours[n].value.data_ptr() == theirs[n].value.data_ptr() for n in shared)


def test_an_artifact_keeps_it(tmp_path):
    made = optimized(Encoder("bert").eval(), seconds=0.5)
    made = replace(made, unpadded=replace(made.unpadded, pays_below=0.7))  # not what was measured: that may be that it never pays
    made.save(tmp_path / "m.tw")
    loaded, mask = tilewright.load(tmp_path / "m.tw"), mask_of([24, 5, 9, 1])
    assert loaded.unpadded.pays_below == 0.7
    assert torch.equal(loaded(ids_like(mask), mask), made(ids_like(mask), mask))
    assert loaded.unpadded.statistic() == {Way.PACKED.value: 1}
    assert any(t.what == packing.MEASURED for t in loaded.receipt.trials)
    assert any(a.rule == "remove-padding" for a in loaded.receipt.applied)


def test_by_the_command(tmp_path):
    mask = mask_of([24, 5, 9, 1])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    shapes = {name: {0: batch, 1: length} for name in ("ids", "mask")}
    program = save_program(tmp_path / "m.pt2", Sentences("bert"), (ids_like(mask), mask), dynamic=shapes)
    assert run(program, "-o", tmp_path / "m.tw", "--tune", 0, "--remove-padding") == 0
    assert tilewright.load(tmp_path / "m.tw").unpadded is not None
    assert run(program, "-o", tmp_path / "m.tw", "--remove-padding", "--target", "sm_90") != 0


def test_both_programs_of_an_artifact_are_verified(tmp_path):
    optimized(Encoder("bert").eval()).save(tmp_path / "m.tw")
    for mask, against in ((mask_of([24, 5, 9, 1]), {"its graph", "its graph without padding"}), (holes(mask_of([24] * 4)), {"its graph"})):
        found = verify(tmp_path / "m.tw", Example((ids_like(mask), mask)))
        assert found.ok and {line.against for line in found.lines} == against


def test_an_artifact_that_says_nonsense_of_padding(tmp_path):
    made = optimized(Encoder("bert").eval())
    plan = made.unpadded.plan
    object.__setattr__(plan, "mask", 9)
    made.save(tmp_path / "m.tw")
    with pytest.raises(BadArtifact, match="padding"):
        tilewright.load(tmp_path / "m.tw")


class Mixed(Encoder):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, mask).mean(1)


def test_what_cannot_be_is_on_the_receipt():
    mask = mask_of([24, 5, 9, 1])
    made = tilewright.optimize(Mixed("bert").eval(), (ids_like(mask), mask), tuning_seconds=0, remove_padding=True)
    assert made.unpadded is None
    (refused,) = (r for r in made.receipt.refused if r.rule == "remove-padding")
    assert refused.source.startswith("test_padding.py") and "padding" in refused.reason


@pytest.mark.parametrize("more", [{"passes": "canonicalize"}, {"target": "sm_90"}, {"activations": "50%"}])
def test_not_together_with(more):
    mask = mask_of([24, 5, 9, 1])
    with pytest.raises(BadOption, match=f"go together with {next(iter(more))}: "):
        tilewright.optimize(Encoder("bert").eval(), (ids_like(mask), mask), remove_padding=True, **more)


@pytest.mark.parametrize("more", [{"passes": "canonicalize"}, {"cuda_graphs": True}])
def test_options_that_do_not_go_together(more):
    with pytest.raises(BadOption, match="remove_padding"):
        checked_options(None, {"remove_padding": True, **more})


@pytest.mark.parametrize("freeze", [False, True])
def test_by_torch_compile(freeze):
    model = Encoder("bert").eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True, options={"remove_padding": True, "freeze": freeze})
    count = len(tilewright.padding_counts())
    for mask in (mask_of([24, 5, 9, 1]), mask_of([24, 5, 9, 1], left=True), mask_of([24] * 4), mask_of([7, 12], length=12)):
        with torch.no_grad():
            ours, eager = compiled(ids_like(mask), mask), model(ids_like(mask), mask)
        torch.testing.assert_close(ours[mask.bool()], eager[mask.bool()], rtol=1e-4, atol=1e-5)
    counts = tilewright.padding_counts()[count:]
    assert sum(c.get(Way.PACKED.value, 0) for c in counts) == 3 and sum(c.get(Way.LITTLE.value, 0) for c in counts) == 1
    torch._dynamo.reset()


def test_training_is_left_alone():
    model = Encoder("bert").train()
    compiled = torch.compile(model, backend="tilewright", options={"remove_padding": True})
    mask = mask_of([24, 5, 9, 1])
    count = len(tilewright.padding_counts())
    compiled(ids_like(mask), mask)[mask.bool()].sum().backward()
    assert len(tilewright.padding_counts()) == count
    torch._dynamo.reset()


def test_threads_share_a_model(encoder):
    model, made = encoder
    mask = mask_of([24, 5, 9, 1])
    wanted = made(ids_like(mask), mask)

    def work(number: int) -> None:
        for _ in range(5):
            assert torch.equal(made(ids_like(mask), mask), wanted)

    in_threads(work)


def test_layout():
    rows, positions, first, last, places = layout_of(torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool().numpy())
    assert rows.tolist() == [0, 1, 2, 10, 11] and positions.tolist() == [0, 1, 2, 2, 3]
    assert first.tolist() == [0, 0, 0, 3, 3] and last.tolist() == [3, 3, 3, 5, 5]
    assert places.tolist() == [[0, 1, 2, -1], [-1] * 4, [-1, -1, 3, 4]]
