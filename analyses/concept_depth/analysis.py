"""Concept depth: from which layer on a linear probe can tell the two classes of a concept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.concept_depth.causal import Causal, Check, causal_table
from analyses.concept_depth.datasets import SETS, get_set, load_set
from analyses.concept_depth.figures import FIGURES, PROFILES
from analyses.concept_depth.labelled_prompts import FIELDS, LabelledSet, labelled_sets, noisy
from analyses.concept_depth.probing import (
    Preset,
    Probed,
    Variant,
    depths_table,
    layer_rows,
    probe_set,
    recipe_of,
    scores_table,
)
from analyses.interventions import Interventions, swept
from analyses.options import option
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PromptError
from probes.linear.probing import Kind
from probes.models.protocol import Model
from probes.models.rounded_weights import fake_quantised
from probes.progress import Progress
from probes.prompts import Prompt, tokenize
from probes.reducers import Reducer
from probes.store import ActivationStore


@dataclass(frozen=True)
class ConceptDepth(Analysis):
    """Accuracy of linear probes along depth (Jin et al. 2024, "Exploring Concept Depth", arXiv 2404.07066)."""

    sets: tuple[str, ...] = option(
        (),
        "Data sets to probe beside the labelled prompts: city_country, capital_negation, number_comparison, coin_flip, sentiment.",
    )
    data: str = option("", "Folder or file of the published data sets among them, paper_cities and eight others.")
    limit: int = option(0, "At most so many rows of each named set, whole groups; 0 takes all.", low=0)
    template: str = option("", "Replaces the template of the named sets; holds {text}.")
    representation: Literal["mlp_in", "resid_mid", "resid_post"] = option(
        "resid_post", "What is probed; mlp_in is what the released code reads."
    )
    pooling: Literal["last", "mean", "position"] = option(
        "last", "Which row of a prompt: the last, the mean, or --position."
    )
    position: int = option(-1, "The chosen token for pooling position, negative from the end.")
    preset: Preset = option(
        "sound",
        "sound: standardised, C chosen on validation, groups kept whole; released: no scaling, C = 1, 60/40 over rows, seed 42.",
    )
    probes: tuple[Kind, ...] = option(("logistic",), "Kinds of probe.")
    splits: int = option(3, "Splits of the sound preset, over which scores are averaged.", low=1, high=50)
    variants: tuple[Variant, ...] = option(
        ("plain",),
        "The model as it is, with text noise in front of each example, or with block weights rounded to 8 or 4 bits.",
    )
    layers: tuple[int, ...] = option((), "Layers to probe; all where none is named.", low=0)
    stride: int = option(1, "Every how many layers one is probed, where no layers are named.", low=1)
    causal_layers: int = option(
        4, "Layers at which the probe's direction is projected out; 0 leaves the check out.", low=0
    )
    causal_prompts: int = option(32, "Test prompts of each set in that check.", low=2)
    chat: bool = option(False, "Wrap each text as one user turn of the chat template.")
    jobs: int = option(0, "Layers fitted at a time; 0 is one per processor.", low=0)
    seed: int = option(0, "Seed of data, splits, controls, noise and intervals.", low=0)

    name = "concept_depth"
    title = "Concept depth: linear probes along the layers"
    reference = 'Jin et al. 2024, "Exploring Concept Depth", arXiv 2404.07066'
    prompt_fields = FIELDS
    figures = FIGURES
    profiles = PROFILES

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sets:
            get_set(name)
        if self.template and "{text}" not in self.template:
            raise OptionError(f"template {self.template!r} does not hold {{text}}, where each example goes")
        if "plain" not in self.variants:
            raise OptionError(f"variants {', '.join(self.variants)} need plain beside them: they are compared with it")

    @property
    def _reducer(self) -> Reducer:
        if self.pooling == "mean":
            return Reducer("mean")
        return Reducer(positions="last" if self.pooling == "last" else (self.position,))

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """At most those of the causal check, and of the variants beside the plain model."""
        forwards = {f"forwards of {variant}": len(prompts) for variant in self.variants if variant != "plain"}
        if self.causal_layers and "lens" not in model.faithfulness.refused:
            layers = min(self.causal_layers + 1, len(self._swept(model)))
            tested = 2 * max(1, self.causal_prompts // 2)
            forwards["directions removed"] = sum(
                2 * layers * min(tested, len(data.prompts)) for data in labelled_sets(prompts)
            )
        return Interventions(forwards, exact=not forwards)

    def _swept(self, model: Model) -> list[int]:
        return swept(model.shape.n_layers, self.layers, self.stride)

    def needs(self, model: Model) -> list[Need]:
        """One row of every layer that is probed."""
        return [Need(tuple(f"{self.representation}.{layer}" for layer in self._swept(model)), self._reducer)]

    @property
    def makes_prompts(self) -> bool:
        """With data sets named in `sets`."""
        return bool(self.sets)

    def collect(self, model: Model, prompts: PromptsLike) -> list[Prompt]:
        """The labelled prompts and those of the named sets; unlabelled prompts count only where no set is named.

        Raises:
            PromptError: a prompt without label, or a position outside one.
        """
        given = as_prompts(prompts, model, self.prompt_fields, chat=self.chat)
        if self.sets:
            given = [prompt for prompt in given if "label" in prompt.fields]
        for name in self.sets:
            lines = load_set(
                name, path=self.data or None, limit=self.limit, template=self.template or None, seed=self.seed
            )
            given += tokenize(lines, model, chat=self.chat)
        labelled_sets(given)
        for i, prompt in enumerate(given if self.pooling == "position" else ()):
            if not -len(prompt.tokens) <= self.position < len(prompt.tokens):
                raise PromptError(f"prompt {i} has {len(prompt.tokens)} tokens, so no position {self.position}")
        return given

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Tables `scores` and `depths` by data set, variant and probe; `sets`; and `causal` where it was asked for.

        Prompts carry `label` (0 or 1), and may carry `group`, `dataset`, `template` and `answers` (of label 0 and 1).
        """
        lines = self.collect(model, prompts)
        probed: list[Probed] = []
        counts: dict[str, int] = {}
        _, plain = self._capture(model, "plain", lines, store, progress)
        for variant in dict.fromkeys(self.variants):
            seen, rows = (lines, plain) if variant == "plain" else self._capture(model, variant, lines, store, progress)
            probed += self._probe(rows, labelled_sets(seen), variant, progress)
            counts |= {} if variant == "plain" else {f"forwards_{variant}": rows.done.forwards}
        sets = labelled_sets(lines)
        tables = {
            "scores": scores_table(probed, self.seed),
            "depths": depths_table(probed, self.seed),
            "sets": _sets_table(sets),
        }
        notes, edited = list(self._notes(model, tables)), sum(counts.values())
        if self.causal_layers and "lens" not in model.faithfulness.refused:
            checks = self._causal(plain, probed, store, progress)
            tables["causal"] = pd.concat([check.table for check in checks], ignore_index=True)
            counts["forwards_causal"] = sum(check.forwards for check in checks)
            edited += sum(check.edited for check in checks)
            notes += [check.note for check in checks if check.note]
        return Measured(lines, tables, plain, notes, counts, interventions=edited)

    def _capture(
        self, model: Model, variant: Variant, prompts: list[Prompt], store: ActivationStore, progress: Progress
    ) -> tuple[list[Prompt], Activations]:
        if variant == "text_noise":
            prompts = noisy(prompts, model, self.seed, self.chat)
        reader = fake_quantised(model, int(variant.removeprefix("int"))) if variant.startswith("int") else model
        sequences = [prompt.tokens for prompt in prompts]
        return prompts, capture(reader, sequences, self.needs(reader), store, progress=progress)

    def _probe(
        self, activations: Activations, sets: Sequence[LabelledSet], variant: Variant, progress: Progress
    ) -> list[Probed]:
        progress.start(len(sets) * len(self.probes), "data set probed")
        probed, numbers = [], self._swept(activations.model)
        for data in sets:
            for kind in dict.fromkeys(self.probes):
                recipe = recipe_of(self.preset, kind, self.splits, self.seed)
                probed.append(
                    probe_set(
                        activations, data, variant, recipe, self.representation, self._reducer, self.jobs, numbers
                    )
                )
                progress.advance()
        return probed

    def _causal(
        self, activations: Activations, probed: Sequence[Probed], store: ActivationStore, progress: Progress
    ) -> list[Causal]:
        checks = []
        where = {"last": "last", "mean": "all", "position": (self.position,)}[self.pooling]
        for one in probed:
            if (one.variant, one.kind) != ("plain", self.probes[0]):
                continue
            check = Check(
                activations.model,
                store,
                one,
                self.representation,
                where,
                self.causal_prompts,
                self.causal_layers,
                self.seed,
            )
            rows_of = partial(layer_rows, activations, one.data, self.representation, self._reducer)
            checks.append(causal_table(check, rows_of, progress))
        return checks

    def _notes(self, model: Model, tables: Mapping[str, pd.DataFrame]) -> tuple[str, ...]:
        scores, depths = tables["scores"], tables["depths"]
        notes = [
            "Probe accuracy says that a concept can be read from a layer, not that the model uses it; the causal check speaks to use."
        ]
        few = depths["peak_accuracy_low"].isna()
        if few.any():
            notes.append(
                f"Too few test groups for an interval: {_named(depths[few])}; whether it is decodable cannot be said."
            )
        blind = depths[~depths["decodable"] & ~few]
        if len(blind):
            notes.append(
                f"Not shown to be decodable anywhere (the interval of what the best layer has over the best control layer reaches zero): "
                f"{_named(blind)}; its depths mean nothing."
            )
        notes += _control_notes(tables["sets"])
        early = int((~scores["converged"]).sum())
        if early:
            notes.append(
                f"{early} of {len(scores)} rows rest on fits that stopped at the iteration limit, as the released procedure does."
            )
        if self.preset == "released" and self.representation != "mlp_in":
            notes.append("The released code reads mlp_in; this run reads another representation.")
        if self.causal_layers and "lens" in model.faithfulness.refused:
            notes.append(f"No causal check: {model.faithfulness.refused['lens']}")
        return tuple(notes)


def _named(depths: pd.DataFrame) -> str:
    return ", ".join(f"{row.dataset} ({row.variant}, {row.probe})" for row in depths.itertuples())


def _control_notes(sets: pd.DataFrame) -> list[str]:
    """What the control task of each data set deals its labels to."""
    notes = []
    for row in sets.to_dict("records"):
        if np.isnan(row["control_position"]):
            notes.append(
                f"{row['dataset']}: no control task, since too few token types occur in several groups; selectivity is left open."
            )
        else:
            notes.append(
                f"{row['dataset']}: the control task deals one random label to each of {row['control_types']} token types at position "
                f"{row['control_position']:.0f} of the prompts, which recur between groups."
            )
    return notes


def _sets_table(sets: Sequence[LabelledSet]) -> pd.DataFrame:
    registered = {entry.name: entry for entry in SETS}
    rows = []
    for data in sets:
        known = registered.get(data.name) if "template" in data.prompts[0].fields else None
        rows.append(
            {
                "dataset": data.name,
                "template": data.template,
                "n": len(data.prompts),
                "n_label_1": sum(data.labels),
                "n_groups": len(set(data.groups)),
                "control_position": float(data.types.position) if data.types else np.nan,
                "control_types": data.types.n if data.types else 0,
                "example": str(data.prompts[0].text),
                "level": known.level if known else "",
                "label_0": known.labels[0] if known else "",
                "label_1": known.labels[1] if known else "",
                "source": known.source if known else "given prompts",
            }
        )
    return pd.DataFrame(rows)
