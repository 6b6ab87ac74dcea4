"""How much of the depth a model uses, by three definitions that need not agree (Hu, Zhou, Zhang 2025, arXiv 2512.14064)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.results.per_prompt import PerPrompt, resampled
from analyses.results.statistics import Array, percentiles

DEFINED = 0.9
"""Share of resampled curves that must have an effective depth for one to be given."""
KL_THRESHOLDS = (0.1, 0.5)
"""Share of the largest KL below which a layer counts as decided: the released code's default, and its printed table's."""
OVERLAP_THRESHOLDS = (0.2, 0.3)
"""Share of the five most probable tokens above which it does: the released code's default, and its printed table's."""
HALF = 0.5
COSINES = ("cosine_attn", "cosine_mlp", "cosine_block")
RELEASED = {"cosine": "cosine", "lens_kl": "lens KL", "lens_overlap": "lens overlap"}
"""The three definitions of the released code."""

Depth = Callable[[Array], Array]
"""Takes curves [..., layer]; returns the index of the layer that each is told by [...], NaN where it is undefined."""
Condition = Callable[[Array], NDArray[np.bool_]]
"""Takes curves [..., layer]; returns where a condition holds [..., layer]."""


def last_crossing(curve: Array) -> Array:
    """Return the last layer below 0 whose successor is not, as the released code does."""
    return _last((curve[..., :-1] < 0) & (curve[..., 1:] >= 0))


def first_of(condition: NDArray[np.bool_]) -> Array:
    """Return the first layer but the last at which a condition [..., layer] holds, as the released code does."""
    short = condition[..., :-1]
    return np.where(short.any(-1), short.argmax(-1), np.nan)


def persistent(condition: NDArray[np.bool_]) -> Array:
    """Return the first layer from which on a condition [..., layer] holds to the end."""
    broken = _last(~condition)
    return np.where(condition[..., -1], np.where(np.isnan(broken), 0, broken + 1), np.nan)


def half_area(curve: Array) -> Array:
    """Return the layer by which the changes of the curve, all counted as positive, sum to half of what they sum to at the end."""
    reached = np.abs(np.diff(curve, axis=-1)).cumsum(-1)
    total = reached[..., -1:]
    half = (reached >= HALF * total).argmax(-1) + 1
    return np.where(total[..., 0] > 0, half, np.nan)


def _last(condition: NDArray[np.bool_]) -> Array:
    n = condition.shape[-1]
    return np.where(condition.any(-1), n - 1 - condition[..., ::-1].argmax(-1), np.nan)


def _decided(share: float) -> Condition:
    return lambda curve: np.asarray(curve < share * curve.max(-1, keepdims=True))


def _above(share: float) -> Condition:
    return lambda curve: np.asarray(curve > share)


def _first(condition: Condition) -> Depth:
    return lambda curve: first_of(condition(curve))


def _persistent(condition: Condition) -> Depth:
    return lambda curve: persistent(condition(curve))


def definitions() -> list[tuple[str, str, float, Depth]]:
    """Return (name, which curve, threshold, how it is read) of every definition."""
    lens = [("lens_kl", share, _decided(share)) for share in KL_THRESHOLDS]
    lens += [("lens_overlap", share, _above(share)) for share in OVERLAP_THRESHOLDS]
    return [
        ("cosine", "cosine", 0.0, last_crossing),
        *((curve, curve, share, _first(condition)) for curve, share, condition in lens),
        ("cosine_persistent", "cosine", 0.0, _persistent(lambda curve: curve >= 0)),
        *((f"{curve}_persistent", curve, share, _persistent(condition)) for curve, share, condition in lens),
        ("half_area", "lens_kl", HALF, half_area),
    ]


def effective_depths(columns: Mapping[str, PerPrompt], seed: int) -> pd.DataFrame:
    """Return the effective depth by every definition, with intervals over resampled prompts.

    Curves are read at the layers that were measured; at the last one the lens is the model's own prediction.

    Args:
        columns: the cosines of every part, `lens_kl` and `lens_overlap`, by layer.

    Returns:
        Columns definition, threshold, layer, ratio ((layer + 1) / layers), ci_low, ci_high (of the ratio), defined_share (of
        resampled curves); layer and ratio are NaN where that share is below `DEFINED`.
    """
    curves = _curves({name: column.mean().numpy()[None] for name, column in columns.items()})
    draws = _curves({name: resampled(column, seed) for name, column in columns.items()})
    n_layers = columns["lens_kl"].sums.shape[1]
    prompts = int((columns["cosine_block"].counts > 0).any(1).sum())
    rows = []
    for name, of, threshold, read in definitions():
        depth, drawn = (_at(layers, read(curve)) for layers, curve in (curves[of], draws[of]))
        share = float(np.isfinite(drawn).mean())
        layer = float(depth[0]) if share >= DEFINED else np.nan
        low, high = percentiles((drawn + 1) / n_layers, prompts if np.isfinite(layer) else 0)
        rows.append((name, threshold, layer, (layer + 1) / n_layers, float(low), float(high), share))
    names = ["definition", "threshold", "layer", "ratio", "ci_low", "ci_high", "defined_share"]
    return pd.DataFrame(rows, columns=names)


def _curves(values: Mapping[str, Array]) -> dict[str, tuple[NDArray[np.intp], Array]]:
    """Return (measured layers, values [draws, layer]) of each curve."""
    cosine = np.mean([values[name] for name in COSINES], axis=0)
    kl, overlap = values["lens_kl"].copy(), values["lens_overlap"].copy()
    kl[:, -1], overlap[:, -1] = 0.0, 1.0
    curves = {"cosine": cosine, "lens_kl": kl, "lens_overlap": overlap}
    known = {name: np.flatnonzero(np.isfinite(curve).all(0)) for name, curve in curves.items()}
    return {name: (known[name], curve[:, known[name]]) for name, curve in curves.items()}


def _at(layers: NDArray[np.intp], index: Array) -> Array:
    known = np.isfinite(index)
    return np.where(known, layers[np.where(known, index, 0).astype(int)], np.nan)


def effective_depth_note(table: pd.DataFrame) -> str:
    """Return the released definitions side by side, as a sentence."""
    shown = table.drop_duplicates("definition").set_index("definition").loc[list(RELEASED)]
    return "effective depth: " + "; ".join(f"{RELEASED[str(n)]} {ratio_text(row)}" for n, row in shown.iterrows())


def ratio_text(row: pd.Series) -> str:
    """Return a ratio with its interval, or that it is undefined."""
    if np.isnan(row["ratio"]):
        return f"undefined (in {1 - row['defined_share']:.0%} of resamples)"
    bounds = f" ({row['ci_low']:.2f} to {row['ci_high']:.2f})" if np.isfinite(row["ci_low"]) else ""
    return f"{row['ratio']:.2f}{bounds}"
