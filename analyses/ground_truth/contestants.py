"""Who takes part: the analyses by their adapters, the ceiling and the controls; one task through all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from analyses.ground_truth import controls
from analyses.ground_truth.answers import Answer, name_of, with_cost
from probes.errors import OptionError, UserError, unknown

if TYPE_CHECKING:
    # Who only names contestants, or scores their answers, waits for no torch.
    from analyses.ground_truth.adapters.adapter import Adapter, Run
    from analyses.results.result import Result
    from probes.models.protocol import Model
    from probes.planted.record import Question
    from probes.planted.task import PlantedTask
    from probes.store import ActivationStore

ADAPTED = (
    "concept_depth", "logit_lens", "lenses", "latent_language", "back_patching", "layer_programs", "voids", "depth_use", "causal_patching",
    "contextual_decomposition", "communication_channels", "norm_removal", "passage_use",
)  # fmt: skip
"""Analyses that take part; each has a file of its name among the adapters."""
CONTROLS = "controls"


def names() -> tuple[str, ...]:
    """Return what can be named to take part: analyses, the ceiling and the controls."""
    return (*ADAPTED, controls.CEILING, CONTROLS)


def runs_of(analysis: str, task: PlantedTask) -> list[Run]:
    """Return the runs by which an analysis answers a task; their prompts are what it is shown.

    Raises:
        OptionError: an analysis that has no adapter.
    """
    adapter = adapter_of(analysis)
    return adapter.runs(task, adapter.questions(task))


def answers_of(result: Result, task: PlantedTask, questions: Sequence[Question] | None = None) -> list[Answer]:
    """Return the answers in a result of one of the runs of `runs_of`.

    Args:
        questions: those that the run was for; all that the analysis answers where it needs one run for all.

    Raises:
        OptionError: an analysis that has no adapter.
    """
    adapter = adapter_of(result.analysis)
    answers = adapter.read(result, task, adapter.questions(task) if questions is None else questions)
    return with_cost(answers, *_cost(result))


def adapter_of(analysis: str) -> Adapter:
    """Return how an analysis takes part.

    Raises:
        OptionError: an analysis that has no adapter.
    """
    if analysis not in ADAPTED:
        raise OptionError(unknown("analysis with an adapter", analysis, ADAPTED))
    adapter: Adapter = import_module(f"analyses.ground_truth.adapters.{analysis}").ADAPTER
    return adapter


def _cost(result: Result) -> tuple[float, int]:
    """Return seconds and forwards of a run, edited ones among them."""
    counts = result.provenance["counts"]
    return float(result.provenance["seconds"]), int(counts["forwards"]) + int(counts["intervention_forwards"])


def answer_task(
    task: PlantedTask,
    model: Model,
    store: ActivationStore,
    methods: Sequence[str] = (),
    note: Callable[[str], object] = str,
) -> list[Answer]:
    """Return every contestant's answers to the questions of a task.

    A run that is refused counts as declined, with the reason.

    Args:
        methods: names of `names`; all where none is named.
        note: receives a line for each run that is refused.

    Raises:
        OptionError: a contestant that does not exist.
    """
    if wrong := set(methods) - set(names()):
        raise OptionError(unknown("method", min(wrong), names()))
    chosen = methods or names()
    answers: list[Answer] = []
    for analysis in (name for name in ADAPTED if name in chosen):
        for run in runs_of(analysis, task):
            answers += _run(adapter_of(analysis), run, task, model, store, note)
    if controls.CEILING in chosen:
        answers += _ceiling(task, model)
    if CONTROLS in chosen:
        answers += control_answers(task, model)
    return answers


def _run(
    adapter: Adapter, run: Run, task: PlantedTask, model: Model, store: ActivationStore, note: Callable[[str], object]
) -> list[Answer]:
    try:
        result = run.analysis.run(model, list(run.prompts), store=store)
    except UserError as error:
        note(f"{task.ref} {adapter.analysis}: {error}")
        methods = (run.method,) if run.method else adapter.methods
        return [
            Answer(method, name_of(task.record), question.key, "declined", reason=str(error))
            for method in methods
            for question in run.questions
        ]
    return answers_of(result, task, run.questions)


def _ceiling(task: PlantedTask, model: Model) -> list[Answer]:
    from analyses.ground_truth.interchange import KINDS, PROMPTS, interchange

    # The whole stream is exchanged, so that nothing is said of one concept in it.
    questions = [question for question in task.record.questions if question.kind in KINDS and question.concept is None]
    started = time.perf_counter()
    answers = interchange(model, task, questions)
    forwards = PROMPTS * (model.shape.n_layers + 1) * len(answers)
    return with_cost(answers, time.perf_counter() - started, forwards)


def control_answers(task: PlantedTask, model: Model) -> list[Answer]:
    """Return what the controls answer to every question of a task."""
    plain = (controls.constant, controls.uniform, controls.always, controls.oracle)
    answers = [control(task.record, question) for control in plain for question in task.record.questions]
    ranked = [question for question in task.record.questions if question.kind in ("nodes", "written", "moved")]
    if ranked:
        from analyses.ground_truth.updates import update_sizes

        sizes = update_sizes(model, task)
        answers += [controls.largest_update(task.record, question, sizes) for question in ranked]
    return answers
