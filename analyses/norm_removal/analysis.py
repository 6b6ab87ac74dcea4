"""Norm removal: what each norm's scale does, and a model trained to do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.interventions import Interventions
from analyses.norm_removal.diagnose import Settings, diagnose
from analyses.norm_removal.figures import FIGURES, PROFILES
from analyses.norm_removal.freezing import forwards, sweep
from analyses.norm_removal.measured import needs, switches_of
from analyses.norm_removal.removal import Plan, most_forwards, remove
from analyses.options import accept_old_names, option
from probes.blocks.rerouting import module_of
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PointError, PromptError
from probes.models.protocol import Model
from probes.norms import norms_of
from probes.progress import Progress
from probes.prompts import Prompt
from probes.store import ActivationStore


@accept_old_names
@dataclass(frozen=True)
class NormRemoval(Plan, Settings, Analysis):
    """What freezing each norm's scale does, without training; and with a schedule, the removal of all norms by fine-tuning.

    Baroni et al. 2025, arXiv 2507.02559; Heimersheim 2024, arXiv 2409.13710.
    """

    diagnose: bool = option(True, "Measure what the norms do: on the model and, after a schedule, on what was trained.")
    chat: bool = option(False, "Wrap each text as one user turn of the chat template.")

    name = "norm_removal"
    title = "Norm removal: what norms do, and a model without them"
    reference = 'Baroni et al. 2025, arXiv 2507.02559; Heimersheim 2024, "You can remove GPT2\'s LayerNorm by fine-tuning", arXiv 2409.13710'
    figures = FIGURES
    profiles = PROFILES

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.schedule) != bool(self.text):
            given, missing = ("schedule", "text") if self.schedule else ("text", "schedule")
            raise OptionError(f"option {given} is given without {missing}: a removal needs both, diagnostics neither")
        if self.export and not self.schedule:
            raise OptionError(
                "option export is given without schedule: only a model whose norms were removed is exported"
            )
        if self.export and (self._export_folder.is_file() or self._holds_other_things()):
            raise OptionError(
                f"export folder {self.export!r} holds something other than a model: give a new or empty folder"
            )
        if not self.schedule and not self.diagnose:
            raise OptionError(
                "option diagnose is false and there is no schedule, so there is nothing to do; give one of them"
            )

    @property
    def _export_folder(self) -> Path:
        return Path(self.export)

    def _holds_other_things(self) -> bool:
        folder = self._export_folder
        return folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()

    @property
    def makes_prompts(self) -> bool:
        """Whether diagnostics are off, so that the training text is all it reads."""
        return not self.diagnose

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the restarts under frozen norms, and with a schedule the sequences trained on and compared."""
        _check_model(model, bool(self.schedule))
        counts = most_forwards(model, self) if self.schedule else {}
        if self.diagnose and (switches := switches_of(model)) is not None:
            models = 2 if self.schedule else 1  # the model without norms has none to freeze
            frozen = sweep(switches, self.split_paths, self.swept(model.shape.n_layers))
            counts["frozen norms"] = models * forwards(switches, frozen, [len(prompt.tokens) for prompt in prompts])
        return Interventions(counts, exact=not self.schedule)

    def needs(self, model: Model) -> list[Need]:
        """Ask for streams, norm divisors and heads' outputs, and by option for patterns and the last MLP's activations."""
        if not self.diagnose:
            return []
        return needs(model, self.swept(model.shape.n_layers), self.sinks, self.neurons > 0)

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `scales`, `freeze_effect`, `freeze_together`, `stream`, `attribution_error`, `attribution_total`, `sinks`,
        `neurons`, and with a schedule `training`, `losses`, `divergence` and `export`.

        Raises:
            PointError: the model is not causal, has no norms, or normalises each sum.
            PromptError: no prompt has a next token, or the training text cannot be read.
            OptionError: a schedule that does not fit the model.
            TrainingError: the loss is no longer a number.
        """
        _check_model(model, bool(self.schedule))
        collected = as_prompts(prompts, model, self.prompt_fields, chat=self.chat)
        if self.diagnose and all(len(prompt.tokens) < 2 for prompt in collected):
            raise PromptError("no prompt has a second token, so there is no loss to measure; give longer prompts")
        models: dict[str, Model] = {"original": model}
        removal = remove(model, self, progress) if self.schedule else None
        if removal is not None:
            models |= removal.models
        tables, notes, activations, done = self._diagnosed(models, collected, store, progress)
        notes += _conventions(model) if self.diagnose else []
        if removal is not None:
            tables |= removal.tables
            notes += removal.notes
            done += sum(removal.forwards.values())
        return Measured(collected, tables, activations, notes, interventions=done)

    def _diagnosed(
        self, models: Mapping[str, Model], prompts: list[Prompt], store: ActivationStore, progress: Progress
    ) -> tuple[dict[str, pd.DataFrame], list[str], Activations | None, int]:
        by_name: dict[str, list[pd.DataFrame]] = {}
        notes: list[str] = []
        first, done = None, 0
        for variant, model in models.items() if self.diagnose else ():
            sequences = [prompt.tokens for prompt in prompts]
            activations = capture(model, sequences, self.needs(model), store, progress=progress)
            first = first or activations
            tables, more, forwards = diagnose(activations, variant, self, progress)
            notes, done = notes + more, done + forwards
            for name, table in tables.items():
                by_name.setdefault(name, []).append(table)
        return {name: pd.concat(tables, ignore_index=True) for name, tables in by_name.items()}, notes, first, done


def _conventions(model: Model) -> list[str]:
    notes = [
        "attribution and direct effect are of the next token's logit; a head's output is its values' mix through its output "
        "weights, so it includes the value bias where there is one and never the output projection's bias"
    ]
    if model.unembedding().softcap is not None:
        notes.append("attribution and direct effect are of the logit before the softcap")
    return notes


def _check_model(model: Model, trained: bool) -> None:
    if not model.shape.causal:
        raise PointError(
            f"{model.ref} reads both ways, so it has no next-token loss; norm_removal needs a causal model"
        )
    model.unembedding()
    if trained:
        with module_of(model) as (_, anatomy):
            norms_of(anatomy)
