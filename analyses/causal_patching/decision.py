"""Decision windows: from which layer a row carries the answer, and up to which it is still needed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.causal_patching.cells import ADDED
from analyses.causal_patching.statistics import by_group, live_roles, signs, wide
from analyses.results.statistics import Array, percentiles, resampled_ratios

HALF = 0.5
"""The share of the gap that counts as having the answer."""
COLUMNS = ["component", "role", "direction", "bound", "layer", "ci_low", "ci_high", "share_undefined", "first_crossing"]


def earliest_lasting(curves: Array) -> Array:
    """Return the earliest column from which on every value is at least a half, [row] of [row, layer]; NaN for none."""
    lasting = np.flip(np.logical_and.accumulate(np.flip(curves >= HALF, -1), -1), -1)
    return np.where(lasting.any(-1), lasting.argmax(-1), np.nan)


def latest(curves: Array) -> Array:
    """Return the last column with at least a half, [row] of [row, layer]; NaN for none."""
    above = curves >= HALF
    return np.where(above.any(-1), curves.shape[-1] - 1 - np.flip(above, -1).argmax(-1), np.nan)


def first_crossing(curve: Array) -> float:
    """Return the first column with at least a half; NaN for none."""
    above = curve >= HALF
    return float(above.argmax()) if above.any() else float("nan")


def window_table(cells: pd.DataFrame, pairs: pd.DataFrame, metric: str, seed: int) -> pd.DataFrame:
    """Return the bounds of each component and role: arrival and departure of stream rows, prefix and suffix of what is added.

    `arrival`: the earliest layer at which denoising restores half of the gap, and at every later one. `departure`: the last
    layer at which noising still destroys half. `prefix`: the earliest l such that layers 0 to l restore half; `suffix`: the
    last l such that layers l on still destroy half. A bound that does not exist is NaN, and `share_undefined` says in how
    many draws of pairs that is so.

    Args:
        cells: as `patched.cells_table`.
        pairs: as `patched.pairs_table`.
        metric: the one on which the bounds are taken.
    """
    cells = live_roles(cells)
    own = cells[(cells["source"] == "pair") & (cells["metric"] == metric) & (cells["head"] < 0)]
    kept = pairs[pairs["kept"] & (pairs["metric"] == metric)].set_index("pair")
    rows = []
    for (component, role, direction, window), part in own.groupby(["component", "role", "direction", "window"]):
        bound = _bound(str(component), str(direction), str(window))
        if bound is None:
            continue
        effects = wide(part)
        gaps = kept["gap"].reindex(effects.index).to_numpy(dtype=float)[:, None]
        group = pd.factorize(kept["group"].reindex(effects.index))[0].astype(np.int64)
        sums = by_group(np.nan_to_num(effects.to_numpy(dtype=float) * signs(effects)), group)
        spans = by_group(gaps, group)
        curve, draws = sums.sum(0) / spans.sum(), resampled_ratios(sums, spans, seed=seed)
        of = earliest_lasting if bound in ("arrival", "prefix") else latest
        layers = np.append(effects.columns.get_level_values("layer").to_numpy(dtype=float), np.nan)
        drawn = layers[np.nan_to_num(of(draws), nan=-1).astype(int)]
        low, high = percentiles(drawn, len(sums))
        crossing = first_crossing(curve)
        rows.append((
            component, role, direction, bound, layers[int(np.nan_to_num(of(curve[None]), nan=-1)[0])], low, high,
            float(np.isnan(drawn).mean()), layers[-1 if np.isnan(crossing) else int(crossing)],
        ))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _bound(component: str, direction: str, window: str) -> str | None:
    """Return which bound a curve over layers has; None where one layer says nothing."""
    if component in ("resid_pre", "resid_post"):
        return "arrival" if direction == "denoise" else "departure"
    if component in ADDED and (window, direction) in (("prefix", "denoise"), ("suffix", "noise")):
        return window
    return None
