"""At which layers the read-out names the word of another language."""

from __future__ import annotations

import torch

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, sure_window
from probes.planted.record import Question


def pivot(bench: Bench, question: Question) -> Measured:
    """Measure the share of examples whose concept's word in the language is named at the position, for each layer from -1.

    A question of no language is of a model whose words are of one.
    """
    if question.concept is None or question.position is None:
        return Measured({}, question.truth is None)
    named = bench.lens(bench.streams[:, *bench.at(question.position)])
    values = [(example.values or {})["concept"] for example in bench.examples]
    words = torch.tensor(bench.task.tokenizer.convert_tokens_to_ids([f"{question.concept}{v}" for v in values]))
    shares = (named == words).float().mean(1).tolist()
    return Measured(shares, sure_window(shares, bench.sure) == (True, question.truth))
