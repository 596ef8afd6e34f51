"""Runs printed kernels: on a GPU, and in Triton's interpreter, which needs none (and no environment variable).

program = build(kernel)                                  # prints the kernel under its default schedule
launch(program, {"x": x, "out": out}, {"n": 1000})       # GPU tensors: compiled; CPU tensors: interpreted
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import linecache
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction

from ...ir.dims import evaluate
from ...ir.errors import TilewrightError
from ..kernel import Kernel
from .program import MOST_PROGRAMS, Launch, Program
from .scalars import FROM_BYTES
from .templates import is_large, widened


class LaunchError(TilewrightError):
    """The tensors or sizes given to a kernel do not fit it."""

    template = "cannot launch {kernel}: {reason}"


_LOADED: dict[tuple[str, bool, Path | None], dict[str, Any]] = {}


def load(source: str, interpreted: bool = False, directory: Path | None = None) -> dict[str, Any]:
    """The names of a printed module, its kernels compiled by Triton on first launch or interpreted.

    Triton reads a function's source again, so the module is registered with `linecache`; with a `directory` it is also written
    there, atomically, for people and profilers. Modules are loaded once per process.
    """
    key = (source, interpreted, directory)
    if key not in _LOADED:
        filename = _file_name(source, directory)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        names: dict[str, Any] = {"__name__": f"tilewright_triton_{hashlib.sha256(source.encode()).hexdigest()[:16]}"}
        exec(compile(source, filename, "exec"), names)
        _LOADED[key] = {name: _converted(name, value, interpreted) for name, value in names.items()}
        for value in _LOADED[key].values():
            if isinstance(value, (JITFunction, InterpretedFunction)):
                value.fn.__globals__.update({k: v for k, v in _LOADED[key].items() if not k.startswith("__")})
    return _LOADED[key]


def _converted(name: str, value: Any, interpreted: bool) -> Any:
    """`triton.jit` decides by an environment variable which of the two it makes; here the caller does."""
    if interpreted and name == "libdevice":
        return INTERPRETED_LIBDEVICE
    kind, other = (InterpretedFunction, JITFunction) if interpreted else (JITFunction, InterpretedFunction)
    return kind(value.fn) if isinstance(value, other) else value


def _file_name(source: str, directory: Path | None) -> str:
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    if directory is None:
        return f"<tilewright triton {digest}>"
    path = directory / f"{digest}.py"
    if not path.exists() or path.read_text() != source:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            file.write(source)
        os.replace(file.name, path)
    return str(path)


def launch(program: Program, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int] | None = None) -> None:
    """Runs the program on buffers: contiguous tensors by buffer name, inputs and outputs, all on one device.

    sizes: the value of each size symbol. CPU tensors are interpreted, slowly. Raises LaunchError where something does not fit.
    """
    sizes = dict(sizes or {})
    kernel = program.kernel
    _check_sizes(kernel, sizes)
    _check_tensors(kernel, tensors)
    if sizes and is_large(program, sizes):
        program = widened(program) or program
    grids = [_grid(program, one, sizes) for one in program.launches]
    if any(0 in grid for grid in grids):
        return
    _check_blocks(program, sizes)
    device = next(iter(tensors.values())).device
    tensors = {**tensors, **{b.name: torch.empty(evaluate(b.size, sizes), dtype=b.dtype, device=device) for b in program.scratch}}
    for one, grid in zip(program.launches, grids):
        launch_one(program, one, grid, tensors, sizes)


def launch_one(program: Program, one: Launch, grid: tuple[int, ...], tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """One launch of a program over that many programs; the tensors are as they must be, and those for scratch are among them."""
    device = next(iter(tensors.values())).device
    given = (tensors[name] for name in one.buffers)
    arguments = [*(t.view(torch.uint8) if t.dtype in FROM_BYTES else t for t in given), *(sizes[s] for s in program.kernel.sizes)]
    function = load(program.source, device.type == "cpu")[one.function]
    if device.type == "cpu":
        with _interpreting():
            function[grid](*arguments, **one.constants)
        return
    with torch.cuda.device(device):
        options = one.options(program.kernel)
        contextvars.copy_context().run(_with_memory, lambda: function[grid](*arguments, **one.constants, **options))


def _with_memory(work: Callable[[], object]) -> None:
    """Launches what may want memory of the compiler's own: descriptors lie there."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    work()


def _grid(program: Program, one: Launch, sizes: Mapping[str, int]) -> tuple[int, ...]:
    grid = tuple(evaluate(extent, sizes) for extent in one.grid)
    if any(extent > most for extent, most in zip(grid, MOST_PROGRAMS)):
        raise LaunchError(kernel=program.kernel.name, reason=f"{grid} programs are more than the {MOST_PROGRAMS} that a device takes")
    return grid


def _check_tensors(kernel: Kernel, tensors: Mapping[str, torch.Tensor]) -> None:
    for buffer in (*kernel.inputs, *kernel.outputs):
        tensor = tensors.get(buffer.name)
        if tensor is None:
            raise LaunchError(kernel=kernel.name, reason=f"there is no tensor for {buffer.name!r}")
        if tensor.dtype != buffer.dtype:
            raise LaunchError(kernel=kernel.name, reason=f"{buffer.name} is {tensor.dtype}, not {buffer.dtype}")


def _check_sizes(kernel: Kernel, sizes: Mapping[str, int]) -> None:
    missing = [s for s in kernel.sizes if s not in sizes]
    if missing:
        raise LaunchError(kernel=kernel.name, reason=f"there is no value for the size {missing[0]!r}")


def _check_blocks(program: Program, sizes: Mapping[str, int]) -> None:
    """A persistent block must hold the whole inner extent; a symbolic one is known only now."""
    for extent, block in program.whole:
        if evaluate(extent, sizes) > block:
            reason = f"an inner extent of {evaluate(extent, sizes)} does not fit the persistent block of {block}"
            raise LaunchError(kernel=program.kernel.name, reason=reason)


def run(
    program: Program, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int] | None = None, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Launches on freshly allocated outputs and returns them, flat, by buffer name."""
    device = device or next((t.device for t in inputs.values()), torch.device("cpu"))
    env = dict(sizes or {})
    _check_sizes(program.kernel, env)
    outputs = {b.name: torch.empty(evaluate(b.size, env), dtype=b.dtype, device=device) for b in program.kernel.outputs}
    for output, source in program.kernel.inplace:
        outputs[output] = inputs[source]
    launch(program, {**inputs, **outputs}, env)
    return outputs


# The interpreter evaluates blocks with numpy; it has no libdevice, for which torch stands in.

_TORCH_NAMES = {"nearbyint": "round"}
_FUNCTIONS = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "pow", "trunc", "nearbyint", "copysign", "nextafter", "hypot", "fmod",
)  # fmt: skip


def _interpreted_function(name: str) -> Any:
    function = getattr(torch, _TORCH_NAMES.get(name, name))

    def call(*args: Any) -> Any:
        block = next(a for a in args if isinstance(a, tl.tensor))
        values = [torch.from_numpy(np.array(a.handle.data if isinstance(a, tl.tensor) else a, block.handle.data.dtype)) for a in args]
        data = function(*values).numpy()
        blocks = any(a.type.is_block() for a in args if isinstance(a, tl.tensor))  # type: ignore[attr-defined]
        kind = tl.block_type(block.dtype, list(data.shape)) if blocks else block.type
        return tl.tensor(TensorHandle(data, block.dtype), kind)  # type: ignore[arg-type]

    return call


INTERPRETED_LIBDEVICE = SimpleNamespace(**{name: _interpreted_function(name) for name in _FUNCTIONS})
_STANDARD = ("sum", "max", "min", "cumsum", "cumprod", "interleave")


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    """Lets the interpreter call those functions of `tl` that are themselves kernels and check assertions; leaves both as they were."""
    namespaces = (tl, tl.core, tl.math, tl.tensor, interpreter_builder, interpreter)
    before = [dict(vars(n)) for n in namespaces]
    interpreter_builder.options = replace(interpreter_builder.options, debug=True, sanitize_overflow=False)
    interpreter_builder.create_splat = _splat
    interpreter_builder.create_dot = _dot
    interpreter_builder.create_minnumf = functools.partial(interpreter_builder.binary_op, op=np.fmin)  # before Triton 3.9 NaN wins
    interpreter_builder.create_maxnumf = functools.partial(interpreter_builder.binary_op, op=np.fmax)
    interpreter._patch_lang_tensor = functools.partial(_patch_tensor, interpreter._patch_lang_tensor)
    for name in _STANDARD:
        function = getattr(tl, name)
        if isinstance(function, JITFunction):
            setattr(tl, name, InterpretedFunction(function.fn))
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for namespace, names in zip(namespaces, before):
            _restore(namespace, names)


def _patch_tensor(patch: Callable[..., None], tensor: Any, scope: Any) -> None:
    """What the interpreter does to `tl.tensor`. Before Triton 3.9 it cannot loop up to what is computed under a recent numpy."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda block: int(block.handle.data.squeeze()))


def _splat(ret_ty: Any, arg: TensorHandle) -> TensorHandle:
    """One element as a block. What a comparison gives is labelled with the type of its operands: spread out, it must stay a bool."""
    if arg.data.dtype == np.bool_:
        arg = TensorHandle(arg.data, tl.int1)
    return type(interpreter_builder).create_splat(interpreter_builder, ret_ty, arg)


def _dot(a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
    """A product of blocks. bfloat16 is kept as bits, which numpy would multiply as integers."""
    kind, operands = type(interpreter_builder), (_widened(a), _widened(b))
    return kind.create_dot(interpreter_builder, *operands, d, input_precision, max_num_imprecise_acc)


def _widened(block: TensorHandle) -> TensorHandle:
    if block.dtype.scalar != tl.bfloat16:
        return block
    return TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _restore(namespace: Any, names: Mapping[str, Any]) -> None:
    for name in set(vars(namespace)) - set(names):
        delattr(namespace, name)
    for name, value in names.items():
        if vars(namespace).get(name) is not value:
            setattr(namespace, name, value)
