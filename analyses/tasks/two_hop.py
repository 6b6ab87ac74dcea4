"""Two-hop questions about countries, made from two small tables of facts.

The tables hold common knowledge, written down for this project: 45 countries with capital, official language, currency
and continent, and 105 cities and landmarks with their country. Where a country has several official languages or lies on
two continents, the most spoken and the one of its capital (for Russia) or of most of its land are given.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from analyses.tasks.item import TextPair

RELATIONS: Mapping[str, str] = {
    "capital": "the capital city of {} is",
    "language": "the official language of {} is",
    "currency": "the currency of {} is the",
    "continent": "{} lies on the continent of",
}
"""Second relation to the text that stands before its answer."""

FIRST_HOP: Mapping[str, str] = {
    "city": "the country that the city of {} is in",
    "landmark": "the country that {} is in",
}
"""Kind of place to the phrase of the first relation."""


@dataclass(frozen=True)
class TwoHop:
    """One question: e1 -(country)-> e2 -(relation)-> e3."""

    entity: str
    """e1, a city or landmark."""
    kind: str
    bridge: str
    """e2, its country."""
    relation: str
    answer: str
    """e3."""

    @property
    def phrase(self) -> str:
        """The first hop's phrase, which ends at the position `t1` or shortly after it."""
        return FIRST_HOP[self.kind].format(self.entity)

    @property
    def prompt(self) -> str:
        """The text of both hops."""
        return self._ask(self.phrase)

    @property
    def first_hop(self) -> str:
        """Answered by the bridge."""
        return capitalised(f"{self.phrase} is")

    @property
    def second_hop(self) -> str:
        """Answered by the answer, without the first hop."""
        return self._ask(named(self.bridge))

    @property
    def entity_shortcut(self) -> str:
        """The second relation asked of e1 itself: who answers this needs no bridge."""
        return self._ask(self.entity)

    @property
    def relation_shortcut(self) -> str:
        """The question without its entity: who answers this guesses from the relations."""
        return self._ask(FIRST_HOP[self.kind].format("").replace("  ", " "))

    def _ask(self, of: str) -> str:
        return capitalised(RELATIONS[self.relation].format(of).lstrip())

    @property
    def fields(self) -> dict[str, str]:
        """What a prompt line of this question carries."""
        return {"entity": self.entity, "bridge": self.bridge, "answer": self.answer, "relation": self.relation}


def capitalised(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def named(country: str) -> str:
    """The country as a sentence names it."""
    return f"the {country}" if country == "Netherlands" else country


@cache
def questions() -> tuple[TwoHop, ...]:
    """Every question whose answer is named neither in its entity nor in its bridge."""
    countries = {row["country"]: row for row in table("two_hop_countries.csv")}
    hops = []
    for place in table("two_hop_places.csv"):
        facts = countries[place["country"]]
        for relation in RELATIONS:
            answer, bridge = facts[relation], place["country"]
            if answer not in (place["place"], bridge) and bridge not in answer:
                hops.append(TwoHop(place["place"], place["kind"], bridge, relation, answer))
    return tuple(hops)


def sample(n: int, seed: int = 0) -> list[TwoHop]:
    """`n` questions in random order, relations in turn; all where there are fewer."""
    rng = np.random.default_rng(seed)
    groups = [[q for q in questions() if q.relation == relation] for relation in RELATIONS]
    for group in groups:
        rng.shuffle(group)  # type: ignore[arg-type]
    order = sorted((rank, which) for which, group in enumerate(groups) for rank in range(len(group)))
    return [groups[which][rank] for rank, which in order[:n]]


def pairs(n: int, seed: int = 0, length: Callable[[str], int] = len) -> list[TextPair]:
    """At most `n` pairs: another place of the same length, whose country gives another answer to the same relation.

    Args:
        length: of a place's name in a prompt, in tokens.
    """
    rng, length = np.random.default_rng(seed), cache(length)
    order = sample(len(questions()), seed)
    drawn: list[TextPair] = []
    for question in order:
        if len(drawn) == n:
            break
        alike = [
            other for other in order
            if (other.kind, other.relation) == (question.kind, question.relation) and other.answer != question.answer
            and length(f" {other.entity}") == length(f" {question.entity}")
        ]  # fmt: skip
        if alike:
            other = alike[int(rng.integers(len(alike)))]
            text = question.prompt
            start = text.rindex(question.entity)
            place = (start, start + len(question.entity))
            before = RELATIONS[question.relation].index("{}") - 1
            roles = {"entity": place[1], "end": len(text)} | ({"relation": before} if before > 0 else {})
            answers, distractors = (" " + question.answer,), (" " + other.answer,)
            drawn.append(TextPair(text, other.prompt, answers, distractors, roles, place, question.bridge))
    return drawn


def table(name: str) -> list[dict[str, str]]:
    """Rows of one of the package's tables, by column."""
    text = files("analyses").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
