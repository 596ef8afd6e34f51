"""Offloading, in the torch.compile door: parameters that a frozen graph needs in another form only move to a file.

    weight: 9 MB of memory               weight: 9 MB of a file, mapped: in memory only while something reads it
    panels: 9 MB of memory      -->      panels: 9 MB of memory

The module stays as usable as before: eager calls, other shapes, state_dict and changes in place work; what is written in place is memory
again, page by page. The file has no name and vanishes with the process.
"""

from __future__ import annotations

import mmap
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..codegen.build import cache_directory
from ..ir.graph import Data, Graph, constants
from .memory import LARGE_BYTES, return_free_memory

LEAST_BYTES = 1 << 18
"""A smaller parameter is not worth a file."""

_addresses = WeakIdKeyDictionary()
"""Parameter -> where its pages are mapped: what another graph has offloaded is not written again."""


def offload(before: Graph, after: Graph) -> None:
    """Moves the constants of `before`, a frozen graph, that `after`, which passes made of it, does not have, to files.

    The constants of `after` are computed on the way, and each parameter goes once nothing needs it any more, so that only a few are held
    in two forms.
    """
    wanted = list(constants(after).values())
    movable = set(constants(before).values()).difference(wanted)
    readers = Counter(source for data in wanted for source in _originals(data))
    directory, freed = cache_directory(), 0
    for data in wanted:
        sources = _originals(data)
        _ = data.value
        readers.subtract(sources)
        done = [s for s in sources if s in movable and not readers[s]]
        movable.difference_update(done)
        freed += sum(_moved(s, directory) for s in done)
        if freed > LARGE_BYTES:
            return_free_memory(freed)
            freed = 0
    return_free_memory(freed + sum(_moved(s, directory) for s in movable))


def _originals(data: Data) -> set[Data]:
    """The constants that one which is yet to be computed is made of, in the end."""
    found: set[Data] = set()
    stack = list(data.sources)
    while stack:
        source = stack.pop()
        stack += source.sources
        if not source.sources:
            found.add(source)
    return found


def _moved(data: Data, directory: Path) -> int:
    """Moves the tensor of a constant; the bytes that it leaves free, 0 where it has to stay."""
    tensor = data.value
    if tensor is None or not _movable(tensor):
        return 0
    try:
        pages = _written(tensor, directory)
    except OSError as error:
        warnings.warn(f"parameters stay in memory: {directory} takes no more ({error.strerror})", RuntimeWarning, 2)
        return 0
    with torch.no_grad():
        mapped = torch.frombuffer(pages, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        tensor.data = mapped
    _addresses[tensor] = mapped.data_ptr()
    return tensor.nbytes


def _movable(tensor: torch.Tensor) -> bool:
    """Whether it has memory for itself, all of it: what shares memory would no longer see what is written to it."""
    if tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES or tensor.untyped_storage().nbytes() != tensor.nbytes:
        return False
    return _uses(tensor) == _uses(torch.empty(1)) and _addresses.get(tensor) != tensor.data_ptr()


def _uses(tensor: torch.Tensor) -> int:
    """How many tensors hold the memory of this one, and one more: the object that is asked."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def _written(tensor: torch.Tensor, directory: Path) -> mmap.mmap:
    """Private pages with the memory of a tensor, of a file without a name."""
    bytes_of = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes_of.numpy().data)
        file.flush()
        return mmap.mmap(file.fileno(), tensor.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
