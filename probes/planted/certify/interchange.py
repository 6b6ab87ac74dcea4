"""Where replacing the stream by the partner prompt's changes the answer, and where the prompt's own brings it."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, window_of
from probes.planted.record import Question


def necessary(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers changed by the partner's stream at the position, for each layer from -1."""
    assert question.position
    own, other = bench.streams, bench.partner_streams
    shares = []
    for layer in range(-1, bench.layers):
        named = _replaced(bench, bench.tokens, bench.last, own, other, layer, question.position)
        shares.append(float((named != bench.plain).float().mean()))
    return Measured(shares, window_of(shares) == (True, question.truth))


def sufficient(bench: Bench, question: Question) -> Measured:
    """Measure the share of partners that give the prompt's answer with its stream at the position, from layer -1."""
    assert question.position
    own, other = bench.streams, bench.partner_streams
    tokens, last = bench.partners
    shares = []
    for layer in range(-1, bench.layers):
        named = _replaced(bench, tokens, last, other, own, layer, question.position)
        shares.append(float((named == bench.plain).float().mean()))
    return Measured(shares, window_of(shares) == (True, question.truth))


def _replaced(
    bench: Bench, tokens: Tensor, last: Tensor, into: Tensor, brought: Tensor, layer: int, position: str
) -> Tensor:
    rows, columns = torch.arange(len(tokens)), bench.at(position)

    def change(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[rows, columns] = brought[layer + 1, rows, columns]
        return stream

    del into
    return bench.answer(tokens, last, {("stream", layer): change})
