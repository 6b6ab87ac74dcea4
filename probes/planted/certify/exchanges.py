"""Which neighbouring blocks may be exchanged."""

from __future__ import annotations

import torch

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, set_of
from probes.planted.record import Question

BOUND = 0.6
"""Largest share of right answers after an exchange of blocks that must keep their order; a guess is sometimes right."""


def order(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers that stay when each block changes places with the next."""
    shares = {}
    for layer in range(bench.layers - 1):
        blocks = [*range(layer), layer + 1, layer, *range(layer + 2, bench.layers)]
        named = bench.run_blocks(blocks, bench.streams[0], bench.last)
        shares[f"{layer}+{layer + 1}"] = float(torch.eq(named, bench.plain).float().mean())
    return Measured(shares, set_of(shares, most=BOUND) == question.truth)
