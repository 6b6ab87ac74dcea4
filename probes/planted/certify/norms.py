"""Where a position is massive, and which norm's scale carries the difference between two classes of prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, set_of, window_of
from probes.planted.record import Question

MASSIVE, USUAL = 20.0, 5.0
"""Smallest ratio of a massive position's norm to the median of all others, and largest of a usual one."""
CARRIES, IDLE = 0.5, 0.1
"""Smallest share of the difference that fixing a scale which carries it takes away, and largest of another."""


def norm(bench: Bench, question: Question) -> Measured:
    """Measure the norm at a position over the median of the others, or the difference that each fixed scale takes away."""
    return _massive(bench, question) if question.position else _sites(bench, question)


def _massive(bench: Bench, question: Question) -> Measured:
    place, others = bench.at(question.position), bench.valid.clone()
    others[place] = False
    ratios = [float(size[place].min() / size[others].median()) for size in bench.streams.norm(dim=-1)]
    return Measured(ratios, window_of(ratios, least=MASSIVE, most=USUAL) == (True, question.truth))


def _sites(bench: Bench, question: Question) -> Measured:
    subsets = [example.subset for example in bench.examples]
    one, other = sorted(set(map(str, subsets)))
    first, second = (torch.tensor([subset == name for subset in subsets]) for name in (one, other))

    def difference() -> float:
        logits = bench.logits(bench.tokens, bench.last)
        scores = logits.log_softmax(-1)[torch.arange(len(subsets)), bench.answers]
        return float(scores[first].mean() - scores[second].mean())

    plain, shares = difference(), {}
    for site in question.candidates:
        with _module(bench, site).register_forward_hook(_fixed_scale):
            shares[site] = abs(1 - difference() / plain)
    return Measured(shares, set_of(shares, least=CARRIES, most=IDLE) == question.truth)


def _module(bench: Bench, site: str) -> Any:
    if site == "final":
        return bench.final_norm
    part, layer = site.split(".")
    block = bench.blocks[int(layer)]
    if bench.is_gpt2:
        return block.ln_1 if part == "attn" else block.ln_2
    return block.input_layernorm if part == "attn" else block.post_attention_layernorm


def _fixed_scale(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Divide every prompt's stream by the geometric mean of all prompts' scales at the position."""
    stream = args[0]
    centred = stream - stream.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else stream
    scale = centred.square().mean(-1, keepdim=True).sqrt()
    return output * scale / scale.log().mean(0, keepdim=True).exp()
