"""What a run of layer programs says in words; each claim follows from an interval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analyses.layer_programs.reading import LOWER_IS_BETTER
from analyses.results.statistics import wilson

SIGNIFICANT = 0.05
FRAGILE = 0.5
"""A share of survivors whose interval ends below this is called an accident."""


def run_notes(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return what the tables say, in sentences."""
    notes = []
    right = tables["questions"]["right"].dropna().astype(bool)
    if len(right):
        low, high = wilson(int(right.sum()), len(right))
        notes.append(
            f"The model by itself answers {int(right.sum())} of {len(right)} questions right (95 % interval {low:.0%} to {high:.0%})."
        )
    if "jumps" in tables:
        notes += [_jumps(tables["jumps"], row) for _, row in tables["best_jump"].iterrows()]
    if "rates" in tables:
        notes += [
            _universal(rows) for _, rows in tables["programs"].groupby("origin", sort=False) if rows["split"].min() >= 0
        ]
        notes += [_items(row) for _, row in tables["rates"].iterrows()]
    if "fragility" in tables:
        notes += _fragile(tables["fragility"])
    return notes


def _jumps(table: pd.DataFrame, best: pd.Series) -> str:
    cells = table[table["metric"] == best["metric"]]
    gain = -cells["mean"] if best["metric"] in LOWER_IS_BETTER else cells["mean"]
    told = cells["p_family"] <= SIGNIFICANT
    said = f"{best['metric']}: of {len(cells)} skips and repeats {int((told & (gain > 0)).sum())} help and {int((told & (gain < 0)).sum())} harm"
    said += " beyond what the largest of so many does by chance"
    if cells["p_family"].isna().all():
        said = f"{best['metric']}: too few groups of prompts to tell {len(cells)} skips and repeats from chance"
    elsewhere = f"a cell chosen so on half of the prompts gains {best['held_out']:.3g} {_interval(best, 'held_out_')} on the other half"
    verdict = "" if best["held_out_low"] > 0 else ", which is no gain that can be told from none"
    return f"{said}. The best, {best['program']}, gains {best['mean']:.3g} on the prompts that chose it; {elsewhere}{verdict}."


def _universal(rows: pd.DataFrame) -> str:
    """Say what one program for all questions does on questions that did not choose it, over the splits."""
    better, n = int((rows["test_low"] > 0).sum()), len(rows)
    harm = int((rows["test_high"] < 0).sum())
    first = rows.iloc[0]
    return (
        f"One program for all questions, found by {first['origin']} on half of them: on the other half its {first['metric']} gains "
        f"{rows['test'].mean():.3g} on average over {n} splits (from {rows['test'].min():.3g} to {rows['test'].max():.3g}); the interval lies above 0 in "
        f"{better} of {n} and below 0 in {harm}. It mends {int(rows['mended'].sum())} answers and breaks {int(rows['broken'].sum())}."
    )


def _items(row: pd.Series) -> str:
    verdict = (
        "more than it does for a wrong answer" if row["difference_low"] > 0 else "not told apart from a wrong answer"
    )
    predicted = (
        f", and {row['predicted']:.0%} are expected of as many random programs" if np.isfinite(row["predicted"]) else ""
    )
    return (
        f"Some program of {row['method']} answers {row['mended']:.0%} of the {int(row['n'])} questions that the model gets wrong "
        f"[{row['mended_low']:.0%}, {row['mended_high']:.0%}], chosen with the answer at hand; another question's answer is given as often as "
        f"{row['wrong_answer']:.0%}{predicted}: difference {row['difference']:.0%} {_interval(row, 'difference_', '.0%')}, {verdict}."
    )


def _fragile(table: pd.DataFrame) -> list[str]:
    rows = table[table["program"] == "programs that mend a question"]
    said = [f"{row['change']} {row['survived']:.0%} {_interval(row, 'ci_', '.0%')}" for _, row in rows.iterrows()]
    if not said:
        return []
    accidents = bool((rows[rows["change"] != "undone"]["ci_high"] < FRAGILE).all())
    verdict = " Such a program is an accident of its question." if accidents else ""
    return [f"Programs that mend a question still do after a small change: {', '.join(said)}.{verdict}"]


def _interval(row: pd.Series, name: str, form: str = ".3g") -> str:
    low, high = row[f"{name}low"], row[f"{name}high"]
    return (
        f"[{low:{form}}, {high:{form}}]"
        if np.isfinite(low) and np.isfinite(high)
        else "(no interval from so few groups)"
    )
