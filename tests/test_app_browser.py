"""The dashboard in a real browser: the journeys of a researcher who has never read the code."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from app_server import CHROMIUM, Server, chromium, serve
from families import make
from small import SMALL
from tiny import native

from analyses.results.result import Result
from app.views.home import MOST
from probes.store import ActivationStore

REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM.is_file() and not REQUIRED, reason="no Chromium; REQUIRE_BROWSER=1 makes this fail"
    ),
]
PATIENCE = 90_000
"""Milliseconds; the first run imports torch twice."""
VISIBLE = 800
"""Pixels of a page that are seen without scrolling."""
MANY = 240
"""Prompts of a run that is still writing when its page has been loaded again."""
PROMPTS = [
    {"tokens": ids, "targets": {"en": [11, 12], "zh": [21, 22]}} for ids in ([5, 6, 7, 8], [9, 10, 31], [33, 34])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("app")
    with serve(folder / "runs", folder / "store", folder / "log.txt") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def profiles(browser: Any) -> dict[str, Any]:
    """A browser's profile for each theme, which keeps the code it has loaded; every page in it is a session of its own."""
    size = {"width": 1440, "height": 1400}
    themes = {theme: browser.new_context(color_scheme=theme, viewport=size) for theme in ("light", "dark")}
    for profile in themes.values():
        profile.set_default_timeout(PATIENCE)
    return themes


@pytest.fixture
def visit(profiles: dict[str, Any], server: Server) -> Iterator[Callable[..., Any]]:
    """Opens a page of the dashboard in a session of its own."""
    pages = []

    def open_page(path: str = "", ready: str = "h1") -> Any:
        page = profiles["light"].new_page()
        pages.append(page)
        page.goto(f"{server.url}/{path}")
        page.wait_for_selector(ready)
        return page

    yield open_page
    for page in pages:
        page.close()


def settle(page: Any) -> None:
    """Waits until the page's script has run; nothing it drew may be a traceback."""
    page.wait_for_timeout(300)  # what was done reaches the server
    page.wait_for_function(
        "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state') === 'notRunning'"
    )
    page.locator("button", has_text="Clear the selection").last.wait_for()  # drawn last
    assert [alert.inner_text() for alert in page.query_selector_all("[data-testid=stException]")] == []


def go(page: Any, name: str) -> None:
    before = page.inner_text("h1")
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
    page.wait_for_function("old => ![old, undefined].includes(document.querySelector('h1')?.innerText)", arg=before)
    settle(page)


def field(page: Any, label: str, text: str) -> None:
    box = page.get_by_label(label, exact=True)
    box.fill(text)
    box.press("Control+Enter" if "prompt a line" in label else "Enter")
    settle(page)


def choose(page: Any, label: str, value: str) -> None:
    """Types into a select box that takes what is not listed."""
    box = page.get_by_role("combobox", name=re.compile(f"{label}$"))
    box.click()
    box.fill(value)
    box.press("Enter")
    settle(page)


def unfold(page: Any, title: str) -> None:
    """Opens an expander, unless it is open."""
    box = page.locator("details", has=page.locator("summary", has_text=title)).last
    box.wait_for()
    if box.get_attribute("open") is None:
        box.locator("summary").first.click()
        settle(page)


def set_up(page: Any, model: Path, prompts: list[dict[str, Any]], name: str) -> None:
    """Fills the form of a new run."""
    unfold(page, "New run")
    choose(page, "Model", str(model))
    field(page, "One prompt a line", "\n".join(map(json.dumps, prompts)))
    if name:
        field(page, "Name of the run", name)


def click_layer(page: Any, layer: int) -> None:
    """Clicks a layer in the column of layers; the figure answers to a pointer that rests on it."""
    page.wait_for_selector(".bars .point")
    page.wait_for_timeout(500)
    box = page.locator(".bars .point").nth(layer).locator("path").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(300)
    page.mouse.click(x, y)


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def test_from_first_start_to_a_download(visit: Callable[..., Any], server: Server, model: Path, tmp_path: Path) -> None:
    page = visit()
    page.get_by_text("No saved run in").wait_for()
    go(page, "Voids")
    set_up(page, model, PROMPTS, "first")
    press(page, "Run")
    page.get_by_text(re.compile(r"Done in .* 3 forward passes")).wait_for()
    settle(page)

    # The run is the one that the command line would have saved, and says how to make it again.
    result = Result.load(server.runs / "first")
    assert result.provenance["counts"]["forwards"] == 3
    unfold(page, "Make this run again")
    page.get_by_test_id("stCode").filter(has_text="bathyscope run voids").wait_for()

    # A layer clicked on the home page is selected everywhere, and in the address.
    go(page, "Home")
    click_layer(page, 1)
    page.wait_for_url("**layers=1**")
    settle(page)
    page.get_by_text("The numbers at layers 1").wait_for()

    # The same prompts serve the next analysis without another forward pass.
    go(page, "Latent language")
    assert json.loads(page.get_by_label("One prompt a line", exact=True).input_value().splitlines()[0]) == PROMPTS[0]
    press(page, "Run")
    page.get_by_text("no forward pass: the store held everything").wait_for()
    settle(page)
    page.get_by_text("Marked: layers 1").wait_for()

    for kind in ("CSV", "Parquet", "HTML", "SVG", "PNG"):
        page.get_by_test_id("stPopoverButton").first.click()
        with page.expect_download() as waiting:
            page.get_by_test_id("stPopoverBody").get_by_role("button", name=kind).click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        if kind in ("CSV", "Parquet"):
            table = pd.read_csv(path) if kind == "CSV" else pd.read_parquet(path)
            assert {"trace", "x", "y"} <= set(table.columns)
        elif kind == "PNG":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ("<svg" if kind == "SVG" else "<html") in path.read_text()[:200]
        page.keyboard.press("Escape")


def test_a_cancelled_run_stops_and_goes_on_where_it_was(visit: Callable[..., Any], server: Server, model: Path) -> None:
    page = visit("voids")
    settle(page)
    many = [{"tokens": [3 + i % 90, 4 + i // 90, 5]} for i in range(MANY)]
    set_up(page, model, many, "long")
    unfold(page, "more options")
    field(page, "max new tokens", "60")
    press(page, "Run")
    page.get_by_text(re.compile(rf"response: [1-9]\d* of {MANY}")).wait_for()
    page.reload()  # the job is found again, with its bar and its button
    page.get_by_text(re.compile(rf"response: [1-9]\d* of {MANY}")).wait_for()
    top = page.get_by_role("button", name="Cancel", exact=True).bounding_box()["y"]
    assert top < page.locator("summary", has_text="New run").bounding_box()["y"] < VISIBLE
    press(page, "Cancel")
    page.get_by_text("What was captured stays in the store").wait_for()
    assert not (server.runs / "long").exists()
    settle(page)
    set_up(page, model, many, "short")
    unfold(page, "more options")
    field(page, "max new tokens", "0")
    press(page, "Run")
    page.get_by_text(re.compile(r"Done in")).wait_for()
    assert Result.load(server.runs / "short").provenance["counts"]["prompts"] == MANY


def test_bad_input_is_refused_with_its_place(visit: Callable[..., Any], server: Server, model: Path) -> None:
    page = visit("logit_lens")
    settle(page)
    set_up(page, model, PROMPTS, "../../escaped")
    press(page, "Run")
    page.get_by_text("run name '../../escaped'").wait_for()
    field(page, "Name of the run", "nowhere")
    choose(page, "Model", "no-such-model")
    press(page, "Run")
    page.get_by_text(
        re.compile(
            "no such model or folder: 'no-such-model'|unknown model 'no-such-model'|model 'no-such-model' is not"
        )
    ).wait_for()
    unfold(page, "New run")
    page.get_by_text("Uploaded", exact=True).click()
    settle(page)
    long = "".join(json.dumps({"tokens": [5, 6]}) + "\n" for _ in range(100_000)).encode()
    for name, data, said in (
        ("broken.jsonl", b'{"tokens": [5]}\n{"tokens": [6\n', "broken.jsonl:2: not JSON"),
        ("../../long.jsonl", long, "long.jsonl:10001: 100,000 lines"),
    ):
        page.set_input_files("input[type=file]", {"name": name, "mimeType": "application/json", "buffer": data})
        page.get_by_text(said).wait_for()
        assert page.get_by_role("button", name="Run", exact=True).is_disabled()
    inside = {path.name for path in server.runs.parent.iterdir()}
    assert inside <= {"runs", "store", "log.txt"}
    assert not any("nowhere" in path.name or "escaped" in path.name for path in server.runs.rglob("*"))


def test_two_sessions_do_not_disturb_each_other(visit: Callable[..., Any], server: Server, model: Path) -> None:
    """Both give the same name, and each sees its own run: the second gets a number."""
    first, second = visit("logit_lens"), visit("logit_lens")
    for page in (first, second):
        settle(page)
        set_up(page, model, PROMPTS, "same")
    press(first, "Run")
    press(second, "Run")
    outcomes = [page.get_by_text(re.compile("Done in")).first.inner_text() for page in (first, second)]
    folders = sorted(Path(re.search(r"Saved in (\S+)\.", outcome)[1]).name for outcome in outcomes)
    assert folders == ["same", "same-2"]  # whichever press the server comes to first
    assert Result.load(server.runs / "same").provenance["counts"]["prompts"] == 3
    assert Result.load(server.runs / "same-2").tables["top"].equals(Result.load(server.runs / "same").tables["top"])
    settle(first)
    assert "layers=" not in first.url + second.url


def test_a_second_prompt_runs_at_once_and_its_result_is_seen(
    visit: Callable[..., Any], server: Server, model: Path
) -> None:
    page = visit("logit_lens")
    settle(page)
    set_up(page, model, PROMPTS[:1], "")
    press(page, "Run")
    page.get_by_text(re.compile("Done in")).wait_for()
    settle(page)
    set_up(page, model, PROMPTS[1:], "")
    press(page, "Run")
    page.get_by_text("logit_lens-tiny-2").first.wait_for()
    settle(page)
    assert Result.load(server.runs / "logit_lens-tiny-2").provenance["counts"]["prompts"] == 2
    assert page.get_by_text(re.compile("Done in")).bounding_box()["y"] < VISIBLE
    assert page.get_by_role("combobox", name=re.compile("Saved run")).bounding_box()["y"] < VISIBLE


def test_a_saved_run_needs_no_model(visit: Callable[..., Any], server: Server, tmp_path: Path) -> None:
    shutil.copytree(_saved(tmp_path), server.runs / "alone")
    page = visit("runs?run=alone&layers=2")
    settle(page)
    page.get_by_text("Top token by layer and position".lower()).or_(page.get_by_text("Lens table")).first.wait_for()
    page.wait_for_selector(".heatmaplayer image, .heatmaplayer .hm")
    page.get_by_text("Marked: layers 2").wait_for()
    page.get_by_role("tab", name="Delete").click()
    settle(page)
    assert page.get_by_role("button", name="Delete", exact=True).is_disabled()


@pytest.fixture(scope="module")
def filled(server: Server) -> Server:
    """The dashboard with a newest run of each analysis."""
    store = ActivationStore(server.runs.parent / "store")
    for name, (analysis, prompts) in SMALL.items():
        analysis.run(native(), prompts, store=store).save(server.runs / name)
    return server


@pytest.fixture(scope="module")
def look(profiles: dict[str, Any], filled: Server) -> Callable[..., Any]:
    """Opens a page of the filled dashboard at a size, in the one session of a theme; loading it anew takes seconds."""
    pages: dict[str, Any] = {}

    def open_page(name: str = "Home", theme: str = "light", width: int = 1440, height: int = 1400) -> Any:
        if theme not in pages:
            pages[theme] = profiles[theme].new_page()
            pages[theme].goto(filled.url)
        page = pages[theme]
        page.set_viewport_size({"width": width, "height": height})
        settle(page)
        link = page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True)
        if page.url.split("?")[0] != link.evaluate("a => a.href"):
            go(page, name)
        return page

    return open_page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_drawn_and_fits(theme: str, look: Callable[..., Any]) -> None:
    """Where SCREENSHOTS names a folder, pictures of all pages stay in it; what fits hangs on no theme."""
    pictures, widths = os.environ.get("SCREENSHOTS"), [1440, 1024] if theme == "light" else [1440]
    Path(pictures or ".").mkdir(parents=True, exist_ok=True)
    page = look(theme=theme, height=1800)
    page.get_by_text("Layer at which each is largest").wait_for()
    settle(page)
    links = page.get_by_test_id("stSidebarNav").get_by_role("link").all_inner_texts()
    names = [link.splitlines()[-1] for link in links]  # an icon's name comes first
    assert len(names) == len(SMALL) + 5
    for name in ["Home", *(name for name in names if name != "Home")]:
        if name != "Home":  # where the page begins
            go(page, name)
        if name == "Live":
            page.get_by_role("grid", name="Lens grid").first.wait_for()
        elif name not in ("Store", "Model"):
            page.wait_for_selector("[data-testid=stMain] .main-svg")
        page.mouse.move(0, 0)
        background = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (theme == "light")
        for width in widths:
            page.set_viewport_size({"width": width, "height": 1800})
            page.wait_for_timeout(400)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            if pictures:
                page.screenshot(path=Path(pictures) / f"{name.lower().replace(' ', '-')}-{theme}-{width}.png")
        widths.reverse()  # a figure drawn anew is what takes long: the next page is first seen at this width


def test_headings_of_home_never_touch(look: Callable[..., Any]) -> None:
    page = look()
    page.get_by_text("Layer at which each is largest").wait_for()
    page.wait_for_selector("[data-testid=stMain] .main-svg .annotation")
    for width in (1440, 1280, 1024, 400):
        page.set_viewport_size({"width": width, "height": 1400})
        page.wait_for_timeout(1500)
        never_touch(page, width)


def never_touch(page: Any, width: int) -> None:
    """Hold the boxes of the panels' headings and of the axes' titles apart."""
    for kind in (".annotation", "[class^=g-x][class$=title]"):
        boxes = [
            box for element in page.query_selector_all(f".main-svg :is({kind})") if (box := element.bounding_box())
        ]
        boxes = [box for box in boxes if box["width"]]
        assert len(boxes) >= min(len(SMALL), MOST)
        boxes.sort(key=lambda box: box["x"])
        assert all(a["x"] + a["width"] <= b["x"] for a, b in pairwise(boxes)), (kind, width)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_code_can_be_read(theme: str, look: Callable[..., Any]) -> None:
    """Each word of code stands out from what lies behind it by 4.5 to 1, as WCAG counts."""
    page = look("Voids", theme)
    unfold(page, "Make this run again")
    page.wait_for_selector("code .token.string")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 5
    assert {word: ratio for word, ratio in contrasts if ratio < 4.5} == {}


CONTRASTS = """() => {
  const part = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => .2126 * part(c[0]) + .7152 * part(c[1]) + .0722 * part(c[2]);
  const read = s => { const m = s.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const words = [];
  for (const code of document.querySelectorAll('code')) {
    const texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      if (!texts.currentNode.textContent.trim()) continue;
      let behind = [255, 255, 255], opacity = 1;
      const chain = [];
      for (let e = texts.currentNode.parentElement; e; e = e.parentElement) chain.unshift(getComputedStyle(e));
      for (const style of chain) { behind = over(read(style.backgroundColor), behind); opacity *= style.opacity; }
      const ink = read(chain.at(-1).color);
      const [a, b] = [light(over([...ink.slice(0, 3), ink[3] * opacity], behind)), light(behind)].sort((x, y) => y - x);
      words.push([texts.currentNode.textContent.trim(), (a + .05) / (b + .05)]);
    }
  }
  return words;
}"""


def test_tool_bars_cover_no_title(look: Callable[..., Any]) -> None:
    page = look("Runs", width=1280)
    page.wait_for_selector("[data-testid=stMain] .main-svg .annotation")
    page.wait_for_timeout(1500)
    page.locator("[data-testid=stPlotlyChart]").first.hover()
    bars = [box for element in page.query_selector_all(".modebar") if (box := element.bounding_box())]
    titles = [box for element in page.query_selector_all(".main-svg .annotation") if (box := element.bounding_box())]
    assert bars
    assert titles
    assert all(bar["y"] + bar["height"] <= title["y"] for bar in bars for title in titles)
    wide = page.evaluate("[...document.querySelectorAll('.dvn-scroller')].map(e => e.scrollWidth - e.clientWidth)")
    assert wide[0] <= 0  # the list of runs shows every column


def _saved(folder: Path) -> Path:
    """A saved run whose model is gone."""
    from tiny import PROMPTS as IDS

    from analyses.logit_lens import LogitLens

    return LogitLens().run(native(), IDS, store=ActivationStore(folder / "store")).save(folder / "run")
