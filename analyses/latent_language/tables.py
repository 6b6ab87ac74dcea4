"""Tables of the latent-language analysis, from a reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.latent_language.items import Item
from analyses.latent_language.measures import area, crossover
from analyses.latent_language.read import Reading
from analyses.results.statistics import Ci, row_interval, wilson
from analyses.tokens import token_text
from probes.models.protocol import Model

LEAD = 0.01
"""Least difference of probabilities that is called a lead; smaller ones may be certain, and are nothing."""
Group = tuple[str, NDArray[np.int64], tuple[str, ...]]
"""(pair, items of it, its languages, the answer's first)."""


def groups(reading: Reading) -> Iterator[Group]:
    """The items of each pair that have the same languages."""
    keys = [(item.pair, item.target, names) for item, names in zip(reading.items, reading.languages, strict=True)]
    for pair, target, names in dict.fromkeys(keys):
        mine = np.array([i for i, key in enumerate(keys) if key == (pair, target, names)])
        yield pair, mine, (target, *(name for name in names if name != target))


def columns(reading: Reading, mine: NDArray[np.int64], language: str, control: bool = False) -> NDArray[np.float64]:
    """[item, layer] probabilities of one language."""
    values = reading.control if control else reading.own
    return np.stack([values[i][:, reading.languages[i].index(language)] for i in mine])


def probability(reading: Reading) -> pd.DataFrame:
    """One row per item, layer and language."""
    parts = []
    for i, item in enumerate(reading.items):
        own, control = reading.own[i], reading.control[i]
        n_layers, names = len(own), reading.languages[i]
        part = {
            "prompt": item.prompt, "layer": np.repeat(np.arange(n_layers), len(names)),
            "language": np.tile(names, n_layers), "probability": own.ravel(), "control": control.ravel(),
            "pair": item.pair, "item": item.name,
        }  # fmt: skip
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def geometry(reading: Reading) -> pd.DataFrame:
    """One row per item and layer."""
    n_items, n_layers = reading.entropy_bits.shape
    return pd.DataFrame(
        {
            "prompt": np.repeat([item.prompt for item in reading.items], n_layers),
            "layer": np.tile(np.arange(n_layers), n_items),
            "entropy_bits": reading.entropy_bits.ravel(),
            "token_energy": reading.token_energy.ravel(),
            "pair": np.repeat([item.pair for item in reading.items], n_layers),
        }
    )


def curve(reading: Reading, right: NDArray[np.bool_], model: Model, ci: Ci, seed: int) -> pd.DataFrame:
    """One row per pair, layer and language: all items, their shuffled-word control, and the items answered right."""
    parts = []
    for pair, mine, names in groups(reading):
        for language in names:
            own, control = columns(reading, mine, language), columns(reading, mine, language, control=True)
            n_layers = own.shape[1]
            part = {"layer": np.arange(n_layers), "language": language}
            for prefix, values in (("", own), ("control_", control), ("right_", own[right[mine]])):
                found = row_interval(values, ci, seed)
                part |= {f"{prefix}mean": found.mean, f"{prefix}ci_low": found.low, f"{prefix}ci_high": found.high}
                part |= {f"{prefix}n": len(values)}
            role = "target" if language == names[0] else "latent"
            depth = np.arange(n_layers) / max(1, n_layers - 1)
            part |= {"pair": pair, "role": role, "model": model.ref, "relative_depth": depth}
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True).drop(columns="control_n")


def profile(reading: Reading, ci: Ci, seed: int) -> pd.DataFrame:
    """Entropy and token energy per pair and layer, with intervals, and the energy's reference values."""
    isotropic, least, greatest = reading.energy_scale
    parts = []
    for pair in dict.fromkeys(item.pair for item in reading.items):
        mine = np.array([i for i, item in enumerate(reading.items) if item.pair == pair])
        part: dict[str, object] = {"pair": pair, "layer": np.arange(reading.entropy_bits.shape[1])}
        for name, values in (("entropy", reading.entropy_bits[mine]), ("energy", reading.token_energy[mine])):
            found = row_interval(values, ci, seed)
            part |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        part |= {"energy_isotropic": isotropic, "energy_least": least, "energy_greatest": greatest, "n": len(mine)}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def lead(reading: Reading, ci: Ci, seed: int) -> pd.DataFrame:
    """Per pair, latent language and layer: how far the latent is ahead of the target and of its own control.

    `dominance` is the share of items for which the latent is more probable than the target. `leads` says that
    the whole interval of the first lies above `LEAD`, and that of the second above zero.
    """
    parts = []
    for pair, mine, (target, *latents) in groups(reading):
        for latent in latents:
            ours, theirs = columns(reading, mine, latent), columns(reading, mine, target)
            ahead = row_interval(ours - theirs, ci, seed)
            above = row_interval(ours - columns(reading, mine, latent, control=True), ci, seed)
            wins = (ours > theirs).sum(axis=0)
            bounds = np.array([wilson(int(w), len(mine)) for w in wins])
            part = {
                "pair": pair, "latent": latent, "target": target, "layer": np.arange(ours.shape[1]),
                "difference": ahead.mean, "ci_low": ahead.low, "ci_high": ahead.high, "over_control": above.mean,
                "over_control_low": above.low, "over_control_high": above.high, "dominance": wins / len(mine),
                "dominance_low": bounds[:, 0], "dominance_high": bounds[:, 1],
                "leads": (ahead.low > LEAD) & (above.low > 0), "n": len(mine),
            }  # fmt: skip
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(_LEAD_COLUMNS))


_LEAD_COLUMNS = (
    "pair", "latent", "target", "layer", "difference", "ci_low", "ci_high", "over_control", "over_control_low",
    "over_control_high", "dominance", "dominance_low", "dominance_high", "leads", "n",
)  # fmt: skip


def summary(curves: pd.DataFrame, leads: pd.DataFrame, right: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """Per pair and latent language: accuracy, peak, area, crossover, and where the latent leads.

    Args:
        right: pair to (items answered right, items).
    """
    rows = []
    for (pair, latent), group in leads.groupby(["pair", "latent"], sort=False):
        target = str(group["target"].iloc[0])
        mine = curves[(curves["pair"] == pair) & (curves["language"] == latent)]
        other = curves[(curves["pair"] == pair) & (curves["language"] == target)]
        latent_mean, target_mean = mine["mean"].to_numpy(), other["mean"].to_numpy()
        peak = int(latent_mean.argmax())
        ahead = group.loc[group["leads"], "layer"].to_numpy()
        n_layers = len(group)
        middle = ahead[(ahead >= n_layers // 4) & (ahead < 3 * n_layers // 4)]
        good, n = right[str(pair)]
        low, high = wilson(good, n)
        crossed = crossover(target_mean, latent_mean)
        rows.append(
            {
                "pair": pair, "target": target, "latent": latent, "n": int(group["n"].iloc[0]), "accuracy": good / n,
                "accuracy_low": low, "accuracy_high": high, "peak_layer": peak, "peak": latent_mean[peak],
                "peak_low": mine["ci_low"].iloc[peak], "peak_high": mine["ci_high"].iloc[peak],
                "peak_control": mine["control_mean"].iloc[peak], "target_at_peak": target_mean[peak],
                "crossover": np.nan if crossed is None else float(crossed), "area": area(latent_mean),
                "target_area": area(target_mean), "leads_at": spans(ahead), "leads_in_middle": spans(middle),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def spans(layers: Sequence[int] | NDArray[np.int64]) -> str:
    """Layers as runs, for instance `3-5, 9`."""
    runs: list[list[int]] = []
    for layer in map(int, layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def answers(reading: Reading, said: Sequence[str | None], right: NDArray[np.bool_], model: Model) -> pd.DataFrame:
    """One row per item: what was asked, what the model says by itself, and whether that is right."""
    rows = []
    for i, item in enumerate(reading.items):
        target = reading.languages[i].index(item.target)
        token = token_text(model, int(reading.top_id[i]))
        answer = said[i]
        rows.append(
            {
                "prompt": item.prompt, "pair": item.pair, "item": item.name, "expected": expected(item, model),
                "said": token if answer is None else answer, "correct": bool(right[i]),
                "target_probability": reading.own[i][-1, target], "top_token": token, "text": item.text,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def expected(item: Item, model: Model) -> str:
    """The right answer as text: a word, or a token where no word is known."""
    if item.answers:
        return item.answers[0]
    return " / ".join(token_text(model, s[0]) for s in item.sets[item.target][:3])
