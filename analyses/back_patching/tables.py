"""Rates over questions: what the best of all cells finds, what one cell chosen beforehand finds, and what controls find."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.results.statistics import cluster_bootstrap, wilson

KEYS = ["position_name", "set"]


def _matrix(grid: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return a column of the grid as prompts by (source, target)."""
    return grid.pivot(index="prompt", columns=["source_layer", "target_layer"], values=value)


def held_out(success: NDArray[np.bool_], gain: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return, per question, whether the cell that is best on all other questions succeeds; ties go to the larger mean gain."""
    n = len(success)
    if n < 2:
        return np.zeros(0, dtype=bool)
    total, gains = success.sum(0), gain.sum(0)
    correct = np.zeros(n, dtype=bool)
    for i in range(n):
        score = (total - success[i]) + 1e-3 * np.tanh((gains - gain[i]) / (10 * (n - 1)))
        correct[i] = success[i, int(score.argmax())]
    return correct


def summary(grid: pd.DataFrame, controls: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return one row per position and set; every rate is over questions, with a 95 % interval."""
    rows = []
    for key, group in grid.groupby(KEYS, sort=False):
        success, logprob = _matrix(group, "success"), _matrix(group, "answer_logprob")
        gain = logprob - group.groupby("prompt")["baseline_logprob"].first().to_numpy()[:, None]
        n, hits = len(success), success.to_numpy(dtype=bool)
        cell = int((hits.mean(0) + 1e-6 * gain.to_numpy().mean(0)).argmax())
        oracle, best = np.asarray(hits.any(1)), hits[:, cell]
        held_out_correct = held_out(hits, gain.to_numpy(dtype=float))
        of_group = controls[(controls["position_name"] == key[0]) & (controls["set"] == key[1])]
        other = of_group[of_group["variant"] == "other_query"]
        mean_gain = cluster_bootstrap(gain.to_numpy()[:, cell], np.arange(n), seed=seed)
        rows.append(
            {
                "position": key[0], "set": key[1], "n": n, "cells": hits.shape[1],
                "baseline_rate": float(group.groupby("prompt")["baseline_success"].first().mean()),
                "oracle_rate": oracle.mean(), **_span("oracle", oracle),
                "best_source": success.columns[cell][0], "best_target": success.columns[cell][1],
                "best_cell_rate": best.mean(), **_span("best_cell", best),
                "held_out_rate": held_out_correct.mean() if len(held_out_correct) else np.nan, **_span("held_out", held_out_correct),
                "control_rate": float(other["oracle_rate"].iloc[0]) if len(other) else np.nan,
                "logprob_gain": mean_gain.mean[0], "gain_low": mean_gain.low[0], "gain_high": mean_gain.high[0],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def control_rates(everything: pd.DataFrame) -> pd.DataFrame:
    """Return, per position, set and variant, the oracle rate and the mean rate of one cell.

    The variant `wrong_answer` counts the answer of another question instead.
    """
    rows = []
    for key, group in everything.groupby([*KEYS, "variant"], sort=False):
        rows.append((*key, *_rates(_matrix(group, "success"))))
        if key[2] == "back_patch":
            rows.append((*key[:2], "wrong_answer", *_rates(_matrix(group, "wrong_answer"))))
    columns = [*KEYS, "variant", "n", "oracle_rate", "oracle_low", "oracle_high", "cell_rate"]
    return pd.DataFrame(rows, columns=columns)


def _rates(matrix: pd.DataFrame) -> tuple[int, float, float, float, float]:
    hits = matrix.to_numpy(dtype=bool)
    oracle = np.asarray(hits.any(1))
    low, high = wilson(int(oracle.sum()), len(oracle))
    return len(hits), float(oracle.mean()), low, high, float(hits.mean())


def _span(name: str, hits: NDArray[np.bool_]) -> dict[str, float]:
    low, high = wilson(int(hits.sum()), len(hits))
    return {f"{name}_low": low, f"{name}_high": high}
