"""The page of a receipt: complete, escaped, closed to the network, the same each time, and small; and what it is made of."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from offline import Mlp, run, save_program, sentence
from receipts import HOSTILE, encoder, full
from tilewright.driver import measure
from tilewright.driver.artifact import receipt_of
from tilewright.driver.errors import BadArtifact
from tilewright.driver.outline import Machine, Outline, outline
from tilewright.driver.receipt import Receipt
from tilewright.driver.report.charts import axis
from tilewright.driver.report.drawing import drawn
from tilewright.driver.report.groups import LIMIT, OUTSIDE, View, views
from tilewright.driver.report.layout import GAP, place
from tilewright.driver.report.page import page
from tilewright.ir.text import parse

SECTIONS = (
    "graph", "layers", "front", "attempts", "kernels", "eager", "error", "measured", "time", "applied", "declined", "unmeasured", "memory",
)  # fmt: skip


class Elements(HTMLParser):
    """What a browser would make of the page: elements with attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found:
            self.texts.append((self.found[-1][0], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


# ---- the page


def test_every_section_is_there() -> None:
    text = page(full())
    parsed = Elements(text)
    ids = {attrs["id"] for attrs in parsed.all("section") if "id" in attrs}
    assert ids == set(SECTIONS)
    links = [attrs["href"] for attrs in parsed.all("a")]
    assert sorted(links) == sorted(f"#{name}" for name in ids)
    for word in (
        "3x faster",
        "0.008",
        "80.0% of the limit, 0.01",
        "33%",
        "98%",
        "because",
        "the kernel would grow too large",
        "rolled back",
    ):
        assert word in text, word


def test_a_receipt_of_nothing_is_a_page_too() -> None:
    assert "<h1><bdi>empty</bdi></h1>" in page(Receipt("empty"))
    assert "not measured" in page(Receipt("empty", target="sm_90"))


def test_the_same_receipt_gives_the_same_bytes() -> None:
    receipt = full()
    assert page(receipt) == page(Receipt.from_json(receipt.to_json()))


def test_hostile_names_are_text() -> None:
    tame, hostile = Elements(page(full())), Elements(page(full(HOSTILE)))
    count = len(tame.found)
    assert [name for name, _ in hostile.found] == [name for name, _ in tame.found] and count > 100
    assert not [name for name, attrs in hostile.found for key in attrs if key.startswith("on")]
    shown = "".join(data for _, data in hostile.texts)
    assert "onerror" in shown and "{{7*7}}" in shown and "49&" not in shown


def test_the_page_loads_nothing() -> None:
    text = page(full(HOSTILE))
    parsed = Elements(text)
    assert not {name for name, _ in parsed.found} & {"img", "link", "iframe", "object", "embed", "base", "form", "use", "image"}
    for name, attrs in parsed.found:
        assert not {"src", "srcset", "style", "xlink:href", "action"} & attrs.keys(), name
        assert attrs.get("href", "#").startswith("#")
    own = page(full())
    assert "http:" not in own and "https:" not in own and "url(" not in own and "@import" not in own


def test_the_policy_allows_one_style_and_one_script() -> None:
    text = page(full(HOSTILE))
    policy = next(attrs["content"] for attrs in Elements(text).all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'"
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_equal_layers_are_drawn_once() -> None:
    found = views(encoder(60, 30))
    assert len(found) > 60 and len({drawn(view) for view in found}) < 10
    assert len(page(full())) < 120_000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-320, 1e308])
def test_numbers_that_cannot_be_drawn(value) -> None:
    receipt = full()
    assert receipt.spent and receipt.speed and receipt.error
    spent = replace(
        receipt.spent,
        error=value,
        seconds=value,
        limits=dict.fromkeys(receipt.spent.limits, value),
        front=tuple(replace(p, seconds=value, error=value, bytes=value) for p in receipt.spent.front),
        layers=tuple(replace(x, error=value, seconds=value, exact_bits=0, exact_bytes=0) for x in receipt.spent.layers),
        exact_bytes=0,
    )
    seconds = dict.fromkeys(receipt.seconds, value)
    speed, error = replace(receipt.speed, ours=value, eager=value), replace(receipt.error, ours=value, eager=value)
    machine = Machine("m", 1e10, value)
    odd = replace(receipt, spent=spent, seconds=seconds, speed=speed, error=error, machine=machine)
    places = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height|d)="([^"]*)"', page(odd))
    assert places and not [p for p in places if "nan" in p or "inf" in p or "e+" in p]


# ---- what is drawn of a graph


def test_rows_stand_below_what_they_read_and_apart() -> None:
    edges = [(0, 2), (1, 2), (2, 3), (2, 4), (3, 5), (4, 5), (0, 5), (1, 6)]
    placed = place([40.0] * 7, edges)
    assert all(placed.row[a] < placed.row[b] for a, b in edges)
    for i in range(7):
        for j in range(i):
            assert placed.row[i] != placed.row[j] or abs(placed.x[i] - placed.x[j]) >= 40 + GAP - 1e-6
    assert all(x >= 20 and x + 20 <= placed.width + 1e-6 for x in placed.x)
    assert [row for _, row in placed.routes[0, 5]] == list(range(placed.row[0] + 1, placed.row[5]))


def test_a_chain_is_straight() -> None:
    placed = place([40.0, 60.0, 30.0, 90.0], [(0, 1), (1, 2), (2, 3)])
    assert len({round(x, 6) for x in placed.x}) == 1 and placed.row == [0, 1, 2, 3]
    assert place([], []).width == 0


def _shown(found: list[View]) -> int:
    return sum(len([i for i in view.items if i.kind not in ("group", "outside")]) for view in found)


def test_small_graphs_are_drawn_whole() -> None:
    (view,) = views(encoder(2, 4))
    assert {i.kind for i in view.items} == {"input", "op", "outside"} and not view.back


def test_large_graphs_are_drawn_by_module() -> None:
    """2000 ops: every op in exactly one view, no view too large, every group opens one, all within a second's work and 200 kB."""
    graph = encoder(100, 20)
    found = views(graph)
    assert _shown(found) == len(graph.rows) == 2001
    assert all(len(view.items) <= LIMIT + OUTSIDE + 1 for view in found)
    assert sorted(child for view in found for child in view.children) == list(range(1, len(found)))
    assert all(sorted(i.opens for i in view.items if i.opens is not None) == list(range(len(view.children))) for view in found)
    assert len({view.path for view in found}) == len(found)
    assert sum(map(len, {drawn(view) for view in found})) < 200_000


def test_graphs_without_modules_are_drawn_in_runs() -> None:
    rows = ("i0 1 2", *(f"o0 1 2 {k}" for k in range(1999)))
    found = views(Outline(("relu", "", "f32[4]"), rows, (1999,)))
    assert _shown(found) == 2000 and max(len(view.items) for view in found) <= LIMIT + OUTSIDE + 1
    assert not any(view.back for view in found)


def test_many_inputs_are_one_box() -> None:
    rows = (*(["i0 1 2"] * 60), "o3 1 2 " + " ".join(map(str, range(60))))
    first, *rest = views(Outline(("x", "", "f32[4]", "cat"), rows, (60,)))
    assert [i.label for i in first.items if i.kind == "group"] == ["(inputs).(0-19)", "(inputs).(20-39)", "(inputs).(40-59)"]
    assert _shown([first, *rest]) == 61


def test_a_module_that_is_called_twice_reads_itself() -> None:
    words = ("x", "", "f32[4]", "relu", "block.act", "linear", "block.a", "other.b")
    rows = ("i0 1 2", *("o3 4 2 0",) * 30, "o5 6 2 25", *("o3 4 2 31",) * 30, "o5 7 2 32")
    found = views(Outline(words, rows, (62,)))
    assert _shown(found) == 63 and any(view.back for view in found)
    assert "edge back" in "".join(map(drawn, found))


@pytest.mark.parametrize("row", ["o0 1", "z0 1 2", "o0 1 9", "o0 1 2 1", "o0 1 2 -1", "o0 1 2 x", "", "o-1 0 0", "o" + "9" * 5000])
def test_damaged_outlines_are_refused(row) -> None:
    with pytest.raises(ValueError):
        Outline(("relu", "", "f32[4]"), ("i0 1 2", row))
    with pytest.raises(ValueError):
        Outline(("relu", "", "f32[4]"), ("i0 1 2",), results=(1,))


def test_axes_hold_their_values() -> None:
    for values in ([], [5.0], [1.0, 3.0], [0.0], [-4.0, 9.0]):
        found = axis(values, str)
        assert found.low < found.high and all(0 <= found.share(v) <= 1 for v in values) and len(found.ticks()) <= 6
    assert axis([3e-4, 0.0, math.nan, 2e-2], str, log=True).ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])


# ---- outlines


def test_an_outline_leaves_out_what_computes_nothing() -> None:
    graph = parse("""
graph g(x: f32[2, 6]) {
  w = constant "w" : f32[6, 6]  # m.py:1 block.fc
  h = linear(x, w) : f32[2, 6]  # m.py:1 block.fc
  v = reshape(h, shape=[2, 2, 3]) : f32[2, 2, 3]  # m.py:2 block
  r = relu(v) : f32[2, 2, 3]  # m.py:2 block.a,block.b
  return r, h
}""")
    found = outline(graph)
    rows = found.decoded()
    assert [(r.kind, r.op, r.module, r.operands) for r in rows] == [
        ("input", "x", "", ()), ("op", "linear", "block.fc", (0,)), ("op", "relu", "block", (1,)),
    ]  # fmt: skip
    assert found.results == (2, 1)
    assert [r.kind for r in outline(graph, ()).decoded()] == ["input", "library", "eager"]


# ---- receipts read back


def test_receipts_are_read_back_whole() -> None:
    receipt = full()
    assert Receipt.from_json(receipt.to_json()) == receipt


@pytest.mark.parametrize(
    "change, words",
    [
        ({"graph": 3}, "receipt.graph cannot be '3'"),
        ({"kernels": {"a": 1}}, "receipt.kernels"),
        ({"kernels": [{"name": "k0"}]}, "receipt.kernels[0]"),
        ({"speed": {"eager": "<b>", "ours": 1, "runs": 1}}, "receipt.speed.eager"),
        ({"speed": {"eager": 1, "ours": 1, "runs": 10**400}}, "receipt.speed.runs"),
        ({"arena": None}, "receipt.arena"),
        ({"seconds": {"fuse": "long"}}, "receipt.seconds['fuse']"),
        ({"nope": 1}, "has no field 'nope'"),
        ({"before": {"words": ["a"], "rows": ["o0 0 7"]}}, "is no row"),
    ],
)
def test_receipts_of_other_types_are_refused(change, words) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Receipt.from_json(json.dumps(json.loads(full().to_json()) | change))


# ---- from the command line


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    return save_program(tmp_path / "mlp.pt2", Mlp(), (torch.randn(3, 8),))


def test_a_report_from_the_command_line(program, tmp_path, capsys) -> None:
    assert run(program, "--tune", "0", "--json", "receipt.json", "--report", "report.html") == 0
    text = (tmp_path / "report.html").read_text()
    assert "Before" in text and "linear" in text
    for source in ("mlp.tw", "receipt.json"):
        assert run(source, "--html", "again.html", command="explain") == 0
        assert (tmp_path / "again.html").read_text() == text
    receipt = receipt_of("mlp.tw")
    assert receipt.before and receipt.after and receipt.before.weights and receipt.after.weights
    assert {r.op for r in receipt.before.decoded()} >= {"linear", "gelu", "add"}
    capsys.readouterr()
    assert run("mlp.tw", "--html", "no/such/a.html", command="explain") == 2
    assert "No such file or directory" in sentence(capsys)


def test_a_damaged_receipt_is_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.json", "{"), ("b.json", '{"graph": 1}'), ("c.json", "[]"), ("d.json", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadArtifact):
            receipt_of(name)
        assert run(name, "--html", "x.html", command="explain") == 2
        assert "is not a usable" in sentence(capsys)
    assert not (tmp_path / "x.html").exists()
