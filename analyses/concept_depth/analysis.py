"""Concept depth: from which layer on a linear probe can tell the two classes of a concept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import pandas as pd

from analyses.base import Analysis, Clock, PromptsLike, as_prompts, make_result
from analyses.concept_depth.causal import Check, causal_table
from analyses.concept_depth.datasets import SETS, get_set, load_set
from analyses.concept_depth.figures import FIGURES
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
from analyses.concept_depth.profiles import PROFILES
from analyses.concept_depth.prompts import FIELDS, LabelledSet, labelled_sets, noisy
from analyses.options import option, validate
from analyses.result import FigureSpec, ProfileSpec, Result
from probes.activations import Activations
from probes.capture import capture
from probes.errors import OptionError, PromptError
from probes.linear import Kind
from probes.models.base import Model
from probes.models.quantised import fake_quantised
from probes.needs import Need, Reducer
from probes.progress import QUIET, Progress
from probes.prompts import Field, Prompt, tokenize
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
    causal_layers: int = option(
        4, "Layers at which the probe's direction is projected out; 0 leaves the check out.", low=0
    )
    causal_prompts: int = option(32, "Test prompts of each set in that check.", low=2)
    chat: bool = option(False, "Wrap each text as one user turn of the chat template.")
    jobs: int = option(0, "Layers fitted at a time; 0 is one per processor.", low=0)
    seed: int = option(0, "Seed of data, splits, controls, noise and intervals.", low=0)

    name: ClassVar[str] = "concept_depth"
    title: ClassVar[str] = "Concept depth: linear probes along the layers"
    reference: ClassVar[str] = 'Jin et al. 2024, "Exploring Concept Depth", arXiv 2404.07066'
    prompt_fields: ClassVar[Mapping[str, Field]] = FIELDS
    figures: ClassVar[Mapping[str, FigureSpec]] = FIGURES
    profiles: ClassVar[Mapping[str, ProfileSpec]] = PROFILES

    def __post_init__(self) -> None:
        validate(self)
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

    @property
    def intervenes(self) -> bool:
        """With a causal check."""
        return self.causal_layers > 0

    def needs(self, model: Model) -> list[Need]:
        """One row of every layer."""
        return [Need(f"{self.representation}.*", self._reducer)]

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

    def run(
        self, model: Model, prompts: PromptsLike, *, store: ActivationStore | None = None, progress: Progress = QUIET
    ) -> Result:
        """Tables `scores` and `depths` by data set, variant and probe; `sets`; and `causal` where it was asked for.

        Prompts carry `label` (0 or 1), and may carry `group`, `dataset`, `template` and `answers` (of label 0 and 1).
        """
        clock, store = Clock(), store or ActivationStore()
        asked = self.collect(model, prompts)
        probed: list[Probed] = []
        counts: dict[str, int] = {}
        _, plain = self._capture(model, "plain", asked, store, progress)
        for variant in dict.fromkeys(self.variants):
            seen, rows = (asked, plain) if variant == "plain" else self._capture(model, variant, asked, store, progress)
            probed += self._probe(rows, labelled_sets(seen), variant, progress)
            counts |= {} if variant == "plain" else {f"forwards_{variant}": rows.done.forwards}
        sets = labelled_sets(asked)
        tables = {
            "scores": scores_table(probed, self.seed),
            "depths": depths_table(probed, self.seed),
            "sets": _sets_table(sets),
        }
        if self.causal_layers and "lens" not in model.faithfulness.refused:
            tables["causal"], counts["forwards_causal"] = self._causal(plain, probed, store, progress)
        return make_result(self, model, asked, tables, plain, clock, self._notes(model, tables), counts)

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
        probed = []
        for data in sets:
            for kind in dict.fromkeys(self.probes):
                recipe = recipe_of(self.preset, kind, self.splits, self.seed)
                probed.append(
                    probe_set(activations, data, variant, recipe, self.representation, self._reducer, self.jobs)
                )
                progress.advance()
        return probed

    def _causal(
        self, activations: Activations, probed: Sequence[Probed], store: ActivationStore, progress: Progress
    ) -> tuple[pd.DataFrame, int]:
        tables, forwards = [], 0
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
            table, ran = causal_table(check, rows_of, progress)
            tables.append(table)
            forwards += ran
        return pd.concat(tables, ignore_index=True), forwards

    def _notes(self, model: Model, tables: Mapping[str, pd.DataFrame]) -> tuple[str, ...]:
        scores, depths = tables["scores"], tables["depths"]
        notes = [
            "Probe accuracy says that a concept can be read from a layer, not that the model uses it; the causal check speaks to use."
        ]
        blind = depths[~depths["decodable"]]
        if len(blind):
            names = ", ".join(f"{row.dataset} ({row.variant}, {row.probe})" for row in blind.itertuples())
            notes.append(
                f"Not decodable anywhere (the best layer does not pass the best control layer): {names}; its depths mean nothing."
            )
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
                "example": str(data.prompts[0].text),
                "level": known.level if known else "",
                "label_0": known.labels[0] if known else "",
                "label_1": known.labels[1] if known else "",
                "source": known.source if known else "given prompts",
            }
        )
    return pd.DataFrame(rows)
