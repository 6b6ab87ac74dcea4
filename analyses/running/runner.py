"""From a model's spec, an analysis and prompts to a result: what every front end calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analyses.base import Analysis
from analyses.results.result import Result
from analyses.running.makes_prompts import check_makes_prompts
from analyses.running.model_spec import ModelSpec
from probes.capture.dry_run import estimate
from probes.capture.needs import CapturePlan, Need
from probes.capture.run import plan_capture
from probes.edits import EditedModel, check_edits, parse_edits
from probes.html_card import count
from probes.models.protocol import Model
from probes.progress import QUIET, Progress
from probes.prompts import PromptLine, check_fields, read_prompts
from probes.store import ActivationStore

Prompts = Path | Sequence[PromptLine] | None
"""A prompt file, lines that were read already, or None where the analysis makes its own."""


def run(
    spec: ModelSpec,
    analysis: Analysis,
    prompts: Prompts,
    store: ActivationStore | None = None,
    *,
    model: Model | None = None,
    prompts_file: Path | None = None,
    texts: Sequence[str] = (),
    edits: Sequence[str] = (),
    progress: Progress = QUIET,
) -> Result:
    """Return the result of an analysis on prompts; everything that needs no model is checked before one is loaded.

    Args:
        store: where rows are kept; the one in the user cache by default.
        model: the loaded model of `spec`, where there is one already.
        prompts_file: where `prompts` were read from, for the provenance of lines given as such.
        texts: the prompts as texts, for the provenance of those that no file holds.
        edits: lines such as `zero z.5.3`, under which the model is read; its rows have a key of their own.

    Raises:
        OptionError: no prompts, and the analysis makes none.
        PromptError: a fault in the prompt file, with its line.
        ModelError: a model that cannot be found, loaded or trusted.
    """
    lines = lines_of(analysis, prompts)
    check_edits(edits)
    result = analysis.run(
        edited(model or spec.load(deferred=True), edits), lines, store=store or ActivationStore(), progress=progress
    )
    file = prompts if isinstance(prompts, Path) else prompts_file
    provenance = {
        **result.provenance,
        "loaded": dataclasses.asdict(spec),
        "prompts_file": None if file is None else str(file.resolve()),
        **({"texts": list(texts)} if texts else {}),
    }
    return dataclasses.replace(result, provenance=provenance)


def edited(model: Model, lines: Sequence[str]) -> Model:
    """Return the model under edits, each a line; the model itself where there are none.

    Raises:
        UserError: a line that is no edit, or one that this model cannot have.
    """
    return (
        EditedModel(model, [edit for line in lines for edit in parse_edits(line, model.shape.n_layers)])
        if lines
        else model
    )


@dataclass(frozen=True)
class Planned:
    """What an analysis reads of its prompts, the captures that the store lacks, and what comes on top of these."""

    sequences: tuple[tuple[int, ...], ...]
    needs: tuple[Need, ...]
    captures: CapturePlan
    notes: tuple[str, ...]


def plan_run(model: Model, analysis: Analysis, lines: Sequence[PromptLine], store: ActivationStore) -> Planned:
    """Return what a run on these lines would do, without doing it; raises as `run` does."""
    prompts, needs = analysis.collect(model, lines), tuple(analysis.needs(model))
    sequences = tuple(prompt.tokens for prompt in prompts)
    notes = []
    if not needs:
        notes.append("and nothing is read from the activation store or added to it")
    if analysis.max_new_tokens:
        tokens, each = count(analysis.max_new_tokens, "new token"), count(len(prompts), "prompt")
        notes.append(f"and up to {tokens} for each of {each}")
    if line := analysis.interventions(model, prompts).line():
        notes.append(line)
    return Planned(sequences, needs, plan_capture(model, sequences, needs, store), tuple(notes))


def dry_run(
    spec: ModelSpec,
    analysis: Analysis,
    prompts: Prompts,
    store: ActivationStore,
    *,
    model: Model | None = None,
    edits: Sequence[str] = (),
) -> list[str]:
    """Return what a run would capture and cost, line by line; raises as `run` does."""
    lines = lines_of(analysis, prompts)
    check_edits(edits)
    model = edited(model or spec.load(deferred=True), edits)
    planned = plan_run(model, analysis, lines, store)
    return [*estimate(model, [planned.captures]).lines(), *planned.notes]


def lines_of(analysis: Analysis, prompts: Prompts) -> list[PromptLine]:
    """Return the validated lines of a prompt file, or none where the analysis makes its own.

    Raises:
        OptionError: it makes none, and no file was given.
        PromptError: a fault in the file.
    """
    if isinstance(prompts, Path):
        return read_prompts(prompts, analysis.prompt_fields)
    if prompts:
        for line in prompts:
            check_fields(line.fields, line.where, analysis.prompt_fields)
        return list(prompts)
    check_makes_prompts(analysis)
    return []
