"""Intervals: known answers, and coverage where the truth is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from analyses.results.statistics import MIN_CLUSTERS, cluster_bootstrap, percentiles, wilson


def test_wilson_by_hand() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert all(np.isnan(wilson(0, 0)))


def test_means_are_over_rows_and_intervals_hold_them() -> None:
    values, groups = [1.0, 2.0, 3.0, *range(4, 9)], [0, 0, 0, *range(1, 6)]
    interval = cluster_bootstrap(values, groups)
    assert interval.mean.tolist() == [4.5]
    assert 2.0 <= interval.low[0] < 4.5 < interval.high[0] <= 8.0


def test_equal_groups_have_no_spread_and_columns_are_apart() -> None:
    interval = cluster_bootstrap(np.tile([1.0, 2.0], (6, 1)), np.arange(6))
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


def test_below_six_groups_there_is_no_interval() -> None:
    values = np.arange(12.0).reshape(6, 2)
    few, enough = cluster_bootstrap(values[:5], np.arange(5)), cluster_bootstrap(values, np.arange(6))
    assert few.mean.tolist() == values[:5].mean(0).tolist()
    assert np.isnan([few.low, few.high]).all()
    assert np.isfinite([enough.low, enough.high]).all()
    assert np.isnan(cluster_bootstrap(np.repeat(values[:5], 100, axis=0), np.repeat(np.arange(5), 100)).low).all()


def test_the_range_of_six_groups_is_the_first_that_can_hold_the_middle() -> None:
    """Every bootstrap mean lies in that range, and the middle is outside it only where all signs agree."""
    signs = {n: list(product((-1, 1), repeat=n)) for n in (MIN_CLUSTERS - 1, MIN_CLUSTERS)}
    missed = {n: np.mean([abs(sum(row)) == n for row in rows]) for n, rows in signs.items()}
    assert missed[MIN_CLUSTERS] <= 0.05 < missed[MIN_CLUSTERS - 1]


def test_each_column_follows_its_own_number_of_groups() -> None:
    draws = np.random.default_rng(0).normal(size=(1000, 3))
    draws[:, 2] = np.nan
    low, high = percentiles(draws, [MIN_CLUSTERS - 1, MIN_CLUSTERS, MIN_CLUSTERS])
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False, True]
    assert (low[1], high[1]) == pytest.approx(np.quantile(draws[:, 1], [0.025, 0.975]))


def test_a_column_without_a_mean_has_no_interval() -> None:
    values = np.stack([np.arange(8.0), [*range(7), np.nan], [*range(7), np.inf]], axis=1)
    interval = cluster_bootstrap(values, np.arange(8))
    assert np.isnan(interval.low).tolist() == np.isnan(interval.high).tolist() == [False, True, True]
