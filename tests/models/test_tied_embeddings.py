"""Language models whose head multiplies by the table of embeddings: the table is held once, in panels."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import tilewright
import torch
from support import NATIVE
from tilewright.driver.accuracy import check, reference_outputs
from tilewright.ir.graph import constants
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

VOCABULARY = 9001  # no whole number of panels


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    return Logits(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                      tie_word_embeddings=True)  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config))


@NATIVE
@pytest.mark.parametrize("make", [gpt2, llama])
def test_one_table_in_panels(make: Any) -> None:
    torch.manual_seed(0)
    model, ids = make(), torch.tensor([[0, 1, 47, 48, 8975, 8976, 8999, 9000]])
    made = tilewright.optimize(model, (ids,), tuning_seconds=0)
    with torch.no_grad():
        for given in (ids, ids.flip(1)):
            exact = reference_outputs(copy.deepcopy(model), (given,))
            result = check(made(given), model(given), exact)
            assert result.ok, str(result)
    assert not made.receipt.library and not made.receipt.fallbacks
    tables = [d.value.shape for d in constants(made.graph).values() if d.value is not None and d.value.numel() >= VOCABULARY * 32]
    assert len(tables) == 1 and len(tables[0]) == 3


@NATIVE
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_token_that_is_not_in_the_table(make: Any) -> None:
    """Rows behind the last are zeros of a panel's tail, but none of the table."""
    model, ids = make(), torch.tensor([[0, 1, 2, 3, 4, VOCABULARY]])
    made = tilewright.optimize(model, (ids.clamp(max=8),), tuning_seconds=0)
    with pytest.raises(IndexError):
        made(ids)
