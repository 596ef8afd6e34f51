"""What a user asks of `Generator`, in the words of `transformers`, as a `Request`: checked, with the model's own defaults filled in.

An option that would change the text and is not done here is refused; one that says how to compute, not what, is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .errors import BadOption
from .meant import COUNT, FLAG, NUMBER, TEXTS, WHOLE, Meaning, check, is_token, one_text, require_known, shown, text_of, token_ids
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

_MEANT = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_return_sequences"), COUNT),
    **dict.fromkeys(("top_k", "seed", "pad_token_id", "prompt_lookup_num_tokens", "max_matching_ngram_size"), WHOLE),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NUMBER),
    "do_sample": FLAG,
    "documents": TEXTS,
    "streamer": Meaning(lambda s: hasattr(s, "put") and hasattr(s, "end"), "something with put and end, as streamers of transformers have"),
}
"""What of these can be meant; ranges are checked where they are used."""

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
    given = {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in given.items()}
    check(_MEANT, given)
    if "max_length" in options and "max_new_tokens" not in options:
        given.pop("max_new_tokens", None)
    stop = token_ids("eos_token_id", given.get("eos_token_id", ())).reshape(-1).tolist()
    pad = given.get("pad_token_id", stop[0] if stop else None)
    padded, kept = _laid_out(input_ids, mask, given.get("pad_token_id"), stop)
    documents = _documents(given.get("documents", ()), len(padded), limits)
    repeats = given.get("num_return_sequences", 1)
    documents = [texts for texts in documents for _ in range(repeats)]
    padded, kept = (t.repeat_interleave(repeats, 0) for t in (padded, kept))
    prompts = [row[tokens].tolist() for row, tokens in zip(padded, kept)]
    _require_tokens(prompts)
    require_known("input_ids", padded[kept], limits.vocabulary)
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
        raise BadOption(option=prefix + name, reason=f"{shown(value)} is not done here; what can be said is {', '.join(KNOWN)}")


def _laid_out(input_ids: Tokens, mask: Any, pad: int | None, stop: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [batch, width], and which of their tokens count. Without a mask those that are padding do not, if padding can be told."""
    listed = isinstance(input_ids, (list, tuple))
    padded, kept = _aligned("input_ids", token_ids, input_ids, pad if pad is not None else stop[0] if stop else 0)
    if padded.dim() != 2:
        raise BadOption(option="input_ids", reason=f"they are token ids [batch, length], not {shown(input_ids)}")
    if mask is not None:
        counted, there = _aligned("attention_mask", _flags, mask, 0)
        if not torch.equal(there, kept):
            reason = f"it has one number for each token; {shown(mask)} does not fit {shown(input_ids)}"
            raise BadOption(option="attention_mask", reason=reason)
        kept = kept & counted
    elif not listed and pad is not None and pad not in stop:
        kept = padded != pad
    return padded, kept


def _aligned(option: str, read: Callable[[str, Any], torch.Tensor], given: Any, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a tensor, lists of any lengths filled up in front, and what of it is there."""
    if not isinstance(given, (list, tuple)):
        values = read(option, given)
        values = values[None] if values.dim() == 1 else values
        return values, torch.ones_like(values, dtype=torch.bool)
    rows = [one_text(option, read(option, row)) for row in (given if given and not is_token(given[0]) else [given])]
    lengths = torch.tensor([[len(row)] for row in rows])
    width = int(lengths.max())
    there = torch.arange(width) >= width - lengths
    return rows[0].new_full((len(rows), width), fill).masked_scatter(there, torch.cat(rows)), there


def _flags(option: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value).detach().cpu().bool()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadOption(option=option, reason=f"it says of each token whether it counts, with 1 or 0, not {shown(value)}") from error


def _documents(given: Any, rows: int, limits: Limits) -> list[Texts]:
    """Of each row: the same for all, or where lists of documents are given, its own. Documents without tokens are left out."""
    each = any(isinstance(text, (list, tuple)) and len(text) and not is_token(text[0]) for text in given)
    if each and len(given) != rows:
        raise BadOption(option="documents", reason=f"there are lists of them for {len(given)} prompts, and {rows} prompts")
    lists = given if each else [given]
    found = [[ids for text in texts if (ids := text_of("documents", text, limits.vocabulary).tolist())] for texts in lists]
    if any(found) and not limits.documents:
        raise BadOption(option="documents", reason="say how they are read: Generator(..., documents=tilewright.ChunkReuse(ratio=0.15))")
    return found if each else found * rows


def _require_tokens(prompts: Texts) -> None:
    if not prompts or not all(prompts):
        raise BadOption(option="input_ids", reason="a prompt without tokens has no next one; begin with one, such as the model's bos token")


def _length(given: Mapping[str, Any], width: int, longest: int, most: int) -> int:
    """New tokens of a row. max_length counts the prompt and its padding, too, but no documents. The last token is never computed with, so
    that a text may be longer by one than what the generator was made for."""
    length = given["max_length"] - width if "max_length" in given else min(NEW_TOKENS, most + 1 - longest)
    length = given.get("max_new_tokens", length)
    if length < 1:
        counted, limit = (width, given["max_length"]) if "max_length" in given else (longest, most)
        reason = f"there is no room for a new token after a prompt of {counted}: texts have at most {limit}"
        raise BadOption(option="max_length", reason=reason)
    if longest + length > most + 1:
        reason = f"{longest} tokens of a prompt and {length} new ones are more than the {most} it was made for"
        raise BadOption(option="max_new_tokens", reason=f"{reason}: Generator(model, max_length=...) says for how many")
    return length
