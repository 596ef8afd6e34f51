"""`Budget`: what a model may cost, as a user says it; and `Spent`, the part of a receipt that tells what it does cost.

Budget(max_error=1e-2, memory="50%", objective="latency")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..passes.formats import FORMATS
from ..search.metrics import METRICS, Metric, metric
from .errors import BadCalibration, BadInputs, BadOption
from .inputs import parse_inputs

OBJECTIVES = {"latency": "time", "memory": "bytes", "error": "error"}
"""What a user wants least of -> the cost it is."""

DEFAULT_FORMATS = (
    "bf16", "bf16-bf16", "int8", "int8-g32", "int8-bf16", "int8-dynamic", "int4-g32", "int4-g32-bf16", "int4-g64", "int4-g128",
    "int4-split3",
)  # fmt: skip
"""Those that are tried unless the user says which."""

Loss = Callable[[Callable[..., Any]], Any]
"""Takes a model, to be called like the original; returns a number that grows as it gets worse, for example 1 - its accuracy. A scalar
tensor with derivatives by what the model returns tells more: by how much it grows is then foretold (`search.curvature`)."""

_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "memory": _BYTES,
    "activations": _BYTES,  # no limit of a budget: see `driver.activations`
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "bops": {},
}
_WRITTEN = {"memory": '"50%" or "200MB"', "activations": '"30%" or "2MB"', "latency": '"80%" or "5ms"', "bops": '"25%" or 1e12'}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(%|[a-zA-Z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """Limits that a model must keep; what is None is not limited.

    max_error: by `metric`, one of METRICS, or a Loss: then it is how much the loss may grow. memory: bytes of the weights, as a number,
    "200MB", or "50%" of what they are. latency: seconds of a call on the example, as a number, "5ms", or "80%" of eager's (for a target: of
    what is foretold of the exact model); None: those of the exact model as `optimize` makes it.
    bits: the mean of a weight, scales and zeros included. bops: products of bits of weights and inputs, added up over multiplications, as
    a number or a share "25%". objective: what to make least, "latency", "memory" or "error". formats: those to choose from.
    calibration: tuples of arguments (or dicts, by name) like the example; a quarter, at least one, is held out to verify the result.
    Without them the example stands for all.
    """

    max_error: float | None = None
    memory: str | float | None = None
    latency: str | float | None = None
    bits: float | None = None
    bops: str | float | None = None
    objective: str = "latency"
    metric: str | Loss = "relative"
    formats: tuple[str, ...] = DEFAULT_FORMATS
    calibration: Sequence[Any] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Raises BadOption for what cannot be meant."""
        if self.objective not in OBJECTIVES:
            raise BadOption(option="objective", reason=f"it is {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if isinstance(self.metric, str):
            metric(self.metric)
        if isinstance(self.formats, str):
            raise BadOption(option="formats", reason=f'it is a tuple of names, as ("{self.formats}",)')
        unknown = next((name for name in self.formats if name not in FORMATS), None)
        if unknown is not None:
            raise BadOption(option="formats", reason=f"there is no {unknown!r}; there are {', '.join(FORMATS)}")
        if not isinstance(self.calibration, Iterable):
            raise BadOption(option="calibration", reason=f"it is a list of inputs, not {self.calibration!r}")
        if self.max_error is None and self.objective != "error":
            raise BadOption(option="max-error", reason=f"say how large it may be; least {self.objective} has no end without it")
        if self.max_error is not None and not (isinstance(self.max_error, (int, float)) and self.max_error >= 0):
            raise BadOption(option="max-error", reason=f"it is a number from 0 on, not {self.max_error!r}")
        if self.bits is not None and not (isinstance(self.bits, (int, float)) and self.bits > 0):
            raise BadOption(option="bits", reason=f"it is a number above 0, not {self.bits!r}")
        for name in ("memory", "latency", "bops"):
            quantity(name, getattr(self, name), 1.0)

    @property
    def of_outputs(self) -> Metric:
        """The metric of single layers; a loss is replaced by the relative error there, and only the joint model is judged by it."""
        return METRICS[self.metric] if isinstance(self.metric, str) else METRICS["relative"]

    @property
    def allowed_relative(self) -> float | None:
        """What the relative error of the outputs may be; None where another one is limited, or none."""
        return self.max_error if self.metric == "relative" else None


def budget_from(
    limits: Mapping[str, float | str | None], objective: str, metric: str, formats: str | None, calibration: Sequence[str]
) -> Budget | None:
    """The budget of a command line, None where it sets no limit. calibration: files, each an input. Raises BadOption and BadCalibration."""
    if all(limit is None for limit in limits.values()):
        given = next((name for name, other in (("formats", formats), ("calibration", calibration)) if other), None)
        if given is None and objective == "latency":
            return None
        raise BadOption(option=given or "objective", reason="it is for a budget: give --max-error, --memory or --latency too")
    names = DEFAULT_FORMATS if formats is None else tuple(name.strip() for name in formats.split(","))
    return Budget(**limits, objective=objective, metric=metric, formats=names, calibration=calibration_from(calibration))  # type: ignore[arg-type]


def calibration_from(paths: Sequence[str]) -> list[Mapping[str, Any]]:
    """Inputs by name, one of each file. Raises BadCalibration."""
    try:
        return [example.kwargs for path in paths if (example := parse_inputs([path])) is not None]
    except BadInputs as error:
        raise BadCalibration(**error.fields) from error


def quantity(name: str, value: str | float | None, whole: float) -> float | None:
    """A limit as a number: bytes, seconds; of a share, that much of `whole`. Raises BadOption."""
    if value is None:
        return None
    match = _QUANTITY.fullmatch(str(value))
    unit = match[2].lower() if match else ""
    if match is None or (unit not in ("", "%") and unit not in _UNITS[name]):
        raise BadOption(option=name, reason=f"{value!r} is no amount; write for example {_WRITTEN[name]}")
    number = float(match[1])
    if not unit and name != "latency" and 0 < number < 1:
        raise BadOption(option=name, reason=f"{value!r} would be less than one; a share of what it is now is written {number:.0%}")
    return number / 100 * whole if unit == "%" else number * _UNITS[name].get(unit, 1.0)


@dataclass(frozen=True)
class LayerLine:
    """A layer in its format: its bytes, predicted seconds, and error of the outputs if nothing else changed; `exact_`: as it was.

    exact_bits: of one of its weights.
    """

    name: str
    source: str
    format: str
    bytes: int
    exact_bytes: int
    seconds: float
    exact_seconds: float
    error: float
    exact_bits: int = 32

    @property
    def bits(self) -> float:
        """Of a weight on average, scales and zeros included."""
        return self.exact_bits * self.bytes / max(self.exact_bytes, 1)


@dataclass(frozen=True)
class Point:
    """Of the front: predicted seconds, bytes and error of a whole model."""

    seconds: float
    bytes: float
    error: float


@dataclass(frozen=True)
class Attempt:
    """An allocation that was tried: what was predicted, from the second one on with what the one before it taught, and measured; and what
    came of it. predicted_error: None where nothing foretells it.
    """

    predicted_error: float | None
    error: float
    predicted_seconds: float
    seconds: float
    verdict: str


@dataclass(frozen=True)
class Spent:
    """limits: as numbers, by cost. error, bytes, seconds: of the result, measured; `exact_`: of the model before. held_out: whether the
    inputs that error was measured on had no part in choosing. prices: by how much the objective would fall with one more unit of a limit.
    candidates: how many pairs of a layer and a format were measured, estimated, declined, or pruned by a prior.
    """

    metric: str
    objective: str
    limits: Mapping[str, float]
    error: float
    bytes: int
    exact_bytes: int
    seconds: float
    exact_seconds: float
    held_out: bool
    layers: tuple[LayerLine, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    front: tuple[Point, ...] = ()
    prices: Mapping[str, float] = field(default_factory=dict)
    candidates: Mapping[str, int] = field(default_factory=dict)
