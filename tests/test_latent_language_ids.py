"""Which token ids say a word: the byte rule on tokenizers that can be checked by hand, and on the shipped ones."""

from __future__ import annotations

from typing import Any

import pytest
from fake_tokenizer import FIRST_BYTE, FakeByteLevel, FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

from analyses.latent_language.ids import Rule, after_quote, clash, prefix_free, resolve, shuffled_controls
from analyses.tokens import token_bytes
from probes.models import Model, fetch_model, load_model

FAKE = FakeTokenizer()
SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=12)


def ids(rule: Rule, *words: str) -> set[int]:
    return {sequence[0] for sequence in rule.sequences(words)}


def test_the_prefix_rule_takes_every_token_that_starts_the_word() -> None:
    rule = Rule(FAKE, "prefix")
    own = {FAKE.id(piece) for piece in ("▁d", "d", "do", "dog", "▁dog")}
    assert ids(rule, "dog") == {*own, FIRST_BYTE + ord("d")}
    assert ids(Rule(FAKE, "prefix", spaces=False), "dog") == {FAKE.id(p) for p in ("d", "do", "dog")} | {
        FIRST_BYTE + ord("d")
    }
    assert ids(Rule(FAKE, "prefix", case=True), "dog") - ids(rule, "dog") == {FAKE.id("Dog"), FIRST_BYTE + ord("D")}


def test_bytes_of_a_character_count_only_where_wanted() -> None:
    first, second, third = "书".encode()
    assert ids(Rule(FAKE, "prefix"), "书") == {FIRST_BYTE + first}
    assert ids(Rule(FAKE, "prefix", byte_tokens=False), "书") == set()
    assert {first, second, third} == {0xE4, 0xB9, 0xA6}


def test_byte_level_pieces_are_read_through_their_alphabet() -> None:
    fake = FakeByteLevel()
    as_bytes = token_bytes(fake)
    assert as_bytes[fake.id("Ġdog")] == b" dog"
    assert as_bytes[fake.id("ä¹¦")] == "书".encode()
    assert ids(Rule(fake, "prefix"), "书") == {fake.id("ä"), fake.id("ä¹"), fake.id("ä¹¦")}
    assert ids(Rule(fake, "prefix", byte_tokens=False), "书") == {fake.id("ä¹¦")}


def test_special_tokens_never_say_a_word() -> None:
    fake = FakeTokenizer(words=("s", "<s"))
    assert not {0, 1, 2} & ids(Rule(fake, "prefix"), "<s>")


def test_a_word_follows_the_quote_without_it() -> None:
    assert after_quote(FAKE, "dog") == (FAKE.id("dog"),)
    assert after_quote(FAKE, " dog") == (FAKE.id("▁dog"),)
    assert Rule(FAKE, "multi_token").sequences(["dot"]) == prefix_free(
        [(FAKE.id("do"), FIRST_BYTE + ord("t")), (FAKE.id("▁d"), FIRST_BYTE + ord("o"), FIRST_BYTE + ord("t"))]
    )
    assert ids(Rule(FAKE, "first_token"), "dot") == {FAKE.id("do"), FAKE.id("▁d")}


def test_a_space_alone_says_no_word() -> None:
    spaced = (FAKE.id("▁"), *(FIRST_BYTE + b for b in "鱼".encode()))
    assert after_quote(FAKE, " 鱼") == spaced
    assert spaced in Rule(FAKE, "multi_token").sequences(["鱼"])
    assert ids(Rule(FAKE, "first_token"), "鱼") == {FIRST_BYTE + "鱼".encode()[0]}
    assert FAKE.id("▁") not in ids(Rule(FAKE, "prefix"), "鱼")


@given(SEQUENCES)
def test_a_prefix_free_cover_keeps_the_event(sequences: list[tuple[int, ...]]) -> None:
    kept = prefix_free(sequences)
    assert not any(clash(a, b) for a in kept for b in kept if a != b)
    assert all(any(s[: len(k)] == k for k in kept) for s in sequences)
    assert set(kept) <= set(sequences)


@given(SEQUENCES, SEQUENCES)
def test_collisions_are_dropped_kept_or_subtracted(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> None:
    sets = {"en": prefix_free(a), "fr": prefix_free(b)}
    clashes = any(clash(x, y) for x in sets["en"] for y in sets["fr"])
    empty = not sets["en"] or not sets["fr"]
    assert resolve(sets, "keep")[1:] == ((None,) if not empty else (resolve(sets, "keep")[1],))
    assert (resolve(sets, "drop")[1] is not None) == (clashes or empty)
    left, reason = resolve(sets, "subtract")
    if reason is None:
        assert not any(clash(x, y) for x in left["en"] for y in left["fr"])
        assert all(set(left[name]) <= set(sets[name]) for name in sets)
        lost = {name: set(sets[name]) - set(left[name]) for name in sets}
        assert all(any(clash(x, y) for y in sets["fr"]) for x in lost["en"])
    else:
        assert "nothing is left" in reason or "no token" in reason


def test_the_reason_of_a_drop_names_the_languages() -> None:
    sets = {"en": ((1,), (2,)), "fr": ((2, 5),), "de": ((7,),)}
    assert resolve(sets, "drop")[1] == "en and fr share 2 tokens"
    assert resolve(sets, "subtract")[0] == {"en": ((1,),), "fr": (), "de": ((7,),)}


def test_controls_are_of_equal_size_and_never_the_words_own() -> None:
    items = [{"en": ((i,), (i + 1,), (i + 50, i)), "fr": ((i + 20,),)} for i in range(8)]
    controls = shuffled_controls(items, seed=3, d_vocab=200)
    others = {s for item in items for s in item["en"]}
    for own, control in zip(items, controls, strict=True):
        assert {name: len(s) for name, s in control.items()} == {name: len(s) for name, s in own.items()}
        assert not any(
            clash(a, b) for s in control.values() for a in s for sequences in own.values() for b in sequences
        )
        assert set(control["en"]) <= others
    assert shuffled_controls(items, seed=3, d_vocab=200) == controls
    assert shuffled_controls(items, seed=4, d_vocab=200) != controls


def test_a_single_item_gets_random_tokens_as_control() -> None:
    [control] = shuffled_controls([{"en": ((4,), (5,)), "fr": ((6,),)}], seed=0, d_vocab=9)
    assert len(control["en"]) == 2
    assert not {(4,), (5,), (6,)} & {*control["en"], *control["fr"]}


def by_decoding(tokenizer: Any, word: str) -> set[int]:
    """The same set for a word in ASCII, from what each token decodes to."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    starts = [(text[1:] if text.startswith(" ") else text) for text in texts]
    return {i for i, text in enumerate(starts) if text and i not in special and word.startswith(text)}


def check_shipped(tokenizer: Any) -> None:
    rule = Rule(tokenizer, "prefix")
    for word in ("book", "mountain"):
        assert ids(rule, word) == by_decoding(tokenizer, word)
    for word in ("书", "река", "œuf"):
        pieces = token_bytes(tokenizer)
        written = after_quote(tokenizer, word)
        assert b"".join(pieces[t] for t in written) == word.encode()
        assert written[0] in ids(rule, word)
        assert all(word.encode().startswith(pieces[t].removeprefix(b" ")) for t in ids(rule, word))
        assert Rule(tokenizer, "multi_token", spaces=False).sequences([word]) == (written,)
    forms = Rule(tokenizer, "first_token").sequences(["dog"])
    assert {tokenizer.decode(s) for s in forms} == {"dog", " dog"}


@pytest.mark.real
def test_the_rules_on_the_default_models_tokenizer(real: Model) -> None:
    check_shipped(real.tokenizer)


@pytest.mark.download
def test_the_rules_on_the_multilingual_models_tokenizer() -> None:
    fetch_model("gemma3-270m", accept_license=True)
    tokenizer = load_model("gemma3-270m").tokenizer
    check_shipped(tokenizer)
    assert len(Rule(tokenizer, "multi_token", spaces=False).sequences(["书"])[0]) == 1
