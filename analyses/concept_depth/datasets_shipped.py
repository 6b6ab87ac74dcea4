"""Labelled statements that come with the package: made from small fact tables, by rule, or by hand."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

NAMES = (
    "Anna", "Ben", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Maria", "Nina",
    "Oscar", "Paula", "Quentin", "Rosa", "Samuel", "Tina", "Victor", "Wendy", "Xavier", "Yusuf", "Zoe", "Omar", "Ingrid",
    "Pedro", "Hana", "Ravi",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One labelled text, before a template; rows of one group must not be divided between training and test."""

    text: str
    label: int
    group: str


def facts(name: str) -> list[dict[str, str]]:
    """The rows of `data/concept_NAME.csv`, below its line of provenance."""
    text = files("analyses").joinpath("data", f"concept_{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def city_country(seed: int) -> list[Example]:
    """Each city once with its country and once with another; countries are as frequent in false statements as in true."""
    rows = facts("cities")
    wrong = _others([row["country"] for row in rows], np.random.default_rng(seed))
    examples = []
    for row, other in zip(rows, wrong, strict=True):
        for label, country in ((0, other), (1, row["country"])):
            examples.append(Example(f"The city of {row['city']} is in {country}.", label, row["city"]))
    return examples


def capital_negation(seed: int) -> list[Example]:
    """True and false statements on capitals, with and without a negation, so that truth is neither word alone."""
    rows = facts("capitals")
    wrong = _others([row["capital"] for row in rows], np.random.default_rng(seed))
    examples = []
    for row, other in zip(rows, wrong, strict=True):
        for capital, right in ((row["capital"], True), (other, False)):
            for verb, negated in (("is", False), ("is not", True)):
                text = f"The capital of {row['country']} {verb} {capital}."
                examples.append(Example(text, int(right != negated), row["country"]))
    return examples


def number_comparison(seed: int, pairs: int = 300) -> list[Example]:
    """Pairs of numbers from 1 to 999 in both orders, as `larger` and as `smaller`; a group is a pair."""
    rng = np.random.default_rng(seed)
    seen: dict[tuple[int, int], None] = {}
    while len(seen) < pairs:
        low, high = sorted(int(value) for value in rng.integers(1, 1000, size=2))
        if low < high:
            seen[low, high] = None
    return [
        Example(f"{a} is {word} than {b}.", int((a > b) == (word == "larger")), f"{low}-{high}")
        for low, high in seen
        for a, b in ((low, high), (high, low))
        for word in ("larger", "smaller")
    ]


def coin_flip(seed: int, stories: int = 500) -> list[Example]:
    """Stories of two to four people who flip a coin or leave it; label 1 where it is still heads up."""
    rng = np.random.default_rng(seed)
    labels: dict[str, int] = {}
    while len(labels) < stories:
        label_due = len(labels) % 2
        people = rng.choice(NAMES, size=rng.integers(2, 5), replace=False)
        flips = rng.integers(0, 2, size=len(people))
        if (flips.sum() % 2 == 0) == label_due:
            acts = [
                f"{who} {'flips' if flip else 'does not flip'} the coin."
                for who, flip in zip(people, flips, strict=True)
            ]
            labels[" ".join(["A coin is heads up.", *acts])] = label_due
    return [Example(text, label, f"story {i}") for i, (text, label) in enumerate(labels.items())]


def sentiment(seed: int) -> list[Example]:
    """Pairs of one favourable and one unfavourable sentence on a subject; a group is a pair."""
    return [Example(row["text"], int(row["label"]), row["group"]) for row in facts("sentiment")]


def _others(values: list[str], rng: np.random.Generator) -> list[str]:
    """The same values dealt anew so that none falls on itself."""
    distinct = list(dict.fromkeys(values))
    rank = dict(zip(distinct, rng.permutation(len(distinct)).tolist(), strict=True))
    order = sorted(range(len(values)), key=lambda i: rank[values[i]])
    widest = max(values.count(value) for value in distinct)
    # Sorted by value, a shift by at least the longest run of one value, at either end, lands on another value.
    shift = int(rng.integers(widest, len(values) - widest + 1))
    out = [""] * len(values)
    for place, i in enumerate(order):
        out[i] = values[order[(place + shift) % len(values)]]
    return out
