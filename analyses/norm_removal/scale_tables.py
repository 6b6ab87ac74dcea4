"""Scales, residual norms, outlier features and attention sinks, from stored rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.norm_removal.measured import POSITION_CLASSES, Measured
from analyses.results.per_prompt import interval
from analyses.results.statistics import cluster_bootstrap
from probes.norms import NormSite
from probes.points import Address

SINK = 0.3
"""Attention to position 0 above which a query is counted as sunk there (Gu et al. 2024, arXiv 2410.10781)."""


def scale_table(measured: Measured, site_scales: Mapping[NormSite, Sequence[Tensor]], seed: int) -> pd.DataFrame:
    """Return the table `scales`: each site's mean scale by position class, its spread and interval over prompts.

    `spread` is the standard deviation over rows relative to their mean: how far a constant is from the norm.
    """
    rows = []
    for site, scales in site_scales.items():
        for name in POSITION_CLASSES:
            values = [s[measured.classes(i)[name]] for i, s in enumerate(scales)]
            flat = torch.cat(values).double().numpy()
            if not len(flat):
                continue
            owner = np.repeat(np.arange(len(values)), [len(v) for v in values])
            ci = cluster_bootstrap(flat, owner, seed=seed)
            rows.append(
                {
                    "site": site.kind,
                    "layer": measured.n_layers if site.layer is None else site.layer,
                    "position_class": name,
                    **ci.columns("scale", "ci_"),
                    "spread": float(flat.std() / flat.mean()),
                    "n": len(flat),
                }
            )
    return pd.DataFrame(rows)


def stream_table(measured: Measured, seed: int) -> pd.DataFrame:
    """Return the table `stream`: the norm of what leaves each block by position class, its turn from what enters, and outlier features.

    `kurtosis` is mean(s⁴) / mean(s²)² with s_j the root mean square of feature j: 1 where all are alike, d_model where
    one holds everything.
    """
    rows = []
    before = measured.activations.get(Address("resid_pre", 0))
    for layer in range(measured.n_layers):
        after = measured.activations.get(Address("resid_post", layer))
        for name in POSITION_CLASSES:
            where = [measured.classes(i)[name] for i in range(measured.n_prompts)]
            chosen = torch.cat([a[w] for a, w in zip(after, where, strict=True)]).float()
            if len(chosen):
                entering = torch.cat([b[w] for b, w in zip(before, where, strict=True)]).float()
                owner = np.repeat(np.arange(len(where)), [int(w.sum()) for w in where])
                rows.append({"layer": layer, "position_class": name, **_stream(entering, chosen, owner, seed)})
        before = after
    return pd.DataFrame(rows)


def _stream(before: Tensor, after: Tensor, owner: np.ndarray, seed: int) -> dict[str, float]:
    norm = torch.linalg.vector_norm(after, dim=-1).double().numpy()
    ci = cluster_bootstrap(norm, owner, seed=seed)
    kurtosis, feature, share = outliers(after)
    return {
        **ci.columns("norm", "ci_"),
        "median": float(np.median(norm)),
        "p99": float(np.quantile(norm, 0.99)),
        "cosine": float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()),
        "kurtosis": kurtosis,
        "largest_feature": feature,
        "largest_share": share,
        "n": len(norm),
    }


def outliers(rows: Float[Tensor, "row d_model"]) -> tuple[float, int, float]:
    """Return (kurtosis of the features' sizes, the largest feature, its share of the squared norm)."""
    power = rows.double().square().mean(0)
    return (
        float(power.square().mean() / power.mean().square()),
        int(power.argmax()),
        float(power.max() / power.sum().clamp_min(1e-300)),
    )


def sink_rate(pattern: Float[Tensor, "head query key"], threshold: float = SINK) -> Float[Tensor, " head"]:
    """Return the share of queries, query 0 included, that attend to position 0 above a threshold."""
    return (pattern[:, :, 0].float() > threshold).double().mean(1)


def sink_table(measured: Measured, layers: Sequence[int], seed: int) -> pd.DataFrame:
    """Return the table `sinks`: the sink rate of every head of `layers` with an interval over prompts, beside that of uniform causal attention."""
    n_heads = measured.model.shape.n_heads
    lengths = [len(s) for s in measured.sequences]
    even = [np.mean([1 / (t + 1) > SINK for t in range(n)]) for n in lengths]
    uniform = float(np.average(even, weights=lengths))
    rows = []
    for layer in layers:
        column = measured.column(n_heads)
        for prompt, pattern in enumerate(measured.activations.get(Address("pattern", layer))):
            rates, n = sink_rate(pattern), pattern.shape[1]
            column.sums[prompt] += rates * n
            column.counts[prompt] += n
        for head, (mean, low, high) in enumerate(zip(*interval(column, seed), strict=True)):
            rows.append(
                {"layer": layer, "head": head, "rate": mean, "ci_low": low, "ci_high": high, "uniform": uniform}
            )
    return pd.DataFrame(rows)
