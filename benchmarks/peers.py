"""What the benchmark compares: each peer turns a workload into a call without arguments that returns its first output."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = tuple[torch.Tensor, ...]
Call = Callable[[], torch.Tensor]


@dataclass
class Notes:
    """lines: what a reader of the result must know of how a peer was run. wasted, wasted_cpu: seconds of attempts that came to nothing,
    which do not count as its first call: who uses the peer knows which way works."""

    lines: list[str] = field(default_factory=list)
    wasted: float = 0.0
    wasted_cpu: float = 0.0


def eager(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    return lambda: model(*inputs)


def tilewright(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    return _compiled(model, inputs, backend="tilewright")


def tilewright_max(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    """Parameters as constants, choices by measurement. torch.compile takes a mode or options, not both, so the backend is bound to them."""
    from tilewright.driver.backend import checked_options, tilewright
    from tilewright.driver.errors import BadOption

    wanted: dict[str, Any] = {"mode": "max-autotune", "options": {"freeze": True}}
    try:
        checked_options(**wanted)
    except BadOption as error:
        notes.lines.append(f"default options: {error}")
        wanted = {}
    return _compiled(model, inputs, backend=functools.partial(tilewright, **wanted))


def tilewright_ahead(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    """The offline door: no guards of Dynamo before a call."""
    import tilewright

    run = tilewright.optimize(model, inputs)
    return lambda: run(*inputs)


def tilewright_unpadded(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    """The same, and tokens that the mask says are padding are left out."""
    import tilewright

    run = tilewright.optimize(model, inputs, remove_padding=True)
    return lambda: run(*inputs)


def inductor(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    return _compiled(model, inputs)


def inductor_max(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _compiled(model, inputs, mode="max-autotune")


def _compiled(model: nn.Module, inputs: Inputs, **options: Any) -> Call:
    run = torch.compile(model, **options)
    return lambda: run(*inputs)


def onnxruntime(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    """Outputs that are new state share the memory of the inputs that they replace."""
    import onnxruntime as ort

    path = _onnx(model, inputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    first, *states = session.get_outputs()
    if not states:
        return lambda: torch.from_numpy(session.run(None, feeds)[0])
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(first.name)
    for output, name in zip(states, list(feeds)[len(feeds) - len(states) :], strict=True):
        binding.bind_ortvalue_output(output.name, values[name])

    def call() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy())

    return call


def _onnx(model: nn.Module, inputs: Inputs) -> str:
    path = os.path.join(tempfile.mkdtemp(), "model.onnx")
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
    return path


def openvino(model: nn.Module, inputs: Inputs, notes: Notes) -> Call:
    """Outputs that are new state become the compiled model's own state."""
    import openvino as ov

    converted = _converted(model, inputs, notes)
    states = len(converted.outputs) - 1
    if states:
        _make_stateful(converted, len(inputs) - states)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.compile_model(converted, "CPU", hints).create_infer_request()
    for state in request.query_state():
        number = state.name.removeprefix("state").partition("new")[0]
        state.state = ov.Tensor(inputs[int(number)].numpy())
    arrays = [x.numpy() for x in inputs[: len(inputs) - states]]
    return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])


def _converted(model: nn.Module, inputs: Inputs, notes: Notes) -> Any:
    """By the first of OpenVINO's three front ends that takes the model."""
    import openvino as ov

    ways: dict[str, Callable[[], Any]] = {
        "torch.jit.trace": lambda: ov.convert_model(model, example_input=inputs),
        "torch.export": lambda: ov.convert_model(torch.export.export(model, inputs, strict=False)),
        "ONNX": lambda: ov.convert_model(_onnx(model, inputs)),
    }
    errors: list[str] = []
    for way, convert in ways.items():
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            converted = convert()
        except Exception as error:  # whatever a front end raises, the next may take it
            errors.append(f"{way}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            notes.wasted += time.perf_counter() - begin
            notes.wasted_cpu += time.process_time() - cpu
            continue
        if errors:
            notes.lines.append(f"converted by way of {way}")
        return converted
    raise RuntimeError("; ".join(errors))


def _make_stateful(converted: Any, first: int) -> None:
    """Pairs the inputs from `first` on with all outputs but the first; state i is named after its input's number."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    pairs: dict[str, str] = {}
    for i, (source, target) in enumerate(zip(converted.inputs[first:], converted.outputs[1:], strict=True), first):
        source.get_tensor().set_names({f"state{i}"})
        target.get_tensor().set_names({f"new{i}"})
        pairs[f"state{i}"] = f"new{i}"
    apply_make_stateful_transformation(converted, pairs)


PEERS: dict[str, Callable[[nn.Module, Inputs, Notes], Call]] = {
    "eager": eager,
    "tilewright": tilewright,
    "tilewright-max": tilewright_max,
    "tilewright-ahead": tilewright_ahead,
    "tilewright-unpadded": tilewright_unpadded,
    "inductor": inductor,
    "inductor-max": inductor_max,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}

PORTABLE = frozenset({"onnxruntime", "openvino"})
"""Peers that take a workload in its portable form."""
