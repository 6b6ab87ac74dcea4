"""The tuned lens: an affine map per layer that carries its rows to where the unembedding can read them.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", fitted here in closed form:
ridge regression of the last block's rows on each layer's, both at unit scale, shrunk towards the plain logit lens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from probes.errors import ProbeError
from probes.lenses import logit
from probes.lenses.protocol import LensRead
from probes.models.protocol import Unembedding

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths tried, relative to the mean variance of a dimension."""
SCORED_ROWS = 192
"""Held-out rows whose divergence from the model is measured."""


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Fitted maps; the last layer's is the identity."""

    unembedding: Unembedding
    change: tuple[Tensor | None, ...]
    """Per layer, [d_model, d_model] added to the identity; None for none."""
    bias: tuple[Tensor | None, ...]
    """Per layer, [d_model]."""
    ridge: tuple[float, ...]
    """Per layer, the strength chosen."""
    logit_kl: NDArray[np.float64]
    """Per layer, mean KL(model || logit lens) on held-out rows, in nats."""
    tuned_kl: NDArray[np.float64]
    """Per layer, mean KL(model || tuned lens) on the same rows, in nats."""
    n_rows: tuple[int, int]
    """Rows fitted on, and rows the two losses were measured on."""

    def read(
        self,
        rows: Float[Tensor, "row d_model"],
        layer: int,
        *,
        ids: Int[Tensor, "*any token"] | None = None,
        top_k: int = 0,
    ) -> LensRead:
        """Read rows of `layer` through its map; see `Lens.read`."""
        return logit.read(self.translate(rows, layer), self.unembedding, ids=ids, top_k=top_k)

    def translate(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Map rows of a layer to what leaves the last block, at unit scale; the last layer's stay as they are."""
        change, bias = self.change[layer], self.bias[layer]
        if change is None or bias is None:
            return rows
        unit = unit_scale(rows)
        return unit + unit @ change.to(unit) + bias.to(unit)


def unit_scale(rows: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """Return rows divided by their root mean square, float32; a final norm reads them as before."""
    rows = rows.float()
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)


def fit(
    layer_rows: Callable[[int], Tensor], n_layers: int, groups: Sequence[int], unembedding: Unembedding, seed: int = 0
) -> TunedLens:
    """Fit one map per layer; whole groups are held out, first for the ridge, then for the losses.

    Args:
        layer_rows: rows [n, d_model] of a layer, the same positions at every layer.
        groups: [n], the text each row comes from.

    Raises:
        ProbeError: fewer than five groups.
    """
    names = np.unique(np.asarray(groups))
    if len(names) < 5:
        raise ProbeError(f"a tuned lens needs rows of at least 5 texts to hold some out, not {len(names)}")
    rng = np.random.default_rng(seed)
    part = dict(zip(rng.permutation(names), np.arange(len(names)) * 5 // len(names), strict=True))
    fold = torch.tensor([int(part[g]) for g in np.asarray(groups)])
    train, choose = fold < 3, fold == 3
    scored = torch.nonzero(fold == 4)[:, 0]
    scored = scored[torch.from_numpy(rng.permutation(len(scored)))[:SCORED_ROWS]]
    last = layer_rows(n_layers - 1)
    target = unit_scale(last)
    maps: list[tuple[Tensor | None, Tensor | None, float]] = []
    losses = []
    for layer in range(n_layers):
        rows = layer_rows(layer)
        unit = unit_scale(rows)
        change = bias = None
        strength = 0.0
        if layer < n_layers - 1:
            change, bias, strength = _ridge(unit[train], target[train], unit[choose], target[choose])
        maps.append((change, bias, strength))
        tuned = rows[scored] if change is None or bias is None else unit[scored] + unit[scored] @ change + bias
        losses.append([_kl(last[scored], final, unembedding) for final in (rows[scored], tuned)])
    changes, biases, ridges = zip(*maps, strict=True)
    logit_kl, tuned_kl = np.array(losses).T
    return TunedLens(unembedding, changes, biases, ridges, logit_kl, tuned_kl, (int(train.sum()), len(scored)))


def _ridge(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return (change, bias, strength): y is about x + x @ change + bias; the strength does best on the new rows."""
    x_mean, residual = x.mean(dim=0), y - x
    r_mean = residual.mean(dim=0)
    centred = (x - x_mean).double()
    gram = centred.T @ centred
    values, vectors = torch.linalg.eigh(gram)
    moment = vectors.T @ (centred.T @ (residual - r_mean).double())
    fits: list[tuple[float, Tensor, Tensor, float]] = []
    for strength in RIDGES:
        shrunk = vectors @ (moment / (values.clamp_min(0) + strength * values.mean())[:, None])
        change = shrunk.float()
        bias = r_mean - x_mean @ change
        error = float((x_new + x_new @ change + bias - y_new).square().mean())
        fits.append((error, change, bias, strength))
    _, change, bias, strength = min(fits, key=lambda entry: entry[0])
    return change, bias, strength


def _kl(reference: Tensor, rows: Tensor, unembedding: Unembedding) -> float:
    return float(logit.read(rows, unembedding, reference=reference).kl.double().mean())
