"""Press every button of the Live page in headless Chromium, in both themes at 1440 and 1024 pixels, and keep pictures.

    python benchmarks/live_walk.py FOLDER                    all four
    python benchmarks/live_walk.py FOLDER --only light-1440

Ends with the buttons that did not answer, that left a fault on the page, or that were seen and not pressed; exit code 1 where there is
one. FOLDER/pressed.txt lists what was pressed in each of the four, and how long it took.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from app_server import chromium, serve
from bench_live import STATE, WAIT, answered, fill, loaded, settled, slide

LOOKS = tuple((theme, width) for theme in ("light", "dark") for width in (1440, 1024))
EXAMPLES = ("Indirect object (IOI)", "A question of two steps", "A latent language", "A fact, patched")
ICONS = ("Move later: edit 0", "Move earlier: edit 1", "Remove edit 0")
"""Buttons that show an icon alone."""
OWN = re.compile(
    r"Open$|Help for|Show/hide columns|Download as CSV|Search: |Fullscreen|Toggle|Copy|Close|Clear value|^$"
)
"""Buttons of every list, table and code block, which are Streamlit's own."""
MANY = 400
"""Prompts of a job that is cancelled."""
DRAWN = """() => !document.querySelector('[data-testid=stSkeleton]')
  && [...document.querySelectorAll('[data-testid=stPlotlyChart]')].filter(e => e.checkVisibility()).every(
       e => e.querySelector('.main-svg .plot, .main-svg .heatmaplayer, .main-svg .shapelayer'))
  && [...document.querySelectorAll('[data-testid=stDataFrame]')].filter(e => e.checkVisibility()).every(
       e => e.querySelector('canvas'))"""
"""Whether everything on the page has been drawn."""


class Walk:
    """A page, what is pressed on it, and what went wrong."""

    def __init__(self, page: Any, name: str, folder: Path) -> None:
        self.page, self.name, self.folder = page, name, folder
        self.main = page.get_by_test_id("stMain")
        self.wrong: list[str] = []
        self.log: list[str] = []
        self.seen: set[str] = set()
        self.pressed: set[str] = set()

    def do(self, what: str, act: Callable[[], Any], refused: bool | None = False) -> None:
        """Do something, wait for the answer, and look for a fault, or for a refusal where one is due; None looks for neither."""
        began = time.perf_counter()
        try:
            act()
            settled(self.page)
            # A list or a click in a figure sends its value a moment later.
            self.page.wait_for_timeout(150)
            settled(self.page)
        except Exception as error:
            self.wrong.append(f"{self.name}: {what}: {' '.join(str(error).split())[:300]}")
            print(self.wrong[-1], flush=True)
            return
        faults = self.page.locator("[data-testid=stException], [data-testid=stAlertContentError]").all_inner_texts()
        if refused is not None and bool(faults) != refused:
            self.wrong.append(f"{self.name}: {what}: {faults or 'was not refused'}")
        self.log.append(f"{self.name:12} {what:40} {time.perf_counter() - began:6.1f} s")
        print(self.log[-1], flush=True)
        self.seen |= set(self.names())

    def names(self) -> list[str]:
        """Return the names of the page's own buttons."""
        texts = self.main.get_by_role("button").evaluate_all(
            "all => all.filter(e => e.checkVisibility()).map(e => e.getAttribute('aria-label') || [...e.querySelectorAll('p')].map(p => p.textContent).join(' ')"
            " || e.textContent)"
        )
        return [name for text in texts if not OWN.search(name := text.strip())]

    def press(self, label: str, refused: bool = False) -> None:
        """Press a button by its label."""
        # A shortcut is part of its button's name.
        buttons = self.main.get_by_role("button", name=label, exact=label not in ("Undo", "Redo"))
        self.pressed.add(label)
        self.do(label, lambda: buttons.first.click(), refused)

    def choose_one(self, group: str | re.Pattern[str], label: str) -> None:
        """Choose one of a row of words; the radio button itself lies hidden under its word."""
        words = self.main.get_by_role("radiogroup", name=group).get_by_text(label, exact=True)
        self.do(f"{group if isinstance(group, str) else group.pattern}: {label}", lambda: words.click())

    def fold(self, label: str) -> None:
        """Open a fold or a pop-up by its words."""
        self.pressed.add(label)
        self.do(label, lambda: self.main.get_by_text(label, exact=True).first.click())

    def click_cell(self, title: str, row: int, column: int) -> None:
        """Click a cell of a grid whose title begins so; it must then be the one that is chosen."""
        grid = self.page.get_by_role("grid", name=title).first
        cell = grid.locator(f"#cell-{row}-{column}")
        self.do(f"cell {row}, {column} of {title}", lambda: cell.click())
        if cell.get_attribute("aria-selected") != "true":
            self.wrong.append(f"{self.name}: {title}: the click chose another cell")

    def keys_in(self, title: str, keys: str, row: int, column: int) -> None:
        """Go to a cell of a grid by keys, and choose it; it must then be told, and keep the keyboard."""
        grid = self.page.get_by_role("grid", name=title).first
        self.do(f"{keys} in {title}", lambda: [grid.press(key) for key in (*keys.split(), "Enter")])
        if grid.locator(f"#cell-{row}-{column}").get_attribute("aria-selected") != "true":
            self.wrong.append(f"{self.name}: {title}: the keys chose another cell")
        if not grid.evaluate("e => e.getRootNode().activeElement === e"):
            self.wrong.append(f"{self.name}: {title}: the keyboard was lost")

    def drawn(self) -> None:
        """Wait until everything on the page is drawn and stands still."""
        self.page.wait_for_function(DRAWN)
        self.page.wait_for_timeout(900)

    def picture(self, what: str) -> None:
        """Take a picture of the whole page."""
        width, height = (self.page.viewport_size[side] for side in ("width", "height"))
        self.drawn()
        whole = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        self.page.set_viewport_size({"width": width, "height": min(max(whole, 1000) + 40, 4000)})
        self.drawn()
        self.page.screenshot(path=self.folder / f"{self.name}-{what.replace(' ', '-').lower()}.png", timeout=WAIT)
        self.page.set_viewport_size({"width": width, "height": height})


def walk(go: Walk) -> None:
    """Press everything."""
    go.picture("open")
    go.press("Got it")
    for example in EXAMPLES:
        go.press(example)
    go.press("Write 20 tokens")
    go.picture("written")
    for show in ("Before", "Difference", "After"):
        go.choose_one("Grid", show)
        if show == "Difference":
            go.picture(show)
    _cell(go)
    _stack(go)
    for tool in (_attention, _heads, _everywhere, _both, _take, _depth, _history):
        tool(go)
    # A label may name a token or a place, which another example or cell has otherwise.
    stems = {re.sub(r"(?<=Steer to ).*|\d.*", "", name) for name in go.pressed}
    missed = sorted(name for name in go.seen if not any(stem in name for stem in stems))
    go.wrong += [f"{go.name}: {name}: was seen and not pressed" for name in missed]


def _cell(go: Walk) -> None:
    page = go.page
    go.choose_one("Tools", "Cell")
    go.click_cell("Lens grid", 20, 2)
    go.keys_in("Lens grid", "ArrowUp ArrowRight ArrowRight", 21, 4)
    go.keys_in("Lens grid", "ArrowDown ArrowLeft ArrowLeft", 20, 2)
    for point in ("mlp_out", "attn_out", "resid_mid", "resid_pre", "resid_post"):
        go.choose_one(re.compile("At block"), point)
    for label in ("Zero", "Mean", "Patch from other", "Skip block", "Repeat block", "Steer to Paris"):
        go.press(label)
        go.press("Undo")
    go.press("Redo")
    go.do("Ctrl-Z", lambda: page.keyboard.press("Control+z"))
    go.do("Ctrl-Y", lambda: page.keyboard.press("Control+y"))
    go.picture("cell")


def _stack(go: Walk) -> None:
    page = go.page
    go.do("a line", lambda: fill(page, "Add an edit", "scale mlp_out.20 x0.5"))
    go.do("slider", lambda: slide(page))
    go.picture("stack")
    for _ in range(2):
        go.do("off and on", lambda: page.locator("[class*=live-step] [data-testid=stCheckbox] label").first.click())
    for name in ICONS:
        # An icon is part of its button's name.
        go.pressed.add(name)
        go.do(name, lambda name=name: go.main.get_by_role("button", name=name).click())
    go.do("no edit", lambda: fill(page, "Add an edit", "zap z.1"), refused=True)
    go.picture("refused")
    go.press("Clear the stack")
    go.fold("What can I write?")
    go.picture("forms")
    page.keyboard.press("Escape")
    go.do("a patch", lambda: fill(page, "Add an edit", "patch resid_post.8 @3 from other"))


def _attention(go: Walk) -> None:
    go.choose_one("Tools", "Attention")
    go.fold("Every query")
    go.picture("attention")
    go.press("Knock out edge")
    go.press("Undo")


def _heads(go: Walk) -> None:
    go.choose_one("Tools", "Heads")
    go.click_cell("Direct effect of every head", 24, 4)
    go.picture("heads")
    for label in ("Zero", "Mean", "Patch"):
        go.press(label)
        go.press("Undo")


def _everywhere(go: Walk) -> None:
    go.choose_one("Tools", "Everywhere")
    go.press("Everywhere")
    go.picture("everywhere")


def _both(go: Walk) -> None:
    go.choose_one("Tools", "Both prompts")
    go.pressed.add("Patch it into block")
    go.do("patch it", lambda: go.main.get_by_role("button", name="Patch it into block").click())
    go.picture("both")


def _take(go: Walk) -> None:
    page = go.page
    # A patch is about one prompt, so that no set of prompts runs under it.
    go.press("Clear the stack")
    go.do("a line", lambda: fill(page, "Add an edit", "scale mlp_out.20 x0.5"))
    go.choose_one("Tools", "Take along")
    go.do("a name that is none", lambda: fill(page, "Save as", "no name"))
    go.press("Save", refused=True)
    go.do("a name", lambda: fill(page, "Save as", go.name), refused=None)
    go.press("Save")
    go.press("Reopen")
    for label in ("Notebook", "Session file"):
        go.pressed.add(label)
        go.do(label, lambda label=label: _download(go, label))
    go.fold("Run on a prompt set")
    go.press("Run under these edits", refused=True)
    _give(go, [f"The capital of country {number} is" for number in range(MANY)])
    go.press("Run under these edits")
    go.press("Cancel")
    go.pressed.add("Stopping …")  # what the same button then says
    _look_until(go, "What was captured stays")
    _give(go, ["The capital of Spain is the city of"])
    go.press("Run under these edits")
    _look_until(go, "Done in")
    go.picture("take along")
    go.do("open the run", lambda: _open_run(go))


def _look_until(go: Walk, words: str) -> None:
    for _ in range(60):
        if go.main.get_by_text(words).count():
            return
        go.page.wait_for_timeout(500)
        if go.main.get_by_role("button", name="Look again").count():
            go.press("Look again")
    go.wrong.append(f"{go.name}: {words}: was never said")


def _give(go: Walk, prompts: list[str]) -> None:
    box = go.page.get_by_label("Prompts, one a line")
    go.do("prompts", lambda: (box.fill("\n".join(prompts)), box.press("Control+Enter")), refused=None)


def _open_run(go: Walk) -> None:
    with go.page.context.expect_page() as opened:
        go.main.get_by_role("link", name=re.compile("^Open ")).click()
    opened.value.get_by_text("Read under 1 edit of the model").wait_for()
    opened.value.close()


def _download(go: Walk, label: str) -> None:
    with go.page.expect_download() as download:
        go.main.get_by_role("button", name=label, exact=True).click()
    if not Path(download.value.path()).stat().st_size:
        raise ValueError(f"{label} is empty")


def _depth(go: Walk) -> None:
    go.choose_one("Tools", "Depth")
    if not go.page.locator(".st-key-live-depth").count():
        go.wrong.append(f"{go.name}: Depth: no profile of the job's run")
    go.picture("depth")


def _history(go: Walk) -> None:
    go.choose_one("Tools", "History")
    go.picture("history")
    go.press("Restore")
    go.choose_one("Compare by", "Whole grids")
    go.picture("whole grids")


def main() -> int:
    """Walk in every look that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Where pictures go.")
    parser.add_argument("--only", default="", help="One look, such as dark-1024.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    log: list[str] = []
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        place = Path(name)
        with serve(place / "runs", place / "store", place / "log.txt", "--preload") as server:
            for theme, width in LOOKS:
                if given.only and given.only != f"{theme}-{width}":
                    continue
                page = browser.new_page(viewport={"width": width, "height": 1100}, color_scheme=theme)
                page.set_default_timeout(WAIT)
                page.goto(f"{server.url}/live", wait_until="commit")
                page.wait_for_function(f"{STATE} !== undefined")
                answered(page)
                loaded(page)
                go = Walk(page, f"{theme}-{width}", given.folder)
                walk(go)
                wrong, log = [*wrong, *go.wrong], [*log, *go.log]
                page.close()
    (given.folder / "pressed.txt").write_text("\n".join(log) + "\n", encoding="utf-8")
    print("\n".join(wrong) or "every button answered")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
