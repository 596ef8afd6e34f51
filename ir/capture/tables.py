"""`NATIVE`: the ATen overloads that have a native form, each with its converter.

`ASSERTIONS` test data and become outputs that are checked after the call; `EFFECT_FREE` restate what capture has already assumed.
"""

from __future__ import annotations

from .aten_constants import CONSTANTS
from .aten_contractions import CONTRACTIONS
from .aten_gather import GATHERS
from .aten_pointwise import POINTWISE
from .aten_recurrences import RECURRENCES
from .aten_reductions import REDUCTIONS
from .aten_views import VIEWS
from .call import Converter

NATIVE: dict[str, Converter] = {**POINTWISE, **REDUCTIONS, **VIEWS, **CONSTANTS, **GATHERS, **CONTRACTIONS, **RECURRENCES}

EFFECT_FREE = frozenset({
    "aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
})  # fmt: skip

ASSERTIONS = frozenset({"aten._assert_async.msg", "aten._assert_async.default"})
