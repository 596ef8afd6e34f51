"""The same graph on another device: types, attributes, bodies, plan, and the data of constants where it is asked for."""

import torch
from tilewright.ir.retarget import retarget
from tilewright.ir.text import parse

TEXT = """
graph g(x: f32[s, 8], state: f32[8]) where s in 1..64 stage fused {
  w = constant "w"                                            : f32[8]
  v = constant "w"                                            : f32[8]
  one = full(shape=[8], value=1.0, dtype=f32)                 : f32[8]
  h = region(x, w, label="mul")                               : f32[s, 8] @ 0+(32*s)
    body r(x: f32[s, 8], w: f32[8]) {
      two = full(value=2.0, dtype=f32)                        : f32[]
      m = mul(x, w)                                           : f32[s, 8]
      y = mul(m, two)                                         : f32[s, 8]
      return y
    }
  t = extern[aten.topk.default](h, args=[$0, 2])              : (f32[s, 2], i64[s, 2])
  c = extern[aten._to_copy.default](v, kwargs=[["device", device("cpu")]]) : f32[8]
  a = item(t, index=0)                                        : f32[s, 2]
  n = add(state, one)                                         : f32[8] into state
  write state = n
  return a, c
}
"""


def graph():
    return parse(TEXT, {"w": torch.arange(8.0)})


def test_everything_is_moved():
    text = str(retarget(graph(), "cuda:0"))
    assert text.count("@cuda:0") == text.count("f32[") + text.count("i64[") and 'device("cuda:0")' in text
    assert text.count('device="cuda:0"') == 2, "of the fills, one of them in the body of the region"


def test_there_and_back():
    before = graph()
    moved = retarget(before, "cuda:0")
    assert str(retarget(moved, "cpu")) == str(before), "with the plan of memory: slots, and what is written in place"
    assert str(parse(str(moved), {"w": torch.arange(8.0)})) == str(moved), "weights wait on the CPU"


def test_data_is_moved_once_and_only_where_asked():
    before = graph()
    moved: list[torch.Tensor] = []

    def move(value: torch.Tensor) -> torch.Tensor:
        moved.append(value)
        return value + 1

    def data(graph):
        return [n.attrs["data"] for n in (*graph.outputs[1].inputs, graph.outputs[0].inputs[0].inputs[0].inputs[1])]

    kept = retarget(before, "cuda:0")
    assert data(kept) == data(before)
    v, w = data(retarget(before, "cpu", move))
    assert v is w and len(moved) == 1 and torch.equal(v.value, torch.arange(8.0) + 1)
