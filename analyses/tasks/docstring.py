"""Docstrings that describe a function's parameters in order; the next parameter's name must be copied.

The task of Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer"; the
form and the words are our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analyses.tasks.item import Corruption, Item, Keeps, TextPair
from analyses.tasks.usable_words import usable

WORDS = (
    "files", "name", "size", "state", "shape", "option", "load", "page", "user", "index", "color", "title", "value",
    "count", "model", "field", "group", "table", "query", "image", "event", "level", "order", "point", "price", "range",
)  # fmt: skip
PROSE = ("first item", "main part", "other side", "new form", "last step", "whole set", "given list", "old copy")
ARGUMENTS = 6
DESCRIBED = 2


def _text(names: Sequence[str], described: Sequence[str], prose: Sequence[str]) -> str:
    lines = [f"    :param {name}: {words}" for name, words in zip(described, prose, strict=False)]
    head = f'def run(self, {", ".join(names)}):\n    """Do the work.\n\n'
    return head + "\n".join(lines) + "\n    :param"


def items(n: int, references: int, seed: int = 0, keeps: Keeps = lambda word: True) -> list[Item]:
    """`n` docstrings of two described parameters, each with references whose signature holds other names.

    Args:
        keeps: which names are one token after a space.

    Raises:
        PromptError: too few names may be used.
    """
    rng = np.random.default_rng(seed)
    words = usable(WORDS, keeps, 2 * ARGUMENTS, "names")
    drawn = []
    for _ in range(n):
        names = [words[int(i)] for i in rng.choice(len(words), ARGUMENTS, replace=False)]
        begin = 2
        described, answer = names[begin : begin + DESCRIBED], names[begin + DESCRIBED]
        prose = [PROSE[int(i)] for i in rng.choice(len(PROSE), DESCRIBED, replace=False)]
        others = [word for word in words if word not in names]
        texts = [
            _text([others[int(i)] for i in rng.choice(len(others), ARGUMENTS, replace=False)], described, prose)
            for _ in range(references)
        ]
        wrong = tuple(" " + name for name in names if name != answer)
        drawn.append(Item(_text(names, described, prose), (" " + answer,), wrong, tuple(texts), "docstring"))
    return drawn


def pairs(n: int, seed: int = 0, corruption: Corruption = "token", keeps: Keeps = lambda word: True) -> list[TextPair]:
    """`n` pairs: the signature has another name in the place that is copied, or other names in every place.

    Args:
        keeps: which names are one token after a space.

    Raises:
        PromptError: too few names may be used.
    """
    drawn: list[TextPair] = []
    for item in items(n, 1, seed, keeps):
        answer = item.answers[0].strip()
        signature = item.text[: item.text.index("):")]
        start = signature.index(f", {answer}") + 2
        others = [word for word in usable(WORDS, keeps, 2 * ARGUMENTS, "names") if word not in signature]
        other = others[len(drawn) % len(others)]
        corrupted = item.text[:start] + other + item.text[start + len(answer) :]
        place = (start, start + len(answer))
        if corruption == "reference":
            drawn.append(
                TextPair(item.text, item.references[0], item.answers, item.distractors, _roles(item.text, place), place)
            )
        else:
            drawn.append(TextPair(item.text, corrupted, item.answers, (" " + other,), _roles(item.text, place), place))
    return drawn


def _roles(text: str, place: tuple[int, int]) -> dict[str, int]:
    return {"name": place[1], "end": len(text)}
