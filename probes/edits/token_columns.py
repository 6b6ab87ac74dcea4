"""Columns of the unembedding along which the logit lens reads tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probes.models.protocol import Model


def lens_column(model: Model, token: int) -> Float[Tensor, " d_model"]:
    """Return the gradient of a token's logit with respect to the last stream, times the final norm's scale.

    That is the unembedding's column times the gain, without its mean where the norm takes the mean away.

    Raises:
        PointError: a model without a final norm and unembedding that give its logits.
    """
    lens = model.unembedding()
    column, like = lens.weight[token].float(), lens.weight
    # Rows of +1 and -1 in turn have mean 0 and scale 1: the norm of one is its signs times the gain, plus the bias.
    signs = torch.ones(column.numel(), device=like.device, dtype=like.dtype)
    signs[1::2] = -1.0
    rows = lens.norm(torch.stack((signs, -signs, torch.ones_like(signs), 0 * signs))).float()
    gained = column * (rows[0] - rows[1]) / 2 * signs
    takes_mean = bool((rows[2] - rows[3]).abs().max() < 1e-3 * (rows[0] - rows[1]).abs().max())
    return gained - gained.mean() if takes_mean else gained


def unit_column(model: Model, token: int, minus: int | None) -> Float[Tensor, " d_model"]:
    """Return a token's column as `lens_column` has it, less that of another token where one is given, at unit length.

    Raises:
        PointError: as `lens_column`.
    """
    with torch.no_grad():
        column = lens_column(model, token)
        if minus is not None:
            column = column - lens_column(model, minus)
    return column / column.norm().clamp_min(torch.finfo(torch.float32).tiny)
