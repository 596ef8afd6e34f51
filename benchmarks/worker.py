"""One peer on one workload in a process of its own: reads commands from stdin, answers one JSON line each.

python benchmarks/worker.py PEER WORKLOAD     peers: eager, tilewright, inductor, onnxruntime, openvino
setup   -> import, build, compile, first call: {"first_call": s, "cpu": s, "error": ..., "peak_mb": ...}
run N   -> {"times": [s, ...]}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tilewright.driver.accuracy import reference_outputs, relative_error
from workloads import build

Call = Callable[[], torch.Tensor]


def eager(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Call:
    return lambda: model(*inputs)


def compiled(backend: str) -> Callable[..., Call]:
    def make(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Call:
        run = torch.compile(model, backend=backend)
        return lambda: run(*inputs)

    return make


def onnxruntime(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Call:
    import onnxruntime as ort

    path = os.path.join(tempfile.mkdtemp(), "model.onnx")
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def openvino(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Call:
    import openvino as ov

    converted = ov.convert_model(model, example_input=inputs)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = ov.compile_model(converted, "CPU", hints).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])


PEERS: dict[str, Callable[..., Call]] = {
    "eager": eager,
    "tilewright": compiled("tilewright"),
    "inductor": compiled("inductor"),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def _setup(peer: str, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Call, dict[str, Any]]:
    begin, cpu = time.perf_counter(), _cpu_seconds()
    call = PEERS[peer](model, inputs)
    output = call()
    facts = {"first_call": time.perf_counter() - begin, "cpu": _cpu_seconds() - cpu, "peak_mb": _peak_mb()}
    reference = reference_outputs(model, inputs)
    return call, facts | {"error": relative_error(output, reference)}


def _cpu_seconds() -> float:
    """User and system time of this process and the compilers it waited for."""
    mine, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


def _peak_mb() -> float:
    """The largest resident size of this process so far (ru_maxrss would count the parent's before exec)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def _times(call: Call, count: int) -> list[float]:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    peer, workload = sys.argv[1:]
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what peers print must not mix with the answers
    model, inputs = build(workload)
    call: Call | None = None
    with torch.no_grad():
        for line in sys.stdin:
            command, *arguments = line.split()
            if command == "setup":
                call, facts = _setup(peer, model, inputs)
                print(json.dumps(facts), file=answer)
            elif command == "run" and call is not None:
                print(json.dumps({"times": _times(call, int(arguments[0]))}), file=answer)


if __name__ == "__main__":
    main()
