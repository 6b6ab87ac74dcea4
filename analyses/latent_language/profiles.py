"""What latent languages say of each layer; of a run with several pairs, of the first."""

from __future__ import annotations

import pandas as pd

from analyses.results.card import ProfileSpec, Tables
from analyses.results.profiles import columns


def _curve(tables: Tables, role: str) -> pd.DataFrame:
    curve = tables["curve"]
    rows = curve[(curve["pair"] == curve["pair"].iloc[0]) & (curve["role"] == role)]
    return rows[rows["language"] == rows["language"].iloc[0]] if len(rows) else rows


def lead(tables: Tables) -> pd.DataFrame:
    """Probability of the first latent language minus that of the language asked for."""
    table = tables["lead"]
    rows = table[(table["pair"] == table["pair"].iloc[0]) & (table["latent"] == table["latent"].iloc[0])]
    return columns(rows, "difference", "ci_low", "ci_high")


def latent(tables: Tables) -> pd.DataFrame:
    """Probability of the word in the first latent language."""
    return columns(_curve(tables, "latent"), "mean", "ci_low", "ci_high")


def target(tables: Tables) -> pd.DataFrame:
    """Probability of the word in the language asked for."""
    return columns(_curve(tables, "target"), "mean", "ci_low", "ci_high")


PROFILES = {
    "lead": ProfileSpec(
        "Latent language's lead",
        "difference of probability",
        "Probability of the word in the latent language minus its probability in the language asked for, read by the lens: above 0 the "
        "layer would rather write the latent language. Where it crosses 0 the language switches.",
        lead,
        lambda tables: len(tables["lead"]) > 0,
    ),
    "latent": ProfileSpec(
        "Latent language",
        "probability",
        "Probability of the word in the latent language, read by the lens at each layer.",
        latent,
        lambda tables: len(_curve(tables, "latent")) > 0,
    ),
    "target": ProfileSpec(
        "Language asked for",
        "probability",
        "Probability of the word in the language asked for, read by the lens at each layer.",
        target,
    ),
}
