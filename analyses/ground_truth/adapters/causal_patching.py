"""Causal patching: where the stream is necessary and sufficient, which heads and MLPs take part, what writes, what moves."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.causal_patching import CausalPatching
from analyses.causal_patching.cells import Component
from analyses.causal_patching.statistics import FOUND_SHARE
from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer
from analyses.ground_truth.spans import HALF, span_answer
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import Example, PlantedTask
from probes.prompts import Prompt

METHOD = "causal_patching"
PAIRS = 6
"""Pairs of a prompt and its partner, the fewest that support an interval, to keep to the benchmark's time."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a subset, at the positions that the task names; at all of them where it names none."""
    out = []
    for subset in dict.fromkeys(question.subset for question in questions):
        own = tuple(question for question in questions if question.subset == subset)
        kinds = {question.kind for question in own}
        streams: tuple[Component, ...] = ("resid_pre", "resid_post") if kinds & {"necessary", "sufficient"} else ()
        parts: tuple[Component, ...] = ("z", "mlp_out") if kinds - {"necessary", "sufficient"} else ()
        examples = [example for example in examples_of(task, subset, PAIRS) if example.partner]
        prompts = tuple(_prompt(task, example) for example in examples)
        roles = tuple(examples[0].positions or task.record.positions) if examples else ()
        # The answer's probability, since the logits of two wrong answers say nothing of the right one.
        analysis = CausalPatching(
            metric=("prob",),
            components=(*streams, *parts),
            roles=roles,
            heads="by_position" if roles else "all_positions",
            nulls="none",
        )
        out.append(Run(analysis, prompts, own))
    return out


def _prompt(task: PlantedTask, example: Example) -> Prompt:
    names = example.positions or task.record.positions
    return prompt_to(
        task,
        example,
        None,
        corrupted_tokens=list(example.partner),
        answer_tokens=[example.answer],
        distractor_tokens=[example.partner_answer],
        named_positions={name: task.position(example, name) for name in names},
    )


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Layers at which half of the gap is moved, and nodes that move a share of it whose interval leaves out zero."""
    cells, table = result.tables["cells"], result.tables["map"]
    answers = []
    for question in questions:
        if question.kind in ("necessary", "sufficient"):
            answers.append(_window(cells, task, question))
        elif question.kind == "nodes":
            answers.append(_nodes(table, task, question))
        else:
            answers.append(_first(table, task, question))
    return answers


def _window(cells: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Return the layers from the embedding on at which noising destroys, or denoising restores, half of the gap."""
    direction = "noise" if question.kind == "necessary" else "denoise"
    own = cells[(cells["source"] == "pair") & (cells["direction"] == direction) & (cells["role"] == question.position)]
    # What enters block l is at layer l - 1, and what leaves the last block at the last layer.
    last = own["layer"].max()
    streams = pd.concat([
        own[own["component"] == "resid_pre"].assign(at=lambda rows: rows["layer"] - 1),
        own[(own["component"] == "resid_post") & (own["layer"] == last)].assign(at=last),
    ])  # fmt: skip
    effects = streams.pivot_table("recovery", "pair", "at").sort_index(axis=1)
    return span_answer(METHOD, task, question, effects.to_numpy(dtype=float), first_layer=-1)


def _nodes(table: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Return every node by the largest share it moves at any position in either direction, and those that act at one."""
    nodes = _named(table)
    scores = nodes["recovery"].abs().groupby(nodes["node"]).max()
    return _answer(task, question, scores, frozenset(nodes["node"][nodes["acts"]]))


def _first(table: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Return the first part that brings half of the gap where the concept is written, or moved to.

    What acts there later passes on what is there already, so it is scored below everything before.
    """
    role, heads_only = (question.to, True) if question.kind == "moved" else (question.position, False)
    nodes = _named(table)
    nodes = nodes[(nodes["role"] == role) & (nodes["direction"] == "denoise")]
    nodes = nodes[nodes["head"] >= 0] if heads_only else nodes
    bring = nodes[nodes["acts"] & (nodes["recovery"] >= HALF)]
    if bring.empty:
        return _answer(task, question, nodes.set_index("node")["recovery"], frozenset())
    # Within a block heads come before the MLP.
    order = bring["layer"] * 2 + (bring["component"] == "mlp_out")
    first = order.min()
    chosen = bring.loc[bring.loc[order == first, "recovery"].idxmax()]
    later = nodes["layer"] * 2 + (nodes["component"] == "mlp_out") > first
    scores = nodes["recovery"].where(~later, nodes["recovery"].clip(upper=0))
    return _answer(task, question, scores.set_axis(nodes["node"]), frozenset({str(chosen["node"])}))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of heads and MLPs with the node that each is, and whether it acts: as the method counts, without its null."""
    nodes = table[table["component"].isin(("z", "mlp_out"))]
    heads = nodes["layer"].astype(str) + "." + nodes["head"].astype(str)
    clear = (nodes["ci_low"] > 0) | (nodes["ci_high"] < 0)
    return nodes.assign(
        node=heads.where(nodes["component"] == "z", "mlp." + nodes["layer"].astype(str)),
        acts=clear & (nodes["recovery"].abs() >= FOUND_SHARE),
    )


def _answer(task: PlantedTask, question: Question, scores: pd.Series, chosen: frozenset[str]) -> Answer:
    named = {str(node): float(score) for node, score in scores.items() if node in question.candidates}
    return set_answer(METHOD, task, question, named, chosen & set(question.candidates))


ADAPTER = Adapter(
    METHOD, (METHOD,), ("necessary", "sufficient", "written", "moved", "nodes"), runs, read,
    # Everything at a position is exchanged, so that nothing is said of one concept's window.
    only=lambda question: question.kind not in ("necessary", "sufficient") or question.concept is None,
)  # fmt: skip
