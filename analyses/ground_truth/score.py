"""Answers held against the truth: a row for each answer, and what they come to for each method, kind of question and tier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import numpy as np
import pandas as pd

from analyses.ground_truth import measures
from analyses.ground_truth.answers import Answer, name_of
from analyses.ground_truth.controls import constant
from analyses.results.statistics import cluster_bootstrap, percentiles, resampled_ratios
from probes.errors import OptionError, unknown
from probes.planted.record import Interval, Question, Record, Tier

KEYS = ["method", "kind", "tier"]
"""What scores are given for; there is never one number for a method."""
AVERAGED = (
    "error", "error_share", "within_1", "bias_first", "bias_last", "covered", "width", "interval_score", "auroc",
    "average_precision", "f1", "jaccard", "false_positive", "miss", "declined",
)  # fmt: skip
"""Columns of the rows of which the summary gives mean and interval."""
SINGLE = ("written", "moved")
"""Kinds whose truth is one node, so that the best named one also has a distance in layers."""


@dataclass(frozen=True)
class Scored:
    """What answers are worth."""

    rows: pd.DataFrame
    """One row an answer; a measure that does not apply is NaN."""
    summary: pd.DataFrame
    """One row a method, kind of question and tier: of every measure its mean, `_low` and `_high`."""

    def _repr_html_(self) -> str:
        shown = [
            column for column in self.summary if column in KEYS or column in ("n", "n_nothing", *AVERAGED, "skill")
        ]
        return str(self.summary[shown].dropna(axis=1, how="all").round(2).to_html(index=False, na_rep=""))


def score(answers: Sequence[Answer], tier: Tier | None = None, records: Iterable[Record] | None = None) -> Scored:
    """Score answers to questions about planted models.

    Intervals are 95 %, from resampling clusters: tasks of one family and one seed, which share how they are built. Below
    six clusters there is none.

    Args:
        answers: of any methods; those that an analysis of this workbench gives are made by `answers_of`.
        tier: compiled, noised or trained. Answers of other tiers are left out, and a question of the tier, of a kind
            that a method answers elsewhere, counts as declined where the method says nothing of it.
        records: the truths; by default those of the tasks that the answers name, and with `tier` those of its tasks.

    Raises:
        OptionError: a task or question that does not exist, or two answers of one method to one question.
    """
    truths = {name_of(record): record for record in (truths_for(answers, tier) if records is None else records)}
    if tier is not None:
        truths = {name: record for name, record in truths.items() if record.tier == tier}
        answers = completed([answer for answer in answers if answer.task in truths], list(truths.values()))
    _check(answers, truths)
    rows = pd.DataFrame([row_of(answer, truths[answer.task]) for answer in answers], columns=list(ROW))
    return Scored(rows, summarised(rows))


def truths_for(answers: Iterable[Answer], tier: Tier | None) -> list[Record]:
    """Build the tasks that answers name, and the others of a tier at the same seeds; return their records.

    Raises:
        OptionError: a name that no task has.
    """
    from probes import planted

    pairs: dict[tuple[str, int], None] = {}
    for name in dict.fromkeys(answer.task for answer in answers):
        task, _, seed = name.partition("@")
        if not seed.isdigit():
            raise OptionError(f"task {name!r} has no seed: write it as A2@0")
        pairs[task, int(seed)] = None
    if tier:
        pairs |= {(task, seed): None for _, seed in list(pairs) for task in planted.tasks(tier)}
    return [planted.task(task, seed=seed).record for task, seed in pairs]


def completed(answers: Sequence[Answer], records: Sequence[Record]) -> list[Answer]:
    """Return the answers, and a declined one for each question of a method's kinds that it says nothing of."""
    by_name = {name_of(record): record for record in records}
    out = list(answers)
    for method in dict.fromkeys(answer.method for answer in answers):
        own = [answer for answer in answers if answer.method == method]
        given = {(answer.task, answer.question) for answer in own}
        kinds = {answer.question.partition(":")[0] for answer in own}
        out += [
            Answer(method, name, question.key, "declined", reason="no answer was handed in")
            for name, record in by_name.items()
            for question in record.questions
            if question.kind in kinds and (name, question.key) not in given
        ]
    return out


def _check(answers: Sequence[Answer], truths: Mapping[str, Record]) -> None:
    seen: set[tuple[str, str, str]] = set()
    for answer in answers:
        if answer.task not in truths:
            raise OptionError(unknown("task", answer.task, sorted(truths)))
        keys = [question.key for question in truths[answer.task].questions]
        if answer.question not in keys:
            raise OptionError(f"{answer.task}: {unknown('question', answer.question, keys)}")
        key = (answer.method, answer.task, answer.question)
        if key in seen:
            raise OptionError(f"{answer.method} answers {answer.question} of {answer.task} twice: hand in one answer")
        seen.add(key)


ROW = (
    "method", "task", "family", "seed", "tier", "kind", "question", "n_layers", "nothing", "decision", *AVERAGED,
    "constant_error", "seconds", "forwards",
)  # fmt: skip
"""Columns of a row."""


def row_of(answer: Answer, record: Record) -> dict[str, Any]:
    """Return the row of one answer; measures that do not apply are NaN.

    `error` is the larger distance of the two ends (of the best named node's layer, where the truth is one node), counted
    where there is something and the method answers. `false_positive` is of questions where there is nothing, `miss` of
    those where there is something: an answer of none, or no answer.
    """
    question, n_layers = record.question(answer.question), int(record.model["layers"])
    claims = answer.decision == "answered" and answer.chosen != frozenset()
    ranks_only = answer.decision == "answered" and answer.chosen is None and bool(answer.scores)
    row: dict[str, Any] = dict.fromkeys(ROW, nan) | {
        "method": answer.method, "task": name_of(record), "family": family_of(record.task), "seed": record.seed,
        "tier": record.tier, "kind": question.kind, "question": question.key, "n_layers": n_layers,
        "nothing": question.nothing, "decision": answer.decision, "declined": float(answer.decision == "declined"),
        "seconds": answer.seconds, "forwards": answer.forwards,
    }  # fmt: skip
    if question.nothing:
        return row | {"false_positive": nan if ranks_only else float(claims)}
    row |= {"miss": nan if question.ranking_only else float(not claims)}
    if isinstance(question.truth, Interval):
        return row | (_of_layers(answer, question.truth, n_layers) if claims else {}) | _constant(record, question)
    return row | _of_sets(answer, question, claims)


def family_of(task: str) -> str:
    """Return what a task shares its construction with: its letter; a trained model is a family of its own."""
    return task.partition("-")[0] if task.startswith("T") else task[0]


def _of_layers(answer: Answer, truth: Interval, n_layers: int) -> dict[str, float]:
    error = measures.layer_error(answer.estimate, truth)
    first, last = measures.layer_errors(answer.estimate, truth)
    return {
        "error": error, "error_share": error / n_layers, "within_1": float(error <= 1) if isfinite(error) else nan,
        "bias_first": first, "bias_last": last, "covered": measures.covered(answer.low, answer.high, truth),
        "width": measures.width(answer.low, answer.high),
        "interval_score": measures.interval_score(answer.low, answer.high, truth, answer.level),
    }  # fmt: skip


def _constant(record: Record, question: Question) -> dict[str, float]:
    """Return how far the constant control is off, which skill is measured against."""
    assert isinstance(question.truth, Interval)
    return {"constant_error": measures.layer_error(constant(record, question).estimate, question.truth)}


def _of_sets(answer: Answer, question: Question, claims: bool) -> dict[str, float]:
    truth = question.truth
    assert isinstance(truth, frozenset)
    candidates = set(question.candidates) or set(answer.scores)
    out = {}
    if answer.scores:
        out["auroc"] = measures.auroc(answer.scores, truth, candidates)
        out["average_precision"] = measures.average_precision(answer.scores, truth, candidates)
    if not question.ranking_only and answer.chosen is not None:
        out |= {"f1": measures.f1(answer.claimed, truth), "jaccard": measures.jaccard(answer.claimed, truth)}
    if question.kind in SINGLE and claims:
        error = abs(layer_of(best_named(answer)) - layer_of(next(iter(truth))))
        out |= {"error": error, "within_1": float(error <= 1)}
    return out


def best_named(answer: Answer) -> str:
    """Return the candidate that is scored highest among those chosen, or among all where none is chosen."""
    among = answer.claimed or frozenset(answer.scores)
    return max(sorted(among), key=lambda name: answer.scores.get(name, -np.inf))


def layer_of(node: str) -> int:
    """Return the block of a node, `7.2` or `mlp.4`."""
    head, _, tail = node.partition(".")
    return int(tail if head in ("mlp", "attn") else head)


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the summary of rows, by `KEYS` in order of first appearance."""
    parts = [_summary(dict(zip(KEYS, key, strict=True)), group) for key, group in rows.groupby(KEYS, sort=False)]
    return pd.DataFrame(parts)


def _summary(keys: Mapping[str, Any], group: pd.DataFrame) -> dict[str, Any]:
    clusters = (group["family"] + "@" + group["seed"].astype(str)).to_numpy()
    out: dict[str, Any] = {
        **keys, "n": int((~group["nothing"].astype(bool)).sum()), "n_nothing": int(group["nothing"].astype(bool).sum()),
        "clusters": len(np.unique(clusters)), "median_error": group["error"].median(),
    }  # fmt: skip
    for name in AVERAGED:
        values = group[name].to_numpy(np.float64)
        known = np.isfinite(values)
        out |= cluster_bootstrap(values[known], clusters[known]).columns(name)
    out |= _skill(group, clusters)
    return out | {"seconds": group["seconds"].sum(), "forwards": int(group["forwards"].sum())}


def _skill(group: pd.DataFrame, clusters: np.ndarray) -> dict[str, float]:
    """Return 1 - error / error of the constant control on the questions that were answered, with its interval."""
    both = group[["error", "constant_error"]].to_numpy(np.float64)
    known = np.isfinite(both).all(1)
    if not known.any() or not both[known, 1].sum():
        return {"skill": nan, "skill_low": nan, "skill_high": nan}
    names, index = np.unique(clusters[known], return_inverse=True)
    sums = np.zeros((len(names), 2))
    np.add.at(sums, index, both[known])
    draws = 1 - resampled_ratios(sums[:, :1], sums[:, 1:], seed=0)[:, 0]
    low, high = percentiles(draws, len(names))
    return {"skill": 1 - sums[:, 0].sum() / sums[:, 1].sum(), "skill_low": float(low), "skill_high": float(high)}
