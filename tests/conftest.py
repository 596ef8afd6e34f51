"""Fixtures of every folder. That this file lies here also lets tests import `support`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("gate", derandomize=True)  # the gate judges the change, not the draw; runs by hand keep looking
if os.environ.get("CI"):
    settings.load_profile("gate")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code before the test and after it, and seeded random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
