"""What is measured of neighbouring blocks run side by side, and its table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analyses.depth_use.settings import Settings
from analyses.results.per_prompt import PerPrompt, interval

COLUMNS = {"error": "{}_error_{}", "cosine": "{}_cosine_{}", "delta_ce": "delta_ce_{}_{}"}
"""The proxy of each column of the table `windows`, by the kind and the width of the window."""


def kinds(settings: Settings) -> dict[str, str]:
    """Return how windows are put together, each with what its columns end in."""
    return {"parallel": "", **({"second_order": "_second_order"} if settings.window_pairs else {})}


def window_columns(settings: Settings) -> list[str]:
    """Return the proxies of all windows."""
    return [
        name.format(kind, width) for width in settings.windows for kind in kinds(settings) for name in COLUMNS.values()
    ]


def windows_table(columns: Mapping[str, PerPrompt], settings: Settings, n_layers: int) -> pd.DataFrame:
    """Return columns start, width, error, cosine, delta_ce, each with its interval over prompts, and the same with
    `_second_order` behind the name where pairs were measured.
    """
    frames = []
    for width in settings.windows:
        start = np.array([layer for layer in settings.swept(n_layers) if layer + width <= n_layers], dtype=np.int64)
        table: dict[str, object] = {"start": start, "width": width}
        for kind, ending in kinds(settings).items():
            for short, proxy in COLUMNS.items():
                mean, low, high = interval(columns[proxy.format(kind, width)], settings.seed)
                name = f"{short}{ending}"
                table |= {name: mean[start], f"{name}_low": low[start], f"{name}_high": high[start]}
        frames.append(pd.DataFrame(table))
    return pd.concat(frames, ignore_index=True)
