"""What a run of back-patching says in words; each claim follows from intervals that do not overlap."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analyses.results.statistics import wilson

CONTROLS = {
    "forward": "forward patches", "other_query": "another question's source", "noise": "noise of the same norm",
    "wrong_answer": "another question's answer",
}  # fmt: skip


def names(said: str, text: str) -> bool:
    """Return whether a continuation names an answer; one of a single letter or digit has to stand alone."""
    if len(text) > 1 or not text.isascii():
        return text in said
    return re.search(rf"\b{re.escape(text)}\b", said) is not None


def verdicts(summary: pd.DataFrame, controls: pd.DataFrame, cases: pd.DataFrame) -> list[str]:
    """Say whether there was anything to mend, and per position and set the rates of many tries and of one beside their controls."""
    right, n = int(cases["composition"].sum()), len(cases)
    low, high = wilson(right, n)
    notes = [f"The model by itself answers {right} of {n} questions right (95 % interval {low:.0%} to {high:.0%})."]
    if not (cases["set"] == "incorrect").any():
        notes.append(
            "No question has its composition wrong without a hop being wrong or a shortcut right, so there is nothing for "
            "back-patching to mend: the rates are of other questions."
        )
    return notes + [_verdict(row, controls) for row in summary.to_dict("records")]


def _verdict(row: Mapping[Any, Any], controls: pd.DataFrame) -> str:
    where = f"{row['position']}, {row['set']} questions (n = {row['n']})"
    if not row["oracle_rate"]:
        return (
            f"{where}: none of {row['cells']} cells answers any; with 95 % confidence the best of them mends at most "
            f"{row['oracle_high']:.0%} of such questions."
        )
    rows = controls[(controls["position_name"] == row["position"]) & (controls["set"] == row["set"])]
    beside = [c for c in rows.to_dict("records") if c["variant"] in CONTROLS]
    best = f"the best of {row['cells']} cells answers {_rate(row, 'oracle')}; with as many tries, {_compared(row, beside, 'oracle')}"
    # Of many cells one answers by chance where answers are few; a cell that was chosen on other questions has one try.
    once = f"the cell that is best on the other questions answers {_rate(row, 'held_out')}; chosen alike, {_compared(row, beside, 'held_out')}"
    return f"{where}: {best}. With one try, {once}." if np.isfinite(row["held_out_low"]) else f"{where}: {best}."


def _rate(row: Mapping[Any, Any], name: str) -> str:
    return f"{row[f'{name}_rate']:.0%} [{row[f'{name}_low']:.0%}, {row[f'{name}_high']:.0%}]"


def _compared(row: Mapping[Any, Any], beside: Sequence[Mapping[Any, Any]], name: str) -> str:
    """Say each control's rate, and whether the interval of the patch's lies above all of theirs."""
    said = ", ".join(f"{CONTROLS[c['variant']]} {_rate(c, name)}" for c in beside)
    level = [CONTROLS[c["variant"]] for c in beside if not row[f"{name}_low"] > c[f"{name}_high"]]
    verdict = f"not told apart from {', '.join(level)}" if level else "above every control"
    if len(beside) < len(CONTROLS) and not level:
        verdict = "above the controls that were run" if beside else "without a control, so it says nothing"
    return f"{said or 'nothing'}: {verdict}"
