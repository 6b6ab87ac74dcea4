"""What a run of back-patching says in words; each claim follows from intervals that do not overlap."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
    """Say whether there was anything to mend, and per position and set the oracle rate beside its controls."""
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
    oracle = f"{row['oracle_rate']:.0%} [{row['oracle_low']:.0%}, {row['oracle_high']:.0%}]"
    rows = controls[(controls["position_name"] == row["position"]) & (controls["set"] == row["set"])]
    beside = [c for c in rows.to_dict("records") if c["variant"] in CONTROLS]
    said = ", ".join(
        f"{CONTROLS[c['variant']]} {c['oracle_rate']:.0%} [{c['oracle_low']:.0%}, {c['oracle_high']:.0%}]"
        for c in beside
    )
    level = [CONTROLS[c["variant"]] for c in beside if not row["oracle_low"] > c["oracle_high"]]
    verdict = f"not told apart from {', '.join(level)}" if level else "above every control"
    if len(beside) < len(CONTROLS) and not level:
        verdict = "above the controls that were run" if beside else "without a control, so it says nothing"
    return f"{where}: the best of {row['cells']} cells answers {oracle}; with as many tries, {said or 'nothing'}: {verdict}."
