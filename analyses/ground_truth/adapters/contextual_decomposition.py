"""Contextual decomposition, and the methods it is compared with: which heads and MLPs take part in the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.contextual_decomposition import ContextualDecomposition
from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer
from analyses.results.card import Tables
from analyses.results.result import Result
from analyses.results.statistics import cluster_bootstrap
from probes.planted.record import Question
from probes.planted.task import Example, PlantedTask
from probes.prompts import Prompt

PROMPTS = 6
"""Prompts that are decomposed, the fewest that support an interval, to keep to the benchmark's time."""
COMPARED = {
    "cdt_paper": "cdt_paper", "attribution": "attribution_patching", "direct": "direct_attribution", "ablation": "mean_ablation",
    "relp": "relp", "lrp": "lrp", "relp_cp": "relp_cp", "lrp_cp": "lrp_cp",
}  # fmt: skip
"""Column of the table `heads`, and what answers by it are called."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run for all questions of the same prompts, of each prompt's answer against its partner's."""
    subsets = dict.fromkeys(question.subset for question in questions)
    analysis = ContextualDecomposition(search_steps=0, random_circuits=0, words="none", other_preset=True)
    return [
        Run(analysis, _prompts(task, subset), tuple(q for q in questions if q.subset == subset)) for subset in subsets
    ]


def _prompts(task: PlantedTask, subset: str | None) -> tuple[Prompt, ...]:
    """Return prompts of the commonest length, since each is compared to the mean of prompts of its own."""
    shown = examples_of(task, subset)
    (length, _), *_ = Counter(len(example.tokens) for example in shown).most_common(1)
    same = [example for example in shown if len(example.tokens) == length]
    n = min(PROMPTS, len(same))
    return tuple(_prompt(task, same[i * len(same) // n]) for i in range(n))


def _prompt(task: PlantedTask, example: Example) -> Prompt:
    other = [example.partner_answer] if 0 <= example.partner_answer != example.answer else []
    fields = {"answer_tokens": [example.answer]} | ({"distractor_tokens": other} if other else {})
    return prompt_to(task, example, None, **fields)


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Nodes whose interval over prompts leaves out zero."""
    answers = []
    for question in questions:
        mean, excludes = decomposed(result.tables["relevance"])
        answers.append(_answer("cdt", task, question, mean, excludes))
        for column, method in COMPARED.items():
            if column in result.tables["heads"]:
                answers.append(_answer(method, task, question, *compared(result.tables, column)))
    return answers


def _answer(
    method: str, task: PlantedTask, question: Question, scores: dict[str, float], clear: dict[str, bool]
) -> Answer:
    return set_answer(method, task, question, scores, frozenset(name for name, outside in clear.items() if outside))


def compared(tables: Tables, column: str) -> tuple[dict[str, float], dict[str, bool]]:
    """Per node that another method scores, the magnitude of its mean, and whether its interval over prompts leaves out zero."""
    heads, mlps = tables["heads"], tables["mlps"]
    parts = [heads.assign(node=heads["layer"].astype(str) + "." + heads["head"].astype(str))]
    if column in mlps:
        parts.append(mlps.assign(node="mlp." + mlps["layer"].astype(str)))
    table = pd.concat(parts)
    clear = (table[f"{column}_low"] > 0) | (table[f"{column}_high"] < 0)
    names = table["node"]
    return dict(zip(names, table[column].abs(), strict=True)), dict(zip(names, map(bool, clear), strict=True))


def decomposed(relevance: pd.DataFrame) -> tuple[dict[str, float], dict[str, bool]]:
    """Per node the magnitude of its mean relevance, and whether its interval over prompts leaves out zero."""
    whole = relevance[relevance["position"] < 0]
    names = np.where(whole["kind"] == "mlp", "mlp." + whole["layer"].astype(str), whole["source"])
    table = whole.assign(node=names).pivot_table(index="prompt", columns="node", values="score")
    interval = cluster_bootstrap(table.to_numpy(), np.arange(len(table)))
    clear = (interval.low > 0) | (interval.high < 0)
    nodes = [str(name) for name in table.columns]
    return dict(zip(nodes, np.abs(interval.mean), strict=True)), dict(zip(nodes, map(bool, clear), strict=True))


ADAPTER = Adapter("contextual_decomposition", ("cdt", *COMPARED.values()), ("nodes",), runs, read)
