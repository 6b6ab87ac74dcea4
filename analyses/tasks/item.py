"""A generated question with its right and wrong continuations, and texts that lack what decides between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Keeps = Callable[[str], bool]
"""Whether a text is one token, so that items line up position by position."""


@dataclass(frozen=True)
class Item:
    """One question; a position means the same in it and in each of its references."""

    text: str
    answers: tuple[str, ...]
    """Right continuations, each with the white space it begins with."""
    distractors: tuple[str, ...]
    references: tuple[str, ...]
    """Texts of the same form and length in which the answer is not determined."""
    group: str = ""
    """Items of one group have the same form, so that their references may be pooled."""
