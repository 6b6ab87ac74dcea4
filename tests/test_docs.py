"""The documentation names what there is: pages, files, words and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analyses.registry import ANALYSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "_generated"} & set(path.parts))
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def words() -> list[str]:
    """The words that the glossary explains."""
    return re.findall(r"^\*\*(.+?)\.\*\*", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)


def spaced(text: str) -> str:
    """A text in lower case, in which `CapturePlan`, `layer_major` and `layer-major` are two words each."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)).lower()


def prose_and_code() -> str:
    """Sources and pages, without the glossary."""
    paths = [path for folder in ("probes", "analyses") for path in (ROOT / folder).rglob("*.py")]
    paths += [page for page in PAGES if page.name != "glossary.md"]
    return spaced(" ".join(path.read_text(encoding="utf-8") for path in paths))


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_a_page_with_its_figure_that_the_index_names(name: str) -> None:
    page, index = DOCS / "methods" / f"{name}.md", (DOCS / "index.md").read_text(encoding="utf-8")
    assert f"```{{gallery}} {name}\n" in page.read_text(encoding="utf-8")
    assert f"methods/{name}.md" in index
    assert f"\nmethods/{name}\n" in index
    assert 0 < (DOCS / "gallery" / f"{name}.png").stat().st_size < 100_000


def test_every_notebook_is_a_tutorial() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^_generated/tutorials/(\w+)$", index, re.MULTILINE))
    assert shown == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_glossary_is_short_and_sorted_and_uses_the_words_of_the_code() -> None:
    assert len(words()) <= 30
    assert words() == sorted(words(), key=str.lower)
    text = prose_and_code()
    assert [word for word in words() if spaced(word) not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_between_pages_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        path = ROOT / "notebooks" / path.name if path.suffix == ".ipynb" else path
        assert path.is_file(), target


def test_the_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = ("probes", "analyses", "app", "tests", "docs", "benchmarks", "notebooks", "studies")
    paths = re.findall(rf"(?<![\w.])((?:{'|'.join(folders)})/[\w/.]*\w)", text)
    assert paths
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []
