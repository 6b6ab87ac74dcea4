"""Which blocks' keys span one subspace over tokens."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, set_of
from probes.planted.record import Question

APART = 0.5
"""Largest overlap of subspaces that are not shared."""
RANK = 1e-3
"""Singular values below this share of the largest count as none."""


@torch.no_grad()
def subspace(bench: Bench, question: Question) -> Measured:
    """Measure the mean squared cosine between the spans over tokens of two blocks' centred keys, for every pair."""
    spans = [_span(bench, layer) for layer in range(bench.layers)]
    overlaps = {
        f"{a}+{b}": float((spans[a].T @ spans[b]).square().sum() / min(spans[a].shape[1], spans[b].shape[1]))
        for a, b in combinations(range(bench.layers), 2)
    }
    return Measured(overlaps, set_of(overlaps, most=APART) == question.truth)


def _span(bench: Bench, layer: int) -> Tensor:
    rows = bench.projected(bench.streams[layer], layer, "k")[bench.valid]
    left, sizes, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return left[:, sizes > RANK * sizes[0]]
