"""One peer on one workload in a process of its own: reads commands from stdin, answers one JSON line each.

python benchmarks/worker.py PEER WORKLOAD
setup   -> builds, compiles and calls once: {"first_call": s, "cpu": s of this process and all it started}
run N   -> {"times": [s, ...]}
finish  -> {"peak_mb": up to the last run, "error": against float64, "notes": [...]}
price   -> {"flops": ..., "read": bytes, "written": bytes} that the workload cannot do without
A command that fails is answered by {"failed": message}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from peers import PEERS, PORTABLE, Call, Notes
from roofline import price
from tilewright.driver.accuracy import to_double
from tilewright.search.metrics import relative_error
from torch import nn
from workloads import WORKLOADS, build, reset


class Session:
    def __init__(self, peer: str, workload: str) -> None:
        self.peer, self.workload = peer, workload
        self.model, self.inputs = build(workload, peer in PORTABLE)
        self.notes = Notes()
        self.call: Call | None = None
        self.peak_mb = 0.0

    def setup(self) -> dict[str, Any]:
        begin, cpu = time.perf_counter(), _cpu_seconds()
        self.call = PEERS[self.peer](self.model, self.inputs, self.notes)
        self._once()
        wall, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
        self.peak_mb = _peak_mb()
        return {"first_call": wall - self.notes.wasted, "cpu": cpu - self.notes.wasted_cpu}

    def _once(self) -> torch.Tensor:
        """One call from where the workload begins."""
        assert self.call is not None, "setup comes first"
        reset(self.model)
        return self.call()

    def run(self, count: str) -> dict[str, Any]:
        times: list[float] = []
        for _ in range(int(count)):
            reset(self.model)
            begin = time.perf_counter()
            self.call()  # type: ignore[misc]
            times.append(time.perf_counter() - begin)
        self.peak_mb = _peak_mb()  # `price` and `finish` build the model once more
        return {"times": times}

    def finish(self) -> dict[str, Any]:
        output = self._once().clone()
        model, inputs = build(self.workload)
        reference = _in_double(model)(*to_double(inputs))
        return {"peak_mb": self.peak_mb, "error": relative_error(output, reference), "notes": self.notes.lines}

    def price(self) -> dict[str, Any]:
        model, inputs = build(self.workload)
        return price(model, inputs, _state(model), WORKLOADS[self.workload].flops)


def _in_double(model: nn.Module) -> nn.Module:
    """The model in float64; experts run one by one there, as grouped products take narrower floats only."""
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return model.double()


def _state(model: nn.Module) -> list[torch.Tensor]:
    """What a model with a cache keeps beside its parameters and buffers."""
    cache = getattr(model, "cache", None)
    return [] if cache is None else [t for layer in cache.layers for t in (layer.keys, layer.values)]


def _cpu_seconds() -> float:
    """User and system time of this process and of every process it started, running or waited for."""
    me = psutil.Process()
    total = sum(me.cpu_times()[:4])
    for child in me.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:  # it has just ended, and counts as waited for
            continue
    return total


def _peak_mb() -> float:
    """The largest resident size of this process so far (ru_maxrss would count the parent's before exec)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def main() -> None:
    peer, workload = sys.argv[1:]
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what peers print must not mix with the answers
    session = Session(peer, workload)
    with torch.no_grad():
        for line in sys.stdin:
            command, *arguments = line.split()
            try:
                result = getattr(session, command)(*arguments)
            except Exception as error:  # a peer that fails is a result
                traceback.print_exc()
                text = " ".join(str(error).split())
                result = {"failed": f"{type(error).__name__}: {text}"[:400], "notes": session.notes.lines}
            print(json.dumps(result), file=answer)


if __name__ == "__main__":
    main()
