"""What can be meant by what a user gives, as tables; all else is refused in a sentence before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Number, Real
from typing import Any

import torch

from .errors import BadOption

_SHOWN = 60
"""Characters of a value that are repeated to the user, at most."""


@dataclass(frozen=True)
class Meaning:
    """fine: whether a value can be meant. words: what it is then, after "it is". optional: None can be, too."""

    fine: Callable[[Any], bool]
    words: str
    optional: bool = False


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


COUNT = Meaning(lambda value: _whole(value) and value >= 1, "a count from 1 on")
WHOLE = Meaning(_whole, "a whole number")
NUMBER = Meaning(lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number")
FLAG = Meaning(lambda value: isinstance(value, Integral) and value in (0, 1), "True or False")
TEXTS = Meaning(
    lambda value: isinstance(value, Collection) and not isinstance(value, (str, Mapping)) and not any(map(is_token, value)),
    "a list of texts, each of token ids; one text alone is in a list, too",
)


def check(meant: Mapping[str, Meaning], given: Mapping[str, Any]) -> None:
    """Raises BadOption for the first value that cannot be meant."""
    for name, value in given.items():
        meaning = meant.get(name)
        if meaning is None or (value is None and meaning.optional) or meaning.fine(value):
            continue
        raise BadOption(option=name, reason=f"it is {meaning.words}, not {shown(value)}")


def shown(value: Any) -> str:
    """A value in a sentence: itself where it is short, or of what kind it is."""
    if isinstance(getattr(value, "shape", None), tuple):
        return f"{getattr(value, 'dtype', type(value).__name__)} of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= _SHOWN and "\n" not in text else f"a {type(value).__name__}"


def is_token(value: Any) -> bool:
    """Whether it stands for one token, and is no text."""
    return isinstance(value, Number) or getattr(value, "ndim", 1) == 0


def token_ids(option: str, value: Any) -> torch.Tensor:
    """i64, on the CPU, of the shape that is given. Raises BadOption."""
    if isinstance(value, Mapping):
        reason = 'it is what a tokenizer returns, not the tokens of it: write generate(**encoding), or encoding["input_ids"]'
        raise BadOption(option=option, reason=reason)
    try:
        ids = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadOption(option=option, reason=f"they are token ids, which a tokenizer makes of text, not {shown(value)}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise BadOption(option=option, reason=f"they are token ids, which are whole numbers, not {shown(ids)}")
    return ids.long()


def one_text(option: str, values: torch.Tensor) -> torch.Tensor:
    """[n] of one text, which may be a batch of one. Raises BadOption."""
    if values.dim() and values.numel() != values.shape[-1]:
        raise BadOption(option=option, reason=f"a text is a list of token ids, not {shown(values)}")
    return values.reshape(-1)


def text_of(option: str, value: Any, vocabulary: int) -> torch.Tensor:
    """The tokens i64[n] of one text, all of which the model knows. Raises BadOption."""
    ids = one_text(option, token_ids(option, value))
    require_known(option, ids, vocabulary)
    return ids


def require_known(option: str, ids: torch.Tensor, vocabulary: int) -> None:
    """Raises BadOption for tokens that the model does not know."""
    if not ids.numel():
        return
    wrong = next((int(t) for t in ids.aminmax() if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise BadOption(option=option, reason=f"there is no token {wrong}; the model knows 0 to {vocabulary - 1}")
