"""What can be read from the stream: concepts by linear probes on held-out combinations, words by the model's own read-out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.planted.certify.ablation import change_rows, every_row, handled, mean_changes
from probes.planted.certify.bench import Bench, Site
from probes.planted.certify.measured import SURE, Measured
from probes.planted.certify.probing import held_out_accuracy
from probes.planted.record import Interval, Question

GUESSED = 0.5
"""Where nothing names the answer a guess does, in fewer examples than this share."""


def readable(bench: Bench, question: Question) -> Measured:
    """Measure the accuracy of a probe for the concept at the position on held-out combinations, for each layer from -1."""
    assert question.concept
    assert question.position
    streams, columns = bench.streams, bench.at(question.position)
    rows = every_row(len(bench.examples))
    scores = probed(bench, streams[:, rows, columns], question.concept)
    chance = _chance(bench, question.concept)
    middle = (1 + chance) / 2
    # Within 2 % of the ceiling, give or take one combination.
    ceiling = SURE * max(scores) - 1 / len({example.group for example in bench.examples})
    inside = [layer - 1 for layer, score in enumerate(scores) if score >= ceiling and score > middle]
    clear = all(score >= ceiling or score <= middle for score in scores)
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
    """Measure what `written` does where the head takes the concept, and how much of its value hangs on `position`.

    That is the change of the value by the partner's stream there, over the difference from the partner's own value.
    """
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
    changed = (patched[site][rows, to][:, columns] - own).norm() / (goal - own).norm().clamp_min(1e-9)
    return Measured({**comes.values, "changed": float(changed)}, comes.agrees and float(changed) >= 0.5)


def lens(bench: Bench, question: Question) -> Measured:
    """Measure the share of examples whose answer the read-out names from a layer on, for each layer from -1."""
    assert question.position
    shares = named_from(bench, question.position)
    if question.truth is None:
        return Measured(shares, max(shares) < GUESSED)
    assert isinstance(question.truth, Interval)
    first = question.truth.first
    return Measured(shares, shares[first + 1] >= bench.sure and shares[first] <= 1 - bench.sure)


def named_from(bench: Bench, position: str) -> list[float]:
    """Return the share of examples whose answer the read-out at a position names at this and every later layer, from -1."""
    rows = every_row(len(bench.examples))
    right = bench.lens(bench.streams[:, rows, bench.at(position)]) == bench.answers
    onwards = right.flip(0).cummin(0).values.flip(0)
    return onwards.float().mean(1).tolist()


def probed(bench: Bench, features: Float[Tensor, "stack example width"], concept: str) -> list[float]:
    """Return for each stack of features the accuracy of a probe for the concept on held-out combinations."""
    return held_out_accuracy(features, _labels(bench, concept), [example.group for example in bench.examples])


def _comes_with(bench: Bench, name: str, concept: str, position: str) -> Measured:
    layer = int(name.removeprefix("mlp.").split(".")[0])
    middle = (1 + _chance(bench, concept)) / 2
    columns, rows = bench.at(position), every_row(len(bench.examples))
    site: Site = ("stream", layer)

    cut = bench.read([site], bench.tokens, mean_changes(bench, [name]))[site]
    stack = torch.stack([bench.streams[layer], bench.streams[layer + 1], cut])[:, rows, columns]
    before, after, without = probed(bench, stack, concept)
    values = {"before": before, "after": after, "without": without}
    return Measured(values, before <= middle < after and without <= middle)


def _chance(bench: Bench, concept: str) -> float:
    labels = _labels(bench, concept)
    return float(torch.bincount(labels).max() / len(labels))


def _labels(bench: Bench, concept: str) -> Int[Tensor, "example"]:
    return torch.tensor([(example.values or {})[concept] for example in bench.examples])
