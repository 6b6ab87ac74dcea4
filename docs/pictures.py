"""Makes the pictures of the documents, by a browser: python docs/pictures.py runs/demo

`depth.png` is the first figure of the demo's report, `dashboard.png` the dashboard's first page on the demo's runs, and `live.png`
the Live page as it opens; with --live that alone, which needs no runs.
"""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from app_server import chromium, serve  # noqa: E402

PATIENCE = 90_000
"""Milliseconds."""
SETTLED = 2500
"""Milliseconds until menus and figures stand still."""


def keep(shot: bytes, name: str) -> None:
    """Write a screenshot as a PNG of 256 colours, which keeps it small."""
    Image.open(BytesIO(shot)).convert("RGB").quantize(256).save(DOCS / name, optimize=True)


def depth_axis(browser: Any, runs: Path) -> None:
    """Take the figure of all analyses from the demo's report."""
    page = browser.new_page(viewport={"width": 1800, "height": 900}, device_scale_factor=1)
    page.goto((runs / "report.html").resolve().as_uri())
    page.wait_for_selector("#depth .plot .main-svg", timeout=PATIENCE)
    page.wait_for_timeout(SETTLED)
    keep(page.locator("#depth .figure").screenshot(), "depth.png")
    page.close()


def dashboard(browser: Any, runs: Path) -> None:
    """Take the dashboard's first page."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(runs.resolve(), Path(folder) / "store", Path(folder) / "log") as server,
    ):
        page = browser.new_page(viewport={"width": 1760, "height": 1240}, device_scale_factor=1)
        page.goto(server.url)
        page.wait_for_selector(".js-plotly-plot .main-svg", timeout=PATIENCE)
        page.wait_for_timeout(SETTLED)
        keep(page.screenshot(), "dashboard.png")
        page.close()


def live(browser: Any) -> None:
    """Take the Live page, with its worked example."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(folder / "runs", folder / "store", folder / "log", "--preload") as server:
            page = browser.new_page(viewport={"width": 1440, "height": 1330}, device_scale_factor=1)
            page.goto(f"{server.url}/live")
            page.get_by_text("blocks run for the edits").wait_for(timeout=PATIENCE)
            page.get_by_text("the model is being loaded").wait_for(state="hidden", timeout=PATIENCE)
            page.get_by_role("button", name="Got it").click()
            page.wait_for_timeout(SETTLED)
            keep(page.screenshot(), "live.png")
            page.close()


if __name__ == "__main__":
    with chromium() as browser:
        if sys.argv[1] != "--live":
            depth_axis(browser, Path(sys.argv[1]))
            dashboard(browser, Path(sys.argv[1]))
        live(browser)
