"""The README's parity table is what its command prints."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "bench_parity.py"))


def table(bench: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = text.partition("<!-- parity: begin -->")[2].partition("<!-- parity: end -->")[0]
    lines = [[part.strip() for part in line.strip("|").split(" | ")] for line in body.strip().splitlines()]
    return {family: tuple(cells) for names, *cells in lines for family in names.split(", ")}


def test_the_readme_has_every_family_and_nothing_that_differs(bench: dict[str, Any]) -> None:
    columns = table(bench)
    assert set(columns) == {*FAMILIES, "family", "largest deviation", "---"} - {"---"} | {
        k for k in columns if "---" in k
    }
    assert all(float(cell) < 1e-5 for cell in columns["largest deviation"])
    assert not any("off by" in cell for cells in columns.values() for cell in cells)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon_grouped", "falcon_sequential"])
def test_the_readme_says_what_the_command_says(bench: dict[str, Any], family: str) -> None:
    assert table(bench)[family] == bench["cells"](family, {})


def test_writing_changes_nothing_but_the_table(bench: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text := "before\n<!-- parity: begin -->\nold\n<!-- parity: end -->\nafter")
    bench["write_between"]("parity", page, "new")
    assert page.read_text() == text.replace("old", "new")
    assert bench["cell"]({"q": None, "k": 1e-7, "v": 0.5}) == "1, without `q`; **v is off by 5e-01**"
