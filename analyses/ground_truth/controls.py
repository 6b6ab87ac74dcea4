"""Answers that know nothing, or everything: what the rows of a score are read beside."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from math import nan

import numpy as np

from analyses.ground_truth.answers import Answer, Decision, Ends, name_of
from probes.planted.record import Interval, Kind, Question, Record

CEILING = "residual interchange"
"""What exhaustive interchange answers, by which truths are certified: no contestant."""
ONE_LAYER: tuple[Kind, ...] = ("lens",)
"""Kinds whose truth is a single layer."""
TO_THE_END: tuple[Kind, ...] = ("readable", "sufficient")
"""Kinds whose interval usually ends in the last layer."""
FROM_THE_START: tuple[Kind, ...] = ("necessary",)
"""Kinds whose interval usually begins at the embedding."""


def _ends(question: Question, n_layers: int, layers: Sequence[float]) -> Ends:
    """Return an interval of the shape usual for the kind, from one layer or two."""
    if question.kind in ONE_LAYER:
        return (layers[0], layers[0])
    if question.kind in TO_THE_END:
        return (layers[0], n_layers - 1)
    if question.kind in FROM_THE_START:
        return (-1, layers[0])
    first, last = sorted(layers)
    return (first, last)


def constant(record: Record, question: Question) -> Answer:
    """Name the middle of the depth, (L - 1) / 2, or the middle half where two ends are open; of sets, every candidate."""
    n_layers = int(record.model["layers"])
    middle = (n_layers - 1) / 2
    two = question.kind not in (*ONE_LAYER, *TO_THE_END, *FROM_THE_START)
    layers = (middle / 2, middle * 3 / 2) if two else (middle,)
    return _answer(
        "control: constant",
        record,
        question,
        _ends(question, n_layers, layers),
        dict.fromkeys(question.candidates, 0.0),
    )


def uniform(record: Record, question: Question, draw: int = 0) -> Answer:
    """Draw layers and scores uniformly; against a uniform layer the expected error is (L² - 1) / (3 L)."""
    name = f"{name_of(record)} {question.key} {draw}"
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    n_layers = int(record.model["layers"])
    layers = [float(layer) for layer in rng.integers(0, n_layers, 2)]
    scores = {candidate: float(rng.random()) for candidate in question.candidates}
    return _answer("control: uniform", record, question, _ends(question, n_layers, layers), scores)


def always(record: Record, question: Question) -> Answer:
    """Answer every question, with all layers or all candidates."""
    n_layers = int(record.model["layers"])
    scores = dict.fromkeys(question.candidates, 0.0)
    return _answer("control: always answers", record, question, (-1, n_layers - 1), scores)


def largest_update(record: Record, question: Question, updates: Mapping[str, float]) -> Answer:
    """Score each node by the mean norm of what it writes relative to the stream; name as many as stand out from the mean.

    Args:
        updates: mean relative norm of what each head (`7.2`) and MLP (`mlp.4`) adds to the stream.
    """
    scores = {candidate: updates.get(candidate, nan) for candidate in question.candidates}
    usual = float(np.nanmean(list(scores.values()))) if scores else nan
    chosen = frozenset(name for name, size in scores.items() if size > usual)
    decision: Decision = "answered" if chosen else "none"
    return Answer("control: largest update", name_of(record), question.key, decision, scores=scores, chosen=chosen)


def oracle(record: Record, question: Question) -> Answer:
    """Read the truth from the record."""
    name, task = "control: oracle", name_of(record)
    if question.nothing:
        return Answer(name, task, question.key, "none")
    if isinstance(question.truth, Interval):
        ends = (float(question.truth.first), float(question.truth.last))
        return Answer(name, task, question.key, "answered", ends, ends, ends)
    assert question.truth is not None
    scores = {candidate: float(candidate in question.truth) for candidate in {*question.candidates, *question.truth}}
    return Answer(name, task, question.key, "answered", scores=scores, chosen=question.truth)


def _answer(method: str, record: Record, question: Question, ends: Ends, scores: Mapping[str, float]) -> Answer:
    """Answer in layers where the kind asks for layers, and in sets where there are candidates."""
    if question.candidates:
        chosen = frozenset(question.candidates)
        return Answer(method, name_of(record), question.key, "answered", scores=scores, chosen=chosen)
    return Answer(method, name_of(record), question.key, "answered", ends)
