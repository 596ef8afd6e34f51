"""How many threads kernels may use, and the OpenMP runtime across `fork`."""

from __future__ import annotations

import torch


def threads() -> int:
    """The number of threads for kernels now."""
    return torch.get_num_threads()
