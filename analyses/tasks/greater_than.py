"""Spans of years: "The war lasted from the year 1741 to the year 17" continues with a later year.

The task of Hanna, Liu, Variengien 2023, "How does GPT-2 compute greater-than?"; sentences and events are our own.
"""

from __future__ import annotations

import numpy as np

from analyses.tasks.item import Item, Keeps, TextPair
from analyses.tasks.usable_words import usable

EVENTS = (
    "war", "reign", "siege", "drought", "voyage", "festival", "strike", "exile", "truce", "famine", "journey", "trial",
    "plague", "alliance", "rebellion", "project",
)  # fmt: skip
TEXT = "The {event} lasted from the year {century}{year:02d} to the year {century}"


def items(n: int, references: int, seed: int = 0, keeps: Keeps = lambda word: True, pairs: bool = True) -> list[Item]:
    """`n` questions, each with references whose span begins in year 01, which nothing but 00 precedes.

    Args:
        keeps: which events are one token after a space.
        pairs: whether the tokenizer has one token for two digits; otherwise the next digit decides, and the first
            digit of the starting year, which may begin an earlier or a later one, counts for neither.

    Raises:
        PromptError: no event may be used.
    """
    rng = np.random.default_rng(seed)
    events = usable(EVENTS, keeps, 1, "events")
    drawn = []
    for _ in range(n):
        century = int(rng.integers(11, 18))
        year = int(rng.integers(12, 88))
        event = events[int(rng.integers(len(events)))]
        texts = [
            TEXT.format(event=events[int(rng.integers(len(events)))], century=int(rng.integers(11, 18)), year=1)
            for _ in range(references)
        ]
        if pairs:
            later = tuple(f"{y:02d}" for y in range(year + 1, 100))
            earlier = tuple(f"{y:02d}" for y in range(2, year + 1))
        else:
            later = tuple(str(d) for d in range(year // 10 + 1, 10))
            earlier = tuple(str(d) for d in range(year // 10))
        text = TEXT.format(event=event, century=century, year=year)
        drawn.append(Item(text, later, earlier, tuple(texts), TEXT))
    return drawn


def text_pairs(
    n: int, seed: int = 0, keeps: Keeps = lambda word: True, pairs: bool = True, references: int = 0
) -> list[TextPair]:
    """`n` pairs whose corrupted span begins in year 01; answers and distractors are those of the clean one.

    Args:
        keeps: which events are one token after a space.
        pairs: whether the tokenizer has one token for two digits.
        references: other spans from year 01 beside each pair, the same for all.

    Raises:
        PromptError: no event may be used.
    """
    drawn, beside = [], items(1, references, seed, keeps, pairs)[0].references
    for item in items(n, 0, seed, keeps, pairs):
        start = item.text.index("year ") + len("year 17")
        corrupted = item.text[:start] + "01" + item.text[start + 2 :]
        roles = {"year": start + 2, "end": len(item.text)}
        span = (start, start + 2)
        drawn.append(TextPair(item.text, corrupted, item.answers, item.distractors, roles, span, references=beside))
    return drawn
