"""Models compared on text that none of them was trained on: losses, calibration, and how far predictions lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analyses.results.statistics import Array, cluster_bootstrap
from analyses.similarity.divergence import jensen_shannon

BINS = 10
"""Bins of equal width for the calibration error."""
ROWS = 8
"""Blocks run at once."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of every token of some blocks but each block's first; [blocks, block - 1] each."""

    loss: Array
    """Cross-entropy, nats."""
    entropy: Array
    """Of the prediction, nats."""
    confidence: Array
    """Probability of the most probable token."""
    correct: Array
    """1 where that token came."""


@torch.no_grad()
def predict(
    modules: Mapping[str, nn.Module], blocks: Tensor
) -> tuple[dict[str, Predictions], dict[tuple[str, str], Array]]:
    """Return the predictions of several models on blocks [n, block], and each pair's Jensen-Shannon divergence per token, nats."""
    parts: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
    divergences: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in combinations(modules, 2)}
    for rows in torch.split(blocks, ROWS):
        logprobs = {}
        for name, module in modules.items():
            device = next(module.parameters()).device
            out = module(input_ids=rows.to(device), use_cache=False).logits[:, :-1].float().log_softmax(-1).cpu()
            logprobs[name] = out
            parts[name].append(_read(out, rows[:, 1:]))
        for a, b in divergences:
            divergences[a, b].append(jensen_shannon(logprobs[a], logprobs[b]))
    predictions = {
        name: Predictions(*(torch.cat(column).double().numpy() for column in zip(*read, strict=True)))
        for name, read in parts.items()
    }
    return predictions, {pair: torch.cat(values).double().numpy() for pair, values in divergences.items()}


def _read(logprobs: Tensor, targets: Tensor) -> list[Tensor]:
    best = logprobs.max(-1)
    return [
        -logprobs.gather(-1, targets[..., None])[..., 0],
        -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1),
        best.values.exp(),
        (best.indices == targets).float(),
    ]


def calibration_error(confidence: Array, correct: Array, bins: int = BINS) -> float:
    """Return the expected calibration error: |confidence - accuracy| per bin of confidence, weighted by the bin's share.

    Naeini, Cooper, Hauskrecht 2015.
    """
    place = np.minimum((confidence.ravel() * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=(confidence - correct).ravel(), minlength=bins)
    return float(np.abs(gaps).sum() / confidence.size)


def loss_table(predictions: Mapping[str, Predictions], control: str, seed: int) -> pd.DataFrame:
    """Return one row a variant, with intervals over blocks; that of the gap resamples the same blocks for both."""
    rows = []
    for name, p in predictions.items():
        block = np.repeat(np.arange(len(p.loss)), p.loss.shape[1])
        own = cluster_bootstrap(p.loss.ravel(), block, seed=seed)
        rows.append(
            {
                "variant": name,
                **own.columns("mean", "ci_"),
                "median": float(np.median(p.loss)),
                "p999": float(np.quantile(p.loss, 0.999)),
                "largest": float(p.loss.max()),
                "n_tokens": p.loss.size,
                "entropy": float(p.entropy.mean()),
                "calibration_error": calibration_error(p.confidence, p.correct),
                "accuracy": float(p.correct.mean()),
                **_gap(p, predictions.get(control), block, seed),
            }
        )
    return pd.DataFrame(rows)


def _gap(p: Predictions, control: Predictions | None, block: NDArray[np.int64], seed: int) -> dict[str, float]:
    if control is None:
        return {}
    gap = cluster_bootstrap((p.loss - control.loss).ravel(), block, seed=seed)
    return gap.columns("gap_to_control", "gap_")


def divergence_table(divergences: Mapping[tuple[str, str], Array], seed: int) -> pd.DataFrame:
    """Return the mean Jensen-Shannon divergence of every two variants, with intervals over blocks."""
    rows = []
    for (a, b), values in divergences.items():
        mean = cluster_bootstrap(values.ravel(), np.repeat(np.arange(len(values)), values.shape[1]), seed=seed)
        rows.append({"variant_a": a, "variant_b": b, **mean.columns("divergence", "ci_")})
    return pd.DataFrame(rows)


def training_table(histories: Mapping[str, Sequence[Mapping[str, object]]]) -> pd.DataFrame:
    """Return the steps of several trainings in one table."""
    return pd.concat([pd.DataFrame(h).assign(variant=name) for name, h in histories.items()], ignore_index=True)
