"""Contextual decomposition, and the methods it is compared with: which heads and MLPs take part in the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.contextual_decomposition import ContextualDecomposition
from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer
from analyses.results.result import Result
from analyses.results.statistics import cluster_bootstrap
from probes.planted.record import Question
from probes.planted.task import PlantedTask

PROMPTS = 12
"""Prompts that are decomposed; as many as the analysis takes by default of a generated task."""
COMPARED = {"attribution": "attribution_patching", "direct": "direct_attribution", "ablation": "mean_ablation"}
"""Column of the table `heads`, and what answers by it are called."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run for all questions of the whole prompt's answer against its partner's."""
    if not questions:
        return []
    prompts = []
    for example in examples_of(task, None, PROMPTS):
        other = [example.partner_answer] if 0 <= example.partner_answer != example.answer else []
        fields = {"answer_tokens": [example.answer]} | ({"distractor_tokens": other} if other else {})
        prompts.append(prompt_to(task, example, None, **fields))
    analysis = ContextualDecomposition(search_steps=0, random_circuits=0, words="none")
    return [Run(analysis, tuple(prompts), tuple(questions))]


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Nodes whose interval over prompts leaves out zero; methods without intervals only rank heads."""
    answers = []
    for question in questions:
        mean, excludes = decomposed(result.tables["relevance"])
        chosen = frozenset(name for name, clear in excludes.items() if clear)
        answers.append(set_answer("cdt", task, question, mean, chosen))
    return answers


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
