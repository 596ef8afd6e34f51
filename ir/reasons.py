"""Why something was declined: the one closed list of reasons, for rules, passes and analyses."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """Why a rewrite was declined: the closed list that receipts draw from. The value is the sentence a user reads."""

    TILED_AXIS = "reduction over a tiled axis"
    DIFFERENT_SPACE = "the loops of the two have different extents"
    RECOMPUTE = "recomputation would cost more than the bytes saved"
    CYCLE = "fusing would make the kernels wait for each other"
    TOO_LARGE = "the kernel would grow too large"
    LIBRARY_CALL = "one side is a library call"
    NOT_EXPRESSIBLE = "no scalar form for this operation"
    RUNTIME_INTEGER_DIVISION = "integer division by a value known only at run time"
    UNSUPPORTED_DTYPE = "dtype without native arithmetic"
    NOT_CONSTANT = "an operand is not a constant"
    SHARED = "another consumer needs the original value"
    OVERWRITTEN = "it cannot be updated in place"
    DIFFERENT_DEVICE = "operands live on different devices"
    OTHER_DEVICE = "it serves another kind of device"
    PROLOGUE = "an operand of a contraction is computed"
    SECOND_WALK = "one kernel walks one contraction or window"
    SHAPE_MISMATCH = "the shapes do not fit the pattern"
    LAYOUT = "the memory layout cannot be expressed in the index"
    NO_GAIN = "no gain by the cost model"
    SIGNED_ZERO = "the result would differ for -0.0"
    NOT_FINITE = "NaN and infinities would be lost"
    ROUNDING = "the result would be rounded differently"
    MEMORY = "the result takes more memory than what it is made of"
    MIXED = "tokens are mixed, or told by their place"
    STATE = "the operation depends on state of training"
    TRAINING = "gradients are recorded"
    WRITTEN = "the graph writes to it"
    RETURNED = "the graph returns its memory"
    CHANGES = "it changes between calls"
    VARYING_SIZE = "a size differs between calls"
    WHOLE_IMAGE = "it may need the whole image"
    NO_KEY_MASK = "no input is provably a mask of padded keys"
    PADDED_ROWS = "what padding holds would matter"
    NOT_ON_ONE_GPU = "not everything is on one GPU"
