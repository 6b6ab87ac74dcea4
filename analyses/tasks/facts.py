"""Facts about countries: "The capital city of France is" continues with Paris, that of Italy with Rome.

Common knowledge from the table of the two-hop questions; two countries of a pair have names of the same number of tokens,
so that nothing but the country differs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analyses.tasks.item import TextPair
from analyses.tasks.two_hop import RELATIONS, capitalised, named, table


def pairs(n: int, seed: int = 0, length: Callable[[str], int] = len) -> list[TextPair]:
    """At most `n` pairs of one relation each, in random order; relations in turn, and no country twice in a relation.

    Args:
        length: of a country's name in a prompt, in tokens.
    """
    rng = np.random.default_rng(seed)
    countries = table("two_hop_countries.csv")
    by_relation = {relation: _of_relation(relation, countries, rng, length) for relation in RELATIONS}
    order = sorted((rank, name) for name, drawn in by_relation.items() for rank in range(len(drawn)))
    return [by_relation[name][rank] for rank, name in order[:n]]


def _of_relation(
    relation: str, countries: list[dict[str, str]], rng: np.random.Generator, length: Callable[[str], int]
) -> list[TextPair]:
    """Pair up the countries whose names have the same length and whose answers differ, each once."""
    waiting: dict[int, list[dict[str, str]]] = {}
    drawn = []
    for i in rng.permutation(len(countries)):
        row = countries[int(i)]
        if row["country"] in row[relation]:
            continue
        same = waiting.setdefault(length(_inside(relation, row)), [])
        other = next((candidate for candidate in same if candidate[relation] != row[relation]), None)
        if other is None:
            same.append(row)
        else:
            same.remove(other)
            drawn.append(_pair(relation, row, other))
    return drawn


def _inside(relation: str, row: dict[str, str]) -> str:
    """Return the country as the prompt has it: behind a space, or at its start."""
    name = named(row["country"])
    return capitalised(name) if RELATIONS[relation].startswith("{}") else f" {name}"


def _pair(relation: str, row: dict[str, str], other: dict[str, str]) -> TextPair:
    text, corrupted = (capitalised(RELATIONS[relation].format(named(r["country"]))) for r in (row, other))
    end = text.index(row["country"]) + len(row["country"])
    place = (end - len(row["country"]), end)
    return TextPair(
        text, corrupted, (" " + row[relation],), (" " + other[relation],), {"country": end, "end": len(text)}, place,
        row["country"],
    )  # fmt: skip
