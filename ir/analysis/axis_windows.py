"""Links of what moves, cuts or thins an axis, or reads neighbours along it: slices, padding, joining, convolutions and pooling.

conv(x [n, c, S, w], stride 2, kernel 3, padding 1) -> [n, o, S / 2, w]       result j stands at 2 * j and reads 1 around it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..dims import dim, same
from ..graph import Node
from .axis_dims import Links, tensors
from .places import OUT, How, Label, Link, Step, mixing


def moved(what: str) -> Label:
    return Label(How.WINDOW, reason=what)


def _slice(node: Node) -> Links:
    rank, d = node.tensor.rank, node.attrs["dim"] % node.tensor.rank
    length, start, stop, by = node.inputs[0].shape[d], node.attrs["start"], node.attrs["stop"], node.attrs["step"]
    found = [Link(((0, i), (OUT, i))) for i in range(rank) if i != d or same(node.shape[d], length)]
    if same(node.shape[d], length):
        return found
    if not isinstance(start, int):
        return [*found, Link(((0, d),), mixing("it is cut at a size"))]
    step = Step(by, start, dim(stop - start + by - 1 - length))
    return [*found, Link(((0, d), (OUT, d)), moved("a part of it is taken"), step)]


def _pad(node: Node) -> Links:
    found = []
    for d, (low, high) in enumerate(zip(node.attrs["low"], node.attrs["high"])):
        if same(low, 0) and same(high, 0):
            found.append(Link(((0, d), (OUT, d))))
        elif isinstance(low, int):
            found.append(Link(((0, d), (OUT, d)), moved("it is padded"), Step(1, -low, dim(low + high))))
        else:
            found.append(Link(((0, d),), mixing("it is padded by a size")))
    return found


def _cat(node: Node) -> Links:
    """Where they are joined, each operand stands behind those before it; those that hold the axis must continue each other."""
    d = node.attrs["dim"] % node.tensor.rank
    found = [Link(((OUT, i), *((k, i) for k, _ in tensors(node)))) for i in range(node.tensor.rank) if i != d]
    offset = 0
    for k, x in tensors(node):
        length = x.shape[d]
        if isinstance(offset, int):
            found.append(Link(((k, d), (OUT, d)), moved("other rows stand beside it"), Step(1, -offset, dim(node.shape[d] - length))))
        else:
            found.append(Link(((k, d),), mixing("rows stand before it")))
        offset = dim(offset + length)
    return found


def _window(node: Node, d: int, kernel: int, at: int) -> Link:
    """Spatial dimension number `at` of a convolution or pooling, which is dimension d."""
    attrs = node.attrs
    stride, low = attrs["stride"][at], attrs["padding"][at]
    high = (attrs["padding_after"] or attrs["padding"])[at]
    reach = (kernel - 1) * (attrs["dilation"][at] if attrs.get("dilation") else 1)
    if reach == low == high == 0 and stride == 1:
        return Link(((0, d), (OUT, d)))
    pad = low + high - reach - 1 + stride
    length, count = node.inputs[0].shape[d], node.shape[d]
    if isinstance(length, int) and isinstance(count, int) and (length + pad) // stride != count:
        pad = count * stride - length  # the last window reaches beyond the end
    return Link(((0, d), (OUT, d)), Label(How.WINDOW), Step(stride, -low, pad, reach))


def _space(node: Node, count: int) -> Sequence[int]:
    """The spatial dimensions."""
    rank = node.tensor.rank
    return range(1, 1 + count) if node.attrs["channels_last"] else range(rank - count, rank)


def _conv(node: Node) -> Links:
    attrs, w = node.attrs, node.inputs[1].tensor
    space = _space(node, w.rank - 2)
    channel = node.tensor.rank - 1 if attrs["channels_last"] else 1
    columns = ((1, 1 if attrs["transposed"] else 0), (OUT, channel), *(((2, 0),) if len(node.inputs) > 2 else ()))
    found = [
        Link(((0, 0), (OUT, 0))),
        Link(((0, channel), (1, 0 if attrs["transposed"] else 1)), mixing("channels are summed over")),
        Link(columns) if attrs["groups"] == 1 else Link(columns[:1], mixing("it is cut into groups")),
    ]
    for i, d in enumerate(space):
        kernel = w.shape[2 + i]
        found.append(Link(((1, 2 + i),), mixing("windows are as long as it")))
        if attrs["transposed"] or not isinstance(kernel, int):
            found.append(Link(((0, d),), mixing("a transposed convolution spreads it")))
        else:
            found.append(_window(node, d, kernel, i))
    return found


def _pool(node: Node) -> Links:
    kernel = node.attrs["kernel"]
    space = _space(node, len(kernel))
    sides = [Link(((0, d), (OUT, d))) for d in range(node.tensor.rank) if d not in space]
    return sides + [_window(node, d, k, i) for i, (d, k) in enumerate(zip(space, kernel))]


WINDOWS: dict[str, Callable[[Node], Links]] = {
    "slice": _slice,
    "pad": _pad,
    "cat": _cat,
    "conv": _conv,
    "max_pool": _pool,
    "avg_pool": _pool,
}
