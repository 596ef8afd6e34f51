"""`Stepper`: a model of whole sequences, step by step: logits of the next tokens of each row, with keys and values kept in between.

    steps = stepper(model, tokens)                     tokens [b, S]: an example; S is the longest text
    state = steps.state(batch=2)
    logits = steps.step(prompt, position, state)       prompt [2, n] at position [2]; the state is updated in place
    logits = steps.step(token, position + n, state)

`passes/reuse_kv.py` derives the steps. A program is made for each batch and size of a step, when it is first needed.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.program import Program
from ..ir.capture import CapturedModule
from ..ir.errors import TilewrightError
from ..ir.graph import Data, Graph, Node, constants
from ..ir.sizes import with_sizes
from ..ir.types import TensorType
from ..passes.base import Notes
from ..passes.canonicalize import Canonicalize
from ..passes.last_rows import LastRows
from ..passes.manager import run_passes
from ..passes.quantize import NO_WEIGHT, Plan, Quantize
from ..passes.reuse_kv import Derived, ReuseKV, tokens_of
from .compile import Options, build_program, rewritten
from .errors import BadInputs
from .inputs import Example
from .loading import captured_of, evaluating, export_module
from .pipeline import FINISHING, PREPARING
from .receipt import Receipt, make_receipt
from .states import State, zeros

ALL_BATCHES = "batch"
"""The size symbol of the batch."""


class OutOfPlace(TilewrightError, ValueError):
    """Tokens at positions that a text cannot have."""

    template = "{count} tokens cannot stand at position {position}: texts have at most {most}"


@dataclass(frozen=True)
class Step:
    """A program for a batch and a size, and what was done to make it."""

    program: Program
    receipt: Receipt


class Stepper:
    """The steps of a model. max_length: of a text, in tokens; vocab: logits per token. kv: one of `passes.kv_formats.KV_FORMATS`.

    graph: canonical, its tokens i64[b, max_length] with a size symbol for b. Safe to call from several threads.
    """

    def __init__(self, graph: Graph, kv: str = "same", tokens: str = "", notes: Notes | None = None) -> None:
        """Raises CannotDerive."""
        self.graph, self.kv, self.tokens = graph, kv, tokens_of(graph, tokens).hint
        self.notes = notes if notes is not None else Notes()
        batch, self.max_length = tokens_of(graph, self.tokens).shape
        self._batch = str(batch)
        self._any: dict[int, Derived] = {}
        self._programs: dict[tuple[int, int, bool], Step] = {}
        self._weights: dict[tuple[Any, ...], Data] = {}
        self._lock = threading.Lock()
        self.vocab = int(self._derived(1).step.outputs[0].shape[-1])

    def state(self, batch: int, *inputs: torch.Tensor) -> State:
        """Empty, for so many texts. inputs: the other inputs of the model, in its order."""
        derived = self._derived(1)
        tensors = [zeros(with_batch(k.node, batch)) for k in derived.kept]
        return State(tensors, tuple(k.dim for k in derived.kept), self._start(derived.start, batch, inputs), [0] * batch)

    def _start(self, start: Graph | None, batch: int, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if start is None:
            return ()
        if len(inputs) != len(start.inputs) or any(x.shape[0] != batch for x in inputs):
            names = ", ".join(n.hint for n in start.inputs)
            raise BadInputs(spec=f"a state of {batch}", reason=f"it depends on {names}, each with {batch} rows")
        return tuple(self._program(batch, 0, start).program(list(inputs)))

    def step(self, tokens: torch.Tensor, position: torch.Tensor, state: State) -> torch.Tensor:
        """Logits [b, n, vocab] of tokens i64[b, n] that stand at position i64[b] and after it; the state of b rows is updated in place.

        Raises TypeError where these are others, and OutOfPlace.
        """
        _require(state, tokens=(tokens, 2), position=(position, 1))
        batch, count = tokens.shape
        tokens = self._whole(tokens, position, state)
        (logits,) = self.program(batch, tokens.shape[1]).program.run([tokens, position, *state.given, *state.tensors])
        return logits if tokens.shape[1] == count else logits[:, :count]

    def last(self, tokens: torch.Tensor, position: torch.Tensor, at: torch.Tensor, state: State) -> torch.Tensor:
        """As `step`, but the logits [b, vocab] of the token `at` i64[b] of each row alone: all that reading a prompt needs."""
        _require(state, tokens=(tokens, 2), position=(position, 1), at=(at, 1))
        if tokens.shape[1] == 1:
            return self.step(tokens, position, state)[:, 0]
        tokens = self._whole(tokens, position, state)
        program = self.program(*tokens.shape, last=True).program
        (logits,) = program.run([tokens, position, *state.given, *state.tensors, at])
        return logits[:, 0]

    def _whole(self, tokens: torch.Tensor, position: torch.Tensor, state: State) -> torch.Tensor:
        """The tokens, and as many more as the size of their step takes: the last one again, which the model can read, while any other might
        make numbers that are not finite. Raises OutOfPlace."""
        count, starts = tokens.shape[1], position.tolist()
        first, last = min(starts), max(starts)
        if first < 0 or last + count > self.max_length or not count:
            raise OutOfPlace(count=count, position=last if first >= 0 else first, most=self.max_length)
        size = size_class(count, self.max_length)
        state.reach(starts, size)
        return tokens if size == count else torch.cat([tokens, tokens[:, -1:].expand(-1, size - count)], 1)

    def program(self, batch: int, size: int, last: bool = False) -> Step:
        """What computes steps of this size, or the logits of one token of each row; compiled when first asked for."""
        known = self._programs.get((batch, size, last))
        if known is not None:
            return known
        graph = self._derived(size).step
        return self._program(batch, size, LastRows().run(graph, self.notes) if last else graph, last)

    def _derived(self, size: int) -> Derived:
        if size not in self._any:
            self._any[size] = ReuseKV(size, self.kv, self.tokens).derive(self.graph, self.notes)
        return self._any[size]

    def _program(self, batch: int, size: int, graph: Graph, last: bool = False) -> Step:
        known = self._programs.get((batch, size, last))
        if known is None:
            self._programs[batch, size, last] = known = self.compiled(graph, batch)
        return known

    def compiled(self, graph: Graph, batch: int) -> Step:
        """A program of a canonical graph for a batch; weights that other programs hold are in memory once."""
        with self._lock:
            return self._compiled(with_sizes(graph, {self._batch: batch}))

    def _compiled(self, graph: Graph) -> Step:
        notes, seconds = Notes(), dict[str, float]()
        fused = rewritten(graph, Options(), [Canonicalize(), *FINISHING], notes, seconds)
        self._share_weights(fused)
        program = build_program(fused)
        return Step(program, make_receipt(program, notes, seconds))

    def _share_weights(self, graph: Graph) -> None:
        """Weights that another program has in the same form are in memory once."""
        for data in constants(graph).values():
            value = data.value
            assert value is not None, f"{data.name} has no values"
            other = self._weights.setdefault((data.name, value.dtype, tuple(value.shape)), data)
            if other is not data and other.value is not value and torch.equal(other.value, value):  # type: ignore[arg-type]
                data.share(other)


def _require(state: State, **given: tuple[torch.Tensor, int]) -> None:
    """Programs take memory as it is: raises TypeError for what is not int64 of so many dimensions, with the rows of the state."""
    batch = len(state.ends)
    for name, (x, rank) in given.items():
        wanted = f"int64[{batch}, n]" if rank == 2 else f"int64[{batch}]"
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"argument {name!r} must be a tensor {wanted}, not {type(x).__name__}")
        if x.dtype != torch.int64 or x.dim() != rank or x.shape[0] != batch:
            found = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
            raise TypeError(f"argument {name!r} must be {wanted}, as the state has {batch} rows, not {found}")


def with_batch(node: Node, batch: int) -> TensorType:
    """The type of an input for a batch of a size."""
    return node.tensor.with_shape(tuple(d if isinstance(d, int) else batch for d in node.shape))


def size_class(count: int, most: int) -> int:
    """The size of the step that takes so many tokens: a power of two, or from 16 on one of up to seven in between that are multiples of 8.

    Few programs are made, and of a longer prompt no more than an eighth is computed in vain.
    """
    power = 1 << (count - 1).bit_length()
    unit = min(max(power // 16, 8), power)
    return min(-(-count // unit) * unit, most)


def stepper(
    model: torch.nn.Module | CapturedModule | Graph,
    tokens: torch.Tensor | None = None,
    *,
    kv: str = "same",
    plan: Plan | str | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    name: str = "",
) -> Stepper:
    """The steps of a model tokens -> logits.

    model: a module (of `transformers`, too), or what was captured of one for any batch. tokens: an example [b, S]; S is the longest text.
    kv: the format of keys and values. plan: formats of weights, "int4-g64" for all of them or as `Plan.parse` reads it; of
    "-bf16" ones the weights, as inputs of a step are not rounded. inputs: examples of the module's other inputs, by name; a state then
    depends on them. name: the argument that the tokens are, where it is not the first, or `decoder_input_ids`.

    Raises CannotDerive where tokens mix, and what exporting raises.
    """
    if isinstance(model, torch.nn.Module):
        if tokens is None:
            raise BadInputs(spec="tokens", reason="a module needs example tokens [batch, length] to be captured")
        graph = _captured(model, tokens, inputs or {}, name)
        name = TOKENS
    else:
        graph = model if isinstance(model, Graph) else model.graph
    notes = Notes()
    with torch.no_grad():
        prepared = run_passes(graph, [*PREPARING, *_formats(plan)], notes)
    unknown = [d.what for d in notes.declined if d.rule == Quantize.name and d.value == NO_WEIGHT]
    if unknown:
        warnings.warn(
            f"{len(unknown)} weights of the plan are none of {graph.name}'s and stay as they are: {', '.join(unknown)}", stacklevel=2
        )
    return Stepper(prepared, kv, name, notes)


def _formats(plan: Plan | str | None) -> list[Quantize]:
    if plan is None:
        return []
    if isinstance(plan, str):
        plan = Plan.parse(plan if ":" in plan else f"*:{plan}")
    return [Quantize(plan.with_plain_inputs())]


TOKENS = "tokens"


def _logits(model: torch.nn.Module, argument: str, others: Sequence[str], options: Mapping[str, Any]) -> torch.nn.Module:
    """A module of (tokens, *others) -> logits alone. torch.export reads the names of its arguments."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            result = self.model(**dict(zip((argument, *others), given)), **options)
            if isinstance(result, torch.Tensor):
                return result
            return result.logits if hasattr(result, "logits") else result[0]

    names = ("self", TOKENS, *others)
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    Logits.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Logits()


@evaluating
def _captured(model: torch.nn.Module, tokens: torch.Tensor, inputs: Mapping[str, torch.Tensor], name: str) -> Graph:
    """The graph of a module for any batch: its logits, without a cache of its own."""
    parameters = inspect.signature(model.forward).parameters
    argument = name or ("decoder_input_ids" if "decoder_input_ids" in parameters and inputs else next(iter(parameters)))
    options = {"use_cache": False} if "use_cache" in parameters else {}
    examples = {TOKENS: tokens, **inputs}
    two = tuple(x[:1].expand(2, *x.shape[1:]).contiguous() for x in examples.values())  # of one, torch would take the batch for fixed
    example = Example(two, {}, {k: {0: ALL_BATCHES} for k in examples})
    graph = captured_of(export_module(type(model).__name__.lower(), _logits(model, argument, tuple(inputs), options), example)).graph
    for data in constants(graph).values():
        data.name = data.name.removeprefix("model.")  # as the module names them, which a plan does too
    return graph
