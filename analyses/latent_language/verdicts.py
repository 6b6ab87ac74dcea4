"""What a run says of each pair in words; each claim follows from an interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analyses.latent_language.tables import LEAD

CANNOT = 0.5
"""A pair is called one the model cannot do where the interval of its share of right answers lies below this."""


def verdicts(summary: pd.DataFrame) -> list[str]:
    """One sentence per pair and latent language: can the model do it, and does the latent lead."""
    return [f"{row['pair']}: {_ability(row)}; {_leading(row)}; {_peak(row)}." for row in summary.to_dict("records")]


def _ability(row: Mapping[Any, Any]) -> str:
    low, high = row["accuracy_low"], row["accuracy_high"]
    share = f"{row['accuracy']:.0%} of {row['n']} items answered right (95 % interval {low:.0%} to {high:.0%})"
    if high < CANNOT:
        return f"{share}: this model cannot do this pair, so its curves say little about it"
    return share if low >= CANNOT else f"{share}: whether this model can do this pair is open"


def _leading(row: Mapping[Any, Any]) -> str:
    latent, target = row["latent"], row["target"]
    if np.isnan(row["peak_low"]):
        return f"too few items for an interval, so whether {latent} leads {target} cannot be said"
    where, middle = row["leads_at"], row["leads_in_middle"]
    elsewhere = f" (in all, at {where})" if where and where != middle else ""
    if middle:
        return f"{latent} leads {target} by more than {LEAD} in middle layers {middle}{elsewhere}"
    return f"{latent} is not shown to lead {target} by {LEAD} in the middle half of the layers{elsewhere}"


def _peak(row: Mapping[Any, Any]) -> str:
    known = not np.isnan(row["peak_low"])
    interval = f" [{row['peak_low']:.3f}, {row['peak_high']:.3f}]" if known else ""
    return (
        f"{row['latent']}'s peak {row['peak']:.3f}{interval} at layer {row['peak_layer']}, where {row['target']} has "
        f"{row['target_at_peak']:.3f} and the control {row['peak_control']:.3f}"
    )
