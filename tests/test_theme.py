"""Bands are drawn where there is an interval, and nowhere else."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from analyses.results.theme import COLOURS, band

NONE = float("nan")


def test_no_interval_draws_no_band() -> None:
    figure = go.Figure()
    band(figure, [0, 1, 2], [NONE] * 3, [NONE] * 3, COLOURS[0])
    assert not figure.data


def test_a_band_does_not_cross_what_has_no_interval() -> None:
    figure = go.Figure()
    band(figure, [0, 1, 2, 3, 4], [0.0, 0.1, NONE, 0.3, 0.4], [1.0, 1.1, 1.2, 1.3, 1.4], COLOURS[0])
    strips = [(list(high.x), list(high.y), list(low.y)) for high, low in zip(*[iter(figure.data)] * 2, strict=True)]
    assert strips == [([0, 1], [1.0, 1.1], [0.0, 0.1]), ([3, 4], [1.3, 1.4], [0.3, 0.4])]
    assert [trace.fill for trace in figure.data] == [None, "tonexty"] * 2


def test_a_whole_band_is_one_strip() -> None:
    figure = go.Figure()
    band(figure, np.arange(3), np.zeros(3), np.ones(3), COLOURS[0])
    assert len(figure.data) == 2
