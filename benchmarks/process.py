"""`Worker`: a process of the benchmark's own, which answers a line of text by a line of JSON."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class Worker:
    """A Python process; `ask` sends one command and waits for its answer.

    arguments: of Python; variables: of its environment, beside ours; log: a file that gets what it prints.
    """

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._log = open(log, "a")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, start_new_session=True,
        )  # fmt: skip

    def ask(self, command: str, limit: float) -> Answer:
        """The answer; {"failed": why} if the process raised, died or took longer than `limit` seconds, after which it is dead."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"failed": self._last_words()}
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if not ready:
            self._kill()
            return {"failed": f"no answer to {command!r} within {limit:.0f} s"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": self._last_words()}

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process and all it started."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
        self._log.close()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        self._process.wait()
        lines = Path(self._log.name).read_text().strip().splitlines()
        return f"exit status {self._process.returncode}: {lines[-1][:300] if lines else ''}"
