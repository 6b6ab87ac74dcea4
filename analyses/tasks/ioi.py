"""Indirect-object prompts: "When Mary and John went to the store, John gave a drink to" continues with Mary.

The task of Wang et al. 2022, "Interpretability in the Wild"; templates, names, places and objects are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analyses.tasks.item import Corruption, Item, Keeps, TextPair
from analyses.tasks.usable_words import usable

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
    template: str = ""
    place: str = ""
    thing: str = ""


def sample(
    n: int,
    seed: int = 0,
    keeps: Callable[[str], bool] = lambda name: True,
    words: tuple[Sequence[str], Sequence[str]] | None = None,
) -> list[Ioi]:
    """`n` prompts; templates and both orders of the names in turn.

    Args:
        keeps: which names may be used, for instance those that are one token.
        words: places and objects instead of all.

    Raises:
        PromptError: fewer than two names may be used.
    """
    rng = np.random.default_rng(seed)
    names = usable(NAMES, keeps, 2, "names")
    places, things = words or (PLACES, OBJECTS)
    prompts = []
    for i in range(n):
        io, s = (names[int(j)] for j in rng.choice(len(names), 2, replace=False))
        first = (i // len(TEMPLATES)) % 2 == 0
        a, b = (io, s) if first else (s, io)
        place, thing = places[int(rng.integers(len(places)))], things[int(rng.integers(len(things)))]
        text = TEMPLATES[i % len(TEMPLATES)].format(a=a, b=b, s=s, place=place, thing=thing)
        prompts.append(Ioi(text, io, s, first, TEMPLATES[i % len(TEMPLATES)], place, thing))
    return prompts


def items(n: int, references: int, seed: int = 0, keeps: Keeps = lambda word: True) -> list[Item]:
    """`n` questions, each with `references` prompts of the same template in which three names come once each.

    Args:
        keeps: which words are one token after a space; places, objects and names are drawn from those alone.

    Raises:
        PromptError: too few words may be used.
    """
    rng = np.random.default_rng(seed)
    places, things = usable(PLACES, keeps, 1, "places"), usable(OBJECTS, keeps, 1, "objects")
    names = usable(NAMES, keeps, 3, "names")
    prompts = []
    for prompt in sample(n, seed, keeps, (places, things)):
        texts = []
        for _ in range(references):
            a, b, s = (names[int(j)] for j in rng.choice(len(names), 3, replace=False))
            place, thing = (words[int(rng.integers(len(words)))] for words in (places, things))
            texts.append(prompt.template.format(a=a, b=b, s=s, place=place, thing=thing))
        answers, distractors = (" " + prompt.indirect,), (" " + prompt.subject,)
        prompts.append(Item(prompt.text, answers, distractors, tuple(texts), prompt.template))
    return prompts


def pairs(
    n: int, seed: int = 0, corruption: Corruption = "token", keeps: Keeps = lambda word: True, references: int = 0
) -> list[TextPair]:
    """`n` pairs: the name that comes twice becomes the other one, so that the answer flips; or three names come once each.

    Args:
        keeps: which words are one token after a space.
        references: prompts of the same template beside each pair in which three names come once each.

    Raises:
        PromptError: too few words may be used.
    """
    places, things = usable(PLACES, keeps, 1, "places"), usable(OBJECTS, keeps, 1, "objects")
    others = [item.references[0] for item in items(n, 1, seed, keeps)] if corruption == "reference" else [""] * n
    of_form = [item.references for item in items(n, references, seed, keeps)]
    drawn = []
    for prompt, reference, beside in zip(sample(n, seed, keeps, (places, things)), others, of_form, strict=True):
        second = prompt.text.rindex(prompt.subject)
        flipped = prompt.text[:second] + prompt.indirect + prompt.text[second + len(prompt.subject) :]
        first = prompt.text.index(prompt.subject) + len(prompt.subject)
        after = prompt.text.index(" ", first)
        roles = {
            "io": prompt.text.index(prompt.indirect) + len(prompt.indirect), "s1": first,
            "s1+1": prompt.text.index(" ", after + 1) if after == first else after,
            "s2": second + len(prompt.subject), "end": len(prompt.text),
        }  # fmt: skip
        subject = (second, second + len(prompt.subject))
        answers, distractors = (" " + prompt.indirect,), (" " + prompt.subject,)
        drawn.append(
            TextPair(prompt.text, reference or flipped, answers, distractors, roles, subject, references=beside)
        )
    return drawn
