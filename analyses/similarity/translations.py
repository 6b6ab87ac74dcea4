"""How alike the texts of one meaning are across two languages, beside texts of other meanings."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.results.statistics import Ci, row_interval


def translation_columns(
    a: Float[Tensor, "text d_model"], b: Float[Tensor, "text d_model"], ci: Ci, seed: int
) -> dict[str, float]:
    """Return what a table says of texts `a` and their translations `b`: aligned, unaligned, gap, ci_low, ci_high, retrieval, chance, n."""
    aligned, unaligned, retrieval = compare(a, b)
    gap = row_interval((aligned - unaligned)[:, None], ci, seed)
    return {
        "aligned": float(aligned.mean()), "unaligned": float(unaligned.mean()), "gap": float(gap.mean[0]),
        "ci_low": float(gap.low[0]), "ci_high": float(gap.high[0]), "retrieval": retrieval, "chance": 1 / len(a), "n": len(a),
    }  # fmt: skip


def compare(a: Float[Tensor, "text d_model"], b: Float[Tensor, "text d_model"]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (cosine of each text with its translation, mean cosine with the other texts, share whose nearest is the translation).

    Each language's mean is taken off first, so that what all its texts share does not count; a, b [text, d_model].
    """
    first, second = (torch.nn.functional.normalize((x - x.mean(dim=0)).double(), dim=-1) for x in (a, b))
    cosine = first @ second.T
    n = len(cosine)
    aligned = cosine.diagonal()
    unaligned = (cosine.sum(dim=1) - aligned) / max(1, n - 1)
    nearest = (cosine.argmax(dim=1) == torch.arange(n)).double() + (cosine.argmax(dim=0) == torch.arange(n)).double()
    return aligned.numpy(), unaligned.numpy(), float(nearest.mean() / 2)
