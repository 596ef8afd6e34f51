"""Fixtures of every folder. That this file lies here also lets tests import `support`.

Tests whose libraries are missing are skipped, file by file: a machine with a GPU need have no more than the kernels need.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # what needs it is skipped
    settings = None
if settings is not None:
    settings.register_profile("gate", derandomize=True)  # the gate judges the change, not the draw; runs by hand keep looking
    if os.environ.get("CI"):
        settings.load_profile("gate")

OPTIONAL = ("hypothesis", "ortools", "rich", "safetensors", "transformers", "typer")


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A file that imports a library that is not there is skipped; in the gate everything is there, and it is an error."""
    outcome: Any = yield
    report = outcome.get_result()
    missing = re.search(rf"No module named '({'|'.join(OPTIONAL)})[.']", str(report.longrepr)) if report.failed else None
    if missing and not os.environ.get("CI"):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code before the test and after it, and seeded random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
