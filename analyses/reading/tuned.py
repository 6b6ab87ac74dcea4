"""A tuned lens of a model from stored rows, with its held-out divergence and that of its controls on its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyses.reading.texts import Texts
from analyses.results.statistics import Array, cluster_bootstrap
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.lenses import logit
from probes.lenses.card import card_of
from probes.lenses.tuned_fit import TunedFit, fit_tuned
from probes.models.protocol import Model, Unembedding
from probes.points import Address
from probes.progress import QUIET, Progress
from probes.reducers import ROWS
from probes.store import RowStore

UNIGRAM_ROWS = 64
"""Rows whose whole distribution is held at once."""


def fit_tuned_on(
    model: Model,
    texts: Texts,
    store: RowStore,
    *,
    offsets: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
    refine: int = 0,
    seed: int = 0,
    progress: Progress = QUIET,
) -> tuple[TunedFit, Activations]:
    """Fit a tuned lens on texts; only rows that the store lacks are captured, and no forward runs where it lacks none.

    `offsets`, `layers` and `refine` as `fit_tuned` takes them.

    Each text's first row is left out: its massive norm sets it apart, and it says nothing of the others.

    Raises:
        ProbeError: fewer than five groups of texts.
    """
    activations = capture(model, list(texts.sequences), [Need("resid_post.*", ROWS)], store, progress=progress)

    def text_rows(layer: int) -> list[Tensor]:
        return [rows[1:].float() for rows in activations.get(Address("resid_post", layer))]

    card = card_of("tuned", model, corpus=texts.corpus, options={"first_token": False})
    fit = fit_tuned(
        text_rows, texts.groups, model.unembedding(), card, offsets=offsets, layers=layers, refine=refine, seed=seed
    )
    return replace(fit, lens=replace(fit.lens, card=replace(fit.lens.card, quality=_quality(fit, seed)))), activations


def _quality(fit: TunedFit, seed: int) -> tuple[Mapping[str, Any], ...]:
    """Mean held-out divergence of the lens and its controls, by layer, with intervals over texts."""
    rows = []
    for name, kl in fit.kl.items():
        interval = cluster_bootstrap(kl.T, fit.text_of, seed=seed)
        for layer, value, low, high in zip(fit.layers, interval.mean, interval.low, interval.high, strict=True):
            bounds = {"ci_low": _known(low), "ci_high": _known(high)}
            sizes = {"n_texts": len(np.unique(fit.text_of)), "n_rows": len(fit.text_of)}
            rows.append(
                {"lens": name, "layer": layer, "measure": "kl_to_final", "value": float(value)} | bounds | sizes
            )
    return tuple(rows)


def _known(bound: float) -> float | None:
    return float(bound) if np.isfinite(bound) else None


def unigram_logprobs(sequences: Sequence[Sequence[int]], d_vocab: int) -> Tensor:
    """Return the log-frequency of every token in texts, add-one smoothed; [d_vocab] float32."""
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
    counts = torch.bincount(ids, minlength=d_vocab).double() + 1
    return (counts / counts.sum()).log().float()


@torch.inference_mode()
def kl_to_fixed(final: Tensor, unembedding: Unembedding, logprobs: Tensor) -> Array:
    """Return KL(model || fixed distribution) of final rows [n, d_model], in nats; [n]."""
    parts = []
    for rows in torch.split(final, UNIGRAM_ROWS):
        own = logit.all_logprobs(rows, unembedding).cpu()
        parts.append((own.exp() * (own - logprobs)).sum(-1))
    return torch.cat(parts).double().numpy()
