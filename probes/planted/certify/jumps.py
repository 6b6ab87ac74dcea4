"""Which jumps back mend a wrong answer: the stream after one block enters an earlier block again."""

from __future__ import annotations

import torch

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, set_of
from probes.planted.record import Question

BY_CHANCE = 0.01
"""Probability that any jump of a model puts more right than counts as guessed."""


@torch.no_grad()
def mending(bench: Bench, question: Question) -> Measured:
    """Measure the share of wrong answers that each jump a->b puts right; where hardly any is wrong there is nothing to mend.

    With a position, the stream after block a is brought back there alone.
    """
    wrong = [
        example for example, named in zip(bench.examples, bench.plain.tolist(), strict=True) if named != example.answer
    ]
    if len(wrong) <= (1 - bench.sure) * len(bench.examples):
        return Measured({}, question.nothing)
    few = Bench(bench.task, wrong).few(24)
    shares = {}
    most = guessed(bench, few) if question.nothing else 1 - bench.sure
    for b in range(few.layers):
        entering = few.streams[b + 1 :]
        if question.position:
            rows, columns = few.at(question.position)
            brought = few.streams[b + 1 :, rows, columns]
            entering = few.streams[b].repeat(len(entering), 1, 1, 1)
            entering[:, rows, columns] = brought
        ends = few.last.repeat(few.layers - b)
        named = few.run_blocks(range(b, few.layers), entering.flatten(0, 1), ends).reshape(few.layers - b, -1)
        for a in range(b, few.layers):
            shares[f"{a}->{b}"] = float((named[a - b] == few.answers).float().mean())
    if question.candidates:
        shares = {cell: share for cell, share in shares.items() if cell in question.candidates}
    measured = {cell: share for cell, share in shares.items() if share > 0}
    return Measured(measured, set_of(shares, least=bench.sure, most=most) == question.truth)


def guessed(bench: Bench, few: Bench) -> float:
    """Return the largest share that a jump puts right by naming another answer at random, over all jumps (Bonferroni)."""
    from scipy.stats import binom  # half a second, which tasks without wrong answers need not spend

    n, chance = len(few.examples), 1 / max(1, len(set(bench.answers.tolist())) - 1)
    jumps = few.layers * (few.layers + 1) // 2
    return float(binom.isf(BY_CHANCE / jumps, n, chance)) / n
