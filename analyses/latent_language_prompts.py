"""Prompts of the tasks: translation, repetition, cloze and culture questions, with demonstrations drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analyses.latent_language_words import ANSWER, LANGUAGES, Question, Word

Task = Literal["translation", "repetition", "cloze"]
Framing = Literal["plain", "japan", "us"]

_FULL_WIDTH = "zh"
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
    words: Sequence[Word], task: Task, source: str, target: str, n_shot: int, n_items: int, seed: int
) -> list[Query]:
    """One prompt per word that has the languages needed; demonstrations never show the word asked for.

    Args:
        n_items: how many words, drawn by seed; 0 for all.
    """
    usable = [word for word in words if target in (word.cloze if task == "cloze" else word.forms)]
    if task != "cloze":
        usable = [word for word in usable if source in word.forms]
    if 0 < n_items < len(usable):
        chosen = np.random.default_rng(seed).choice(len(usable), n_items, replace=False)
        asked = [usable[i] for i in sorted(chosen)]
    else:
        asked = usable
    found = []
    for index, word in enumerate(asked):
        shown = demonstrations(usable, word, n_shot, seed, index)
        ask = _cloze if task == "cloze" else _translation
        lines = [ask(shot, source, target, answered=True) for shot in shown]
        found.append(Query(word, "".join(lines) + ask(word, source, target, answered=False)))
    return found


def demonstrations(words: Sequence[Word], query: Word, n_shot: int, seed: int, index: int) -> list[Word]:
    """Words to demonstrate with, drawn without replacement from all but the query and its homographs."""
    taken = {text.lower() for forms in query.forms.values() for text in forms}
    others = [w for w in words if w.name != query.name and not taken & {f[0].lower() for f in w.forms.values()}]
    chosen = np.random.default_rng((seed, index)).permutation(len(others))[:n_shot]
    return [others[i] for i in chosen]


def _translation(word: Word, source: str, target: str, *, answered: bool) -> str:
    open_ = f'{LANGUAGES[source]}: "{word.forms[source][0]}" - {LANGUAGES[target]}: "'
    return f'{open_}{word.forms[target][0]}"\n' if answered else open_


def _cloze(word: Word, source: str, target: str, *, answered: bool) -> str:
    open_ = word.cloze[target] + ('："' if target == _FULL_WIDTH else ': "')
    stop = "。" if target in ("zh", "ja") else "."
    return f'{open_}{word.forms[target][0]}"{stop}\n' if answered else open_


def culture_prompt(
    question: Question, examples: Sequence[Question], language: str, framing: Framing, seed: int, index: int
) -> str:
    """A culture question after shuffled demonstrations that have one answer everywhere.

    Args:
        framing: `plain` names no country; `japan` and `us` name it.
    """
    order = np.random.default_rng((seed, index)).permutation(len(examples))
    shown = [_asked(examples[i], language, "") + examples[i].answers["japan", language] + '"\n' for i in order]
    place = "" if framing == "plain" else _PLACE[framing, language]
    return "".join(shown) + _asked(question, language, place)


def _asked(question: Question, language: str, place: str) -> str:
    text = question.text[language]
    if place and language == "en":
        text = text[:1].lower() + text[1:]
    return f'{_QUESTION[language]}: {place}{text} {ANSWER[language]}: "'
