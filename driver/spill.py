"""Keys and values of a run of tokens in a file: written whole or not at all, and read back only as what was written.

The file is a safetensors one: tensors "0", "1", ..., and in its metadata whose they are, the tokens, and a sum over the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ir.errors import TilewrightError


class Damaged(TilewrightError):
    template = "{path} does not hold what was written: {reason}"


class SpillFolder:
    """A folder of its own under `parent`, gone when nobody holds this any more, and at the latest when Python ends."""

    def __init__(self, parent: str | Path) -> None:
        """Raises OSError where it cannot be made."""
        Path(parent).mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="prefixes-", dir=parent))
        self._made = 0
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def write(self, owner: str, tokens: Sequence[int], tensors: Sequence[torch.Tensor]) -> Path:
        """Raises OSError where the disk takes no more; then nothing is left behind."""
        self._made += 1
        path = self.path / f"{self._made}.safetensors"
        partial = path.with_suffix(".partial")
        about = {"owner": owner, "tokens": json.dumps(list(tokens)), "sum": str(_sum(tensors))}
        try:
            save_file({str(i): t.contiguous() for i, t in enumerate(tensors)}, partial, about)
            os.replace(partial, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)
        return path


def read(path: Path, owner: str, tokens: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """What `write` was given. Raises Damaged for a file that is gone, cut short, changed, or another's."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        same = about["owner"] == owner and json.loads(about["tokens"]) == list(tokens)
        whole = same and about["sum"] == str(_sum(tensors))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise Damaged(path=path, reason=type(error).__name__) from error
    if not whole:
        raise Damaged(path=path, reason="its bytes were changed" if same else "it belongs to another text")
    return [t.to(device) for t in tensors]


def _sum(tensors: Iterable[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data, total)
    return total
