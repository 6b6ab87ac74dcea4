"""What can be read from the stream: concepts by linear probes on held-out combinations, words by the model's own read-out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from probes.planted.certify.ablation import change_rows, every_row, handled, mean_changes
from probes.planted.certify.bench import Bench, Change, Site
from probes.planted.certify.measured import SURE, Measured
from probes.planted.record import Interval, Question

GUESSED = 0.5
"""Where nothing names the answer a guess does, in fewer examples than this share."""
_PENALTIES = (1e-3, 1e-1, 1e1)


def readable(bench: Bench, question: Question) -> Measured:
    """Measure the accuracy of a probe for the concept at the position on held-out examples, for each layer from -1."""
    assert question.concept
    assert question.position
    streams, columns = bench.streams, bench.at(question.position)
    rows = every_row(len(bench.examples))
    scores = [probed(bench, stream[rows, columns], question.concept) for stream in streams]
    chance = _chance(bench, question.concept)
    middle = (1 + chance) / 2
    inside = [layer - 1 for layer, score in enumerate(scores) if score >= SURE * max(scores) and score > middle]
    clear = all(score >= SURE * max(scores) or score <= middle for score in scores)
    interval = Interval(inside[0], inside[-1]) if inside else None
    whole = not inside or inside == list(range(inside[0], inside[-1] + 1))
    return Measured(scores, clear and whole and interval == question.truth)


def written(bench: Bench, question: Question) -> Measured:
    """Measure at the position how well the concept is read before the node's block, after it, and without the node."""
    assert isinstance(question.truth, frozenset)
    assert question.concept
    assert question.position
    (name,) = question.truth
    return _comes_with(bench, name, question.concept, question.position)


def moved(bench: Bench, question: Question) -> Measured:
    """Measure what `written` does where the head takes the concept, and how much of its value comes from `position`."""
    assert isinstance(question.truth, frozenset)
    assert question.concept
    assert question.position
    assert question.to
    (name,) = question.truth
    comes = _comes_with(bench, name, question.concept, question.to)
    site, columns = handled(bench, name)
    at, to = bench.at(question.position), bench.at(question.to)
    rows = every_row(len(bench.examples))
    own = bench.read([site], bench.tokens)[site][rows, to][:, columns]
    other = bench.partner_streams[site[1]]
    patched = bench.read([site], bench.tokens, {("stream", site[1] - 1): change_rows(rows, at, other[rows, at])})
    goal = bench.read([site], bench.partners[0])[site][rows, to][:, columns]
    left = (patched[site][rows, to][:, columns] - goal).norm() / (own - goal).norm().clamp_min(1e-9)
    values = {**comes.values, "left": float(left)}
    return Measured(values, comes.agrees and float(left) <= 0.5)


def lens(bench: Bench, question: Question) -> Measured:
    """Measure the share of examples whose answer the read-out names from a layer on, for each layer from -1."""
    assert question.position
    shares = named_from(bench, question.position)
    if question.truth is None:
        return Measured(shares, max(shares) < GUESSED)
    assert isinstance(question.truth, Interval)
    first = question.truth.first
    return Measured(shares, shares[first + 1] >= SURE and shares[first] <= 1 - SURE)


def named_from(bench: Bench, position: str) -> list[float]:
    """Return the share of examples whose answer the read-out at a position names at this and every later layer, from -1."""
    rows = every_row(len(bench.examples))
    right = bench.lens(bench.streams[:, rows, bench.at(position)]) == bench.answers
    onwards = right.flip(0).cummin(0).values.flip(0)
    return onwards.float().mean(1).tolist()


def probed(bench: Bench, features: Tensor, concept: str) -> float:
    """Return the best held-out accuracy of ridge and logistic probes; fitted on the fit examples, tested on the others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    labels = np.array([(example.values or {})[concept] for example in bench.examples])
    fit = np.array([example.split == "fit" for example in bench.examples])
    x = features.double().numpy()
    x = x - x[fit].mean(0)
    x = x / max(np.sqrt((x[fit] ** 2).sum(1).mean()), 1e-9)
    best = 0.0
    for penalty in _PENALTIES:
        for model in (RidgeClassifier(alpha=penalty), LogisticRegression(C=1 / penalty, max_iter=200)):
            if isinstance(model, LogisticRegression) and penalty != _PENALTIES[0]:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                best = max(best, float(model.fit(x[fit], labels[fit]).score(x[~fit], labels[~fit])))
    return best


def _comes_with(bench: Bench, name: str, concept: str, position: str) -> Measured:
    layer = int(name.removeprefix("mlp.").split(".")[0])
    middle = (1 + _chance(bench, concept)) / 2
    columns, rows = bench.at(position), every_row(len(bench.examples))
    site: Site = ("stream", layer)

    def read(changes: Mapping[Site, Change] | None = None) -> float:
        return probed(bench, bench.read([site], bench.tokens, changes)[site][rows, columns], concept)

    before = probed(bench, bench.streams[layer, rows, columns], concept)
    after, without = read(), read(mean_changes(bench, [name]))
    values = {"before": before, "after": after, "without": without}
    return Measured(values, before <= middle < after and without <= middle)


def _chance(bench: Bench, concept: str) -> float:
    labels = torch.tensor([(example.values or {})[concept] for example in bench.examples])
    return float(torch.bincount(labels).max() / len(labels))
