"""Inputs by which a bounded rewrite is chosen, and those that judge it: as a graph takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.capture import CapturedModule
from .calling import CallingConvention
from .errors import BadCalibration
from .loading import Model
from .measure import flat_example, flattened

HELD_OUT = 4
"""One in so many inputs judges the result, and has no part in choosing."""


@dataclass(frozen=True)
class Batches:
    """held_out: whether what judges had no part in choosing; with the example alone it does both."""

    chosen_on: list[list[Any]]
    judged_on: list[list[Any]]
    held_out: bool


def batches(model: Model, captured: CapturedModule, convention: CallingConvention, calibration: Sequence[Any]) -> Batches:
    """The example and further inputs: tuples of arguments, dicts of them by name, or single arguments. Raises BadCalibration."""
    found = [flat_example(model, captured, convention), *_flat(captured, convention, calibration)]
    held = max(1, len(found) // HELD_OUT) if len(found) > 1 else 0
    return Batches(found[:-held], found[-held:], True) if held else Batches(found, found, False)


def _flat(captured: CapturedModule, convention: CallingConvention, calibration: Sequence[Any]) -> list[list[Any]]:
    found = []
    for number, item in enumerate(calibration, 1):
        kwargs = dict(item) if isinstance(item, Mapping) else {}
        args = () if kwargs else tuple(item) if isinstance(item, (tuple, list)) else (item,)
        try:
            flat = flattened(convention, captured, args, kwargs)
            convention.checked(flat, captured.graph)
            found.append(flat)
        except TypeError as error:
            raise BadCalibration(spec=f"input {number}", reason=str(error)) from error
    return found
