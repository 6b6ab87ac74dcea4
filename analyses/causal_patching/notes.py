"""What a run says in words: what was left out, how far numbers can be trusted, and where the answer is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analyses.causal_patching.corruption import Noise
from analyses.causal_patching.figures import decision_window
from analyses.causal_patching.pairs import Pair
from analyses.causal_patching.statistics import MIN_PAIRS
from analyses.results.statistics import MIN_CLUSTERS

Tables = Mapping[str, pd.DataFrame]


def run_notes(pairs: Sequence[Pair], tables: Tables, null: str, noise: Noise | None, floor: float) -> list[str]:
    """Return the notes of a run.

    Args:
        pairs: all that were given.
        noise: where embeddings were made noisy.
        floor: the largest change of the first metric when a run is copied into itself.
    """
    metric = tables["pairs"]["metric"].iloc[0]
    each = tables["pairs"][tables["pairs"]["metric"] == metric]
    kept = int(each["kept"].sum())
    notes = [
        f"{kept} of {len(each)} pairs tell the two answers apart; their mean gap is {each[each['kept']]['gap'].mean():.2f} "
        f"({metric}). Denoising shows what is enough to bring the answer back, noising what is needed; neither stands for the other.",
        f"Copying a run into itself moves {metric} by at most {floor:.1e}: smaller effects are rounding.",
    ]
    notes += _left_out(each)
    if noise is not None:
        notes += _noise(noise, tables["pairs"])
    if any(pair.shifted for pair in pairs):
        notes.append(
            "An alignment moves some positions: rows of the stream carry the position embedding of where they came from, and a "
            "moved key is rotated to its new place."
        )
    notes += _tests(kept, null, tables["map"])
    window = decision_window(tables["window"])
    if window is not None:
        notes.append(
            f"Decision window: a changed position is still needed up to layer {window[0]:.0f}, and the last position carries at "
            f"least half of the gap from layer {window[1]:.0f} on ({metric}); intervals are in the table `window`."
        )
    return notes


def _left_out(each: pd.DataFrame) -> list[str]:
    lost = each[~each["kept"]]
    if lost.empty:
        return []
    first = lost.iloc[0]
    return [
        f"{len(lost)} pairs were left out of every map, listed in the table `pairs`; the first: {first['where']}, {first['reason']}."
    ]


def _noise(noise: Noise, pairs: pd.DataFrame) -> list[str]:
    said = [
        f"Noise of standard deviation {noise.deviation:.3f} on the subject's embeddings, {noise.samples} draws a pair."
    ]
    probabilities = pairs[(pairs["metric"] == "prob") & pairs["kept"]]
    if len(probabilities) and float((probabilities["m_corrupted"] / probabilities["m_clean"]).mean()) > 0.5:
        said.append("It leaves more than half of the answer's probability: the corruption is too weak.")
    return said


def _tests(kept: int, null: str, table: pd.DataFrame) -> list[str]:
    said = []
    if null == "none":
        said.append("No null was run, so no cell is called found: `--nulls unrelated` runs one.")
    elif not np.isfinite(table["null"]).any():
        said.append(f"No pair had a prompt of its length for the null {null!r}, so no cell is called found.")
    elif kept < MIN_PAIRS:
        said.append(f"{kept} pairs support no p (at least {MIN_PAIRS} do), so no cell is called found.")
    if kept < MIN_CLUSTERS:
        said.append(f"{kept} pairs support no interval (at least {MIN_CLUSTERS} do).")
    return said
