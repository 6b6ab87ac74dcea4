"""Laundry lists: recall the one item of a list that the text has not used up.

A task in the manner of Merullo, Eickhoff and Pavlick 2024 ("Talking Heads", arXiv 2406.09519); the wording is our own,
since theirs is not published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analyses.tasks.usable_words import usable

NAMES = ("Mary", "John", "Tom", "Anna", "Paul", "Lisa")
ITEMS = (
    "apple", "book", "lamp", "chair", "phone", "ring", "cup", "ball", "shirt", "knife", "clock", "pen", "hat", "cake",
    "map", "key", "bag", "box", "coat", "table", "bread", "milk", "rice", "soap", "rope", "glass", "brush", "paper",
)  # fmt: skip
TEMPLATES = (
    "{name} had to buy {all}. {name} already bought {bought}. Now {name} only has to buy the",
    "On the list of {name} there are {all}. {name} has packed {bought}. What is still missing is the",
)


@dataclass(frozen=True)
class Laundry:
    """One prompt of a list of N items, of which N - 1 are used up."""

    text: str
    items: tuple[str, ...]
    missing: int
    """Index of the answer in `items`."""

    @property
    def answer(self) -> str:
        """The item that is missing."""
        return self.items[self.missing]


def sample(
    n_items: int,
    per_position: int,
    seed: int = 0,
    shuffled: bool = True,
    keeps: Callable[[str], bool] = lambda item: True,
) -> list[Laundry]:
    """Prompts with lists of `n_items`, the answer standing at every position equally often.

    Args:
        per_position: prompts per position of the answer.
        shuffled: whether the used-up items are named in another order than in the list.
        keeps: which items may be used, for instance those that are one token.

    Raises:
        PromptError: fewer than `n_items` may be used.
    """
    rng = np.random.default_rng((seed, n_items))
    candidates = usable(ITEMS, keeps, n_items, "items")
    prompts = []
    for i in range(per_position * n_items):
        items = tuple(candidates[int(j)] for j in rng.choice(len(candidates), n_items, replace=False))
        missing = i % n_items
        bought = [f"the {item}" for j, item in enumerate(items) if j != missing]
        if shuffled:
            rng.shuffle(bought)
        text = TEMPLATES[(i // n_items) % len(TEMPLATES)].format(
            name=NAMES[int(rng.integers(len(NAMES)))],
            all=_listed([f"{'an' if x[0] in 'aeiou' else 'a'} {x}" for x in items]),
            bought=_listed(bought),
        )
        prompts.append(Laundry(text, items, missing))
    return prompts


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
