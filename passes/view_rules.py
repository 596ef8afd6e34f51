"""Rules on views for `canonicalize`: compositions, identities, and the ends of cat, pad and layout. All bitwise exact."""

from __future__ import annotations

from typing import Any

from ..ir.dims import dim, same, same_shape
from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.rules import Outcome, Site
from ..ir.types import same_type
from .facts import fit
from .rules import Table


def canonical_dims(node: Node, site: Site) -> Outcome:
    """softmax(x, dim=-1) --> softmax(x, dim=1): no negative dimension numbers; lists of them ascending, all of them spelled out"""
    rank = node.inputs[0].tensor.rank
    attrs = dict(node.attrs)
    if "dim" in attrs:
        attrs["dim"] = attrs["dim"] % max(rank, 1)
    if "dims" in attrs:
        attrs["dims"] = _canonical_list(node, rank)
    if attrs == node.attrs:
        return None
    return OPS[node.op.name](*node.inputs, **attrs)


def _canonical_list(node: Node, rank: int) -> tuple[int, ...]:
    dims = tuple(d % max(rank, 1) for d in node.attrs["dims"])
    if node.op.name == "permute":
        return dims
    whole = node.op.name not in ("flip", "argmax", "argmin", "index", "index_put")
    return tuple(range(rank)) if whole and not dims else tuple(sorted(dims))


def reshape_identity(node: Node, site: Site) -> Outcome:
    """reshape(x, shape of x) --> x; likewise expand"""
    (x,) = node.inputs
    return x if same_type(x.type, node.type) else None


def reshape_of_reshape(node: Node, site: Site) -> Outcome:
    """reshape(reshape(x, a), b) --> reshape(x, b); likewise expand"""
    (x,) = node.inputs
    return OPS[node.op.name](x.inputs[0], shape=node.attrs["shape"]) if x.op is node.op else None


def permute_identity(node: Node, site: Site) -> Outcome:
    """permute(x, [0, 1, 2]) --> x"""
    dims = node.attrs["dims"]
    return node.inputs[0] if dims == tuple(range(len(dims))) else None


def permute_of_permute(node: Node, site: Site) -> Outcome:
    """permute(permute(x, [1, 0]), [1, 0]) --> permute(x, [0, 1])"""
    (x,) = node.inputs
    if x.op.name != "permute":
        return None
    return OPS["permute"](x.inputs[0], dims=tuple(x.attrs["dims"][d] for d in node.attrs["dims"]))


def flip_of_flip(node: Node, site: Site) -> Outcome:
    """flip(flip(x, [0]), [0, 1]) --> flip(x, [1]);  flip(x, []) --> x"""
    (x,) = node.inputs
    if not node.attrs["dims"]:
        return x
    if x.op.name != "flip":
        return None
    return OPS["flip"](x.inputs[0], dims=tuple(sorted(set(x.attrs["dims"]) ^ set(node.attrs["dims"]))))


def view_of_full(node: Node, site: Site) -> Outcome:
    """any view of full(value) --> full(value) of the view's shape"""
    (x,) = node.inputs
    if x.op.name != "full":
        return None
    t = node.tensor
    return OPS["full"](shape=t.shape, value=x.attrs["value"], dtype=t.dtype, device=t.device)


def slice_whole(node: Node, site: Site) -> Outcome:
    """slice(x, start=0, stop=size) --> x"""
    (x,), a = node.inputs, node.attrs
    whole = a["step"] == 1 and same(a["start"], 0) and same(a["stop"], x.shape[a["dim"]])
    return x if whole else None


def slice_of_slice(node: Node, site: Site) -> Outcome:
    """slice(slice(x, 2, 10), 1, 3) --> slice(x, 3, 5) along the same dimension"""
    (x,), a = node.inputs, node.attrs
    if x.op.name != "slice" or x.attrs["dim"] != a["dim"]:
        return None
    inner, count = x.attrs, node.shape[a["dim"]]
    step, start = inner["step"] * a["step"], dim(inner["start"] + inner["step"] * a["start"])
    if step == 1:
        stop = dim(inner["start"] + a["stop"])
    elif isinstance(count, int) and count > 0:
        stop = dim(start + (count - 1) * step + 1)
    else:
        return None
    return OPS["slice"](x.inputs[0], dim=a["dim"], start=start, stop=stop, step=step)


def select_of_slice(node: Node, site: Site) -> Outcome:
    """select(slice(x, 2, 10), 1) --> select(x, 3)"""
    (x,), d = node.inputs, node.attrs["dim"]
    if x.op.name != "slice" or x.attrs["dim"] != d:
        return None
    return OPS["select"](x.inputs[0], dim=d, index=dim(x.attrs["start"] + x.attrs["step"] * node.attrs["index"]))


def slice_of_expand(node: Node, site: Site) -> Outcome:
    """slice(expand(x: [n, 1], [n, 8]), dim=1, ...) --> expand(x, [n, 3]): a repeated dimension needs no slicing"""
    (x,), d = node.inputs, node.attrs["dim"]
    if x.op.name != "expand":
        return None
    source = x.inputs[0]
    lead = len(x.shape) - source.tensor.rank
    if d >= lead and not same(source.shape[d - lead], 1):
        return None
    return OPS["expand"](source, shape=node.shape)


def select_of_expand(node: Node, site: Site) -> Outcome:
    """select(expand(x: [n], [b, n]), dim=0, ...) --> x"""
    (x,), d = node.inputs, node.attrs["dim"]
    if x.op.name != "expand" or d >= len(x.shape) - x.inputs[0].tensor.rank:
        return None
    return fit(x.inputs[0], node.type)


def slice_of_cat(node: Node, site: Site) -> Outcome:
    """slice(cat(x: [4], y: [4]), 5, 7) --> slice(y, 1, 3): inside one part;  select likewise"""
    (x,), a = node.inputs, node.attrs
    if x.op.name != "cat" or x.attrs["dim"] != a["dim"]:
        return None
    start = a["start"] if node.op.name == "slice" else a["index"]
    stop = a["stop"] if node.op.name == "slice" else dim(start + 1)
    offset: Any = 0
    for part in x.inputs:
        size = part.shape[a["dim"]]
        if not all(isinstance(v, int) for v in (offset, size, start, stop)):
            return None
        if offset <= start and stop <= offset + size and part.dtype == node.dtype and start < stop:
            return _within(node, part, start - offset, stop - offset)
        offset += size
    return None


def _within(node: Node, part: Node, start: int, stop: int) -> Node:
    d = node.attrs["dim"]
    if node.op.name == "select":
        return OPS["select"](part, dim=d, index=start)
    return OPS["slice"](part, dim=d, start=start, stop=stop, step=node.attrs["step"])


def cat_parts(node: Node, site: Site) -> Outcome:
    """cat(x) --> x;  cat(cat(a, b), c) --> cat(a, b, c);  parts without elements vanish"""
    d = node.attrs["dim"]
    parts: list[Node] = []
    for part in node.inputs:
        nested = part.op.name == "cat" and part.attrs["dim"] == d and part.dtype == node.dtype
        parts += part.inputs if nested else (part,)
    filled = [p for p in parts if not same(p.shape[d], 0)]
    if not filled:
        return None
    if len(filled) == 1:
        return fit(filled[0], node.type)
    if len(filled) == len(node.inputs):
        return None
    made = OPS["cat"](*filled, dim=d)
    return made if made.dtype == node.dtype else None


def cat_of_slices(node: Node, site: Site) -> Outcome:
    """cat(slice(x, 0, 4), slice(x, 4, 8)) --> slice(x, 0, 8)"""
    d = node.attrs["dim"]
    parts = list(node.inputs[:1])
    for part in node.inputs[1:]:
        joined = _joined(parts[-1], part, d)
        parts[-1:] = [joined] if joined else [parts[-1], part]
    if len(parts) == len(node.inputs):
        return None
    return fit(parts[0], node.type) if len(parts) == 1 else OPS["cat"](*parts, dim=d)


def _joined(a: Node, b: Node, d: int) -> Node | None:
    """One slice for two adjacent ones."""
    both = a.op.name == b.op.name == "slice" and a.inputs == b.inputs and a.attrs["dim"] == b.attrs["dim"] == d
    if not both or a.attrs["step"] != 1 or b.attrs["step"] != 1 or not same(a.attrs["stop"], b.attrs["start"]):
        return None
    return OPS["slice"](a.inputs[0], dim=d, start=a.attrs["start"], stop=b.attrs["stop"])


def index_everywhere(node: Node, site: Site) -> Outcome:
    """index(x: [b, s], iota(b): [b, 1, 1], iota(s): [s], dims=[0, 1]) --> reshape(x, [b, 1, s]): every position in its place"""
    x, *indices = node.inputs
    dims = node.attrs["dims"]
    adjacent = dims[-1] - dims[0] == len(dims) - 1
    rank = node.tensor.rank - x.tensor.rank + len(dims)  # of the indices together
    places = [_counted(i, x.shape[d], rank) for i, d in zip(indices, dims)]
    if not adjacent or None in places or sorted(set(places)) != places:  # type: ignore[type-var]
        return None
    return OPS["reshape"](x, shape=node.shape)


def _counted(index: Node, size: Any, rank: int) -> int | None:
    """The dimension, of `rank` together, along which an index is 0, 1, ... size - 1; None where it is anything else."""
    shape, counted = index.shape, index
    while counted.op.name in ("reshape", "cast"):
        (counted,) = counted.inputs
    if counted.op.name != "iota" or counted.attrs["start"] != 0 or counted.attrs["step"] != 1 or not same(counted.shape[0], size):
        return None
    long = [d for d, n in enumerate(shape) if not same(n, 1)]
    return rank - len(shape) + long[0] if len(long) == 1 else None


def pad_nothing(node: Node, site: Site) -> Outcome:
    """pad(x, low=[0, 0], high=[0, 0]) --> x"""
    return node.inputs[0] if all(same(p, 0) for p in (*node.attrs["low"], *node.attrs["high"])) else None


def layout_of_layout(node: Node, site: Site) -> Outcome:
    """layout(layout(x, s), t) --> layout(x, t)"""
    (x,) = node.inputs
    if x.op.name != "layout":
        return None
    return OPS["layout"](x.inputs[0], strides=node.attrs["strides"], own=node.attrs["own"] or x.attrs["own"])


def strided_identity(node: Node, site: Site) -> Outcome:
    """as_strided(x, shape and strides of x) --> x"""
    (x,), a = node.inputs, node.attrs
    whole = same_shape(a["shape"], x.shape) and same_shape(a["strides"], a["of"]) and same(a["offset"], 0)
    return x if whole else None


_DIMENSIONED = ("softmax", "log_softmax", "cumsum", "cumprod", "cat", "gather", "scatter", "slice_scatter", "cache_update", "sum", "mean",
                "prod", "amax", "amin", "any", "all", "argmax", "argmin", "var")  # fmt: skip

VIEW_RULES: Table = {
    **dict.fromkeys(_DIMENSIONED, (canonical_dims,)),
    "reshape": (reshape_identity, reshape_of_reshape, view_of_full),
    "expand": (reshape_identity, reshape_of_reshape, view_of_full),
    "permute": (canonical_dims, permute_identity, permute_of_permute, view_of_full),
    "flip": (canonical_dims, flip_of_flip, view_of_full),
    "slice": (canonical_dims, slice_whole, slice_of_slice, slice_of_cat, slice_of_expand, view_of_full),
    "select": (canonical_dims, select_of_slice, slice_of_cat, select_of_expand, view_of_full),
    "cat": (canonical_dims, cat_parts, cat_of_slices),
    "index": (index_everywhere,),
    "pad": (pad_nothing,),
    "layout": (layout_of_layout,),
    "as_strided": (strided_identity,),
}
