"""What the model itself answers, and whether that is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analyses.generation import Decoding, respond
from analyses.latent_language_ids import continuation
from analyses.latent_language_read import Reading
from probes.models.base import Model
from probes.progress import Progress
from probes.store import ActivationStore

_END = re.compile(r'["“”„»«\n]')


def said(
    reading: Reading, model: Model, store: ActivationStore, how: Literal["generate", "first_token"], progress: Progress
) -> tuple[list[str | None], int]:
    """(per item the word the model writes, or None where only its next token is judged; how many were written now)."""
    found: list[str | None] = [None] * len(reading.items)
    asked = [i for i, item in enumerate(reading.items) if item.answers]
    if how == "first_token" or model.tokenizer is None or not asked:
        return found, 0
    longest = max(len(continuation(model.tokenizer, a)) for i in asked for a in reading.items[i].answers)
    sequences = [reading.items[i].tokens for i in asked]
    written, new = respond(model, sequences, Decoding(longest + 1), store, progress=progress)
    for i, tokens in zip(asked, written, strict=True):
        found[i] = first_word(str(model.tokenizer.decode(list(tokens), skip_special_tokens=True)))
    return found, new


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
