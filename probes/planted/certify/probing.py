"""Linear probes of the bench's own: ridge and softmax regression, tested on combinations that were held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

FOLDS = 4
_PENALTIES = (1e-3, 1e-1, 1.0, 10.0)
_STEPS, _DECAY = 120, 1e-4
Probe = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows it is fitted on, rows it is asked about [stack, row, width], targets [row, label]: scores [penalty, stack, row, label]."""


def held_out_accuracy(
    features: Float[Tensor, "stack row width"], labels: Int[Tensor, "row"], groups: Sequence[str]
) -> list[float]:
    """Return for each stack the share of rows whose label the better of two probes tells, fitted without their group.

    Groups are dealt to four folds, each label's evenly; penalties are shared by all folds.
    """
    folds = _folds(labels, groups)
    shares = _shares(_ridge, features, labels, folds)
    rest = shares < 1  # where every row is told, the slower probe can tell no more
    if rest.any():
        shares[rest] = torch.maximum(shares[rest], _shares(_softmax, features[rest], labels, folds))
    return shares.tolist()


def _shares(probe: Probe, features: Tensor, labels: Tensor, folds: Tensor) -> Float[Tensor, "stack"]:
    """Return for each stack the share of rows that a probe tells, under the best of its penalties."""
    targets = torch.nn.functional.one_hot(labels).double()
    right = []
    for fold in range(FOLDS):
        fit, test = folds != fold, folds == fold
        x = features.double() - features[:, fit].double().mean(1, keepdim=True)
        x = x / x[:, fit].square().sum(-1).mean(1).sqrt().clamp_min(1e-9)[:, None, None]
        right.append(probe(x[:, fit], x[:, test], targets[fit]).argmax(-1) == labels[test])
    return torch.cat(right, dim=-1).float().mean(-1).amax(0)


def _ridge(x: Tensor, new: Tensor, targets: Tensor) -> Float[Tensor, "penalty stack row label"]:
    mean = targets.mean(0)
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    projected = left.mT @ (targets - mean)
    shrunk = [(sizes / (sizes.square() + penalty))[..., None] * projected for penalty in _PENALTIES]
    return torch.stack([new @ (right.mT @ weights) + mean for weights in shrunk])


def _softmax(x: Tensor, new: Tensor, targets: Tensor) -> Float[Tensor, "1 stack row label"]:
    """Softmax regression by accelerated gradient descent; rows have mean square 1, so the step 2 is below 1 / curvature."""
    ahead = weights = torch.zeros(len(x), x.shape[-1], targets.shape[-1], dtype=x.dtype)
    step = 1.0 / (0.5 + _DECAY)
    for number in range(_STEPS):
        error = (x @ ahead).softmax(-1) - targets
        following = ahead - step * (x.mT @ error / x.shape[1] + _DECAY * ahead)
        ahead = following + number / (number + 3) * (following - weights)
        weights = following
    return (new @ weights)[None]


def _folds(labels: Tensor, groups: Sequence[str]) -> Int[Tensor, "row"]:
    label_of = dict(zip(groups, labels.tolist(), strict=True))
    dealt = {group: number % FOLDS for number, group in enumerate(sorted(label_of, key=lambda g: (label_of[g], g)))}
    return torch.tensor([dealt[group] for group in groups])
