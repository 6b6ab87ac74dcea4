"""The tokens of an answer are those that continue its own prompt, whatever the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from families import make
from hypothesis import given
from hypothesis import strategies as st
from real_tokenizers import ANSWERS, KINDS, tokenizer_of

from analyses.answers import Answer, answer_after, clash_note, clashes, continuation, encode, single, spaced
from probes.errors import PromptError
from probes.models.backends.native import NativeModel
from probes.prompts import Prompt, tokenize

CONTEXT = "The capital city of France is"
CAPITALS = ("Paris", "Rome", "Madrid", "London", "Berlin", "Vienna")


def speaking(kind: str) -> NativeModel:
    tokenizer = tokenizer_of(kind)
    module = make("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    return NativeModel(module, tokenizer, ref=kind, weights=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_end_of_the_whole_texts(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for context in (CONTEXT, 'He said: "', "The place ("):
        for word in ANSWERS:
            text = spaced(context, word)
            tokens = continuation(tokenizer, context, text)
            assert encode(tokenizer, context) + tokens == encode(tokenizer, context + text)


@pytest.mark.parametrize("kind", KINDS)
def test_different_answers_begin_differently(kind: str) -> None:
    model = speaking(kind)
    prompt = tokenize([CONTEXT], model)[0]
    answers = [answer_after(model, prompt, word) for word in CAPITALS]
    assert len({answer.first for answer in answers}) == len(CAPITALS)
    assert not clashes(answers)
    assert clash_note(answers) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
@given(
    cut=st.sampled_from(
        ["The year is 17|42", "The capital is |Paris", "def run(|files", "The war|rior", 'He said: "|Rome', "a  |b"]
    )
)
def test_a_boundary_inside_a_token_keeps_the_text(kind: str, cut: str) -> None:
    tokenizer = tokenizer_of(kind)
    context, text = cut.split("|")
    tokens = continuation(tokenizer, context, text)
    both = [*encode(tokenizer, context), *tokens]
    assert tokenizer.decode(both) == tokenizer.decode(list(encode(tokenizer, context + text)))


def test_a_number_that_word_pieces_cannot_continue_is_refused() -> None:
    with pytest.raises(PromptError, match="joins the end of the prompt, 'The year is 17', with '42'"):
        continuation(tokenizer_of("wordpiece"), "The year is 17", "42")


@pytest.mark.parametrize(
    ("context", "answer", "written"),
    [
        ("The capital is", "Paris", " Paris"),
        ("The capital is", " Paris ", " Paris"),
        ("The capital is ", " Paris", "Paris"),
        ("Answer:\n", "Paris", "Paris"),
        ('English: "dog" - French: "', "chien", "chien"),
        ('He said "no"', "and", " and"),
        ("the dogs'", "tails", " tails"),
        ("He came (", "late", "late"),
        ("答案是", "书", "书"),
        ("答案：", "dog", "dog"),
        ("", "Paris", "Paris"),
    ],
)
def test_where_an_answer_takes_a_space(context: str, answer: str, written: str) -> None:
    assert spaced(context, answer) == written


@pytest.mark.parametrize("kind", ["llama2", "metaspace_always", "unigram"])
def test_an_answer_that_begins_with_a_bare_space_is_refused(kind: str) -> None:
    model = speaking(kind)
    prompt = tokenize([CONTEXT], model)[0]
    with pytest.raises(PromptError, match="begins with a token that is only a space"):
        answer_after(model, prompt, "☃")
    assert answer_after(model, tokenize([f"{CONTEXT} "], model)[0], "☃").tokens == encode(tokenizer_of(kind), "a☃")[-3:]


def test_answers_that_no_next_token_tells_apart_are_named() -> None:
    alike = [Answer(" Spain", (5, 6)), Answer(" Spanish", (5, 7)), Answer(" Rome", (8,))]
    assert clashes(alike) == [("Spain", "Spanish")]
    assert clash_note(alike) == (
        "2 of 3 answers have more than one token; only their first is read. "
        "1 pairs of answers begin with the same token ('Spain', 'Spanish') and are not told apart."
    )
    with pytest.raises(PromptError, match="all 2 answers, 'Spain' to 'Spanish', begin with the same token"):
        clash_note(alike[:2])
    assert clash_note([alike[0]] * 3) == "3 of 3 answers have more than one token; only their first is read."


class Chatty:
    """A tokenizer whose chat template ends where the answer's line begins."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self, text: str, **options: Any) -> Any:
        return self.plain(text, **options)

    def decode(self, ids: list[int]) -> str:
        return str(self.plain.decode(ids))


def test_under_a_chat_template_the_answer_follows_the_template() -> None:
    plain = tokenizer_of("byte_level")
    model = NativeModel(make("llama", vocab_size=len(plain)), Chatty(plain), ref="chat", weights="chat")
    rendered = encode(plain, "user: The capital?\nassistant:\n")
    assert answer_after(model, Prompt(rendered, "The capital?"), "Paris").text == "Paris"
    assert answer_after(model, Prompt(encode(plain, CONTEXT)), "Paris").text == " Paris"


@pytest.mark.parametrize("kind", KINDS)
def test_whole_words_count_as_single_under_every_tokenizer(kind: str) -> None:
    assert all(single(tokenizer_of(kind), word) for word in ("Mary", "John", "apple", "store"))
    assert not single(tokenizer_of(kind), "Marystoreapple")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_level_prefix"])
@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring"])
def test_tasks_are_made_for_every_tokenizer(kind: str, task: str) -> None:
    from analyses.contextual_decomposition.cases import case_of, generated_questions

    model = speaking(kind)
    for index, (prompt, item) in enumerate(generated_questions(model, task, 4, 2, 0)):
        try:
            case = case_of(model, index, prompt, item)
        except PromptError:
            assert (kind, task) == ("wordpiece", "greater_than")  # its pieces cannot go on from half a year
            continue
        whole = encode(model.tokenizer, item.text + item.answers[0])
        assert model.tokenizer.decode([*case.tokens, case.answers[0]]) == model.tokenizer.decode(
            list(whole[: len(case.tokens) + 1])
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_channels_prompts_hold_their_names(kind: str) -> None:
    from analyses.communication_channels.edits import name_token, open_prompts
    from analyses.communication_channels.list_recall import listed
    from analyses.tasks import ioi
    from analyses.tasks import laundry_list as laundry

    model = speaking(kind)
    prompts = ioi.sample(4, 0, lambda name: name_token(model, name) is not None)
    assert len(open_prompts(model, prompts)) == 4
    assert len(listed(model, laundry.sample(3, 2))) == 6


def test_a_task_whose_words_a_tokenizer_cuts_up_is_refused_in_one_line() -> None:
    from analyses.tasks import docstring, greater_than, ioi
    from analyses.tasks import laundry_list as laundry

    def none(word: str) -> bool:
        return False

    with pytest.raises(
        PromptError, match="needs 2 names that are one token each, and under this tokenizer 0 of its 26 are"
    ):
        ioi.sample(2, 0, none)
    for make_items in (ioi.items, docstring.items, greater_than.items):
        with pytest.raises(PromptError, match="one token each"):
            make_items(2, 1, 0, none)
    with pytest.raises(PromptError, match="needs 5 items"):
        laundry.sample(5, 1, keeps=lambda item: item == "apple")
