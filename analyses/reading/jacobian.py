"""How settled a Jacobian lens is: its two halves, fitted on every other text, against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probes.lens_fits.jacobian_fit import JacobianFit
from probes.lenses.jacobian import JacobianLens


def with_halves(fit: JacobianFit) -> JacobianLens:
    """Return the fitted lens, its card naming per layer how alike its halves are and how large the error of the mean is.

    The change of a running mean falls as one over the number of texts whatever happens, and so is no evidence; halves are.
    """
    if fit.halves is None:
        return fit.lens
    quality: list[Mapping[str, Any]] = []
    for layer in sorted(fit.lens.maps):
        even, odd = (half.maps[layer] for half in fit.halves)
        values = {"split_half_cosine": cosine(even, odd), "relative_error": fit.relative_error[layer]}
        sizes = {"ci_low": None, "ci_high": None, "n_texts": fit.lens.card.corpus.texts, "n_rows": 0}
        quality += [
            {"lens": "jacobian", "layer": layer, "measure": name, "value": value, **sizes}
            for name, value in values.items()
        ]
    return replace(fit.lens, card=replace(fit.lens.card, quality=tuple(quality)))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two matrices as vectors."""
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
