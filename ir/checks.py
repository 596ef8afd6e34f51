"""Assertions of a model: outputs of its graph that must be true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def assert_checks(checks: Sequence[tuple[int, str]], outputs: Sequence[Any]) -> None:
    """Raises RuntimeError for an output among `checks` that is false; on a GPU when the device gets there, as torch does."""
    for i, message in checks:
        torch.ops.aten._assert_async.msg(outputs[i], message)
