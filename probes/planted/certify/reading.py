"""What can be read from the stream: concepts by linear probes on held-out combinations, words by the model's own read-out."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.planted.certify.ablation import handled, mean_changes, replacing
from probes.planted.certify.bench import Bench, Site
from probes.planted.certify.measured import SURE, Measured, window_of
from probes.planted.certify.probing import held_out_accuracy
from probes.planted.record import Interval, Question

GUESSED = 0.5
"""Where nothing names the answer a guess does, in fewer examples than this share."""


def readable(bench: Bench, question: Question) -> Measured:
    """Measure the accuracy of a probe for the concept at the position on held-out combinations, for each layer from -1."""
    assert question.concept
    scores = probed(bench, bench.streams[:, *bench.at(question.position)], question.concept)
    # Within 2 % of the ceiling, give or take one combination.
    ceiling = SURE * max(scores) - 1 / len({example.group for example in bench.examples})
    middle = _middle(bench, question.concept)
    least = max(ceiling, math.nextafter(middle, math.inf))
    return Measured(scores, window_of(scores, least=least, most=middle) == (True, question.truth))


def written(bench: Bench, question: Question) -> Measured:
    """Measure at the position how well the concept is read before the node's block, after it, and without the node."""
    return _comes_with(bench, question, question.position)


def moved(bench: Bench, question: Question) -> Measured:
    """Measure what `written` does where the head takes the concept, and how much of its value hangs on `position`.

    That is the change of the value by the partner's stream there, over the difference from the partner's own value.
    """
    comes = _comes_with(bench, question, question.to)
    site, columns = handled(bench, _only(question))
    at, to = bench.at(question.position), bench.at(question.to)
    own = bench.read([site], bench.tokens)[site][to][:, columns]
    other = bench.partner_streams[site[1]]
    patched = bench.read([site], bench.tokens, {("stream", site[1] - 1): replacing(at, other[at])})
    goal = bench.read([site], bench.partners[0])[site][to][:, columns]
    changed = (patched[site][to][:, columns] - own).norm() / (goal - own).norm().clamp_min(1e-9)
    return Measured({**comes.values, "changed": float(changed)}, comes.agrees and float(changed) >= 0.5)


def lens(bench: Bench, question: Question) -> Measured:
    """Measure the share of examples whose answer the read-out names from a layer on, for each layer from -1."""
    shares = named_from(bench, question.position)
    if question.truth is None:
        return Measured(shares, max(shares) < GUESSED)
    assert isinstance(question.truth, Interval)
    first = question.truth.first
    return Measured(shares, shares[first + 1] >= bench.sure and shares[first] <= 1 - bench.sure)


def named_from(bench: Bench, position: str | None) -> list[float]:
    """Return the share of examples whose answer the read-out at a position names at this and every later layer, from -1."""
    right = bench.lens(bench.streams[:, *bench.at(position)]) == bench.answers
    onwards = right.flip(0).cummin(0).values.flip(0)
    return onwards.float().mean(1).tolist()


def probed(bench: Bench, features: Float[Tensor, "stack example width"], concept: str) -> list[float]:
    """Return for each stack of features the accuracy of a probe for the concept on held-out combinations."""
    return held_out_accuracy(features, _labels(bench, concept), [example.group for example in bench.examples])


def _only(question: Question) -> str:
    assert isinstance(question.truth, frozenset)
    (name,) = question.truth
    return name


def _comes_with(bench: Bench, question: Question, position: str | None) -> Measured:
    assert question.concept
    name = _only(question)
    layer = int(name.removeprefix("mlp.").split(".")[0])
    site: Site = ("stream", layer)
    cut = bench.read([site], bench.tokens, mean_changes(bench, [name]))[site]
    stack = torch.stack([bench.streams[layer], bench.streams[layer + 1], cut])[:, *bench.at(position)]
    before, after, without = probed(bench, stack, question.concept)
    middle = _middle(bench, question.concept)
    values = {"before": before, "after": after, "without": without}
    return Measured(values, before <= middle < after and without <= middle)


def _middle(bench: Bench, concept: str) -> float:
    """Return the accuracy half way from that of the commonest value to 1."""
    labels = _labels(bench, concept)
    return (1 + float(torch.bincount(labels).max() / len(labels))) / 2


def _labels(bench: Bench, concept: str) -> Int[Tensor, "example"]:
    return torch.tensor([(example.values or {})[concept] for example in bench.examples])
