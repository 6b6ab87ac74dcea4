"""What passage use says of each layer."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import columns


def _read(measure: str) -> Callable[[Tables], pd.DataFrame]:
    def read(tables: Tables) -> pd.DataFrame:
        table = tables["means"]
        return columns(table[table["measure"] == measure], "mean", "low", "high")

    return read


def _has(measure: str) -> Callable[[Tables], bool]:
    return lambda tables: bool((tables["means"]["measure"] == measure).any())


def _profile(measure: str, title: str, unit: str, caption: str) -> ProfileSpec:
    return ProfileSpec(title, unit, caption, _read(measure), _has(measure))


PROFILES = {
    "knock_out_loss": _profile(
        "knock_out_loss",
        "Need of the passage",
        "nats",
        "How much the answer's log-probability falls when nothing behind the passage sees it in blocks around this one.",
    ),
    "mass": _profile(
        "mass",
        "Attention to the passage",
        "share",
        "Share of its attention that the position that predicts the answer gives to the passage, averaged over heads. Attention is not use.",
    ),
    "iks": _profile(
        "iks",
        "MLP read-out change",
        "nats",
        "How far the prediction read before this block's MLP is from that read after it (Jensen-Shannon divergence).",
    ),
}
