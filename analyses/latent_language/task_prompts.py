"""Prompts of the tasks: translation, repetition, cloze and culture questions, with demonstrations drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analyses.word_lists import ANSWER, LANGUAGES, Question, Word

Task = Literal["translation", "repetition", "cloze"]
Framing = Literal["plain", "japan", "us"]
Form = Literal["quoted", "plain"]
"""The paper's form, which ends inside an open quote, or the same without quotes."""

_FULL_WIDTH = ("zh", "ja")
_QUESTION = {"en": "Question", "ja": "質問"}
_PLACE = {
    ("japan", "en"): "In Japan, ", ("japan", "ja"): "日本では、",
    ("us", "en"): "In the United States, ", ("us", "ja"): "アメリカでは、",
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """A word to be asked for, and the prompt that asks."""

    word: Word
    text: str


def queries(
    words: Sequence[Word], task: Task, source: str, target: str, n_shot: int, n_prompts: int, seed: int,
    form: Form = "quoted",
) -> list[Query]:  # fmt: skip
    """One prompt per word that has the languages needed; demonstrations never show the word asked for.

    Args:
        n_prompts: how many words, drawn by seed; 0 for all.
        form: of translation and repetition.
    """
    usable = [word for word in words if target in (word.cloze if task == "cloze" else word.forms)]
    if task != "cloze":
        usable = [word for word in usable if source in word.forms]
    words_used = usable
    if 0 < n_prompts < len(usable):
        chosen = np.random.default_rng(seed).choice(len(usable), n_prompts, replace=False)
        words_used = [usable[i] for i in sorted(chosen)]
    drawn = []
    for index, word in enumerate(words_used):
        shown = demonstrations(usable, word, n_shot, seed, index)
        lines = [_ask(shot, task, source, target, form) for shot in shown]
        text = "".join(open_ + answer for open_, answer in lines) + _ask(word, task, source, target, form)[0]
        drawn.append(Query(word, text))
    return drawn


def _ask(word: Word, task: Task, source: str, target: str, form: Form) -> tuple[str, str]:
    """(the line up to the answer, the answer and the line's end)."""
    answer = word.forms[target][0]
    if task == "cloze":
        stop = "。" if target in _FULL_WIDTH else "."
        return word.cloze[target] + ('："' if target == "zh" else ': "'), f'{answer}"{stop}\n'
    source_word = word.forms[source][0]
    if form == "quoted":
        return f'{LANGUAGES[source]}: "{source_word}" - {LANGUAGES[target]}: "', f'{answer}"\n'
    named = f"{LANGUAGES[source]}{'：' if source in _FULL_WIDTH else ': '}{source_word}"
    # Without a quote the space before a word belongs to its first token, so the prompt must not end in it.
    if target in _FULL_WIDTH:
        return f"{named} - {LANGUAGES[target]}：", f"{answer}\n"
    return f"{named} - {LANGUAGES[target]}:", f" {answer}\n"


def demonstrations(words: Sequence[Word], query: Word, n_shot: int, seed: int, index: int) -> list[Word]:
    """Words to demonstrate with, drawn without replacement from all but the query and its homographs."""
    taken = {text.lower() for forms in query.forms.values() for text in forms}
    others = [w for w in words if w.name != query.name and not taken & {f[0].lower() for f in w.forms.values()}]
    chosen = np.random.default_rng((seed, index)).permutation(len(others))[:n_shot]
    return [others[i] for i in chosen]


def culture_prompt(
    question: Question, examples: Sequence[Question], language: str, framing: Framing, seed: int, index: int
) -> str:
    """A culture question after shuffled demonstrations that have one answer everywhere.

    Args:
        framing: `plain` names no country; `japan` and `us` name it.
    """
    order = np.random.default_rng((seed, index)).permutation(len(examples))
    shown = [_question_text(examples[i], language, "") + examples[i].answers["japan", language] + '"\n' for i in order]
    place = "" if framing == "plain" else _PLACE[framing, language]
    return "".join(shown) + _question_text(question, language, place)


def _question_text(question: Question, language: str, place: str) -> str:
    text = question.text[language]
    if place and language == "en":
        text = text[:1].lower() + text[1:]
    return f'{_QUESTION[language]}: {place}{text} {ANSWER[language]}: "'
