"""How much each block adds to the stream, of every token or of a class of words."""

from __future__ import annotations

import torch

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured
from probes.planted.record import Question
from probes.planted.vocabulary import word_class

NOTHING, SOMETHING = 3e-3, 3e-2
"""Largest relative update of a block that changes nothing, and smallest of one that does."""


def void(bench: Bench, question: Question) -> Measured:
    """Measure each block's largest update over the stream it enters, by class of words where the candidates name classes."""
    steps = (bench.streams[1:] - bench.streams[:-1]).norm(dim=-1) / bench.streams[:-1].norm(dim=-1)
    classes = sorted({name.partition(":")[2] for name in question.candidates})
    largest: dict[str, float] = {}
    for name in classes:
        rows = bench.valid & _of_class(bench, name) if name else bench.valid
        suffix = f":{name}" if name else ""
        largest |= {f"{layer}{suffix}": float(step[rows].max()) for layer, step in enumerate(steps)}
    if question.ranking_only and isinstance(question.truth, frozenset):
        smallest = min(update for name, update in largest.items() if name not in question.truth)
        return Measured(largest, max(largest[name] for name in question.truth) < smallest)
    clear = all(update <= NOTHING or update >= SOMETHING for update in largest.values())
    voids = frozenset(name for name, update in largest.items() if update <= NOTHING)
    return Measured(largest, clear and voids == question.truth)


def _of_class(bench: Bench, name: str) -> torch.Tensor:
    tokenizer = bench.task.tokenizer
    classes = [word_class(tokenizer.convert_ids_to_tokens(index)) for index in range(len(tokenizer))]
    return torch.tensor([word == name for word in classes])[bench.tokens]
