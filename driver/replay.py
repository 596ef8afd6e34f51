"""mode="reduce-overhead": what a call enqueues on a GPU is recorded once as a CUDA graph, and replayed by the calls that follow.

    first call       runs as ever: libraries load and allocate what they need
    second call      runs while the device records, on copies of its inputs, in memory that only recordings have
    every call       copies its inputs there, replays, and returns copies of the outputs

Outputs are therefore as eager's: they stay what they are. Parameters are read where they lie, and what the graph writes to (a cache of keys
and values) is read and written there; a call with others (layers that share compiled code, another cache) is recorded for itself. What
cannot be replayed is declined with a reason, and runs as ever.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..ir.analysis.memory import may_share, owners
from ..ir.capture.aot import TRAINING, Held
from ..ir.errors import is_lost
from ..ir.graph import Graph, Node, is_scalar, order
from ..ir.types import ScalarType, TensorType
from ..passes.base import Notes, Reason

RULE = "record-launches"
MOST_RECORDINGS = 64
"""Of one graph: so many sets of parameters."""

Run = Callable[[list[Any]], list[Any]]


def replayed(run: Run, graph: Graph, held: Held, device: str) -> Run:
    """`run`, recorded and replayed on that device. Only for a graph that `refusal` says nothing about."""
    written = {target for target, _ in graph.writes}
    in_place = sorted({*held, *(i for i, node in enumerate(graph.inputs) if node in written)})
    return Replayed(run, in_place, len(graph.inputs), CudaRecorder(torch.device(device)))


def device_to_record(graph: Graph, notes: Notes) -> str | None:
    """The GPU whose work for this graph is recorded; None, noted with the reason, where that cannot be done."""
    refused = refusal(graph)
    if refused is not None:
        notes.decline(RULE, graph.name, refused[0], None, refused[1])
        return None
    (device,) = _devices(graph)
    notes.apply(RULE, f"the launches of {graph.name} on {device}")
    return device


def refusal(graph: Graph) -> tuple[Reason, str] | None:
    """Why calls of this graph cannot be replayed, and what is guilty."""
    if graph.name.endswith(TRAINING):  # what is saved for the backward graph would be copied once more
        return Reason.TRAINING, graph.name
    sizes = sorted(graph.symbols) + [n.hint for n in graph.inputs if isinstance(n.type, ScalarType)]
    if sizes:
        return Reason.VARYING_SIZE, sizes[0]
    other = [d for d in _devices(graph) if not d.startswith("cuda")]
    if other or len(_devices(graph)) != 1:
        return Reason.NOT_ON_ONE_GPU, ", ".join(_devices(graph))
    shared = _shared_output(graph)
    return None if shared is None else (Reason.RETURNED, shared.hint or shared.op.name)


def _devices(graph: Graph) -> list[str]:
    types = [t for node in order(graph) for t in (node.type if isinstance(node.type, tuple) else (node.type,))]
    return sorted({t.device for t in types if isinstance(t, TensorType)})


def _shared_output(graph: Graph) -> Node | None:
    """An output that may lie in the memory of an input or of another output: a copy of it would not."""
    owned = owners(order(graph), may_share)
    seen = {owner for node in graph.inputs if not is_scalar(node) for owner in owned[node]}
    for node in graph.outputs:
        mine = frozenset() if is_scalar(node) else owned[node]
        if mine & seen:
            return node
        seen |= mine
    return None


class Recording(Protocol):
    """What was recorded: `replay` does it again, on the `inputs` as they are then, and leaves new values in the `outputs`."""

    inputs: list[Any]
    outputs: list[Any]

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what `run` enqueues for inputs of its own, without doing it; `held` of them are those given.

    `ordered` waits for what was replayed before. `idle`: whether nobody else is recording this very call, which must then run as ever.
    """

    def record(self, run: Run, inputs: Sequence[Any], held: Sequence[int]) -> Recording: ...

    def ordered(self, work: Callable[[], list[Any]]) -> list[Any]: ...

    def idle(self) -> bool: ...


class Replayed:
    """`run`, recorded at its second call. held: numbers of the inputs that are read, and written, where they lie.

    Calls from several threads follow each other: they share the memory of the recordings.
    """

    def __init__(self, run: Run, held: Sequence[int], count: int, recorder: Recorder) -> None:
        self._run = run
        self._held = tuple(held)
        self._given = tuple(i for i in range(count) if i not in self._held)
        self._recorder = recorder
        self._called: set[tuple[int, ...]] = set()  # with these parameters at these places
        self._recordings: dict[tuple[int, ...], Recording | None] = {}
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """As `run`: outputs for the inputs, which it empties."""
        if not self._recorder.idle():
            return self._run(inputs)
        with self._lock:
            recording = self._recording(inputs)
            if recording is not None:
                return self._recorder.ordered(lambda: self._replay(recording, inputs))
        return self._run(inputs)

    def _recording(self, inputs: Sequence[Any]) -> Recording | None:
        """The one for these parameters; None at their first call, and where there can be none."""
        places = tuple(inputs[i].data_ptr() for i in self._held)
        if places in self._called and places not in self._recordings:
            self._recordings[places] = self._record(inputs)
        if len(self._called) < MOST_RECORDINGS:
            self._called.add(places)
        return self._recordings.get(places)

    def _record(self, inputs: Sequence[Any]) -> Recording | None:
        try:
            return self._recorder.record(self._run, inputs, self._held)
        except RuntimeError as error:  # an op that waits for the device, as a fallback may
            if is_lost(error):
                raise
            warnings.warn(f"mode='reduce-overhead': the launches cannot be recorded, and run as ever: {error}", RuntimeWarning, 4)
            return None

    def _replay(self, recording: Recording, inputs: list[Any]) -> list[Any]:
        for i in self._given:
            recording.inputs[i].copy_(inputs[i])
        inputs.clear()
        recording.replay()
        return [copied(value) for value in recording.outputs]


def copied(value: Any) -> Any:
    """A tensor of its own with the same strides."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


# -- on a GPU


class CudaRecording:
    """A CUDA graph, and the tensors it works on."""

    def __init__(self, inputs: list[Any]) -> None:
        self.inputs = inputs
        self.outputs: list[Any] = []
        self.graph = torch.cuda.CUDAGraph()

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Recordings of one device share a pool of memory: they are replayed one after the other, and outputs are copied at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def record(self, run: Run, inputs: Sequence[Any], held: Sequence[int]) -> CudaRecording:
        with torch.cuda.device(self._device), torch.inference_mode(False), torch.no_grad():  # calls in any mode write to the copies
            own = [x if i in held else torch.empty_like(x).copy_(x) for i, x in enumerate(inputs)]
            made = CudaRecording(own)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            torch.cuda.current_stream().synchronize()
            with torch.cuda.graph(made.graph, pool=self._pool, capture_error_mode="thread_local"):
                made.outputs = run(list(own))
            made.inputs = [None if i in held else x for i, x in enumerate(own)]  # parameters are not kept alive
            return made

    def idle(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def ordered(self, work: Callable[[], list[Any]]) -> list[Any]:
        with torch.cuda.device(self._device), torch.no_grad():
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            outputs = work()
            self._done = self._done or torch.cuda.Event()
            self._done.record(stream)
            return outputs
