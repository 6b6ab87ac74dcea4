"""How alike two lenses read the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor

from analyses.reading.quality import TOP, JudgedRows
from analyses.similarity.divergence import jensen_shannon
from probes.lenses import logit
from probes.lenses.protocol import Lens
from probes.models.protocol import Model

ROWS_COMPARED = 12
"""Rows whose whole distributions are compared, which bounds memory."""


def similarity(model: Model, judged: JudgedRows, lenses: Mapping[str, Lens], layers: Sequence[int]) -> pd.DataFrame:
    """Columns lens_a, lens_b, layer, js (Jensen-Shannon divergence, nats), top10_overlap, spearman (over the vocabulary)."""
    unembedding = model.unembedding()
    step = max(1, len(judged.places) // ROWS_COMPARED)
    parts = []
    for layer in layers:
        rows = judged.rows(layer)[::step][:ROWS_COMPARED]
        read = {
            name: logit.all_logprobs(lens.readable(rows, layer).float(), unembedding) for name, lens in lenses.items()
        }
        order = {name: _ranks(logprobs) for name, logprobs in read.items()}
        parts += [
            {
                "lens_a": a, "lens_b": b, "layer": layer, "js": float(jensen_shannon(read[a], read[b]).mean()),
                "top10_overlap": float(_shared(read[a], read[b]).mean()), "spearman": float(_pearson(order[a], order[b]).mean()),
                "n_rows": len(rows),
            }
            for a, b in combinations(read, 2)
        ]  # fmt: skip
    return pd.DataFrame(parts)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    first, second = (x.topk(min(TOP, x.shape[-1]), -1).indices for x in (a, b))
    return (first[:, :, None] == second[:, None, :]).any(2).float().mean(1)


def _ranks(values: Tensor) -> Tensor:
    # numpy sorts a vocabulary several times faster than torch does on a processor.
    order = torch.from_numpy(values.cpu().numpy().argsort(-1)).to(values.device)
    return torch.empty_like(values).scatter_(-1, order, torch.arange(values.shape[-1]).to(values).expand_as(values))


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)
