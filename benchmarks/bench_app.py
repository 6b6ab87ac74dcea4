"""The dashboard by the clock: first page, page switches, and memory over a long session, in headless Chromium.

    bathyscope bench app --runs runs/demo            medians of starts and of page switches
    bathyscope bench app --soak 200                  runs, switches and selections; resident memory of the dashboard's process

Starts are measured from the command, in a browser that has never seen the dashboard: to the words that say at which layer
each profile is largest, and to the depth figure, which waits for plotly's own code; a switch from the click to the page's
figure or table. The soak needs no saved runs: it makes its own on a tiny random model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from app_server import Server, chromium, serve

IDLE = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state') === 'notRunning'"
VIEW = {"width": 1440, "height": 1200}
SHOWN = "[data-testid=stMain] .main-svg, [data-testid=stMain] [data-testid=stDataFrame] canvas"
"""A drawn figure or table."""
PAGES = (
    "Voids",
    "Logit lens",
    "Back patching",
    "Communication channels",
    "Concept depth",
    "Latent language",
    "Depth use",
    "Norm removal",
    "Contextual decomposition",
    "Runs",
    "Store",
    "Model",
)


def main() -> None:
    """Prints medians, and the memory of a soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="Folder of the demo's saved runs.")
    parser.add_argument("--starts", type=int, default=5, help="Times the dashboard is started.")
    parser.add_argument("--rounds", type=int, default=3, help="Times every page is visited.")
    parser.add_argument("--soak", type=int, default=0, help="Steps of a long session, instead of the clock.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        if given.soak:
            soak(browser, Path(folder), given.soak)
        else:
            clock(browser, given.runs.resolve(), Path(folder), given.starts, given.rounds)


def clock(browser: Any, runs: Path, folder: Path, starts: int, rounds: int) -> None:
    """Medians of the first page and of page switches."""
    if not any(runs.rglob("result.json")):
        raise SystemExit(f"{runs} holds no saved run: make one with `bathyscope demo --out {runs}`")
    words, figures = zip(*(start(browser, runs, folder) for _ in range(starts)), strict=True)
    print(f"first page after the command: {spread(words)}")
    print(f"depth figure after the command: {spread(figures)}")
    with serve(runs, folder / "store", folder / "log.txt") as server:
        page = opened(browser, server)
        for name in PAGES:  # imports, and figures drawn for the first time
            switch(page, name)
        taken: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name in (*PAGES, "Home"):
                taken.setdefault(name, []).append(switch(page, name))
        for name, seconds in taken.items():
            print(f"switch to {name}: {spread(seconds)}")
        every = [seconds for values in taken.values() for seconds in values]
        print(
            f"all switches: median {statistics.median(every):.2f} s, slowest {max(every):.2f} s; process {server.memory() / 2**20:.0f} MiB"
        )


def spread(seconds: Sequence[float]) -> str:
    """The median, and all values, smallest first."""
    return f"median {statistics.median(seconds):.2f} s of {', '.join(f'{value:.2f}' for value in sorted(seconds))}"


def start(browser: Any, runs: Path, folder: Path) -> tuple[float, float]:
    """Seconds from the command to what the home page says of the runs, and to its figure."""
    began = time.perf_counter()
    with serve(runs, folder / "store", folder / "log.txt") as server:
        page = browser.new_page(viewport=VIEW)
        page.goto(server.url, wait_until="commit")
        page.get_by_text("Layer at which each is largest").wait_for(timeout=120_000)
        words = time.perf_counter() - began
        page.wait_for_selector(SHOWN, timeout=120_000)
        figure = time.perf_counter() - began
        page.close()
        return words, figure


def opened(browser: Any, server: Server) -> Any:
    """A new session on the home page, with its figure drawn."""
    page = browser.new_page(viewport=VIEW)
    page.set_default_timeout(120_000)
    page.goto(server.url, wait_until="commit")
    page.wait_for_selector(SHOWN)
    return page


def link_to(page: Any, name: str) -> Any:
    """The side bar's link to a page."""
    return page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True)


def switch(page: Any, name: str) -> float:
    """Seconds from the click on a page's link to its figure or table."""
    before = page.inner_text("h1")
    began = time.perf_counter()
    link_to(page, name).click()
    page.wait_for_function("old => ![old, undefined].includes(document.querySelector('h1')?.innerText)", arg=before)
    if name != "Store":
        page.wait_for_selector(SHOWN)
    else:
        page.get_by_role("button", name="Verify every shard").wait_for()
    taken = time.perf_counter() - began
    page.wait_for_function(IDLE)
    return taken


def soak(browser: Any, folder: Path, steps: int) -> None:
    """Runs, switches and selections in turn; prints the resident memory of the dashboard's process every 20 steps."""
    from families import make

    make("llama").save_pretrained(folder / "model")
    chance = random.Random(0)
    with serve(folder / "runs", folder / "store", folder / "log.txt") as server:
        page = browser.new_page(viewport=VIEW)
        page.set_default_timeout(120_000)
        page.goto(server.url)
        page.wait_for_selector("h1")
        sizes = []
        for step in range(1, steps + 1):
            act(page, folder / "model", step, chance)
            sizes.append(server.memory())
            if step % 20 == 0:
                print(
                    f"step {step}: {sizes[-1] / 2**20:.1f} MiB, {sizes[-1] / sizes[19] - 1:+.1%} of step 20", flush=True
                )
        print(f"after {steps} steps: {sizes[-1] / sizes[19] - 1:+.1%} of step 20 (limit 10 %)")


def act(page: Any, model: Path, step: int, chance: random.Random) -> None:
    """One step of a session: every fifth a run, else a page and a selection."""
    if step % 5 == 1:
        run(page, model, step, ("Voids", "Logit lens")[step % 2], chance)
        return
    name = chance.choice(["Home", "Voids", "Logit lens", "Runs", "Store", "Model", "Depth use"])
    if link_to(page, name).get_attribute("aria-current") != "page":
        link_to(page, name).click()
    idle(page)
    box = page.get_by_role("combobox", name="Layers").last
    if box.is_enabled():
        box.fill(str(chance.randrange(3)))
        box.press("Enter")
        page.locator("h1").click()  # closes the list, where the layer was chosen already
        idle(page)
    clear = page.locator("button", has_text="Clear the selection").last
    if step % 3 == 0 and clear.is_enabled():
        clear.click()
        idle(page)


def run(page: Any, model: Path, step: int, name: str, chance: random.Random) -> None:
    """Starts a run through the form and waits for its end."""
    link_to(page, name).click()
    page.wait_for_function("name => document.querySelector('h1')?.innerText.includes(name)", arg=name.split()[0])
    idle(page)
    form = page.locator("details", has=page.locator("summary", has_text="New run")).last
    form.wait_for()
    if form.get_attribute("open") is None:
        form.locator("summary").click()
        idle(page)
    prompts = [{"tokens": [chance.randrange(3, 97) for _ in range(6)]} for _ in range(8)]
    for field, text, send in (
        (page.get_by_role("combobox", name="Model"), str(model), "Enter"),
        (page.get_by_label("One prompt a line", exact=True), "\n".join(map(json.dumps, prompts)), "Control+Enter"),
        (page.get_by_label("Name of the run", exact=True), f"run-{step % 20}", "Enter"),
    ):
        field.click()
        field.fill(text)
        field.press(send)
        idle(page)
    tick = page.get_by_role("switch", name="Replace a run of that name").or_(
        page.get_by_label("Replace a run of that name")
    )
    if not tick.first.is_checked():
        page.get_by_text("Replace a run of that name").click()
        idle(page)
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Done in").wait_for()
    idle(page)


def idle(page: Any) -> None:
    """Waits until the page's script has run."""
    page.wait_for_timeout(300)
    page.wait_for_function(IDLE)
    page.locator("button", has_text="Clear the selection").last.wait_for()


if __name__ == "__main__":
    main()
