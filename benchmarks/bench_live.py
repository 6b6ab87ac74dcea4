"""The Live page by the clock, in headless Chromium: medians and 95th percentiles of what a reader waits for.

    bathyscope bench live                       with and without a batch job beside it
    bathyscope bench live --repeats 5 --quick   without the job
    bathyscope bench live --write               also put the table into README.md

`open` is from the address to the answered example, with what the last session kept of it; `the first time` there is nothing kept, and
the model has to be loaded. Every other time is from the press of a key or button to the page that shows its answer. The bounds are those of a quiet machine of two
cores, with smollm2-135m and a prompt of 20 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from app_server import chromium, serve
from marked import write_between

from probes.cache_folder import cache_root

VIEW = {"width": 1440, "height": 1200}
PROMPT = "When the sun had gone down behind the hills, the old man closed the gate and then went"
OTHER = "When the sun had gone down behind the hills, the young man closed the gate and then went a"
BOUNDS = {
    "open, the first time": 6.0, "open": 6.0, "prompt": 1.0, "inspector": 0.3, "edit": 0.7, "slider": 0.4, "slider, with the grid": 0.7, "everywhere": 4.0, "edit beside a job": 2.5,
}  # fmt: skip
"""Seconds that the 95th percentile may take."""
STATE = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state')"
STILL = f"{STATE} === 'notRunning' && !document.querySelector('[data-stale=true]')"
"""Whether nothing on the page is still to be drawn again."""
GRID = "[class*=st-key-live-grid]"
STRIP = "step => [...document.querySelectorAll('[data-live-step]')].some(e => e.dataset.liveStep !== step && e.getClientRects().length)"
"""Whether the strip shows another step."""
SAME = f"""step => [...document.querySelectorAll('{GRID} *')].some(e =>
  [...(e.shadowRoot || e).querySelectorAll('table')].some(t => t.dataset.step === step && t.getClientRects().length))"""
"""Whether the grid, which stands in a tree of its own, shows this step."""
CAPTION = (
    "text => [...document.querySelectorAll('[data-testid=stCaptionContainer]')].some(e => e.textContent.includes(text))"
)
"""Whether a line in small print says something."""
WAIT = 120_000
LOOK = 20
"""Milliseconds between two looks at the page."""
JOB_PROMPTS = 1500
JOB_WAIT = 600
"""Seconds in which the job has to end once the edits were made."""


def main() -> None:
    """Print a table of medians and 95th percentiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="Times each thing is done.")
    parser.add_argument("--quick", action="store_true", help="Without the batch job.")
    parser.add_argument("--write", action="store_true", help="Also put the table between the markers of README.md.")
    given = parser.parse_args()
    # The bounds are those of a machine whose cores are all free for the model, and which keeps sources compiled.
    for name in ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        # A cache that has the models and nothing else, so that the first time is the first time.
        (folder / "cache").mkdir()
        (folder / "cache" / "models").symlink_to(cache_root().resolve() / "models")
        os.environ["BATHYSCOPE_CACHE"] = str(folder / "cache")
        for what in ("open, the first time", "open"):
            with serve(folder / "runs", folder / "store", folder / "log.txt", "--preload") as server:
                page = browser.new_page(viewport=VIEW)
                page.set_default_timeout(WAIT)
                began = time.perf_counter()
                page.goto(f"{server.url}/live", wait_until="commit")
                answered(page)
                taken[what] = [time.perf_counter() - began]
                loaded(page)
                if what == "open":
                    page.get_by_role("button", name="Got it").click()
                    settled(page)
                    stepped(page, partial(fill, page, "Other prompt", OTHER))
                    measure(page, given.repeats, taken)
                    if not given.quick:
                        beside_a_job(page, folder, given.repeats, taken)
                page.close()
    report(taken)
    if given.write:
        write_between("live", Path(__file__).parents[1] / "README.md", markdown(taken, given.repeats))


def p95_of(seconds: list[float]) -> float:
    """Return the 95th percentile by nearest rank, a value that was measured: below 20 of them, the largest."""
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def markdown(taken: dict[str, list[float]], repeats: int) -> str:
    """Return the table as Markdown, with the command that makes it."""
    rows = [
        f"| {name} | {len(seconds)} | {statistics.median(seconds):.2f} s | {p95_of(seconds):.2f} s | {BOUNDS[name]:g} s |"
        for name, seconds in taken.items()
    ]
    head = ["| what | times | median | 95th percentile | bound |", "|---|---|---|---|---|"]
    words = (
        f"`bathyscope bench live --repeats {repeats}`, {date.today():%Y-%m-%d}, {os.cpu_count()} cores of {processor()}: "
        "from the key or button to the answered page, headless Chromium."
    )
    return "\n".join([words, "", *head, *rows])


def processor() -> str:
    """Return the processor's name."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def report(taken: dict[str, list[float]]) -> None:
    """Print the table, and whether each bound holds."""
    print(f"{'what':20} {'n':>3} {'median':>8} {'p95':>8} {'bound':>6}")
    for name, seconds in taken.items():
        p95 = p95_of(seconds)
        bound = BOUNDS[name]
        verdict = "holds" if p95 <= bound else "missed"
        print(f"{name:20} {len(seconds):3} {statistics.median(seconds):7.2f}s {p95:7.2f}s {bound:5.1f}s {verdict}")


def measure(page: Any, repeats: int, taken: dict[str, list[float]]) -> None:
    """Time prompts, cells, edits, slider steps and maps, without anything beside."""
    for i in range(repeats):
        taken.setdefault("prompt", []).append(
            stepped(page, lambda i=i: fill(page, "Prompt", f"{PROMPT} {'abcdefghijklmnopqrstuvwxyz'[i % 26]}"))[1]
        )
        began = time.perf_counter()
        pick(page, (7 * i + 3) % 30, (3 * i + 5) % 20)
        taken.setdefault("inspector", []).append(time.perf_counter() - began)
        taken.setdefault("edit", []).append(
            stepped(page, lambda i=i: fill(page, "Add an edit", f"scale mlp_out.{(5 * i) % 30} x0.{i % 9 + 1}"))[1]
        )
        strip, whole = stepped(page, lambda: slide(page))
        taken.setdefault("slider", []).append(strip)
        taken.setdefault("slider, with the grid", []).append(whole)
        stepped(page, lambda: page.get_by_role("button", name="Clear the stack").click())
    # A patch from a prompt that begins alike would skip the cells before the difference, most of the work: zeros skip none.
    fill(page, "Add an edit", "zero mlp_out.8 @3")
    settled(page)
    page.get_by_text("Everywhere", exact=True).first.click()
    settled(page)
    for i in range(max(2, repeats // 4)):
        taken.setdefault("everywhere", []).append(timed(page, lambda: sweep(page)))
        stepped(page, lambda i=i: fill(page, "Prompt", f"{PROMPT} {'zyxwvutsrqponmlkjihgfedcba'[i % 26]}"))


def stepped(page: Any, act: Callable[[], None]) -> tuple[float, float]:
    """Do what changes the session; return the seconds to the new strip, and to the whole page with the grid of the same step.

    The page looks every `LOOK` milliseconds: a locator's own waiting looks less and less often, at last every half second, and
    looking at every frame makes the browser draw frames that nobody would see, on the cores that the model computes on.
    """
    strip = page.locator("[data-live-step]")
    before = strip.get_attribute("data-live-step")
    began = time.perf_counter()
    act()
    page.wait_for_function(STRIP, arg=before, polling=LOOK)
    seen = time.perf_counter() - began
    page.wait_for_function(SAME, arg=strip.get_attribute("data-live-step"), polling=LOOK)
    page.wait_for_function(STILL, polling=LOOK)
    return seen, time.perf_counter() - began


def beside_a_job(page: Any, folder: Path, repeats: int, taken: dict[str, list[float]]) -> None:
    """Time edits while a batch job runs in the same process, and wait for the job's end."""
    lines = "\n".join(
        json.dumps({"tokens": [300 + (7 * i + j) % 40_000 for j in range(24)]}) for i in range(JOB_PROMPTS)
    )
    page.get_by_text("Take along", exact=True).first.click()
    settled(page)
    page.get_by_text("Run on a prompt set").click()
    settled(page)
    area = page.get_by_label("Prompts, one a line")
    area.fill(lines)
    area.press("Control+Enter")
    settled(page)
    page.get_by_role("button", name="Run under these edits").click()
    settled(page)
    ran = 0
    for i in range(repeats):
        line = f"scale attn_out.{(5 * i) % 30} x0.{i % 9 + 1}"
        _, seconds = stepped(page, lambda line=line: fill(page, "Add an edit", line))
        text = page.inner_text("[data-testid=stMain]")
        if "queued" in text or "running" in text:
            ran += 1
            taken.setdefault("edit beside a job", []).append(seconds)
        timed(page, lambda: page.get_by_role("button", name="Undo").click())
    until = time.monotonic() + JOB_WAIT
    while not any((folder / "runs").rglob("result.json")) and time.monotonic() < until:
        time.sleep(0.5)
    print(
        f"{ran} of {repeats} edits were made while the job ran; the job {'finished' if any((folder / 'runs').rglob('result.json')) else f'did not finish in {JOB_WAIT} s more'}"
    )


def timed(page: Any, act: Callable[[], None]) -> float:
    """Return the seconds from an action to the page that answers it."""
    began = time.perf_counter()
    act()
    settled(page)
    return time.perf_counter() - began


def answered(page: Any) -> None:
    """Wait for the page's last line, which says how long the answer took."""
    page.wait_for_function(CAPTION, arg="blocks run for the edits", polling=LOOK)
    settled(page)


def loaded(page: Any) -> None:
    """Wait until the model has answered what was shown from an earlier session."""
    page.get_by_text("the model is being loaded").wait_for(state="hidden")
    settled(page)


def settled(page: Any) -> None:
    """Wait until the page's script has run: it may need a moment to begin."""
    page.evaluate("() => new Promise(r => setTimeout(r, 40))")
    page.wait_for_function(STILL, polling=LOOK)


def fill(page: Any, label: str, text: str) -> None:
    """Write into a field, and press Enter."""
    field = page.get_by_label(label, exact=True)
    field.fill(text)
    field.press("Enter")


def pick(page: Any, block: int, position: int) -> None:
    """Click a cell of the lens grid, and wait until it is told, and until the buttons below are those of the cell."""
    grid = page.locator(GRID)
    grid.locator(f"#cell-{block}-{position}").click()
    grid.get_by_text(f"block {block}, position {position} ").first.wait_for()
    page.get_by_text(f"At block {block}, position {position}", exact=True).wait_for()
    page.wait_for_function(STILL, polling=LOOK)


def sweep(page: Any) -> None:
    """Press Everywhere, and wait for its map."""
    page.get_by_role("button", name="Everywhere").last.click()
    page.wait_for_function(CAPTION, arg="repeated at every layer", polling=LOOK)


def slide(page: Any) -> None:
    """Move the first slider by a step."""
    page.get_by_role("slider").first.press("ArrowLeft")


if __name__ == "__main__":
    main()
