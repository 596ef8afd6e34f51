"""The driver library of GPUs, through ctypes: loads binaries and describes their kernels for launching (cpp/call.h).

Neither Triton nor a compiler takes part: a machine that runs what another one compiled needs only this.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import FATAL, DeviceLost, TilewrightError
from ..arena import raw_stream
from ..threads import loaded_libraries
from .binary import Binary, runs_on

MAX_THREADS = 0  # an attribute of functions, of the same number for CUDA and HIP
SHARED_BYTES_ALLOWED = 8  # an attribute of CUDA's functions
SHARED_BYTES_FREELY = 48 << 10
"""What a kernel of CUDA's may use without asking."""


class DriverError(TilewrightError):
    """The driver refused to do something."""

    template = "cannot {action}: {reason}"


class DoesNotFit(DriverError):
    """A kernel takes more shared memory or registers than the device has for one program."""


@dataclass(frozen=True)
class Functions:
    """A driver library, and what its functions are called. Those with "" it lacks, or needs not.

    library: its file, without the version. context: makes what `choose` takes of a device; without it, that is the device's number.
    """

    library: str
    versions: tuple[str, ...]
    init: str
    load: str
    find: str
    read: str
    launch: str
    chosen: str
    choose: str
    name: str
    message: str
    device: str = ""
    context: str = ""
    allow: str = ""


FUNCTIONS: dict[str, Functions] = {
    "cuda": Functions(
        "libcuda.so", (".1", ""), init="cuInit", load="cuModuleLoadData", find="cuModuleGetFunction", read="cuFuncGetAttribute",
        launch="cuLaunchKernel", chosen="cuCtxGetCurrent", choose="cuCtxSetCurrent", name="cuGetErrorName", message="cuGetErrorString",
        device="cuDeviceGet", context="cuDevicePrimaryCtxRetain", allow="cuFuncSetAttribute",
    ),
    "hip": Functions(
        "libamdhip64.so", ("", ".7", ".6"), init="hipInit", load="hipModuleLoadData", find="hipModuleGetFunction",
        read="hipFuncGetAttribute", launch="hipModuleLaunchKernel", chosen="hipGetDevice", choose="hipSetDevice",
        name="hipDrvGetErrorName", message="hipDrvGetErrorString",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """architecture: "sm_90", "gfx942"; shared: bytes of shared memory that one program may have."""

    architecture: str
    shared: int


class Launchable(ctypes.Structure):
    """What `launch` in cpp/call.h reads of a kernel."""

    _fields_ = (("launch", ctypes.c_void_p), ("chosen", ctypes.c_void_p), ("choose", ctypes.c_void_p), ("place", ctypes.c_void_p),
                ("function", ctypes.c_void_p), ("threads", ctypes.c_int64), ("shared", ctypes.c_int64))  # fmt: skip

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class Driver:
    """One device. library: the driver's, loaded; facts: of the device; stream: asks for the current one.

    What is loaded stays loaded until the process ends.
    """

    def __init__(self, functions: Functions, library: Any, index: int, facts: Facts, stream: Callable[[], int]) -> None:
        self.facts = facts
        self.stream = stream
        self.index = index
        self._functions = functions
        self._library = library
        self._loaded: dict[tuple[str, str], Launchable] = {}
        self._lock = threading.Lock()
        self._check("start the driver", functions.init, 0)
        self._place = self._find_place()

    def _find_place(self) -> int:
        """What `choose` takes for this device."""
        if not self._functions.context:
            return self.index
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(f"use device {self.index}", self._functions.device, ctypes.byref(device), self.index)
        self._check(f"use device {self.index}", self._functions.context, ctypes.byref(context), device)
        return context.value or 0

    def load(self, binary: Binary) -> Launchable:
        """The kernel, ready to be launched: loaded once per image. Raises DriverError, DoesNotFit where less might fit, and DeviceLost."""
        key = (hashlib.sha256(binary.image).hexdigest(), binary.function)
        with self._lock:
            if key not in self._loaded:
                self._check_target(binary)
                self._loaded[key] = self._chosen(lambda: self._load(binary))
            return self._loaded[key]

    def failed(self, name: str, code: int) -> TilewrightError:
        """The error of a launch of the kernel `name` that returned a number: DriverError, or DeviceLost."""
        return self._error(f"launch {name} on {self._device}", code)

    def _error(self, action: str, code: int) -> TilewrightError:
        return (DeviceLost if code in FATAL else DriverError)(action=action, reason=self._reason(code))

    @property
    def _device(self) -> str:
        return f"device {self.index} ({self.facts.architecture})"

    def _check_target(self, binary: Binary) -> None:
        here = self.facts.architecture
        if not runs_on(binary.target, here):
            reason = f"it was compiled for {binary.target}, and device {self.index} is {here}; compile it for {here}"
            raise DriverError(action=f"load {binary.function}", reason=reason)
        if binary.shared > self.facts.shared:
            reason = f"it takes {binary.shared} bytes of shared memory, and {self._device} has {self.facts.shared} for one program"
            raise DoesNotFit(action=f"load {binary.function}", reason=reason)

    def _chosen(self, work: Callable[[], Launchable]) -> Launchable:
        """Does something with this device chosen, and leaves the one chosen that was."""
        before = ctypes.c_void_p()
        self._check(f"use {self._device}", self._functions.chosen, ctypes.byref(before))
        self._check(f"use {self._device}", self._functions.choose, ctypes.c_void_p(self._place))
        try:
            return work()
        finally:
            self._check(f"leave {self._device}", self._functions.choose, before)

    def _load(self, binary: Binary) -> Launchable:
        action = f"load {binary.function} on {self._device}"
        module, function, most = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self._check(action, self._functions.load, ctypes.byref(module), binary.image)
        self._check(action, self._functions.find, ctypes.byref(function), module, binary.function.encode())
        self._check(action, self._functions.read, ctypes.byref(most), MAX_THREADS, function)
        if binary.threads > most.value:
            reason = f"it runs with {binary.threads} threads per program, and has registers for {most.value}"
            raise DoesNotFit(action=action, reason=reason)
        if self._functions.allow and binary.shared > SHARED_BYTES_FREELY:
            self._check(action, self._functions.allow, function, SHARED_BYTES_ALLOWED, binary.shared)
        launch, chosen, choose = (self._address(name) for name in (self._functions.launch, self._functions.chosen, self._functions.choose))
        return Launchable(launch, chosen, choose, self._place, function, binary.threads, binary.shared)

    def _address(self, name: str) -> int | None:
        return ctypes.cast(self._library[name], ctypes.c_void_p).value

    def _check(self, action: str, function: str, *arguments: Any) -> None:
        """Calls a function of the library; raises what it says: DriverError, or DeviceLost."""
        code = self._library[function](*arguments)
        if code:
            raise self._error(action, code)

    def _reason(self, code: int) -> str:
        """What the driver says of an error: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)."""
        texts: list[str] = []
        for function in (self._functions.name, self._functions.message):
            text = ctypes.c_char_p()
            self._library[function](code, ctypes.byref(text))
            texts.append((text.value or b"").decode(errors="replace"))
        return f"{texts[0] or f'error {code}'}" + (f" ({texts[1]})" if texts[1] else "")


# -- of this machine


@functools.cache
def driver_of(index: int) -> Driver | None:
    """The driver of torch's device of this number; None where there is no such library."""
    functions = FUNCTIONS["cuda" if torch.version.hip is None else "hip"]
    library = _library(functions)
    if library is None:
        return None
    return Driver(functions, library, index, _facts(index), functools.partial(raw_stream, index))


def _library(functions: Functions) -> ctypes.CDLL | None:
    """The one that torch has loaded, else the system's."""
    for path in (*loaded_libraries(functions.library), *(functions.library + version for version in functions.versions)):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _facts(index: int) -> Facts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Facts(properties.gcnArchName.split(":")[0], properties.shared_memory_per_block)
    return Facts(f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin)
