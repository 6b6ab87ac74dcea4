"""A generated question with its right and wrong continuations, and texts that lack what decides between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

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


Corruption = Literal["token", "reference"]
"""What makes the other prompt of a pair: the same form with another answer, or with none determined."""


@dataclass(frozen=True)
class TextPair:
    """Two texts of one form that differ in the fact that decides the answer."""

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    """Right continuations of the clean text, each with the white space it begins with."""
    distractors: tuple[str, ...]
    """What counts against them: the corrupted text's own continuations, or the task's wrong ones."""
    roles: Mapping[str, int] = field(default_factory=dict)
    """Name to the place in the clean text, in characters, at which a word of that role ends."""
    subject: tuple[int, int] | None = None
    """Where the words stand, in characters, on which the answer hangs."""
    group: str = ""
    """Pairs of one group share a fact."""
    references: tuple[str, ...] = ()
    """Texts of the clean one's form in which the answer is not determined."""
