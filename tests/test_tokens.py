"""Tokens as people see them: whole, with their spaces, in bytes where they are no character, and never as markup."""

from __future__ import annotations

import json
from copy import copy
from typing import Any

import pandas as pd
import pytest
from fake_tokenizer import FIRST_BYTE, FakeByteLevel, FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL
from tiny import native

from analyses.results.result import Result
from analyses.results.theme import NAMED, plain, shorten, token_label, visible
from analyses.tokens import joined, token_text, tokens_text
from probes.models import Model
from probes.store import ActivationStore

STRUCK = "<s>&amp;$x$"
TEXTS = st.text(alphabet="ab <>&$é书🦉\n", min_size=1, max_size=24)


TINY = native()


def model(tokenizer: Any) -> Model:
    with_tokenizer = copy(TINY)
    with_tokenizer.tokenizer = tokenizer
    return with_tokenizer


def test_a_word_keeps_the_space_before_it() -> None:
    fake = FakeTokenizer(["▁Once", "▁upon", "▁a", "▁time"])
    ids = [fake.id(piece) for piece in ("▁Once", "▁upon", "▁a", "▁time")]
    assert [token_text(model(fake), token) for token in ids] == [" Once", " upon", " a", " time"]
    assert tokens_text(model(fake), ids) == " Once upon a time"


def test_part_of_a_character_reads_as_its_bytes() -> None:
    fake = FakeTokenizer()
    ids = [FIRST_BYTE + byte for byte in "书".encode()]
    assert [token_text(model(fake), token) for token in ids] == ["\\xe4", "\\xb9", "\\xa6"]
    assert token_text(model(FakeByteLevel()), FakeByteLevel().id("ä¹")) == "\\xe4\\xb9"
    assert tokens_text(model(fake), ids) == "书"
    assert joined([token_text(model(fake), token) for token in ids]) == "书"


def test_a_special_token_and_an_unknown_id_read_as_their_names() -> None:
    assert [token_text(model(FakeTokenizer()), token) for token in (1, 10**6)] == ["<s>", "<1000000>"]
    assert token_text(model(None), 5) == "<5>"


@given(TEXTS)
def test_token_by_token_gives_the_text_back(text: str) -> None:
    fake = FakeTokenizer(["▁", "a", "b", "ab", "▁a", "<", "s>", "&"])
    ids = fake(text)["input_ids"]
    assert tokens_text(model(fake), ids) == text
    assert joined([token_text(model(fake), token) for token in ids]) == text


@given(TEXTS)
def test_what_a_figure_is_given_has_no_markup_and_loses_nothing(text: str) -> None:
    shown = plain(text)
    assert not set("<>$") & set(shown)
    assert shown.replace("&lt;", "<").replace("&gt;", ">").replace("&#36;", "$").replace("&amp;", "&") == text


def test_white_space_and_characters_without_a_sign_are_seen() -> None:
    assert visible(" a\n\tb\x00\u200b") == "·a⏎⇥b\\x00\\u200b"
    assert visible("") == "∅"
    assert token_label("<s>" * 10, 4) == "&lt;s&gt;…"
    assert shorten("<s>" * 10, 4) == "<s>…"


@pytest.mark.parametrize("name", SMALL)
def test_no_text_of_a_table_is_markup_in_a_figure(name: str, store: ActivationStore) -> None:
    analysis, prompts = SMALL[name]
    result = analysis.run(native(), prompts, store=store)
    for figure in result.figures:
        assert STRUCK not in json.dumps(result.figures[figure].drawn(_struck(result)).to_plotly_json(), default=_listed)


def _struck(result: Result) -> dict[str, pd.DataFrame]:
    """Every text that is a token, a prompt or named by a user, with markup before it."""
    free = ("token", "input_token", "full_token", "final_token", "top_token", "text", "said", "expected", *NAMED)
    return {
        name: table.assign(**{column: STRUCK + table[column].astype(str) for column in free if column in table})
        for name, table in result.tables.items()
    }


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
