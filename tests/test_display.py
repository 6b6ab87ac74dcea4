"""What a model, a store and a result show of themselves: whole, compact, escaped, and in the page's own colours."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from tiny import PROMPTS

from analyses.logit_lens import LogitLens
from analyses.results.result import Result
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.html_card import Fold, aligned, card, count, size
from probes.models.backends.native import NativeModel
from probes.models.protocol import Faithfulness, Identity
from probes.store import ActivationStore

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Text of a fragment, and its tags checked for balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data + " "


@pytest.fixture
def result(tiny: NativeModel, store: ActivationStore) -> Result:
    return LogitLens(top_k=2).run(tiny, PROMPTS, store=store)


def test_everything_a_card_is_given_is_escaped() -> None:
    html = card(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [Fold(HOSTILE, (HOSTILE,), [(HOSTILE,)])])
    page = Page(html)
    assert "script" not in page.seen
    assert page.words.count(HOSTILE) == 7


def test_a_card_sets_no_colour_of_its_own(tiny: NativeModel, store: ActivationStore, result: Result) -> None:
    for thing in (tiny, store, result):
        html = thing._repr_html_()
        assert not re.search(r"(?<!-)\b(color|background)\s*:", html)
        assert not re.search(r"#[0-9a-fA-F]{3,6}\b", html)
        assert "style" not in Page(html).seen


def test_a_model_shows_its_sizes_and_whether_it_is_faithful(tiny: NativeModel) -> None:
    assert repr(tiny) == (
        "NativeModel('tiny-llama': LlamaForCausalLM, 3 layers of 32; native, float32, sdpa, cpu; "
        f"{len(tiny.faithfulness.identities)} identities hold)"
    )
    words = Page(tiny._repr_html_()).words
    for fact in (
        "tiny-llama",
        "LlamaForCausalLM",
        "3 layers",
        "4 heads of 8 on 2 for keys and values",
        tiny.context.weights,
    ):
        assert fact in words
    for identity in tiny.faithfulness.identities:
        assert identity.name in words


def test_a_model_that_fails_a_check_says_so(tiny: NativeModel) -> None:
    tiny.faithfulness = Faithfulness(
        (Identity("a == b", 0.5, 1e-4), Identity("c == d", 0.0, 1e-4)), {"pattern": HOSTILE}
    )
    assert "1 of 2 identities FAIL" in repr(tiny)
    words = Page(tiny._repr_html_()).words
    assert "1 of 2 identities FAIL" in words
    assert "What it refuses (1)" in words
    assert HOSTILE in words


def test_a_store_shows_what_it_holds(tiny: NativeModel, store: ActivationStore) -> None:
    assert "0 bytes in 0 shards" in Page(store._repr_html_()).words
    assert "Contexts" not in Page(store._repr_html_()).words
    capture(tiny, PROMPTS, [Need("resid_post.*")], store)
    words = Page(store._repr_html_()).words
    assert str(store.root) in words
    assert size(store.bytes_held()) in words
    assert "Contexts (1)" in words
    assert tiny.context.weights in words
    assert "at most 1.0 GiB" in ActivationStore(store.root, max_bytes=2**30)._repr_html_()


def test_a_result_shows_its_tables_and_figures_not_its_rows(result: Result) -> None:
    assert (
        repr(result)
        == "Result(logit_lens on tiny-llama; tables top (84 rows), read (42 rows), curve (15 rows); figures lens, convergence)"
    )
    words = Page(result._repr_html_()).words
    for fact in ("logit_lens", "on tiny-llama", "lens, convergence", "4 forward passes", "top_k", "kl_to_final"):
        assert fact in words
    assert len(result._repr_html_()) < 6000


def test_a_result_escapes_its_notes_columns_and_options(result: Result) -> None:
    table = pd.DataFrame({HOSTILE: [1]})
    hostile = replace(result, notes=(HOSTILE,), tables={"x": table}, options={"words": HOSTILE})
    page = Page(hostile._repr_html_())
    assert page.words.count(HOSTILE) == 3
    assert "script" not in page.seen


def test_a_count_agrees_with_its_noun() -> None:
    assert [count(n, "prompt") for n in (0, 1, 2, 1200)] == ["0 prompts", "1 prompt", "2 prompts", "1,200 prompts"]
    assert [count(n, "forward pass") for n in (1, 2)] == ["1 forward pass", "2 forward passes"]
    assert [count(n, "analysis", "analyses") for n in (1, 2)] == ["1 analysis", "2 analyses"]


SAYING = [
    *(path for folder in ("", "cli", "results", "running") for path in (ROOT / "analyses" / folder).glob("*.py")),
    *(ROOT / "analyses").rglob("*.html"),
    *(ROOT / "probes" / name for name in ("capture/needs.py", "capture/dry_run.py")),
]


@pytest.mark.parametrize("path", SAYING, ids=lambda path: path.stem)
def test_no_page_or_command_writes_a_plural_after_any_number(path: Path) -> None:
    nouns = "prompts|tokens|rows|forwards|forward passes|cells|shards|layers|features|sequences|identities"
    assert not re.findall(rf"\}} (?:{nouns})\b", path.read_text(encoding="utf-8"))


def test_the_cells_of_a_table_stand_below_their_heads() -> None:
    assert aligned(("a", "b"), [("long", 1), ("", "wide")]) == ["a     b", "long  1", "      wide"]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**50, "5,120.0 TiB"),
    ],
)
def test_sizes_read_as_people_say_them(n: int, text: str) -> None:
    assert size(n) == text


def test_a_result_of_an_analysis_that_is_not_registered_still_shows(result: Result) -> None:
    own = replace(result, analysis="own")
    assert "figures lens, convergence" in repr(own), "its card came with it"
    unknown = replace(own, given_card=None)
    assert "none that this version can draw" in repr(unknown)
    assert "none that this version can draw" in Page(unknown._repr_html_()).words
