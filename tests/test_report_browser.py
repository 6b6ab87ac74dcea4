"""A report in a real browser: figures drawn when seen, in the reader's colours, and all of them on paper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_server import CHROMIUM, chromium
from small import SMALL
from tiny import native

from analyses.results.report import write_report
from probes.store import ActivationStore

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM.is_file() and os.environ.get("REQUIRE_BROWSER") != "1",
        reason="no Chromium; REQUIRE_BROWSER=1 makes this fail",
    ),
]
PATIENCE = 90_000
DRAWN = "document.querySelectorAll('.plot .main-svg:first-child').length"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three analyses on a tiny model."""
    folder = tmp_path_factory.mktemp("report")
    store = ActivationStore(folder / "store")
    results = [
        SMALL[name][0].run(native(), SMALL[name][1], store=store) for name in ("logit_lens", "voids", "depth_use")
    ]
    return write_report(results, folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def opened(browser: Any, report: Path, scheme: str, width: int) -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(report.as_uri())
    page.wait_for_selector(".plot .main-svg", timeout=PATIENCE)
    return page


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")])
def test_figures_near_the_view_are_drawn_in_the_colours_of_the_page(
    scheme: str, paper: str, browser: Any, report: Path
) -> None:
    page = opened(browser, report, scheme, 1440)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    background = page.evaluate("document.querySelector('.plot').layout.paper_bgcolor")
    assert background == ("#fff" if scheme == "light" else "#14181d")
    drawn = page.evaluate(DRAWN)
    assert 1 <= drawn < page.evaluate("document.querySelectorAll('.plot').length")
    page.evaluate("document.querySelector('#section-2').scrollIntoView({behavior: 'instant'})")
    page.wait_for_function(f"{DRAWN} > {drawn}", timeout=PATIENCE)
    page.close()


def test_a_narrow_page_scrolls_its_figures_and_never_itself(browser: Any, report: Path) -> None:
    page = opened(browser, report, "light", 400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()


def test_all_figures_are_on_paper_and_light(browser: Any, report: Path) -> None:
    page = opened(browser, report, "dark", 1440)
    page.wait_for_selector("html[data-printable]", timeout=PATIENCE)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    plots = page.evaluate("[...document.querySelectorAll('.plot')].map((plot) => plot.layout?.paper_bgcolor)")
    assert set(plots) == {"#fff"}
    page.close()


def test_paper_is_as_wide_as_every_figure(browser: Any, report: Path) -> None:
    page = opened(browser, report, "dark", 718)
    page.wait_for_selector("html[data-printable]", timeout=PATIENCE)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    inks = page.evaluate("[...document.querySelectorAll('.plot')].map((plot) => plot.layout.font.color)")
    assert set(inks) == {"#1b2733"}, "figures near the view are not drawn again for the dark screen"
    page.close()
