"""Lenses side by side: read-outs of given prompts, quality on held-out text with controls, and known intermediates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.interventions import Interventions
from analyses.lenses.band import band_table
from analyses.lenses.figures import FIGURES, PROFILES
from analyses.lenses.items import FIELDS, Watched, two_hop_prompts, watched_of
from analyses.lenses.patched import CONTROLS, Kind, lift_table, patchscopes_of, target_of, text_table
from analyses.lenses.read_tables import cards_table, read_of
from analyses.lenses.similarity import similarity
from analyses.lenses.watched import pass_at_k, watched_tables
from analyses.options import option
from analyses.reading.choice import chosen_lens
from analyses.reading.quality import Quality, judged_rows, quality_rows, read_texts, solid_layers
from analyses.reading.texts import Texts, file_texts, shipped_texts, without
from analyses.reading.tuned import fit_tuned_on
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PromptError
from probes.html_card import count
from probes.lens_fits.patchscope import Patchscope
from probes.lenses.jacobian import JacobianLens
from probes.lenses.names import LENS_HELP
from probes.lenses.protocol import Lens
from probes.models.protocol import Model
from probes.progress import Progress
from probes.prompts import Prompt
from probes.reducers import ROWS
from probes.store import ActivationStore

NEED = Need(("resid_post.*", "embed"), ROWS)


@dataclass(frozen=True)
class Lenses(Analysis):
    """Logit, tuned, Jacobian and Patchscope readings of the same rows (Belrose et al. 2023; Gurnee et al. 2026; Ghandeharioun et al. 2024)."""

    lenses: tuple[str, ...] = option(
        ("logit", "tuned"),
        f"What to compare: tuned (fitted here from stored rows), patchscope, {LENS_HELP}",
        lenses=("tuned", "patchscope"),
    )
    task: Literal["prompts", "two_hop"] = option(
        "prompts", "prompts: the prompt file's; two_hop: generated questions whose intermediate country is watched for."
    )
    n_prompts: int = option(40, "two_hop: how many questions.", low=2)
    layers: tuple[int, ...] = option((), "Layers to read, besides the last; all where none is named.", low=0)
    positions: Literal["last", "all"] = option("all", "Which positions of each prompt to read.")
    top_k: int = option(5, "How many of the most probable tokens to list.", low=1, high=100)
    ks: tuple[int, ...] = option((1, 10), "Watched tokens count as read among the first k.", low=1)
    fit_on: Literal["shipped", "prompts"] = option(
        "shipped", "What tuned is fitted on: shipped sentences, or the prompts themselves, each a text to hold out."
    )
    fit_texts: int = option(150, "Shipped sentences that tuned is fitted on.", low=5)
    eval_prompts: str = option("", "File of text to judge lenses by; shipped sentences none was fitted on by default.")
    eval_texts: int = option(50, "How many texts to judge by; 0 judges by none.", low=0)
    band: bool = option(
        False, "Look for layers that read as a workspace; needs a Jacobian lens and 20 texts to judge by."
    )
    patchscope: Kind = option(
        "identity",
        "Patchscope: the prompt that copies, describes or completes a relation, or a chat question (SelfIE).",
    )
    relation: tuple[str, ...] = option(
        ("France: Paris", "Japan: Tokyo", "Egypt: Cairo"), "Patchscope relation: examples, left and right of a colon."
    )
    target_layer: str = option("same", "Patchscope: where rows are put: same, a layer's number, or all of those read.")
    max_new_tokens: int = option(10, "Patchscope describe and selfie: tokens written.", low=1, high=200)
    samples: int = option(
        0, "Patchscope describe and selfie: texts drawn at random besides the most probable.", low=0, high=32
    )
    rescale: Literal["none", "target_norm"] = option(
        "none", "Patchscope: rows as they are, or with the norm of the row they replace."
    )
    allow_other_weights: bool = option(False, "Read through lenses of other weights of the same shape.")
    seed: int = option(0, "Of draws, folds, controls and intervals.", low=0)

    name = "lenses"
    title = "Lenses"
    reference = (
        'Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112; Gurnee et al. '
        '2026, "Verbalizable Representations Form a Global Workspace in Language Models", arXiv 2607.15495; Ghandeharioun et al. '
        '2024, "Patchscopes", arXiv 2401.06102'
    )
    prompt_fields = FIELDS
    figures = FIGURES
    profiles = PROFILES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_layer not in ("same", "all") and not self.target_layer.isdecimal():
            raise OptionError(f"option target_layer is {self.target_layer!r}: give same, all, or the number of a layer")
        if 0 < self.samples < 3:
            raise OptionError(
                f"option samples is {self.samples}: one or two drawn texts say nothing; give 3, or 0 for none"
            )
        if not self.relation or not all(re.fullmatch(r"[^:]*\S[^:]*:.*\S.*", pair) for pair in self.relation):
            raise OptionError(f"option relation is {self.relation}: give examples such as 'France: Paris'")
        if 0 < self.eval_texts < 10:
            raise OptionError(
                f"option eval_texts is {self.eval_texts}: give at least 10 texts to judge by, or 0 for none"
            )

    @property
    def makes_prompts(self) -> bool:
        """Whether the task is `two_hop`, which generates its questions."""
        return self.task == "two_hop"

    def collect(self, model: Model, prompts: PromptsLike) -> list[Prompt]:
        """Return the prompts read: those given, or the task's."""
        if self.task == "two_hop":
            drawn = two_hop_prompts(model, self.n_prompts, self.seed)
            if not drawn:
                raise PromptError(f"no two-hop question can be asked of {model.ref}: its tokenizer joins words")
            return drawn
        return as_prompts(prompts, model, self.prompt_fields)

    def needs(self, model: Model) -> list[Need]:
        """Rows of every layer, and the embeddings, which are a Patchscope's control."""
        return [NEED]

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Those of a Patchscope: every row put into another prompt, and its controls."""
        if "patchscope" not in self.lenses:
            return Interventions()
        layers = len(self._layers(model)) - 1
        watched = sum(len(prompt.fields.get("watch", {})) for prompt in prompts)
        places = sum(
            len(prompt.fields.get("watch", {})) * len(prompt.fields.get("named_positions", {"end": -1}))
            for prompt in prompts
        )
        forwards = layers * (
            sum(len(prompt.tokens[self._read_from :]) for prompt in prompts) + places + watched * len(CONTROLS)
        )
        texts = places * len(CONTROLS) * (1 + self.samples) if self.patchscope in ("describe", "selfie") else 0
        forwards += layers * texts * self.max_new_tokens
        forwards *= layers if self.target_layer == "all" else 1
        return Interventions({"rows put into another prompt": forwards}, exact=False)

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Tables `lenses`, `read` and `top` (those of the analysis logit_lens, by lens), `watched`, `pass_at_k`, `quality`,
        `similarity`, `patchscope`, `descriptions`, `band`; those without data are left out.
        """
        model.unembedding()
        layers = self._layers(model)
        lines = self.collect(model, prompts)
        activations = capture(model, [line.tokens for line in lines], [NEED], store, progress=progress)
        lenses = self._lenses(model, lines, store, progress)
        tables = {
            "lenses": cards_table(lenses),
            **read_of(activations, lines, lenses, layers, self._read_from, self.top_k),
        }
        watched, notes = watched_of(lines, model)
        if watched:
            tables["watched"], chance = watched_tables(activations, watched, lenses, self.seed, layers)
            tables["pass_at_k"] = pass_at_k(tables["watched"], chance, self.ks, self.seed)
        if "patchscope" in lenses and watched:
            tables |= self._patched(activations, watched, layers)
        if self.eval_texts:
            more, said = self._judged(model, lenses, store, progress)
            tables |= more
            notes += said
        notes += [f"{name}: {lens.card.sentence()}" for name, lens in lenses.items()]
        return Measured(lines, tables, activations, notes)

    def _layers(self, model: Model) -> list[int]:
        """The layers that are read, the last among them."""
        last = model.shape.n_layers - 1
        if above := [layer for layer in self.layers if layer > last]:
            raise OptionError(f"option layers has {above[0]}: legal are 0 to {last}")
        return sorted({*(self.layers or range(last)), last})

    @property
    def _read_from(self) -> int:
        return 0 if self.positions == "all" else -1

    def _lenses(
        self, model: Model, prompts: Sequence[Prompt], store: ActivationStore, progress: Progress
    ) -> dict[str, Lens]:
        lenses: dict[str, Lens] = {}
        for name in self.lenses:
            if name == "tuned":
                texts = self._fitted_on(model, prompts)
                fitted, _ = fit_tuned_on(
                    model, texts, store, layers=self._layers(model), seed=self.seed, progress=progress
                )
                lenses[name] = fitted.lens
            elif name == "patchscope":
                target = target_of(model, self.patchscope, self.relation, self.rescale)
                where = "same" if self.target_layer == "all" else self.target_layer
                lenses[name] = patchscopes_of(model, target, self.patchscope, where, ())[0]
            else:
                label = name if name == "logit" else Path(name).name
                lenses[label] = chosen_lens(name, model, allow_other_weights=self.allow_other_weights)
        return lenses

    def _patched(
        self, activations: Activations, watched: Sequence[Watched], layers: Sequence[int]
    ) -> dict[str, pd.DataFrame]:
        """Table `patchscope` and, of prompts that are continued, `descriptions`, at every named position."""
        places = dict.fromkeys(place for item in watched for place in item.places)
        lifts, texts = [], []
        for scope in self._patchscopes(activations.model):
            for place in places:
                at = (activations, watched, scope, place, self.seed, layers[:-1])
                lifts.append(lift_table(*at).assign(position_name=place))
                if self.patchscope in ("describe", "selfie"):
                    said = text_table(*at, max_new_tokens=self.max_new_tokens, samples=self.samples)
                    texts.append(said.assign(position_name=place))
        tables = {"patchscope": lifts, "descriptions": texts}
        return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}

    def _patchscopes(self, model: Model) -> list[Patchscope]:
        target = target_of(model, self.patchscope, self.relation, self.rescale)
        return patchscopes_of(model, target, self.patchscope, self.target_layer, self._layers(model)[:-1])

    def _fitted_on(self, model: Model, prompts: Sequence[Prompt]) -> Texts:
        if self.fit_on == "shipped":
            return shipped_texts(model, self.fit_texts, self.seed)
        sequences = tuple(dict.fromkeys(prompt.tokens for prompt in prompts))
        return Texts(sequences, tuple(range(len(sequences))), "the prompts read")

    def _texts(self, model: Model, lenses: Mapping[str, Lens]) -> Texts:
        drawn = (
            file_texts(model, Path(self.eval_prompts)) if self.eval_prompts else shipped_texts(model, 10**6, self.seed)
        )
        left = without(drawn, [lens.card.corpus for lens in lenses.values()])
        kept = [i for i, sequence in enumerate(left.sequences) if len(sequence) > 2][: self.eval_texts]
        return replace(
            left, sequences=tuple(left.sequences[i] for i in kept), groups=tuple(left.groups[i] for i in kept)
        )

    def _judged(
        self, model: Model, lenses: Mapping[str, Lens], store: ActivationStore, progress: Progress
    ) -> tuple[dict[str, pd.DataFrame], list[str]]:
        texts = self._texts(model, lenses)
        others = {name: lens for name, lens in lenses.items() if lens.card.kind != "logit"}
        layers = self._layers(model)
        quality: Quality = read_texts(model, texts, others, store, layers=layers, seed=self.seed, progress=progress)
        rows = quality_rows(quality, self.seed)
        tables = {"quality": pd.DataFrame(rows)}
        if len(lenses) > 1:
            judged = judged_rows(model, texts, store, seed=self.seed, progress=progress)
            tables["similarity"] = similarity(model, judged, lenses, layers)
        notes = [f"Judged on {len(texts.sequences)} texts of {texts.name} that no lens was fitted on."]
        for name, lens in others.items():
            if lens.card.kind == "tuned":
                below = solid_layers(rows, name)
                where = (
                    f"at {len(below)} of {count(len(layers) - 1, 'layer')} below the last" if below else "at no layer"
                )
                notes.append(
                    f"{name}: {where} its divergence from the output lies below the logit lens's and below that of its maps at other "
                    "layers, intervals apart."
                )
        jacobian = next(((name, lens) for name, lens in lenses.items() if isinstance(lens, JacobianLens)), None)
        if self.band:
            if jacobian is None or len(texts.sequences) < 20:
                raise OptionError(
                    "option band needs the folder of a Jacobian lens among lenses, and eval_texts of at least 20"
                )
            tables["band"], verdict = band_table(model, texts, jacobian[1], store, self.seed, progress)
            notes.append(f"{jacobian[0]}: {verdict}")
        return tables, notes
