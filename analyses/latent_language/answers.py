"""What the model itself answers, and whether that is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analyses.generation import Decoding, respond
from analyses.latent_language.ids import after_quote
from analyses.latent_language.items import Item
from analyses.latent_language.read import Reading
from analyses.tokens import token_text
from probes.models.protocol import Model
from probes.progress import Progress
from probes.store import ActivationStore

_END = re.compile(r'["“”„»«\n]')
_CUT = re.compile(r"\\x[0-9a-f]{2}")
"""What a token that ends inside a character decodes to."""


def said(
    reading: Reading, model: Model, store: ActivationStore, how: Literal["generate", "first_token"], progress: Progress
) -> tuple[list[str | None], int]:
    """(per item the word the model writes, or None where only its next token is judged; how many were written now).

    Where the most probable next token starts no right answer, that token and an ellipsis stand for the wrong word.
    """
    written_words: list[str | None] = [None] * len(reading.items)
    if how == "first_token" or model.tokenizer is None:
        return written_words, 0
    by_length: dict[int, list[int]] = {}
    for i, item in enumerate(reading.items):
        if not item.answers:
            continue
        start = token_text(model, int(reading.top_id[i]))
        if could_start(start, item):
            longest = max(len(after_quote(model.tokenizer, answer)) for answer in item.answers)
            by_length.setdefault(longest + 1, []).append(i)
        else:
            written_words[i] = f"{start.strip()}…"
    new = 0
    for length, members in by_length.items():
        sequences = [reading.items[i].tokens for i in members]
        written, new_responses = respond(model, sequences, Decoding(length), store, progress=progress)
        new += len(new_responses)
        for i, tokens in zip(members, written, strict=True):
            written_words[i] = first_word(str(model.tokenizer.decode(list(tokens), skip_special_tokens=True)))
    return written_words, new


def could_start(token: str, item: Item) -> bool:
    """Whether an answer that begins with this token can be right; in doubt it can."""
    text = token.strip().casefold()
    if not text or _CUT.search(text):
        return True
    return any(a.casefold().startswith(text) or text.startswith(a.casefold()) for a in item.answers)


def first_word(text: str) -> str:
    """The text up to the closing quote or line's end."""
    return _END.split(text.strip().lstrip('"“„«'))[0].strip().rstrip(".。")


def right(reading: Reading, said: Sequence[str | None]) -> NDArray[np.bool_]:
    """[item], whether the word written is an answer; judged by the next token where no word was written."""
    verdicts = []
    for item, answer, top in zip(reading.items, said, reading.top_id, strict=True):
        if answer is None:
            verdicts.append(int(top) in {sequence[0] for sequence in item.sets[item.target]})
        else:
            verdicts.append(answer.casefold() in {a.casefold() for a in item.answers})
    return np.array(verdicts, dtype=bool)
