"""What depth use says of each layer."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import columns


def _read(proxy: str) -> Callable[[Tables], pd.DataFrame]:
    def read(tables: Tables) -> pd.DataFrame:
        table = tables["proxy_intervals"]
        return columns(table[table["proxy"] == proxy], "mean", "ci_low", "ci_high")

    return read


def _has_proxy(proxy: str) -> Callable[[Tables], bool]:
    return lambda tables: bool((tables["proxy_intervals"]["proxy"] == proxy).any())


def _profile(proxy: str, title: str, unit: str, caption: str) -> ProfileSpec:
    return ProfileSpec(title, unit, caption, _read(proxy), _has_proxy(proxy))


PROFILES = {
    "removal": _profile(
        "delta_ce_block",
        "Loss without the block",
        "nats per token",
        "Rise of the next-token loss when this block alone is left out: what the model really loses without it.",
    ),
    "frozen_norm": _profile(
        "delta_ce_frozen_norm",
        "Loss with frozen norm",
        "nats per token",
        "Rise of the next-token loss when this block's normalisation divides by its average instead of each token's own norm.",
    ),
    "generation": _profile(
        "text_lost_block",
        "Text changed without the block",
        "share of tokens",
        "Share of the tokens of the model's own greedy text that are others when it writes without this block.",
    ),
    "contribution": _profile(
        "relative_norm_block",
        "Size of the contribution",
        "norm added / norm of the stream",
        "How large what the block adds is beside the stream it is added to, averaged over tokens.",
    ),
}
