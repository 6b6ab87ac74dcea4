"""Which layers' keys, values and streams span the same subspace over tokens (xKV, arXiv 2503.18893), from streamed cross-products.

Feature axes of two layers cannot be compared, but what either does over the same tokens can: K_l = U_l S_l V_lᵀ with
tokens along the rows, and the leading columns of U_l are a subspace of token space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analyses.results.statistics import MIN_CLUSTERS, Z
from probes.capture.activations import Activations
from probes.errors import OptionError, PromptError
from probes.html_card import count
from probes.models.protocol import Model
from probes.points import Address

FOLDS = 20
"""Parts that the prompts are cut into for the jackknife."""
STREAM_WIDTH = 256
"""Dimensions that streams are projected to at random."""
LARGEST = 2**31
"""Bytes of the cross-products of all layers at most."""
GROUPS = (2, 4)
"""Numbers of neighbouring layers that share one basis."""
ENERGY = 0.95
"""Share of the squared entries that a basis has to keep."""
ABSENT = 1e-12
"""Squared singular values below this share of the largest are taken for 0."""
KINDS = {"k": "k", "v": "v", "stream": "resid_post"}


class CrossProducts:
    """Sums over tokens from which the subspaces of all layers follow; memory independent of the number of tokens."""

    def __init__(self, n_layers: int, width: int) -> None:
        self.n_layers, self.width, self.n = n_layers, width, 0
        self.first = torch.zeros(n_layers * width, dtype=torch.float64)
        self.second = torch.zeros(n_layers * width, dtype=torch.float64)
        self.cross = torch.zeros(n_layers * width, n_layers * width, dtype=torch.float64)

    def add(
        self,
        rows: Float[Tensor, "layer token width"],
        other: Float[Tensor, "layer token width"] | None = None,
        sign: int = 1,
    ) -> None:
        """Add tokens to the sums, or take them out again with sign -1.

        Args:
            other: the rows that those of another layer are compared with; `rows` themselves when left out.
        """
        x, y = (h.double().movedim(0, 1).flatten(1) for h in (rows, rows if other is None else other))
        self.n += sign * len(x)
        self.first += sign * x.sum(0)
        self.second += sign * y.sum(0)
        self.cross.addmm_(x.T, y, alpha=sign)

    def blocks(self) -> Float64[Tensor, "layer width layer width"]:
        """Return the products K_lᵀ K_m of centred rows, for all pairs of layers at once."""
        centred = self.cross - torch.outer(self.first, self.second) / max(self.n, 1)
        return centred.view(self.n_layers, self.width, self.n_layers, self.width)


def overlaps(blocks: Float64[Tensor, "layer width layer width"], grams: Tensor, rank: int) -> Tensor:
    """Return the mean squared cosine of the principal angles between the leading subspaces of every two layers, [layer, layer].

    UₗᵀUₘ = Sₗ⁻¹ Vₗᵀ (KₗᵀKₘ) Vₘ Sₘ⁻¹, so no rows are needed.

    Args:
        grams: [layer, width, width], KₗᵀKₗ.
    """
    values, vectors = torch.linalg.eigh(grams)
    values, vectors = values[..., -rank:], vectors[..., -rank:]
    # Directions that no token has span nothing.
    present = values > ABSENT * values[..., -1:]
    whitening = vectors * torch.where(present, values.clamp_min(1e-300).rsqrt(), 0)[..., None, :]
    half = torch.einsum("lcr,lcmd->lrmd", whitening, blocks)
    cosines = torch.einsum("lrmd,mds->lmrs", half, whitening)
    return cosines.square().sum((-1, -2)) / rank


def cka(blocks: Float64[Tensor, "layer width layer width"]) -> Tensor:
    """Return ||KₗᵀKₘ||² / (||KₗᵀKₗ|| ||KₘᵀKₘ||), [layer, layer] (linear CKA, Kornblith et al. 2019)."""
    squared = blocks.square().sum((1, 3))
    own = squared.diagonal().sqrt()
    return squared / torch.outer(own, own)


def joint_rank(gram: Float64[Tensor, "width width"]) -> int:
    """Return the smallest rank that keeps `ENERGY` of the squared entries of rows with this product."""
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return int((values.cumsum(0) < ENERGY * values.sum()).sum()) + 1


def diagonal(blocks: Float64[Tensor, "layer width layer width"]) -> Float64[Tensor, "layer width width"]:
    """Return KₗᵀKₗ of every layer."""
    return torch.stack([blocks[layer, :, layer] for layer in range(len(blocks))])


def check_kv(
    model: Model, sequences: Sequence[Sequence[int]], rank: int, layers: Sequence[int], first_token: bool
) -> None:
    """Refuse subspaces that say nothing or do not fit into memory; nothing is wrong with rank 0, which leaves them out.

    Raises:
        PromptError: no more tokens than features.
        OptionError: a rank above the number of features, or cross-products of more layers than memory takes.
    """
    narrow = model.shape.n_kv_heads * model.shape.d_head
    width = max(narrow, min(model.shape.d_model, STREAM_WIDTH))
    n = sum(len(sequence) - (not first_token) for sequence in sequences)
    if rank > narrow:
        raise OptionError(
            f"option kv_rank is {rank}: keys and values have {narrow} features, so legal are 0 to {narrow}"
        )
    if rank and n <= width:
        raise PromptError(
            f"the prompts have {count(n, 'token')} for {width} features, so that any two layers overlap: give more tokens than "
            "key features, or leave kv_rank at 0"
        )
    if rank and (size := 8 * (len(layers) * width) ** 2) > LARGEST:
        raise OptionError(
            f"the cross-products of {len(layers)} layers of {width} features take {size / 2**30:.1f} GiB: name fewer layers, or raise stride"
        )


def kv_tables(
    activations: Activations, rank: int, layers: Sequence[int], first_token: bool, seed: int
) -> dict[str, pd.DataFrame]:
    """Return the tables `kv_subspaces` and `kv_joint`.

    Returns:
        `kv_subspaces`: kind (k, v, or stream: the residual stream, projected at random to at most 256 dimensions), layer_a,
        layer_b, rank, overlap, low, high (95 % by a jackknife over prompts), cka, chance (rank / tokens), lexical (overlap when one
        layer's rows change places among equal tokens: what the token alone explains), excess (overlap minus lexical),
        position_free (overlap after each position's mean row is taken off).
        `kv_joint`: kind, first, group (neighbouring layers), rank (of one basis for all of them that keeps 95 % of the squared
        entries), sum_of_ranks (of a basis for each).
    """
    pairs, joint = [], []
    for kind, point in KINDS.items():
        rows, prompt_of, tokens, positions = _rows(activations, point, layers, first_token, seed)
        n_layers, n, width = rows.shape
        products = CrossProducts(n_layers, width)
        products.add(rows)
        blocks = products.blocks()
        grams = diagonal(blocks)
        value, similar = overlaps(blocks, grams, rank), cka(blocks)
        error = _jackknife(products, rows, prompt_of, rank)
        lexical = _other_overlaps(rows, rows[:, _among_equals(tokens, seed)], grams, rank)
        position_free = _position_free(rows, positions, rank)
        for i, j in combinations(range(n_layers), 2):
            half = Z * float(error[i, j])
            overlap, word = float(value[i, j]), float(lexical[i, j])
            pairs.append(
                {
                    "kind": kind, "layer_a": layers[i], "layer_b": layers[j], "rank": rank, "overlap": overlap,
                    "low": np.clip(overlap - half, 0, 1), "high": np.clip(overlap + half, 0, 1), "cka": float(similar[i, j]),
                    "chance": rank / n, "lexical": word, "excess": overlap - word, "position_free": float(position_free[i, j]),
                }
            )  # fmt: skip
        joint += [{"kind": kind, **row} for row in _joint(blocks, layers)]
    return {"kv_subspaces": pd.DataFrame(pairs), "kv_joint": pd.DataFrame(joint)}


def _rows(
    activations: Activations, point: str, layers: Sequence[int], first_token: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows [layer, token, width] float32, and each token's prompt, id and position; first tokens' keys are massive."""
    start = 0 if first_token else 1
    stacked = []
    for layer in layers:
        rows = torch.cat([h[start:].flatten(1).float() for h in activations.get(Address(point, layer))])
        if point == "resid_post" and rows.shape[1] > STREAM_WIDTH:
            generator = torch.Generator().manual_seed(seed)
            rows = rows @ torch.randn(rows.shape[1], STREAM_WIDTH, generator=generator) / STREAM_WIDTH**0.5
        stacked.append(rows)
    where = [(i, t, p) for i, tokens in enumerate(activations.sequences) for p, t in enumerate(tokens) if p >= start]
    prompt_of, tokens, positions = torch.tensor(where).reshape(-1, 3).T
    return torch.stack(stacked), prompt_of, tokens, positions


def _jackknife(products: CrossProducts, rows: Tensor, prompt_of: Tensor, rank: int) -> Tensor:
    """Return the standard error [layer, layer] of overlaps, from leaving out one part of the prompts at a time; NaN for few prompts."""
    prompts = torch.unique(prompt_of)
    n_folds = min(FOLDS, len(prompts))
    if n_folds < MIN_CLUSTERS:
        return torch.full((products.n_layers, products.n_layers), torch.nan)
    left_out = []
    for fold in range(n_folds):
        part = rows[:, torch.isin(prompt_of, prompts[fold::n_folds])]
        products.add(part, sign=-1)
        blocks = products.blocks()
        left_out.append(overlaps(blocks, diagonal(blocks), rank))
        products.add(part)
    values = torch.stack(left_out)
    return ((n_folds - 1) / n_folds * (values - values.mean(0)).square().sum(0)).sqrt()


def _other_overlaps(rows: Tensor, other: Tensor, grams: Tensor, rank: int) -> Tensor:
    """Return overlaps of every layer with the `other` rows of every later one, whose own products are the same."""
    products = CrossProducts(len(rows), rows.shape[-1])
    products.add(rows, other)
    return overlaps(products.blocks(), grams, rank)


def _among_equals(tokens: Tensor, seed: int) -> Tensor:
    """Return an order of the rows in which each has changed places with one of an equal token."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(tokens))
    for token in torch.unique(tokens):
        own = (tokens == token).nonzero()[:, 0]
        order[own] = own[torch.randperm(len(own), generator=generator)]
    return order


def _position_free(rows: Tensor, positions: Tensor, rank: int) -> Tensor:
    """Return overlaps of rows without the mean row of their position."""
    left = rows.clone()
    for position in torch.unique(positions):
        own = positions == position
        left[:, own] -= rows[:, own].mean(1, keepdim=True)
    products = CrossProducts(len(rows), rows.shape[-1])
    products.add(left)
    blocks = products.blocks()
    return overlaps(blocks, diagonal(blocks), rank)


def _joint(blocks: Tensor, layers: Sequence[int]) -> Iterator[dict[str, int]]:
    single = [joint_rank(blocks[i, :, i]) for i in range(len(layers))]
    for group in GROUPS:
        for first in range(len(layers) - group + 1):
            part = blocks[first : first + group, :, first : first + group].flatten(2).flatten(0, 1)
            yield {
                "first": layers[first], "group": group, "rank": joint_rank(part),
                "sum_of_ranks": sum(single[first : first + group]),
            }  # fmt: skip
