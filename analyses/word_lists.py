"""Word lists, cloze sentences and culture questions: the shipped ones and the papers' published files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

from probes.errors import OptionError

LANGUAGES: Mapping[str, str] = {
    "en": "English", "fr": "Français", "de": "Deutsch", "es": "Español", "it": "Italiano", "ru": "Русский",
    "zh": "中文", "ja": "日本語", "ar": "عربي",
}  # fmt: skip
"""Language code to the language's own name, as prompts write it."""

ANSWER: Mapping[str, str] = {
    "en": "Answer", "fr": "Réponse", "de": "Antwort", "es": "Respuesta", "it": "Risposta", "ru": "Ответ",
    "zh": "答案", "ja": "答え", "ar": "الجواب",
}  # fmt: skip

Row = Mapping[str, str]


@dataclass(frozen=True)
class Word:
    """One meaning in several languages."""

    name: str
    """The English word."""
    forms: Mapping[str, tuple[str, ...]]
    """Language to the word and its synonyms, the usual one first."""
    cloze: Mapping[str, str] = field(default_factory=dict)
    """Language to a definition with a blank, up to the colon before the answer."""


@dataclass(frozen=True)
class Question:
    """A question whose usual answer depends on the culture."""

    kind: str
    text: Mapping[str, str]
    """Language to the question."""
    answers: Mapping[tuple[str, str], str]
    """(culture, language) to the answer."""


CULTURES = ("japan", "us")
CULTURE_LANGUAGES = ("ja", "en")


def shipped_words() -> list[Word]:
    """The words of `latent_words.csv` with the sentences of `latent_cloze.csv`."""
    return list(_shipped())


@cache
def _shipped() -> tuple[Word, ...]:
    sentences = {row["en_word"]: row for row in _rows(_data("latent_cloze.csv"))}
    words = []
    for row in _rows(_data("latent_words.csv")):
        forms = {language: tuple(text.split("|")) for language, text in row.items()}
        own = sentences.get(row["en"], {})
        cloze = {lang: _stem(text, lang) for lang, text in own.items() if lang != "en_word"}
        words.append(Word(row["en"], forms, cloze))
    return tuple(words)


def _stem(sentence: str, language: str) -> str:
    return f"{sentence}{'' if language in ('zh', 'ja') else ' '}{ANSWER[language]}"


def read_words(path: str | Path) -> list[Word]:
    """Words of a file: a table with one column per language, one of the papers' tables, or a folder of `*/clean.csv`.

    Raises:
        OptionError: no such file, or columns that are none of these.
    """
    path = Path(path)
    if path.is_dir():
        tables = sorted(path.glob("*/clean.csv"))
        if not tables:
            raise OptionError(f"words {str(path)!r}: the folder holds no LANGUAGE/clean.csv")
        return _merged(word for table in tables for word in _wendler(_rows(table), table))
    if not path.is_file():
        raise OptionError(f"words {str(path)!r} does not exist: give a CSV file with one column per language")
    rows = _rows(path)
    columns = set(rows[0]) if rows else set()
    if {"lang", "word_original", "word_translation"} <= columns:
        return _wendler(rows, path)
    languages = [language for language in LANGUAGES if language in columns]
    if "en" not in languages or len(languages) < 2:
        raise OptionError(
            f"words {str(path)!r}: columns are {', '.join(sorted(columns)) or 'none'}; needed are en and another of "
            f"{', '.join(LANGUAGES)}, or lang, word_original and word_translation"
        )
    return [_zhong(row, languages) for row in rows if row["en"]]


def _zhong(row: Row, languages: Iterable[str]) -> Word:
    forms, cloze = {}, {}
    for language in languages:
        texts = [*row[language].split("|"), *(row.get(f"{language}1") or "").split("|")]
        forms[language] = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
        if masked := row.get(f"{language}_prompt_masked"):
            cloze[language] = _cut(masked)
    return Word(row["en"], {language: forms_given for language, forms_given in forms.items() if forms_given}, cloze)


def _wendler(rows: Iterable[Row], path: Path) -> list[Word]:
    words = []
    for row in rows:
        language, name = row["lang"], row["word_original"].strip()
        if language not in LANGUAGES:
            raise OptionError(f"words {str(path)!r}: language {language!r} is none of {', '.join(LANGUAGES)}")
        masked = row.get("blank_prompt_translation_masked")
        cloze = {language: _cut(masked)} if masked else {}
        words.append(Word(name, {"en": (name,), language: (row["word_translation"].strip(),)}, cloze))
    return _merged(words)


def _merged(words: Iterable[Word]) -> list[Word]:
    """Words of the same English name as one."""
    merged: dict[str, Word] = {}
    for word in words:
        earlier = merged.get(word.name)
        if earlier:
            word = Word(word.name, {**earlier.forms, **word.forms}, {**earlier.cloze, **word.cloze})
        merged[word.name] = word
    return list(merged.values())


def _cut(masked: str) -> str:
    """A cloze prompt up to its first colon."""
    ends = [at for at in (masked.find(":"), masked.find("：")) if at >= 0]
    return masked[: min(ends)] if ends else masked


@cache
def shipped_questions() -> tuple[Question, ...]:
    """The questions of `cultural_conflict.csv`; those of kind `example` have one answer everywhere."""
    return tuple(
        Question(
            row["kind"],
            {language: row[f"question_{language}"] for language in CULTURE_LANGUAGES},
            {(culture, lang): row[f"{culture}_{lang}"] for culture in CULTURES for lang in CULTURE_LANGUAGES},
        )
        for row in _rows(_data("cultural_conflict.csv"))
    )


def _data(name: str) -> Path:
    return Path(str(files("analyses").joinpath("data", name)))


def _rows(path: Path) -> list[Row]:
    """Rows of a CSV file, without comment lines at its head."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise OptionError(f"words {str(path)!r}: not UTF-8 text (byte {error.start})") from None
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    rows: list[Row] = list(csv.DictReader(lines))
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise OptionError(f"words {str(path)!r}: row {number} has not as many fields as the head")
    return rows
