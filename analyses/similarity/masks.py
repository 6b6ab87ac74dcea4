"""Which weights two groups of texts need most, and how far the two sets overlap (masks as of Wanda, Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.results.statistics import quantiles
from analyses.similarity.groups import deals, names_of, token_counts
from probes.anatomy import Anatomy
from probes.anatomy.sites import linear_weight
from probes.blocks.rerouting import module_of
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.models.protocol import Model
from probes.points import Address
from probes.reducers import Reducer

READ_FROM: Mapping[str, str] = {
    "attn.q": "attn_in", "attn.k": "attn_in", "attn.v": "attn_in", "attn.qkv": "attn_in", "attn.o": "z", "mlp.gate": "mlp_in",
    "mlp.in": "mlp_in", "mlp.out": "mlp_post",
}  # fmt: skip
"""Each matrix of a block and the point that it multiplies."""
POINTS = tuple(dict.fromkeys(READ_FROM.values()))
OUTPUTS = 256
"""Outputs of a matrix whose weights are ranked at most, drawn at random; each output ranks its own."""
DEALS = 20
"""Random regroupings of the texts behind the control."""


def mean_square(first_token: bool) -> Reducer:
    """Return the reducer that keeps each input feature's mean square over a text."""
    return Reducer("mean_square", "all" if first_token else "after_first")


def mask_needs(model: Model, first_token: bool) -> list[Need]:
    """Ask for the mean squares of the inputs of every matrix."""
    points = tuple(f"{point}.*" for point in POINTS if model.refusal(Address(point, 0)) is None)
    return [Need(points, mean_square(first_token))]


def kept_weights(
    weight: Float[Tensor, "out width"], squares: Float[Tensor, " width"], sparsity: float
) -> Bool[Tensor, "out width"]:
    """Return which weights of each output are kept: all but the share with the lowest |weight| times root mean square input."""
    importance = weight.abs() * squares.to(weight).sqrt()
    n_pruned = int(sparsity * weight.shape[1])
    kept = torch.ones_like(weight, dtype=torch.bool)
    return kept.scatter_(1, importance.topk(n_pruned, dim=1, largest=False).indices, False)


def overlap(a: Bool[Tensor, "*any"], b: Bool[Tensor, "*any"]) -> float:
    """Return the intersection of two sets over their union."""
    return float((a & b).sum() / (a | b).sum())


def chance(sparsity: float) -> float:
    """Return the overlap that two random masks of this sparsity have in expectation, p / (2 - p) for a kept share p."""
    kept = 1 - sparsity
    return kept / (2 - kept)


def mask_table(
    activations: Activations, groups: Sequence[str], sparsities: Sequence[float], first_token: bool, seed: int
) -> pd.DataFrame:
    """Return how far the weights that two groups keep overlap, matrix by matrix.

    Magnitudes are the same for all groups, so any two groups overlap far; what tells them apart is an overlap below that
    of texts dealt to the groups at random.

    Returns:
        Columns layer, matrix, group_a, group_b, sparsity, iou (intersection over union of the kept weights), excess (iou minus
        the mean of random regroupings), shuffled_low, shuffled_high (95 % of those), magnitude_iou (mean overlap of either group
        with the weights kept by magnitude alone), chance (of two random masks).

    Raises:
        PointError: the backend keeps the weights to itself.
    """
    names = names_of(groups)
    members, records = np.array(groups), []
    counts = np.array(token_counts(activations, first_token), dtype=np.float64)
    model, generator = activations.model, torch.Generator().manual_seed(seed)
    with module_of(model) as (_, anatomy):
        for layer, name, weight in _weights(anatomy, generator):
            rows = activations.get(Address(READ_FROM[name], layer), mean_square(first_token))
            sums = torch.stack([row.flatten() for row in rows]).double() * torch.from_numpy(counts)[:, None]
            for sparsity in dict.fromkeys(sparsities):
                by_size = kept_weights(weight, torch.ones(weight.shape[1]), sparsity)

                def masked(chosen: np.ndarray, s: float = sparsity, x: Tensor = sums, w: Tensor = weight) -> Tensor:
                    # How many tokens a group has scales all its inputs alike, which ranks nothing differently.
                    return kept_weights(w, torch.from_numpy(chosen) @ x, s)

                for a, b in combinations(names, 2):
                    in_a, in_b = ((members == name).astype(np.float64) for name in (a, b))
                    first, second = masked(in_a), masked(in_b)
                    dealt = deals(in_a, in_b, seed, DEALS)
                    shuffled = (
                        np.array([np.nan])
                        if dealt is None
                        else np.array([overlap(masked(x), masked(y)) for x, y in zip(*dealt, strict=True)])
                    )
                    iou, (low, high) = overlap(first, second), quantiles(shuffled)
                    records.append(
                        {
                            "layer": layer, "matrix": name, "group_a": a, "group_b": b, "sparsity": sparsity, "iou": iou,
                            "excess": iou - float(shuffled.mean()), "shuffled_low": float(low), "shuffled_high": float(high),
                            "magnitude_iou": (overlap(first, by_size) + overlap(second, by_size)) / 2,
                            "chance": chance(sparsity),
                        }
                    )  # fmt: skip
    return pd.DataFrame(records)


def _weights(anatomy: Anatomy, generator: torch.Generator) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (layer, name, weights of some outputs [out, width] float32 on the CPU) of every matrix that reads a point."""
    for layer in range(anatomy.n_layers):
        for name, point in READ_FROM.items():
            if anatomy.map.path(name, layer) and anatomy.refusal(Address(point, layer)) is None:
                weight = linear_weight(anatomy.component(name, layer)).detach()
                rows = torch.randperm(len(weight), generator=generator)[:OUTPUTS].sort().values
                yield layer, name, weight[rows.to(weight.device)].float().cpu()
