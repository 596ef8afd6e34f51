"""The pipeline: one flat list of passes, in order, with a reason per line."""

from __future__ import annotations

from ..passes.base import Pass
from ..passes.canonicalize import Canonicalize
from ..passes.choose_layouts import ChooseLayouts
from ..passes.fold_constants import FoldConstants
from ..passes.fold_norms import FoldNorms
from ..passes.fuse_regions import FuseRegions
from ..passes.manager import parse_passes
from ..passes.merge_linears import MergeLinears
from ..passes.pack_weights import PackWeights
from ..passes.plan_memory import PlanMemory
from ..passes.recognize import Recognize
from ..passes.split_bias import SplitBias

DEFAULT_PASSES: tuple[Pass, ...] = (
    Canonicalize(),  # one form for each thing: every later pass looks for one only
    FoldConstants(),  # masks and scales become constants, which recognize reads
    Recognize(),  # before fold-norms, which looks for norms by name
    FoldNorms(),  # before merge-linears: each weight takes the scale of the norm in front of it, then they merge
    MergeLinears(),  # once weights are final
    Canonicalize(),  # slices of merged products and views of composites compose with what reads them
    ChooseLayouts(),  # just before fusion, which takes the permutes that are left into its kernels
    PackWeights(),  # once weights and layouts are final: what is packed here becomes a kernel of ours
    SplitBias(),  # just before fusion, which takes the sums into its kernels
    FuseRegions(),  # sees the final ops: kernels are decided here
    PlanMemory(),  # last: lifetimes are those of kernels
)

_FORMATS_AT = 1 + max(i for i, item in enumerate(DEFAULT_PASSES) if isinstance(item, Canonicalize))
PREPARING, FINISHING = DEFAULT_PASSES[:_FORMATS_AT], DEFAULT_PASSES[_FORMATS_AT:]
"""What runs before weights are put in other formats, and after: once weights are final, before layouts and kernels are decided."""


def passes_from(text: str | None) -> list[Pass]:
    """The passes of `--passes`, None for the default list. Raises PassSyntaxError."""
    return list(DEFAULT_PASSES) if text is None else parse_passes(text)
