"""The op catalogue: `OPS` maps every name to its one definition; `ops.add`, `ops.linear`, ... are the same objects."""

from __future__ import annotations

from ..errors import UnknownOpError
from ..graph import INPUT, SCALAR
from ..op import Op
from .attention_gradients import ATTENTION_GRADIENTS
from .composites import COMPOSITES
from .constants import CONSTANTS, tensor_type
from .contractions import CONTRACTIONS
from .gathers import GATHERS
from .pointwise import POINTWISE, PROMOTION, Promotion, number_as, operand_dtype, unprintable
from .quantized import QUANTIZED
from .recurrences import RECURRENCES
from .reductions import REDUCTIONS
from .structure import STRUCTURE, Ref
from .views import VIEWS

_TABLES = (
    (INPUT, SCALAR), CONSTANTS, POINTWISE, REDUCTIONS, VIEWS, GATHERS, CONTRACTIONS, RECURRENCES, COMPOSITES, ATTENTION_GRADIENTS,
    QUANTIZED, STRUCTURE,
)  # fmt: skip
OPS: dict[str, Op] = {op.name: op for table in _TABLES for op in table}


def op(name: str) -> Op:
    """The op of that name; raises UnknownOpError."""
    if name not in OPS:
        raise UnknownOpError(name=name)
    return OPS[name]


def __getattr__(name: str) -> Op:
    if name in OPS:
        return OPS[name]
    raise AttributeError(f"there is no op named {name!r}")


__all__ = ["OPS", "PROMOTION", "Op", "Promotion", "Ref", "number_as", "op", "operand_dtype", "tensor_type", "unprintable"]
