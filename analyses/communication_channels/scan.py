"""The scan of all head pairs from weights alone: whole-head scores, strongest component, z, p and q."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probes.weights import composition as comp
from probes.weights.composition import Circuit, Heads, Kind

Null = Literal["analytic", "random"]


@dataclass(frozen=True, eq=False)
class Scan:
    """Scores of every earlier head with every later one, for one kind."""

    kind: Kind
    target: Circuit
    score: Tensor
    """[layer, head, layer, head], NaN where not strictly earlier."""
    component: Tensor
    """The same shape: the source's component that scores highest."""
    best: Tensor
    """The same shape: its score."""
    z: Tensor
    """The same shape: its robust z among the source's components."""


def scan(heads: Heads, kind: Kind, rotation: Tensor | None = None) -> Scan:
    """Score every earlier head with every later one.

    Whole-head scores follow from those of components, CS² = Σ s² CS_i² / Σ s², so one product gives both.
    """
    target, (_, s, write) = heads.reader(kind, rotation), heads.ov.svd
    n_layers, n_heads, k, d_model = write.shape
    shape = (n_layers, n_heads, n_layers, n_heads)
    score, best, z = (torch.full(shape, torch.nan) for _ in range(3))
    component = torch.full(shape, -1, dtype=torch.long)
    share = s.square() / s.square().sum(-1, keepdim=True)
    for layer in range(1, n_layers):
        columns = target.reading[layer].transpose(0, 1).reshape(d_model, n_heads * k)
        for head in range(n_heads):
            product = (write[:layer, head].reshape(layer * k, d_model) @ columns).square_()
            squares = product.view(layer, k, n_heads, k).sum(-1).transpose(1, 2) / target.norm[layer][:, None].square()
            scores = squares.sqrt()
            score[:layer, head, layer] = (squares * share[:layer, head, None]).sum(-1).sqrt()
            top = scores.max(-1)
            best[:layer, head, layer], component[:layer, head, layer] = top.values, top.indices
            z[:layer, head, layer] = comp.robust_z(scores).amax(-1)
    return Scan(kind, target, score, component, best, z)


def p_values(
    scores: Float[Tensor, "*rest component"], target: Circuit, null: Null, draws: int, seed: int
) -> Float[Tensor, "*rest component"]:
    """Return p values of component scores for isotropic write directions; `target` broadcasts with the leading axes.

    `analytic` matches a gamma distribution to the null's mean and variance, which reaches small p; `random` counts
    draws, and cannot go below 1 / (draws + 1).
    """
    if null == "random":
        flat = comp.random_null(target, draws, seed)
        return comp.exceedance(scores, flat.reshape(draws, *scores.shape[:-1]))
    mean, spread = (x.double()[..., None] for x in comp.analytic_null(target))
    shape = (mean / spread).square()
    return torch.special.gammaincc(shape.expand_as(scores), (scores.double().square() * shape / mean))


def composition_table(
    scans: Sequence[Scan], null: Null, draws: int, seed: int, z_thresh: float, alpha: float = 0.001
) -> pd.DataFrame:
    """Return one row per pair and kind; p is of the strongest component, corrected for having k to choose from."""
    parts = []
    for one in scans:
        l1, h1, l2, h2 = (index.numpy() for index in torch.nonzero(~one.score.isnan(), as_tuple=True))
        best = one.best[l1, h1, l2, h2]
        p = np.empty(len(best))
        k = one.target.left.shape[-1]
        for layer in range(one.target.left.shape[0]):
            for head in range(one.target.left.shape[1]):
                into_head = (l2 == layer) & (h2 == head)
                if into_head.any():
                    circuit = Circuit(one.target.left[layer, head], one.target.right[layer, head])
                    p[into_head] = p_values(best[into_head][None], circuit, null, draws, seed)[0].numpy()
        parts.append(
            pd.DataFrame(
                {
                    "kind": one.kind,
                    "source_layer": l1,
                    "source_head": h1,
                    "target_layer": l2,
                    "target_head": h2,
                    "score": one.score[l1, h1, l2, h2].numpy(),
                    "component": one.component[l1, h1, l2, h2].numpy(),
                    "component_score": best.numpy(),
                    "z": one.z[l1, h1, l2, h2].numpy(),
                    "p": -np.expm1(k * np.log1p(-np.clip(p, 0, 1 - 1e-16))),
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    table["q_value"] = comp.benjamini_hochberg(torch.tensor(table["p"].to_numpy())).numpy()
    table["flagged"] = (table["z"] > z_thresh) & (table["q_value"] < alpha)
    return table


PAIR = ["kind", "source_layer", "source_head", "target_layer", "target_head"]


def ranked(table: pd.DataFrame, kind: Kind | None = None, target: tuple[int, int] | None = None) -> pd.DataFrame:
    """Sort pairs by the robust z of their strongest component, flagged ones first."""
    rows = table if kind is None else table[table["kind"] == kind]
    if target is not None:
        rows = rows[(rows["target_layer"] == target[0]) & (rows["target_head"] == target[1])]
    return rows.sort_values(["flagged", "z"], ascending=False)


def pair_circuits(heads: Heads, scans: Sequence[Scan], pair: pd.Series) -> tuple[Circuit, Circuit]:
    """Return (the source's output circuit, the target's reading circuit) of a row of the composition table."""
    one = next(s for s in scans if s.kind == pair["kind"])
    a, b = (pair["source_layer"], pair["source_head"]), (pair["target_layer"], pair["target_head"])
    return Circuit(heads.w_v[a], heads.w_o[a]), Circuit(one.target.left[b], one.target.right[b])


def component_table(
    heads: Heads, scans: Sequence[Scan], pairs: pd.DataFrame, null: Null, draws: int, seed: int
) -> pd.DataFrame:
    """Return every component of the source of each pair with its null; q values are over all rows."""
    parts = []
    for _, pair in pairs.iterrows():
        source, target = pair_circuits(heads, scans, pair)
        scores = comp.component_scores(source, target)
        s, energy = source.svd[1], source.svd[1].square()
        mean, spread = comp.analytic_null(target)
        parts.append(
            pd.DataFrame(
                {
                    **{name: pair[name] for name in PAIR},
                    "component": range(len(s)),
                    "singular_value": s.numpy(),
                    "energy_share": (energy / energy.sum()).numpy(),
                    "score": scores.numpy(),
                    "relative_score": (scores * target.norm / target.svd[1].max()).numpy(),
                    "z": comp.robust_z(scores).numpy(),
                    "p": p_values(scores[None], target, null, draws, seed)[0].numpy(),
                    "null_mean": float(mean.sqrt()),
                    "null_high": float((mean + 3 * spread).sqrt()),
                    "principal_angles": float(comp.principal_angles(source, target)),
                    "pair_score": pair["score"],
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    table["q_value"] = comp.benjamini_hochberg(torch.tensor(table["p"].to_numpy(dtype=float))).numpy()
    return table
