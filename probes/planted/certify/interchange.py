"""Where replacing the stream by the partner prompt's changes the answer, and where the prompt's own brings it."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, sure_window
from probes.planted.record import Interval, Question

FEW = 32
"""Examples of an intervention that either always works or never."""


def necessary(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers changed by the partner's stream at the position, for each layer from -1."""
    if question.concept:
        return _of_concept(bench, question)
    few = bench.few(FEW)
    shares = _shares(few, question, few.streams, few.partner_streams, few.last, changed=True)
    return Measured(shares, sure_window(shares, bench.sure) == (True, question.truth))


def sufficient(bench: Bench, question: Question) -> Measured:
    """Measure the share of partners that give the prompt's answer with its stream at the position, from layer -1."""
    few = bench.few(FEW)
    shares = _shares(few, question, few.partner_streams, few.streams, few.partners[1], changed=False)
    return Measured(shares, sure_window(shares, bench.sure) == (True, question.truth))


def _of_concept(bench: Bench, question: Question) -> Measured:
    """Where the concept can be read, bring in the stream of an example that differs in its value and in no other's."""
    values = [dict(example.values or {}) for example in bench.examples]
    donors = torch.tensor([
        max(range(len(values)), key=lambda other: _likeness(own, values[other], str(question.concept))) for own in values
    ])  # fmt: skip
    read = bench.task.record.question(f"readable:{question.concept}:{question.position}").truth
    assert isinstance(read, Interval)
    shares = _shares(bench, question, bench.streams, bench.streams[:, donors], bench.last, changed=True)
    inside = shares[read.first + 1 : read.last + 2]
    return Measured(inside, question.truth is None and max(inside) <= 1 - bench.sure)


def _likeness(own: dict[str, int], other: dict[str, int], concept: str) -> int:
    alike = sum(own[name] == other[name] for name in own if name != concept)
    return alike - (len(own) + 1) * (own[concept] == other[concept])


@torch.no_grad()
def _shares(
    bench: Bench, question: Question, into: Tensor, brought: Tensor, last: Tensor, *, changed: bool
) -> list[float]:
    """Put one stream's row at the position into the other after each layer; a block runs once for all that enter it."""
    rows, columns = bench.at(question.position)
    streams = into.clone()
    streams[:, rows, columns] = brought[:, rows, columns]
    running = streams[0][:0]
    for layer in range(bench.layers):
        running = bench.through(layer, torch.cat([running, streams[layer]]))
    ends = torch.cat([running, streams[-1]])
    named = bench.lens(ends[torch.arange(len(ends)), last.repeat(len(streams))]).reshape(len(streams), -1)
    return (named.eq(bench.plain) != changed).float().mean(1).tolist()
