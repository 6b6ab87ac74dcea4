"""Composition of attention heads, from weights alone, through d_head x d_head factors.

A head's output circuit is W_OV = W_V W_O and its attention circuit W_QK = W_Q W_Kᵀ, both [d_model, d_model] of rank at
most d_head (rows are read, columns are written). The composition score of an earlier head's A = W_OV with a later
head's B is |A B| / (|A| |B|) in Frobenius norms (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"), where B is W_QK (kind `q`), W_QKᵀ (`k`) or W_OV (`v`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Circuit:
    """Matrices [..., d_model, d_model] as products left @ right of [..., d_model, k] and [..., k, d_model]."""

    left: Tensor
    right: Tensor

    @property
    def transposed(self) -> Circuit:
        """Return the circuits of the transposed matrices."""
        return Circuit(self.right.transpose(-1, -2), self.left.transpose(-1, -2))

    @cached_property
    def reading(self) -> Tensor:
        """Return [..., d_model, k], equal to the matrix up to an orthogonal factor on the right: |x M| = |x reading|."""
        triangle = torch.linalg.qr(self.right.transpose(-1, -2), mode="r").R
        return self.left @ triangle.transpose(-1, -2)

    @cached_property
    def norm(self) -> Tensor:
        """Return the Frobenius norms [...]."""
        return torch.linalg.matrix_norm(self.reading)

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (read directions [..., k, d_model], singular values [..., k], write directions [..., k, d_model])."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.transpose(-1, -2))
        u, s, vh = torch.linalg.svd(r_left @ r_right.transpose(-1, -2))
        read = (q_left @ u).transpose(-1, -2)
        return read, s, vh @ q_right.transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Heads:
    """Weights of all heads, one set per query head: [layer, head, d_model, d_head], W_O [layer, head, d_head, d_model]."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    fold_norm: bool
    """Whether the gain of the norm before attention is inside W_Q, W_K and W_V (centred for a centring norm)."""
    notes: tuple[str, ...] = ()
    """What these weights leave out."""

    @property
    def n_layers(self) -> int:
        """Return the number of layers."""
        return self.w_q.shape[0]

    @property
    def n_heads(self) -> int:
        """Return the number of query heads of a layer."""
        return self.w_q.shape[1]

    @cached_property
    def ov(self) -> Circuit:
        """Return the output circuits W_V W_O."""
        return Circuit(self.w_v, self.w_o)

    def reader(self, kind: Kind, rotation: Tensor | None = None) -> Circuit:
        """Return the circuit by which a later head reads; `rotation` [d_head, d_head] stands between W_Q and W_Kᵀ."""
        if kind == "v":
            return self.ov
        middle = self.w_q if rotation is None else self.w_q @ rotation.to(self.w_q)
        qk = Circuit(middle, self.w_k.transpose(-1, -2))
        return qk if kind == "q" else qk.transposed


def composition_scores(source: Circuit, target: Circuit) -> Float[Tensor, "layer head layer head"]:
    """Return the scores of every earlier head with every later one; NaN where not strictly earlier.

    Args:
        source: output circuits of all heads [layer, head, ...]; the first two axes of the result.
        target: reading circuits of all heads [layer, head, ...].
    """
    n_layers, n_heads = source.left.shape[:2]
    # |A B| = |R b c Tᵀ| with A = (Q R) b and B = c (P T)ᵀ: only k x k products are formed.
    writing = source.transposed.reading.transpose(-1, -2)
    reading = target.reading
    d_model, k = reading.shape[-2:]
    out = torch.full((n_layers, n_heads, n_layers, n_heads), torch.nan, device=reading.device)
    for layer in range(1, n_layers):
        columns = reading[layer].transpose(0, 1).reshape(d_model, n_heads * k)
        for head in range(n_heads):
            pairs = writing[:layer, head].reshape(layer * k, d_model) @ columns
            squares = pairs.square_().view(layer, k, n_heads, k).sum((1, 3))
            out[:layer, head, layer] = squares.sqrt()
    return out / (source.norm[:, :, None, None] * target.norm)


def component_scores(source: Circuit, target: Circuit) -> Tensor:
    """Return scores [..., k] of the source's singular components with the target: |v_i B| / |B|; batched over leading axes."""
    _, _, write = source.svd
    return torch.linalg.vector_norm(write @ target.reading, dim=-1) / target.norm[..., None]


def pairwise_scores(source: Circuit, target: Circuit) -> Tensor:
    """Return |v_i . a_j| [..., i, j] of the source's write directions with the target's read directions."""
    return (source.svd[2] @ target.svd[0].transpose(-1, -2)).abs()


def principal_angles(source: Circuit, target: Circuit) -> Tensor:
    """Return the mean squared cosine [...] between what the source writes and what the target reads: |Uᵀ V|² / k, in 0..1."""
    return pairwise_scores(source, target).square().mean(-1).sum(-1)


def analytic_null(target: Circuit) -> tuple[Tensor, Tensor]:
    """Return (mean, standard deviation) [...] of a squared component score for an isotropic write direction.

    The mean is 1/d_model; the variance about 2 Σ w² / d_model², w the target's shares of squared singular values.
    """
    d_model = target.left.shape[-2]
    energy = target.svd[1].square()
    share = energy / energy.sum(-1, keepdim=True)
    spread = (2 * share.square().sum(-1)).sqrt() / d_model
    return torch.full_like(spread, 1 / d_model), spread


def random_null(target: Circuit, draws: int, seed: int = 0) -> Tensor:
    """Return scores [draws, ...] of isotropic random unit write directions with the target, sorted along the draws."""
    d_model = target.left.shape[-2]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(draws, d_model, generator=generator).to(target.left)
    directions /= directions.norm(dim=-1, keepdim=True)
    flat = target.reading.reshape(-1, d_model, target.reading.shape[-1])
    scores = torch.stack([torch.linalg.vector_norm(directions @ reading, dim=-1) for reading in flat], dim=1)
    scores = scores.view(draws, *target.norm.shape) / target.norm
    return scores.sort(dim=0).values


def robust_z(scores: Float[Tensor, "*rest test"]) -> Float[Tensor, "*rest test"]:
    """Return (score - median) / (1.4826 median absolute deviation), over the last axis."""
    centre = scores.quantile(0.5, dim=-1, keepdim=True)
    spread = 1.4826 * (scores - centre).abs().quantile(0.5, dim=-1, keepdim=True)
    return (scores - centre) / spread.clamp_min(torch.finfo(scores.dtype).tiny)


def exceedance(scores: Float[Tensor, "*rest k"], null: Float[Tensor, "draw *rest"]) -> Float[Tensor, "*rest k"]:
    """Return p values of `scores` [..., k] against sorted draws [draws, ...]: (1 + draws at least as large) / (1 + draws)."""
    sorted_draws = null.movedim(0, -1).contiguous()
    below = torch.searchsorted(sorted_draws, scores.contiguous())
    return (1 + null.shape[0] - below) / (1 + null.shape[0])


def benjamini_hochberg(p: Float[Tensor, " test"]) -> Float[Tensor, " test"]:
    """Return the adjusted p values of a flat family of tests, in the order given."""
    order = p.argsort()
    n = p.numel()
    scaled = p[order] * n / torch.arange(1, n + 1, device=p.device)
    adjusted = scaled.flip(0).cummin(0).values.flip(0).clamp_max(1.0)
    out = torch.empty_like(adjusted)
    out[order] = adjusted
    return out


def rotation(d_head: int, offset: int, frequencies: Sequence[float]) -> Float[Tensor, "d_head d_head"]:
    """Return the rotary matrix R [d_head, d_head] with q R kᵀ the score of a query `offset` positions after its key.

    Dimensions i and i + m rotate together, m frequencies in radians per position; the rest stand still.
    """
    m = len(frequencies)
    out = torch.eye(d_head, dtype=torch.float64)
    angle = torch.tensor([offset * f for f in frequencies], dtype=torch.float64)
    i = torch.arange(m)
    out[i, i], out[i, i + m] = angle.cos(), angle.sin()
    out[i + m, i], out[i + m, i + m] = -angle.sin(), angle.cos()
    return out.float()
