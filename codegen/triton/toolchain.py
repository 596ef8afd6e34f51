"""From kernels to callables: print for Triton, launch on tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

from ..kernel import Kernel
from ..target import Compiled, Failed
from .legalize import UnsupportedByTriton
from .program import Program
from .runtime import launch
from .templates import build


def compile_kernels(kernels: Sequence[Kernel]) -> list[Union[Compiled, Failed]]:
    """Every kernel as launch(*tensors, *sizes), or why it has no Triton form. Triton compiles at the first launch."""
    return [_compile(k) for k in kernels]


def _compile(kernel: Kernel) -> Compiled | Failed:
    try:
        program = build(kernel)
    except UnsupportedByTriton as error:
        return Failed(kernel, str(error))
    return Compiled(kernel, program.source, _launcher(program))


def _launcher(program: Program) -> Callable[..., None]:
    names = [b.name for b in (*program.kernel.inputs, *program.kernel.outputs)]
    sizes = program.kernel.sizes

    def run(*arguments: Any) -> None:
        launch(program, dict(zip(names, arguments)), dict(zip(sizes, arguments[len(names) :])))

    return run
