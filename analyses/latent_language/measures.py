"""Measures of the latent-language analysis, as functions of numbers: event probability, token energy, crossover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.latent_language.ids import Tokens
from probes.lenses import logit
from probes.models.protocol import Unembedding

ID_COLUMNS = 16
"""Token columns gathered at once, which bounds memory."""
ENERGY_TILE = 8192
"""Unembedding rows per tile of the Gram matrix."""


def event_probability(
    logprobs: Mapping[tuple[Tokens, int], Float[Tensor, " layer"]], sequences: Sequence[Tokens]
) -> Float[Tensor, " layer"]:
    """The probability that text begins with one of prefix-free `sequences`; [layer] float64.

    Args:
        logprobs: (tokens before, token) to the token's log-probability at every layer, [layer].
    """
    total = torch.zeros_like(next(iter(logprobs.values())), dtype=torch.float64)
    for sequence in sequences:
        factors = [logprobs[sequence[:i], token].double() for i, token in enumerate(sequence)]
        total = total + torch.stack(factors).sum(dim=0).exp()
    return total


@torch.inference_mode()
def chosen_logprobs(
    rows: Float[Tensor, "n d_model"], unembedding: Unembedding, ids: Int[Tensor, "n m"], log_z: Float[Tensor, " n"]
) -> Float[Tensor, "n m"]:
    """Log-probability of chosen tokens through the lens, a few columns at a time.

    Args:
        rows: [n, d_model].
        ids: [n, m].
        log_z: [n], the log-sum-exp of each row's logits.
    """
    hidden = logit.normalized(rows, unembedding)
    parts = [
        logit.token_logits(hidden, unembedding, part.to(hidden.device)) for part in torch.split(ids, ID_COLUMNS, dim=1)
    ]
    return torch.cat(parts, dim=1) - log_z[:, None]


def crossover(target: NDArray[np.float64], latent: NDArray[np.float64]) -> int | None:
    """The first layer from which on the target's curve stays above the latent's; None where it ends below."""
    below = np.flatnonzero(~(np.asarray(target) > np.asarray(latent)))
    first = int(below[-1]) + 1 if len(below) else 0
    return first if first < len(target) else None


def area(curve: NDArray[np.float64]) -> float:
    """Area under a curve over relative depth from 0 to 1; the mean's unit."""
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1))) if len(curve) > 1 else float(curve[0])


@dataclass(frozen=True)
class TokenEnergy:
    """How much of a latent lies in the directions that tokens are read from (Wendler 2024).

    The root mean square of a unit latent's cosine with all unembedding rows, relative to that of the rows among themselves.
    """

    gram: Tensor
    """[d_model, d_model], the mean outer product of the unit rows; float64."""
    centred: bool
    """Whether the final norm subtracts the mean, so that latents are compared without it."""

    @property
    def scale(self) -> float:
        """The rows' root mean square cosine with each other; at least 1/sqrt(d_model)."""
        return float(self.gram.norm())

    @property
    def isotropic(self) -> float:
        """The energy of a latent without direction (root mean square over the sphere)."""
        return float((1 / self.gram.shape[0]) ** 0.5 / self.scale)

    def bounds(self) -> tuple[float, float]:
        """The least and greatest energy any latent can have."""
        values = torch.linalg.eigvalsh(self.gram).clamp_min(0)
        return float(values[0].sqrt() / self.scale), float(values[-1].sqrt() / self.scale)

    def of(self, rows: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        """Energy of residual rows [..., d_model]; [...] float64, not a number for a zero row."""
        latents = rows.double().cpu()
        if self.centred:
            latents = latents - latents.mean(dim=-1, keepdim=True)
        unit = latents / latents.norm(dim=-1, keepdim=True)
        return ((unit @ self.gram) * unit).sum(dim=-1).clamp_min(0).sqrt() / self.scale


@torch.no_grad()
def token_energy(unembedding: Unembedding) -> TokenEnergy:
    """The energy measure of a model's unembedding, its rows scaled by the final norm's gain."""
    gain, centred = norm_gain(unembedding)
    d_model = unembedding.weight.shape[1]
    total = torch.zeros(d_model, d_model, dtype=torch.float64)
    for part in torch.split(unembedding.weight, ENERGY_TILE):
        rows = part.float() * gain
        unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        total += (unit.T @ unit).double().cpu()
    return TokenEnergy(total / len(unembedding.weight), centred)


@torch.no_grad()
def norm_gain(unembedding: Unembedding) -> tuple[Tensor, bool]:
    """The final norm's gain per dimension [d_model], up to one factor, and whether it subtracts the mean.

    Read off the norm itself, by inputs of alternating sign, which have mean zero and equal magnitude everywhere.
    """
    weight = unembedding.weight
    signs = torch.ones(weight.shape[1], device=weight.device, dtype=weight.dtype)
    signs[1::2] = -1
    up, down = unembedding.norm(signs).float(), unembedding.norm(-signs).float()
    gain = (up - down) / 2 * signs.float()
    moved = unembedding.norm(signs + 2).float()
    return gain, bool(torch.allclose(moved, up, rtol=1e-2, atol=1e-3 * float(up.abs().max())))
