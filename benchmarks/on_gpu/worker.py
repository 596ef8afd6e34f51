"""Measures rows in a process of its own: a row that hangs or breaks the device costs only itself.

python -m on_gpu.worker [DEVICE]
machine   -> {"name": ..., "torch": ..., ...}
row N     -> what row number N of `rows.ROWS` measures; {"note": why it is left out} or {"failed": message}
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from .clock import in_a_line
from .place import NotHere, Place
from .rows import ROWS


def machine(place: Place) -> dict[str, Any]:
    import triton

    about = torch.cuda.get_device_properties(place.device)
    return {
        "name": about.name, "memory_gb": round(about.total_memory / 1e9), "processors": about.multi_processor_count,
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda or torch.version.hip,
    }  # fmt: skip


def answer(command: str, place: Place) -> dict[str, Any]:
    verb, *arguments = command.split()
    try:
        return machine(place) if verb == "machine" else ROWS[int(arguments[0])].measure(place)
    except NotHere as note:
        return {"note": str(note)}
    except Exception as error:  # a row that fails is a result
        traceback.print_exc()
        return {"failed": in_a_line(error)}


def usable(place: Place) -> bool:
    """Frees what a row took. False where it left the device in a state that no later row can use."""
    try:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.synchronize(place.device)
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def main() -> None:
    place = Place(*sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print must not mix with the answers
    for line in sys.stdin:
        result = answer(line, place)
        good = usable(place)
        print(json.dumps(result if good else {"failed": result.get("failed", "it broke the device")}), file=answers)
        if not good:
            os._exit(1)  # without the clean-up, which would wait for the device


if __name__ == "__main__":
    main()
