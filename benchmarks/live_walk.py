"""Press every button of the Live page in headless Chromium, in both themes at 1440 and 1024 pixels, and keep pictures.

    python benchmarks/live_walk.py FOLDER [--only light-1440]

Ends with the buttons that did not answer, or that left a fault on the page; exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from app_server import chromium, serve
from bench_live import STATE, WAIT, answered, fill, settled, slide

LOOKS = tuple((theme, width) for theme in ("light", "dark") for width in (1440, 1024))
EXAMPLES = ("Indirect object (IOI)", "A question of two steps", "A latent language", "A fact, patched")
ICONS = {"Let it act later.": "arrow_downward", "Let it act earlier.": "arrow_upward", "Remove this edit.": "close"}
TOOLS = ("Cell", "Attention", "Heads", "Everywhere", "Both prompts", "Depth", "History", "Take along")


class Walk:
    """A page, what is pressed on it, and what went wrong."""

    def __init__(self, page: Any, name: str, folder: Path) -> None:
        self.page, self.name, self.folder = page, name, folder
        self.wrong: list[str] = []

    def do(self, what: str, act: Callable[[], Any], refused: bool = False) -> None:
        """Do something, wait for the answer, and look for a fault, or for a refusal where one is due."""
        began = time.perf_counter()
        try:
            act()
            settled(self.page)
        except Exception as error:
            self.wrong.append(f"{self.name}: {what}: {str(error).splitlines()[0]}")
            return
        faults = self.page.locator("[data-testid=stException], [data-testid=stAlertContentError]").all_inner_texts()
        if bool(faults) != refused:
            self.wrong.append(f"{self.name}: {what}: {faults or 'was not refused'}")
        print(f"{self.name:12} {what:40} {time.perf_counter() - began:6.1f} s", flush=True)

    def press(self, label: str, last: bool = False, refused: bool = False) -> None:
        """Press a button by its label."""
        # A shortcut is part of its button's name.
        exact = label not in ("Undo", "Redo")
        buttons = self.page.get_by_role("button", name=label, exact=exact)
        self.do(label, lambda: (buttons.last if last else buttons.first).click(), refused)

    def tool(self, label: str) -> None:
        """Choose a tool."""
        self.choose(f"tool {label}", label)

    def choose(self, what: str, label: str) -> None:
        """Choose one of several, which a page draws as radio buttons or as buttons."""
        either = self.page.get_by_role("radio", name=label).or_(self.page.get_by_role("button", name=label, exact=True))
        self.do(what, lambda: either.first.click())

    def picture(self, what: str) -> None:
        """Take a picture of the whole page."""
        width = self.page.viewport_size["width"]
        height = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        self.page.set_viewport_size({"width": width, "height": min(max(height, 1000) + 40, 3200)})
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=self.folder / f"{self.name}-{what.replace(' ', '-').lower()}.png", timeout=WAIT)


def walk(go: Walk) -> None:
    """Press everything once."""
    page = go.page
    go.picture("open")
    go.press("Got it")
    for example in EXAMPLES:
        go.press(example)
    for show in ("Before", "Difference", "After"):
        go.choose(f"grid {show}", show)
    go.press("Write 20 tokens")
    go.tool("Cell")
    for label in ("Zero", "Mean", "Patch from other", "Skip block", "Repeat block", "Steer to Paris"):
        go.press(label)
        go.press("Undo")
    go.press("Redo")
    go.do("a line", lambda: fill(page, "Add an edit", "scale mlp_out.20 x0.5"))
    go.do("slider", lambda: slide(page))
    go.picture("cell")
    go.do(
        "off",
        lambda: (
            page.get_by_text("on", exact=True)
            .locator("visible=true")
            .or_(page.get_by_role("switch"))
            .first.click(force=True)
        ),
    )
    for name, icon in ICONS.items():
        buttons = page.locator("[class*=live-step] button:not([disabled])", has_text=icon)
        go.do(name, lambda buttons=buttons: buttons.first.click())
    go.do("no edit", lambda: fill(page, "Add an edit", "zap z.1"), refused=True)
    go.press("Clear the stack")
    go.do("a patch", lambda: fill(page, "Add an edit", "patch resid_post.8 @3 from other"))
    for tool in TOOLS[1:]:
        go.tool(tool)
        if tool == "Attention":
            go.press("Knock out edge")
            go.press("Undo")
        if tool == "Heads":
            for label in ("Zero", "Mean", "Patch"):
                go.press(label)
                go.press("Undo")
        if tool == "Everywhere":
            go.press("Everywhere", last=True)
        if tool == "Both prompts":
            go.do("patch it", lambda: page.get_by_role("button", name="Patch it into block").click())
        if tool == "History":
            go.press("Restore")
            go.choose("whole grids", "Whole grids")
        if tool == "Take along":
            go.do("name", lambda: page.get_by_label("Save as").fill("walked"))
            go.press("Save")
            go.press("Reopen")
            for label in ("Notebook", "Session file"):
                go.press(label)
        go.picture(tool)


def main() -> int:
    """Walk in every look that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Where pictures go.")
    parser.add_argument("--only", default="", help="One look, such as dark-1024.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        place = Path(name)
        with serve(place / "runs", place / "store", place / "log.txt") as server:
            for theme, width in LOOKS:
                if given.only and given.only != f"{theme}-{width}":
                    continue
                page = browser.new_page(viewport={"width": width, "height": 1100}, color_scheme=theme)
                page.set_default_timeout(WAIT)
                page.goto(f"{server.url}/live", wait_until="commit")
                page.wait_for_function(f"{STATE} !== undefined")
                answered(page)
                go = Walk(page, f"{theme}-{width}", given.folder)
                walk(go)
                wrong += go.wrong
                page.close()
    print("\n".join(wrong) or "every button answered")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
