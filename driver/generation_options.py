"""What a user asks of `Generator`, in the words of `transformers`, as a `Request`: checked, with the model's own defaults filled in.

An option that would change the text and is not done here is refused; one that says how to compute, not what, is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch

from .errors import BadOption
from .sampling import Sampling, seeds_of
from .speculation import PromptLookup

NEW_TOKENS = 20
"""Where nobody says how many, as in transformers."""

TRANSFORMERS_DEFAULTS = {"top_k": 50}
"""Where neither the user nor a model of transformers says otherwise."""

_SAMPLING = tuple(f.name for f in fields(Sampling))
KNOWN = (
    "max_new_tokens", "max_length", *_SAMPLING, "seed", "eos_token_id", "pad_token_id", "num_return_sequences",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "streamer", "documents",
)  # fmt: skip

_HOW = (
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile", "low_memory",
    "prefill_chunk_size", "continuous_batching_config", "renormalize_logits", "early_stopping", "length_penalty", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind", "bos_token_id", "decoder_start_token_id",
    "transformers_version", "_from_model_config",
)  # fmt: skip
"""They say how to compute, or something of beams, assistants and encoders, which are refused themselves."""

_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "guidance_scale", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "epsilon_cutoff"), 0),
    **dict.fromkeys(("eta_cutoff", "diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"), False),
    **dict.fromkeys(("remove_invalid_values", "token_healing", "use_mtp"), False),
}
"""Options that are not done here -> the value at which there is nothing to do."""

Tokens = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
"""[batch, length] or [length], or lists of any lengths."""

Texts = list[list[int]]
"""Of one row, those that stand one after the other."""


@dataclass(frozen=True)
class Limits:
    """most: tokens of a text that the generator was made for. vocabulary: how many tokens there are. lookup: how to draft where the
    options do not say. documents: whether there may be some. defaults: options of the model, as in its generation_config."""

    most: int
    vocabulary: int
    lookup: PromptLookup | None
    documents: bool
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """documents: of each row, what stands before its prompt. prompts: without padding. length: new tokens of a row at most. stop: tokens
    after which a row ends. seeds: of each row.

    padded: the prompts as they came. pad: what rows that ended are filled up with; None where none ends before the others.
    """

    documents: list[Texts]
    prompts: Texts
    padded: torch.Tensor
    length: int
    sampling: Sampling
    stop: frozenset[int]
    pad: int | None
    seeds: list[int]
    lookup: PromptLookup | None
    streamer: Any = None


def request(input_ids: Tokens, mask: torch.Tensor | None, options: Mapping[str, Any], limits: Limits) -> Request:
    """Raises BadOption."""
    _refuse(options, "")
    _refuse({name: value for name, value in limits.defaults.items() if options.get(name) is None}, "generation_config.")
    options = {name: value for name, value in options.items() if value is not None}
    given = {**{name: value for name, value in limits.defaults.items() if value is not None}, **options}
    if "max_length" in options and "max_new_tokens" not in options:
        given.pop("max_new_tokens", None)
    stop = _ids(given.get("eos_token_id"))
    pad = given.get("pad_token_id", stop[0] if stop else None)
    padded, kept = _laid_out(input_ids, mask, given.get("pad_token_id"), stop)
    documents = _documents(given.get("documents", ()), len(padded), limits)
    repeats = given.get("num_return_sequences", 1)
    documents = [texts for texts in documents for _ in range(repeats)]
    padded, kept = (t.repeat_interleave(repeats, 0) for t in (padded, kept))
    prompts = [row[tokens].tolist() for row, tokens in zip(padded, kept)]
    _require_tokens(prompts)
    _require_known("input_ids", prompts, limits.vocabulary)
    sampling = Sampling(**{name: given[name] for name in _SAMPLING if name in given})
    lookup = limits.lookup
    if given.get("prompt_lookup_num_tokens"):
        lookup = PromptLookup(given["prompt_lookup_num_tokens"], given.get("max_matching_ngram_size", PromptLookup().ngram))
    longest = max(len(prompt) + sum(map(len, texts)) for prompt, texts in zip(prompts, documents))
    length = _length(given, padded.shape[1], longest, limits.most)
    if given.get("streamer") is not None and len(prompts) > 1:
        raise BadOption(option="streamer", reason=f"it takes one text, not {len(prompts)}")
    seeds = seeds_of(given.get("seed"), len(prompts))
    return Request(documents, prompts, padded, length, sampling, frozenset(stop), pad, seeds, lookup, given.get("streamer"))


def _refuse(options: Mapping[str, Any], prefix: str) -> None:
    for name, value in options.items():
        if value is None or name in KNOWN or name in _HOW or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        raise BadOption(option=prefix + name, reason=f"{value!r} is not done here; what can be said is {', '.join(KNOWN)}")


def _ids(value: Any) -> list[int]:
    """Of one id, several, or a tensor of them."""
    if value is None:
        return []
    return torch.as_tensor(value).reshape(-1).tolist()


def _laid_out(input_ids: Tokens, mask: torch.Tensor | None, pad: int | None, stop: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [batch, width], and which of their tokens count. Without a mask those that are padding do not, if padding can be told."""
    if isinstance(input_ids, (list, tuple)):
        rows = [torch.as_tensor(row).reshape(-1) for row in (input_ids if input_ids and not isinstance(input_ids[0], int) else [input_ids])]
        lengths = torch.tensor([[len(row)] for row in rows])
        width = int(lengths.max())
        kept = torch.arange(width) >= width - lengths
        fill = pad if pad is not None else stop[0] if stop else 0
        padded = torch.full((len(rows), width), fill).masked_scatter(kept, torch.cat(rows).long())
        return padded, kept
    padded = torch.as_tensor(input_ids).detach().cpu()
    padded = padded[None] if padded.dim() == 1 else padded
    if padded.dim() != 2 or padded.is_floating_point():
        raise BadOption(option="input_ids", reason=f"they are token ids [batch, length], not {padded.dtype} of shape {list(padded.shape)}")
    if mask is not None:
        kept = mask.detach().cpu().bool().reshape(padded.shape)
    else:
        kept = padded != pad if pad is not None and pad not in stop else torch.ones_like(padded, dtype=torch.bool)
    return padded.long(), kept


def _documents(given: Any, rows: int, limits: Limits) -> list[Texts]:
    """Of each row: the same for all, or where lists of documents are given, its own. Documents without tokens are left out."""
    if any(map(_is_token, given)):
        raise BadOption(option="documents", reason="they are a list of texts, each of token ids; one text alone is in a list, too")
    each = any(isinstance(text, (list, tuple)) and len(text) and not _is_token(text[0]) for text in given)
    if each and len(given) != rows:
        raise BadOption(option="documents", reason=f"there are lists of them for {len(given)} prompts, and {rows} prompts")
    found = [[ids for text in texts if (ids := _ids(text))] for texts in (given if each else [given])]
    if any(found) and not limits.documents:
        raise BadOption(option="documents", reason="say how they are read: Generator(..., documents=tilewright.ChunkReuse(ratio=0.15))")
    for texts in found:
        _require_known("documents", texts, limits.vocabulary)
    return found if each else found * rows


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) or getattr(value, "ndim", 1) == 0


def _require_tokens(prompts: Texts) -> None:
    if not prompts or not all(prompts):
        raise BadOption(option="input_ids", reason="a prompt without tokens has no next one; begin with one, such as the model's bos token")


def _require_known(option: str, texts: Texts, vocabulary: int) -> None:
    wrong = next((t for text in texts for t in (min(text), max(text)) if not (isinstance(t, int) and 0 <= t < vocabulary)), None)
    if wrong is not None:
        raise BadOption(option=option, reason=f"there is no token {wrong}; the model knows 0 to {vocabulary - 1}")


def _length(given: Mapping[str, Any], width: int, longest: int, most: int) -> int:
    """New tokens of a row. max_length counts the prompt and its padding, too, but no documents. The last token is never computed with, so
    that a text may be longer by one than what the generator was made for."""
    length = given["max_length"] - width if "max_length" in given else min(NEW_TOKENS, most + 1 - longest)
    length = given.get("max_new_tokens", length)
    if length < 1:
        raise BadOption(option="max_new_tokens", reason=f"there is no room for a new token after a prompt of {longest}")
    if longest + length > most + 1:
        raise BadOption(
            option="max_new_tokens", reason=f"{longest} tokens of a prompt and {length} new ones are more than the {most} it was made for"
        )
    return length
