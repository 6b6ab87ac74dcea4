"""Text to fit and judge lenses on: the shipped sentences, or a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analyses.base import as_prompts
from analyses.word_lists import Word, shipped_words
from probes.errors import PromptError
from probes.lenses.card import Corpus
from probes.models.protocol import Model
from probes.prompts import tokenize

SENTENCES = 150
"""Sentences drawn by default."""
SHIPPED = "shipped sentences"
LICENCE = "MIT"


@dataclass(frozen=True)
class Texts:
    """Token ids of texts, and which of them say the same in other words."""

    sequences: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    name: str
    licence: str = ""

    @property
    def corpus(self) -> Corpus:
        """Their description on a card."""
        return Corpus.of(self.name, self.sequences, self.licence)


def parallel_sentences(words: Sequence[Word]) -> list[Mapping[str, str]]:
    """Return per word its definition in every language that has one, the word itself in the blank."""
    sentences: list[Mapping[str, str]] = []
    for word in words:
        texts = {language: _filled(stem, word.forms[language][0]) for language, stem in word.cloze.items()}
        if len(texts) > 1:
            sentences.append(texts)
    return sentences


def _filled(stem: str, word: str) -> str:
    """The sentence without the label of the answer, and without the quotes around the blank."""
    sentence = stem.replace('"___"', word)
    ends = [sentence.rfind(stop) for stop in (".", "。")]
    return sentence[: max(ends) + 1]


def shipped_texts(model: Model, most: int = SENTENCES, seed: int = 0) -> Texts:
    """Draw sentences of all languages; those of one meaning form one group, so that none is judged by its own translation."""
    sentences = [(i, text) for i, texts in enumerate(parallel_sentences(shipped_words())) for text in texts.values()]
    chosen = [int(i) for i in np.random.default_rng(seed).permutation(len(sentences))[:most]]
    sequences = tuple(tokenize([sentences[i][1]], model)[0].tokens for i in chosen)
    return Texts(sequences, tuple(sentences[i][0] for i in chosen), SHIPPED, LICENCE)


def packed_texts(model: Model, length: int, most: int, seed: int = 0) -> Texts:
    """Pack the shipped sentences, one language a text, into texts of about `length` tokens; no sentence is used twice."""
    sentences = parallel_sentences(shipped_words())
    order = np.random.default_rng(seed).permutation(len(sentences))
    packed: list[tuple[int, ...]] = []
    for language in sorted({language for texts in sentences for language in texts}):
        joint = "" if language in ("zh", "ja") else " "
        written = [sentences[i][language] for i in order if language in sentences[i]]
        begin = 0
        while begin < len(written):
            end = begin + 1
            while len(tokens := tokenize([joint.join(written[begin:end])], model)[0].tokens) < length and end < len(
                written
            ):
                end += 1
            if len(tokens) >= length:
                packed.append(tokens[:length])
            begin = end
    drawn = np.random.default_rng(seed).permutation(len(packed))[:most]
    return Texts(tuple(packed[i] for i in drawn), tuple(range(len(drawn))), f"{SHIPPED}, packed", LICENCE)


def file_texts(model: Model, path: Path, most: int | None = None) -> Texts:
    """Read texts of a prompt file, the first `most` of them, each a group of its own.

    Raises:
        PromptError: a fault in the file, with its line.
    """
    prompts = as_prompts(path, model, {})[:most]
    sequences = tuple(dict.fromkeys(prompt.tokens for prompt in prompts))
    return Texts(sequences, tuple(range(len(sequences))), path.name)


def without(texts: Texts, corpora: Sequence[Corpus]) -> Texts:
    """Return the texts on which no lens of these corpora was fitted.

    Raises:
        PromptError: none is left.
    """
    fitted = {member for corpus in corpora for member in corpus.members}
    members = texts.corpus.members
    kept = [i for i, member in enumerate(members) if member not in fitted]
    if not kept:
        raise PromptError(f"every text of {texts.name} was fitted on by a lens: give other texts to judge lenses by")
    return Texts(
        tuple(texts.sequences[i] for i in kept), tuple(texts.groups[i] for i in kept), texts.name, texts.licence
    )
