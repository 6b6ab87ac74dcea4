"""How much each block adds to the stream."""

from __future__ import annotations

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured
from probes.planted.record import Question

NOTHING, SOMETHING = 1e-4, 1e-2
"""Largest relative update of a block that changes nothing, and smallest of one that does."""


def void(bench: Bench, question: Question) -> Measured:
    """Measure each block's largest update over the stream it enters."""
    steps = (bench.streams[1:] - bench.streams[:-1]).norm(dim=-1) / bench.streams[:-1].norm(dim=-1)
    largest = {str(layer): float(step[bench.valid].max()) for layer, step in enumerate(steps)}
    clear = all(update <= NOTHING or update >= SOMETHING for update in largest.values())
    voids = frozenset(layer for layer, update in largest.items() if update <= NOTHING)
    return Measured(largest, clear and voids == question.truth)
