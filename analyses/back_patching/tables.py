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
        success, gain = _matrix(group, "success"), _gain(group)
        n, hits = len(success), success.to_numpy(dtype=bool)
        cell = int((hits.mean(0) + 1e-6 * gain.mean(0)).argmax())
        oracle, best = np.asarray(hits.any(1)), hits[:, cell]
        held_out_correct = held_out(hits, gain)
        of_group = controls[(controls["position_name"] == key[0]) & (controls["set"] == key[1])]
        other = of_group[of_group["variant"] == "other_query"]
        rows.append(
            {
                "position": key[0], "set": key[1], "n": n, "cells": hits.shape[1],
                "baseline_rate": float(group.groupby("prompt")["baseline_success"].first().mean()),
                "oracle_rate": oracle.mean(), **_span("oracle", oracle),
                "best_source": success.columns[cell][0], "best_target": success.columns[cell][1],
                "best_cell_rate": best.mean(), **_span("best_cell", best),
                "held_out_rate": held_out_correct.mean() if len(held_out_correct) else np.nan, **_span("held_out", held_out_correct),
                "control_rate": float(other["oracle_rate"].iloc[0]) if len(other) else np.nan,
                **cluster_bootstrap(gain[:, cell], np.arange(n), seed=seed).columns("logprob_gain", "gain_"),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def control_rates(everything: pd.DataFrame) -> pd.DataFrame:
    """Return, per position, set and variant, the oracle rate, the mean rate of one cell, and that of the cell best on other questions.

    The variant `wrong_answer` counts the answer of another question instead.
    """
    rows = []
    for key, group in everything.groupby([*KEYS, "variant"], sort=False):
        rows.append((*key, *_rates(group, "success")))
        if key[2] == "back_patch":
            rows.append((*key[:2], "wrong_answer", *_rates(group, "wrong_answer")))
    rates = ["oracle_rate", "oracle_low", "oracle_high", "cell_rate", "held_out_rate", "held_out_low", "held_out_high"]
    return pd.DataFrame(rows, columns=[*KEYS, "variant", "n", *rates])


def _rates(group: pd.DataFrame, value: str) -> tuple[float, ...]:
    hits = _matrix(group, value).to_numpy(dtype=bool)
    oracle = np.asarray(hits.any(1))
    gain = _gain(group) if value == "success" else np.zeros(hits.shape)
    elsewhere = held_out(hits, gain)
    rate = float(elsewhere.mean()) if len(elsewhere) else np.nan
    return (
        len(hits), float(oracle.mean()), *wilson(int(oracle.sum()), len(oracle)), float(hits.mean()),
        rate, *wilson(int(elsewhere.sum()), len(elsewhere)),
    )  # fmt: skip


def _gain(group: pd.DataFrame) -> NDArray[np.float64]:
    """Return the rise of the answer's log-probability, prompts by cells, in nats."""
    logprob = _matrix(group, "answer_logprob")
    baseline = group.groupby("prompt")["baseline_logprob"].first().to_numpy()[:, None]
    return np.asarray(logprob - baseline, dtype=np.float64)


def _span(name: str, hits: NDArray[np.bool_]) -> dict[str, float]:
    low, high = wilson(int(hits.sum()), len(hits))
    return {f"{name}_low": low, f"{name}_high": high}
