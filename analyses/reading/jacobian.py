"""How settled a Jacobian lens is: its two halves, fitted on every other text, against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from analyses.reading.quality import TOP, JudgedRows, judged_rows
from analyses.reading.texts import Texts, shipped_texts
from probes.lens_fits.jacobian_fit import JacobianFit
from probes.lenses import logit
from probes.lenses.jacobian import JacobianLens
from probes.models.protocol import Model, Unembedding
from probes.progress import QUIET, Progress
from probes.store import RowStore

HELD_OUT = 40
"""Sentences of which the halves' readings are compared."""


def with_halves(
    fit: JacobianFit, judged: JudgedRows | None = None, unembedding: Unembedding | None = None
) -> JacobianLens:
    """Return the fitted lens, its card naming per layer how alike its halves are and how large the error of the mean is.

    The change of a running mean falls as one over the number of texts whatever happens, and so is no evidence; halves are.

    Args:
        judged: held-out rows, on which the halves' first and first ten tokens are compared too.
        unembedding: what reads them.
    """
    if fit.halves is None:
        return fit.lens
    quality: list[Mapping[str, Any]] = []
    for layer in sorted(fit.lens.maps):
        even, odd = (half.maps[layer] for half in fit.halves)
        values = {"split_half_cosine": cosine(even, odd), "relative_error": fit.relative_error[layer]}
        if judged is not None and unembedding is not None:
            values |= _shared(fit.halves, judged.rows(layer), layer, unembedding)
        n_rows = 0 if judged is None else len(judged.places)
        sizes = {"ci_low": None, "ci_high": None, "n_texts": fit.lens.card.corpus.texts, "n_rows": n_rows}
        quality += [
            {"lens": "jacobian", "layer": layer, "measure": name, "value": value, **sizes}
            for name, value in values.items()
        ]
    return replace(fit.lens, card=replace(fit.lens.card, quality=tuple(quality)))


def held_out_rows(
    model: Model, texts: Texts, store: RowStore, seed: int = 0, progress: Progress = QUIET
) -> JudgedRows | None:
    """Return a few rows of shipped sentences that are no part of the texts; None from a model without a tokenizer."""
    if model.tokenizer is None:
        return None
    fitted = [" ".join(map(str, text)) for text in texts.sequences]
    shipped = shipped_texts(model, 10**6, seed)
    # Packed sentences are tokenised together, which may change their first and last token.
    kept = [
        i for i, sentence in enumerate(shipped.sequences)
        if not any(" ".join(map(str, sentence[1:-1])) in text for text in fitted)
    ][:HELD_OUT]  # fmt: skip
    few = replace(
        shipped, sequences=tuple(shipped.sequences[i] for i in kept), groups=tuple(shipped.groups[i] for i in kept)
    )
    return judged_rows(model, few, store, seed=seed, positions=2, progress=progress) if kept else None


def _shared(
    halves: tuple[JacobianLens, JacobianLens], rows: Tensor, layer: int, unembedding: Unembedding
) -> dict[str, float]:
    """The share of rows whose first token both halves read, and how many of the first ten they share."""
    readable = torch.cat([half.readable(rows, layer) for half in halves])
    even, odd = torch.split(logit.read(readable, unembedding, top_k=TOP).top_ids.cpu(), len(rows))
    return {
        "split_half_top1": float((even[:, 0] == odd[:, 0]).float().mean()),
        "split_half_top10": float((even[:, :, None] == odd[:, None, :]).any(2).float().mean()),
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two matrices as vectors."""
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
