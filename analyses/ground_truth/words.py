"""What scores say in words; each claim follows from an interval, and where there is none, nothing is claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import pandas as pd

from analyses.ground_truth.answers import LEVEL
from analyses.ground_truth.contestants import ADAPTED, adapter_of
from analyses.registry import SHIPPED

ABSTAINS, ALWAYS = 0.2, 0.5
"""Rates of false positives below which a method counts as abstaining, and above which as answering whatever it is asked."""


CANNOT_TELL: Mapping[str, str] = {
    "concept_depth": "a concept that is used from one that is not, nor one whose code is not linear from one that is absent",
    "logit_lens": "what is written in other directions than those of the answer",
    "lenses": "where the answer is written from where a linear map can already make it: its map reads ahead of the read-out",
    "latent_language": "a language that leads from an answer's rival that happens to lead",
    "back_patching": "a jump that mends from noise by the best of all cells, or from few questions: on models with four answers both find one",
    "layer_programs": "which part of two blocks replaces which of the other, nor parts of one block that replace one another: it leaves out whole "
    "blocks",
    "voids": "by the paper's step, a block that turns the stream at equal norm from one that does nothing",
    "depth_use": "a block that writes nothing from one that writes where nobody reads, nor by erasure a token's content from its being asked for",
    "causal_patching": "a concept that the answer does not depend on from one that is absent, nor, without its null, the fact from all else that "
    "differs between two prompts",
    "contextual_decomposition": "by its default rules what acts only through a gate, nor by any interval small side effects from taking part",
    "communication_channels": "from weights alone, a channel that the data use from one that they do not",
    "norm_removal": "which of several norms an effect passes through when freezing any of them costs loss",
    "passage_use": "which head of a block takes from the passage, nor what a wrong answer takes from it: the loss is the right answer's",
}
"""What each analysis has no way of knowing, whatever its scores."""
CONSTANT = "control: constant"
"""The control of the short table: always the middle layer, or every candidate alike."""


def sentences(summary: pd.DataFrame) -> list[str]:
    """Return one sentence for each method, kind of question and tier."""
    return [sentence(row) for row in summary.to_dict("records")]


def sentence(row: Mapping[Any, Any]) -> str:
    """Return what one row of the summary supports."""
    parts = [part for part in (_layers(row), _sets(row), _intervals(row), _nothing(row), _misses(row)) if part]
    return f"{row['method']}, {row['kind']}, {row['tier']}: {'; '.join(parts) or 'nothing was measured'}."


def _layers(row: Mapping[Any, Any]) -> str:
    if not isfinite(row["error"]):
        return ""
    said = f"off by {span(row, 'error')} layers on {row['n']} questions"
    if not isfinite(row["skill"]):
        return said
    if not isfinite(row["skill_low"]):
        return f"{said}, {_few()}"
    beaten = (
        "nearer than" if row["skill_low"] > 0 else "farther than" if row["skill_high"] < 0 else "not told apart from"
    )
    return f"{said}, {beaten} always naming the middle (skill {span(row, 'skill')})"


def _sets(row: Mapping[Any, Any]) -> str:
    if not isfinite(row["auroc"]):
        return f"F1 {span(row, 'f1')}" if isfinite(row["f1"]) else ""
    low, high = row["auroc_low"], row["auroc_high"]
    verdict = _few()
    if isfinite(low):
        verdict = "above chance" if low > 0.5 else "below chance" if high < 0.5 else "not told apart from chance"
    own = f", F1 of its own set {span(row, 'f1')}" if isfinite(row["f1"]) else ""
    return f"ranks with AUROC {span(row, 'auroc')}, {verdict}{own}"


def _intervals(row: Mapping[Any, Any]) -> str:
    if not isfinite(row["covered"]):
        return ""
    said = f"its 95 % intervals, {row['width']:.1f} layers wide, hold the truth in {share(row, 'covered')}"
    return f"{said}: too narrow" if row["covered_high"] < LEVEL else said


def _nothing(row: Mapping[Any, Any]) -> str:
    if not isfinite(row["false_positive"]):
        return ""
    low, high = row["false_positive_low"], row["false_positive_high"]
    verdict = ": it abstains" if high < ABSTAINS else ": it does not abstain" if low > ALWAYS else ""
    return f"where there is nothing it names something in {share(row, 'false_positive')} of {row['n_nothing']}{verdict}"


def _misses(row: Mapping[Any, Any]) -> str:
    return f"misses {share(row, 'miss')} of what there is" if row["miss"] > 0 else ""


def _few() -> str:
    return "of too few clusters for an interval"


def span(row: Mapping[Any, Any], name: str, digits: int = 2) -> str:
    """Return a mean with its interval, where it has one."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    bounds = f" [{low:.{digits}f}, {high:.{digits}f}]" if isfinite(low) and isfinite(high) else ""
    return f"{row[name]:.{digits}f}{bounds}"


def share(row: Mapping[Any, Any], name: str) -> str:
    """Return a rate with its interval, where it has one."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    bounds = f" [{low:.0%}, {high:.0%}]" if isfinite(low) and isfinite(high) else ""
    return f"{row[name]:.0%}{bounds}"


def readme_table(summary: pd.DataFrame, tiers: Sequence[str] = ("compiled", "noised", "trained")) -> str:
    """Return the summary as a markdown table: by kind a line for each method, then that of the constant control.

    Kinds that only controls answer, and the other controls, are left to the report.
    """
    control = summary["method"].str.startswith("control")
    kinds = list(dict.fromkeys(summary.loc[~control, "kind"]))
    shown = summary[(~control | (summary["method"] == CONSTANT)) & summary["kind"].isin(kinds)]
    order = shown["kind"].map(kinds.index) * 2 + shown["method"].str.startswith("control")
    shown = shown.loc[order.sort_values(kind="stable").index]
    lines = [f"| method | asked | {' | '.join(tiers)} |", "|---" * (len(tiers) + 2) + "|"]
    for (method, kind), group in shown.groupby(["method", "kind"], sort=False):
        by_tier = {row["tier"]: row for row in group.to_dict("records")}
        cells = [_cell(by_tier[tier]) if tier in by_tier else "" for tier in tiers]
        if any(cells):
            lines.append(f"| {method} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def method_list(summary: pd.DataFrame) -> str:
    """Return as markdown, for each analysis and then for other tools: what it cannot tell, and what its scores say."""
    parts, left = [], set(summary.loc[~summary["method"].str.startswith("control"), "method"])
    for analysis in ADAPTED:
        methods = adapter_of(analysis).methods
        parts.append(
            f"### {SHIPPED[analysis][1]}\n\nCannot tell {CANNOT_TELL[analysis]}.\n\n{_bullets(summary, methods)}"
        )
        left -= set(methods)
    return "\n\n".join([*parts, f"### Other tools, and the ceiling\n\n{_bullets(summary, sorted(left))}"])


def _bullets(summary: pd.DataFrame, methods: Sequence[str]) -> str:
    rows = summary[summary["method"].isin(methods)]
    return "\n".join(f"- {said}" for said in sentences(rows)) or "- It was not asked."


def _cell(row: Mapping[Any, Any]) -> str:
    parts = []
    if isfinite(row["auroc"]):
        parts.append(f"AUROC {span(row, 'auroc')}")
    elif isfinite(row["error"]):
        parts.append(f"± {span(row, 'error', 1)}")
    if isfinite(row["f1"]):
        parts.append(f"F1 {row['f1']:.2f}")
    if isfinite(row["covered"]):
        parts.append(f"covers {row['covered']:.0%}")
    if isfinite(row["false_positive"]):
        parts.append(f"false {row['false_positive']:.0%}")
    if row["miss"] > 0:
        parts.append(f"misses {row['miss']:.0%}")
    return ", ".join(parts)
