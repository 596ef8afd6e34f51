"""What kernels may use that not every GPU has, nor every Triton: looked up here, and nowhere else.

lacking("descriptors", "sm_80")  -->  "sm_80 has no unit that copies blocks (TMA)"
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """architectures: those of NVIDIA that have it, None for all GPUs; otherwise: what is said of a target that has it not.

    function, parameter: of `triton.language`, where the installed Triton has it; "" for any parameters.
    """

    architectures: range | None
    otherwise: str
    function: str
    parameter: str = ""

    def here(self) -> bool:
        """Whether the installed Triton has it."""
        import triton.language as tl

        function = getattr(tl, self.function, None)
        return function is not None and (not self.parameter or self.parameter in inspect.signature(function).parameters)


FEATURES: dict[str, Feature] = {
    "programs": Feature(None, "", "range", "flatten"),
    "descriptors": Feature(range(90, 1000), "{target} has no unit that copies blocks (TMA)", "make_tensor_descriptor"),
    "specialized": Feature(range(90, 110), "Triton gives no warps of {target} work of their own", "range", "warp_specialize"),
}
"""By the option of a schedule that asks for it."""


@functools.cache
def lacking(option: str, target: str) -> str | None:
    """Why kernels for a target ("sm_90", "gfx942") cannot have an option; None where they can, as far as is known without Triton."""
    feature, found = FEATURES[option], re.fullmatch(r"sm_(\d+)", target)
    if feature.architectures is not None and (found is None or int(found[1]) not in feature.architectures):
        return feature.otherwise.format(target=target)
    if importlib.util.find_spec("triton") is not None and not feature.here():
        return f"the Triton that is installed does not offer {option}"
    return None
