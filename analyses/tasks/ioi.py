"""Indirect-object prompts: "When Mary and John went to the store, John gave a drink to" continues with Mary.

The task of Wang et al. 2022, "Interpretability in the Wild"; templates, names, places and objects are our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NAMES = (
    "Mary", "John", "Tom", "Anna", "Paul", "Lisa", "Mark", "Kate", "Peter", "Laura", "James", "Emma", "David", "Sarah",
    "Robert", "Alice", "Michael", "Susan", "Daniel", "Rachel", "George", "Helen", "Henry", "Jane", "Frank", "Maria",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "station", "garden", "library", "market", "hospital", "beach")
OBJECTS = ("drink", "book", "ring", "ball", "key", "letter", "flower", "ticket", "cake", "map")
TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} arrived at the {place}, {s} handed a {thing} to",
    "While {a} and {b} were at the {place}, {s} passed a {thing} to",
    "{a} and {b} met at the {place}. Then {s} offered a {thing} to",
    "Yesterday {a} and {b} walked to the {place}, and {s} showed a {thing} to",
)


@dataclass(frozen=True)
class Ioi:
    """One prompt and where its names stand."""

    text: str
    indirect: str
    """The name that comes once, and next."""
    subject: str
    """The name that comes twice."""
    indirect_first: bool


def sample(n: int, seed: int = 0, keeps: Callable[[str], bool] = lambda name: True) -> list[Ioi]:
    """`n` prompts; templates and both orders of the names in turn.

    Args:
        keeps: which names may be used, for instance those that are one token.
    """
    rng = np.random.default_rng(seed)
    names = [name for name in NAMES if keeps(name)]
    found = []
    for i in range(n):
        io, s = (names[int(j)] for j in rng.choice(len(names), 2, replace=False))
        first = (i // len(TEMPLATES)) % 2 == 0
        a, b = (io, s) if first else (s, io)
        place, thing = PLACES[int(rng.integers(len(PLACES)))], OBJECTS[int(rng.integers(len(OBJECTS)))]
        text = TEMPLATES[i % len(TEMPLATES)].format(a=a, b=b, s=s, place=place, thing=thing)
        found.append(Ioi(text, io, s, first))
    return found
