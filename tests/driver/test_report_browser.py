"""The page in headless Chromium: no error, nothing runs that is not ours, no wider than a phone, opened and sorted by its script."""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from receipts import HOSTILE, encoder, full
from tilewright.driver.receipt import Receipt
from tilewright.driver.report.page import page

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

Browse = Callable[..., str]


@pytest.fixture
def browse(tmp_path) -> Browse:
    """What a page became after its script ran; where the console says anything, the test fails."""

    def run(text: str, *flags: str, width: int = 1200) -> str:
        (tmp_path / "page.html").write_text(text)
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(CHROMIUM), *FLAGS, profile, f"--window-size={width},800", *(flags or ["--dump-dom"]), f"file://{tmp_path}/page.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not complaints, complaints
        return done.stdout

    return run


def _with_script(receipt: Receipt, script: str) -> str:
    """A page with another script behind ours, and without the policy that would forbid it."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page(receipt))
    return text.replace("</body>", f"<script>{script}</script></body>")


def _on_a_phone(receipt: Receipt, width: int) -> str:
    """In a frame of that width, which can be less than a window's; the title tells the width that the page would take."""
    script = "onload = () => { document.title = frames[0].document.documentElement.scrollWidth + ',' + frames[0].innerWidth }"
    frame = f'<iframe width="{width}" height="700" frameborder="0" srcdoc="{html.escape(page(receipt))}"></iframe>'
    return f"<!doctype html><title></title>{frame}<script>{script}</script>"


def _title(document: str) -> str:
    return re.findall(r"<title>(.*?)</title>", document)[0]


def test_the_script_runs_and_nothing_complains(browse) -> None:
    document = browse(page(full()))
    assert document.count("<th scope") > 20 and '<th scope="col"><button' in document
    assert re.search(r'aria-label="module"><button type="button" aria-current="true">model</button>', document)


def test_hostile_names_run_nothing(browse) -> None:
    """An alert would stop the page, an image would be an element or an error of the policy."""
    document = browse(page(full(HOSTILE)))
    assert "<img" not in document and "onerror" in document and "<main>" in document and "</footer>" in document


def test_a_phone_does_not_scroll_sideways(browse) -> None:
    for receipt in (full(), full("a" * 300), full(layers=30)):
        assert _title(browse(_on_a_phone(receipt, 320))) == "320,320"


def test_modules_open_and_close(browse) -> None:
    large = replace(full(), before=encoder(40, 20), after=encoder(40, 12, before=False))
    script = """
      const say = [], stage = (side) => document.querySelector(`[data-side=${side}] .stage`);
      const crumbs = (side) => document.querySelector(`[data-side=${side}] .crumbs`).textContent;
      const state = () => ["before", "after"].map(crumbs).join("|");
      const box = () => stage("before").querySelector("[data-open]");
      say.push(state());
      box().dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
      say.push(state());
      box().dispatchEvent(new MouseEvent("click", { bubbles: true }));
      say.push(state());
      stage("before").dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
      say.push(state());
      document.querySelector("[data-side=after] .crumbs button").click();
      say.push(state(), document.activeElement.closest("[data-side]").dataset.side);
      document.title = say.join(";");
    """
    closed, first, second, up, again, focus = _title(browse(_with_script(large, script))).replace("encoder.layer.", "").split(";")
    assert closed == "model|model" == again and focus == "after"
    assert first == "model / (0-19)|model / (0-19)"
    assert second == "model / (0-19) / 0|model / (0-19) / 0"
    assert up == first


def test_the_graph_is_enlarged(browse) -> None:
    script = """
      const stage = document.querySelector(".stage"), width = () => Number(stage.firstElementChild.getAttribute("width"));
      const sizes = [width()];
      for (const key of ["+", "-", "-", "0"]) {
        stage.dispatchEvent(new KeyboardEvent("keydown", { key }));
        sizes.push(width());
      }
      document.title = sizes.join();
    """
    start, larger, back, smaller, fitted = map(float, _title(browse(_with_script(full(), script))).split(","))
    assert larger == pytest.approx(1.25 * start) and back == pytest.approx(start) == fitted and smaller < start


def test_tables_are_sorted_by_numbers(browse) -> None:
    script = """
      const table = document.querySelector("#kernels table");
      const column = () => [...table.tBodies[0].rows].map((row) => row.cells[5].textContent);
      const title = table.tHead.rows[0].cells[5], seen = [column()];
      for (let i = 0; i < 2; i++) { title.firstChild.click(); seen.push(column(), title.getAttribute("aria-sort")); }
      document.title = seen.join(";");
    """
    assert _title(browse(_with_script(full(), script))) == "2 MB,8 MB;8 MB,2 MB;descending;2 MB,8 MB;ascending"


def test_two_thousand_ops_stay_quick(browse) -> None:
    large = replace(full(), before=encoder(100, 20), after=encoder(100, 20, before=False))
    script = "document.title = [document.querySelectorAll('*').length, performance.now()].join();"
    elements, milliseconds = map(float, _title(browse(_with_script(large, script))).split(","))
    assert elements < 3000 and milliseconds < 20_000


@pytest.mark.parametrize("width", [320, 1280])
def test_light_and_dark(browse, tmp_path, width) -> None:
    """The corner of the picture is the paper: bright, and dark for who likes it so."""
    found = []
    for scheme in (1, 0):  # of Chromium: 0 is dark
        picture = tmp_path / f"{scheme}.png"
        browse(page(full()), f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}", width=width)
        assert picture.read_bytes()[16:24] == struct.pack(">II", width, 800)
        found.append(_first_pixel(picture))
    assert min(found[0]) > 200 and max(found[1]) < 60


def _first_pixel(path: Path) -> tuple[int, ...]:
    """Red, green and blue of the upper left corner of a PNG: its row has no row above, and its pixel none before, so no filter counts."""
    import zlib

    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return tuple(zlib.decompress(packed)[1:4])
