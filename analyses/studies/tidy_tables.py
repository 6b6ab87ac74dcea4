"""The results of a study as tidy tables: a line per cell, a line per layer of every depth profile, a line per curve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analyses.results.result import Result
from analyses.studies.cells import Cell, shown
from analyses.studies.study_folder import StudyFolder

LABELS = ["entry", "analysis", "model", "prompts", "options"]
"""What tells the curves of a study apart; cells that agree in these differ in their seed."""
CURVE = [*LABELS, "profile", "title", "unit"]
INDEX = [
    "cell", "state", "error", *LABELS, "seed", "ref", "layers", "weights", "n_prompts", "tokens", "forwards", "seconds",
    "created", "all_options", "result",
]  # fmt: skip
PROFILES = ["cell", *CURVE, "seed", "layers", "layer", "depth", "value", "ci_low", "ci_high"]


def build(cells: Sequence[Cell], folder: StudyFolder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return tables `index` (a line per cell) and `profiles` (a line per layer of every profile of every finished cell)."""
    lines, profiles = [], []
    for cell in cells:
        labels = _labels(cell)
        if not folder.done(cell.name):
            why = folder.why(cell.name)
            lines.append({**labels, "state": "failed" if why else "missing", "error": why["error"] if why else ""})
            continue
        result = Result.load(folder.cell(cell.name))
        layers = int(result.provenance["model"]["layers"])
        lines.append({**labels, **_facts(result), "state": "done", "error": "", "result": f"cells/{cell.name}"})
        profiles += [one.assign(**labels, layers=layers) for one in _profiles(result, layers)]
    varied = [f"option.{name}" for name in dict.fromkeys(name for cell in cells for name in cell.varied)]
    index = pd.DataFrame(lines).reindex(columns=[*INDEX, *varied])
    frame = pd.concat(profiles, ignore_index=True) if profiles else pd.DataFrame()
    return _typed(index), frame.reindex(columns=[*PROFILES, *varied])


def _labels(cell: Cell) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "entry": cell.entry,
        "analysis": cell.analysis.name,
        "model": cell.model.label,
        "ref": cell.model.spec.ref,
        "prompts": cell.prompts.label if cell.prompts else "",
        "options": ", ".join(f"{name} {shown(value)}" for name, value in cell.varied.items()),
        "seed": cell.seed,
        **{f"option.{name}": shown(value) for name, value in cell.varied.items()},
    }


def _facts(result: Result) -> dict[str, Any]:
    provenance = result.provenance
    return {
        "layers": provenance["model"]["layers"],
        "weights": provenance["model"]["weights"],
        "n_prompts": provenance["counts"]["prompts"],
        "tokens": provenance["counts"]["tokens"],
        "forwards": provenance["counts"]["forwards"],
        "seconds": provenance["seconds"],
        "created": provenance["created"],
        "all_options": json.dumps(dict(result.options), sort_keys=True),
    }


def _typed(index: pd.DataFrame) -> pd.DataFrame:
    """Keep whole numbers whole where some cells have none."""
    whole = ["seed", "layers", "n_prompts", "tokens", "forwards"]
    return index.astype(dict.fromkeys(whole, "Int64"))


def _profiles(result: Result, layers: int) -> Iterator[pd.DataFrame]:
    for name, spec in result.profiles.items():
        one = result.profile(name).reindex(columns=["layer", "value", "ci_low", "ci_high"])
        depth = one["layer"] / max(1, layers - 1)
        yield one.assign(profile=name, title=spec.title, unit=spec.unit, depth=depth)


def curves(profiles: pd.DataFrame) -> pd.DataFrame:
    """Average profiles over seeds: columns of `CURVE`, layer, depth, value, ci_low, ci_high, seed_sd, n_seeds.

    The interval adds in squares what each cell says of its own data and the 95 % Student interval of the mean over
    seeds; with one seed only the former is there.
    """
    columns = [*CURVE, "layers", "layer", "depth"]
    grouped = profiles.groupby(columns, sort=False, dropna=False)
    mean = grouped[["value", "ci_low", "ci_high"]].mean()
    mean["seed_sd"], mean["n_seeds"] = grouped["value"].std(), grouped["value"].count()
    from scipy.stats import t as student  # half a second, which the processes that run cells need not spend

    n = mean["n_seeds"].to_numpy()
    half = np.zeros(len(mean))
    several = n > 1
    half[several] = student.ppf(0.975, n[several] - 1) * mean["seed_sd"].to_numpy()[several] / np.sqrt(n[several])
    for side, sign in (("ci_low", -1), ("ci_high", 1)):
        own = (mean[side] - mean["value"]).abs().to_numpy()
        width = np.hypot(np.nan_to_num(own), half)
        known = ~np.isnan(own) | several
        mean[side] = np.where(known, mean["value"] + sign * width, np.nan)
    return mean.reset_index()


def summary(curve: pd.DataFrame) -> pd.DataFrame:
    """Return a line per curve: where along relative depth it peaks and how high, with that layer's interval, and its mean."""
    lines = []
    for key, one in curve.groupby(CURVE, sort=False, dropna=False):
        one = one.dropna(subset=["value"])
        if len(one):
            peak = one.iloc[int(one["value"].to_numpy().argmax())]
            named = dict(zip(CURVE, key, strict=True))
            lines.append({
                **named, "layers": peak["layers"], "n_seeds": peak["n_seeds"], "peak_layer": peak["layer"],
                "peak_depth": peak["depth"], "peak": peak["value"], "ci_low": peak["ci_low"], "ci_high": peak["ci_high"],
                "mean": one["value"].mean(),
            })  # fmt: skip
    measured = ["layers", "n_seeds", "peak_layer", "peak_depth", "peak", "ci_low", "ci_high", "mean"]
    return pd.DataFrame(lines, columns=[*CURVE, *measured])


def gather(index: pd.DataFrame, root: Path, analysis: str, table: str) -> pd.DataFrame:
    """Return one table of one analysis from all finished cells, each line with its cell's labels."""
    parts = []
    for _, line in index[(index["analysis"] == analysis) & (index["state"] == "done")].iterrows():
        file = root / line["result"] / "tables" / f"{table}.parquet"
        if file.is_file():
            labels = {f"study_{name}": line[name] for name in ("entry", "model", "prompts", "options", "seed")}
            parts.append(pd.read_parquet(file).assign(cell=line["cell"], **labels))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
