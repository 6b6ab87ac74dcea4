"""Intervals: known answers, and coverage where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from analyses.statistics import cluster_bootstrap, wilson


def test_wilson_by_hand() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert all(np.isnan(wilson(0, 0)))


def test_means_are_over_rows_and_intervals_hold_them() -> None:
    values, groups = [1.0, 3.0, 5.0, 7.0], [0, 0, 0, 1]
    interval = cluster_bootstrap(values, groups)
    assert interval.mean.tolist() == [4.0]
    assert interval.low[0] == 3.0, "one resample in sixteen or more draws the first group twice"
    assert interval.high[0] == 7.0


def test_equal_groups_have_no_spread_and_columns_are_apart() -> None:
    values = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    interval = cluster_bootstrap(values, [0, 1, 2])
    assert interval.low.tolist() == interval.high.tolist() == [1.0, 2.0]


def test_intervals_cover_the_truth_at_their_level() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        centres = rng.normal(size=40)
        values = (centres[:, None] + 0.1 * rng.normal(size=(40, 5))).ravel()
        interval = cluster_bootstrap(values, np.repeat(np.arange(40), 5), seed=trial, resamples=400)
        covered += interval.low[0] <= 0 <= interval.high[0]
    assert 0.87 <= covered / 200 <= 0.99


def test_no_rows_have_no_mean() -> None:
    assert np.isnan(cluster_bootstrap(np.empty((0, 2)), []).mean).all()
