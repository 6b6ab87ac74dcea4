"""Lenses side by side: read-outs of given prompts, quality on held-out text with controls, and known intermediates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pandas as pd
import torch

from analyses.base import Analysis, Clock, PromptsLike, as_prompts, make_result
from analyses.interventions import Interventions
from analyses.lenses.band import band_table
from analyses.lenses.figures import FIGURES
from analyses.lenses.items import FIELDS, two_hop_prompts, watched_of
from analyses.lenses.patched import CONTROLS, lift_table
from analyses.lenses.profiles import PROFILES
from analyses.lenses.similarity import similarity
from analyses.lenses.watched import pass_at_k, watched_tables
from analyses.options import option, validate
from analyses.reading.choice import LENS_HELP, check_lens, chosen_lens
from analyses.reading.quality import Quality, judged_rows, quality_rows, read_texts, solid_layers
from analyses.reading.read_outs import positions_table, read_tables
from analyses.reading.texts import Texts, file_texts, shipped_texts, without
from analyses.reading.tuned import fit_tuned_on
from analyses.results.card import FigureSpec, ProfileSpec
from analyses.results.result import Result
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PromptError
from probes.html_card import count
from probes.lens_fits.patchscope import Patchscope, identity_target
from probes.lenses.jacobian import JacobianLens
from probes.lenses.protocol import Lens
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import QUIET, Progress
from probes.prompts import Field, Prompt
from probes.reducers import ROWS
from probes.store import ActivationStore

WORDS = ("river", "seven", "blue")
"""Copied in the Patchscope's prompt."""
NEED = Need(("resid_post.*", "embed"), ROWS)


@dataclass(frozen=True)
class Lenses(Analysis):
    """Logit, tuned, Jacobian and Patchscope readings of the same rows (Belrose et al. 2023; Gurnee et al. 2026; Ghandeharioun et al. 2024)."""

    lenses: tuple[str, ...] = option(
        ("logit", "tuned"), f"What to compare: tuned (fitted here from stored rows), patchscope, {LENS_HELP}"
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
    target_layer: str = option("same", "Patchscope: where rows are put: same, or a layer's number.")
    rescale: Literal["none", "target_norm"] = option(
        "none", "Patchscope: rows as they are, or with the norm of the row they replace."
    )
    allow_other_weights: bool = option(False, "Read through lenses of other weights of the same shape.")
    seed: int = option(0, "Of draws, folds, controls and intervals.", low=0)

    name: ClassVar[str] = "lenses"
    title: ClassVar[str] = "Lenses"
    reference: ClassVar[str] = (
        'Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112; Gurnee et al. '
        '2026, "Verbalizable Representations Form a Global Workspace in Language Models", arXiv 2607.15495; Ghandeharioun et al. '
        '2024, "Patchscopes", arXiv 2401.06102'
    )
    prompt_fields: ClassVar[Mapping[str, Field]] = FIELDS
    figures: ClassVar[Mapping[str, FigureSpec]] = FIGURES
    profiles: ClassVar[Mapping[str, ProfileSpec]] = PROFILES

    def __post_init__(self) -> None:
        validate(self)
        for name in self.lenses:
            if name == "jacobian":
                raise OptionError(
                    "a Jacobian lens takes long to fit: run `bathyscope lens fit --kind jacobian` once, and give its folder"
                )
            check_lens(name, "tuned", "patchscope")
        if self.target_layer != "same" and not self.target_layer.isdecimal():
            raise OptionError(f"option target_layer is {self.target_layer!r}: give same, or the number of a layer")
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
        return Interventions({"rows put into another prompt": forwards}, exact=False)

    def run(
        self,
        model: Model,
        prompts: PromptsLike = (),
        *,
        store: ActivationStore | None = None,
        progress: Progress = QUIET,
    ) -> Result:
        """Tables `lenses`, `read` and `top` (those of the analysis logit_lens, by lens), `watched`, `pass_at_k`, `quality`,
        `similarity`, `patchscope`, `band`; those without data are left out.
        """
        clock, store = Clock(), store or ActivationStore()
        model.unembedding()
        layers = self._layers(model)
        lines = self.collect(model, prompts)
        activations = capture(model, [line.tokens for line in lines], [NEED], store, progress=progress)
        lenses = self._lenses(model, lines, store, progress)
        tables = {"lenses": _cards(lenses), **self._read(activations, lines, lenses)}
        watched, notes = watched_of(lines, model)
        if watched:
            tables["watched"], chance = watched_tables(activations, watched, lenses, self.seed, layers)
            tables["pass_at_k"] = pass_at_k(tables["watched"], chance, self.ks, self.seed)
        patchscope = lenses.get("patchscope")
        if isinstance(patchscope, Patchscope) and watched:
            places = dict.fromkeys(place for item in watched for place in item.places)
            tables["patchscope"] = pd.concat(
                [
                    lift_table(activations, watched, patchscope, place, self.seed, layers[:-1]).assign(
                        position_name=place
                    )
                    for place in places
                ],
                ignore_index=True,
            )
        if self.eval_texts:
            more, said = self._judged(model, lenses, store, progress)
            tables |= more
            notes += said
        notes += [f"{name}: {lens.card.sentence()}" for name, lens in lenses.items()]
        return make_result(self, model, lines, tables, activations, clock, notes)

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
                into = None if self.target_layer == "same" else int(self.target_layer)
                lenses[name] = Patchscope.of(model, identity_target(model, WORDS, self.rescale), into)
            else:
                label = name if name == "logit" else Path(name).name
                lenses[label] = chosen_lens(name, model, allow_other_weights=self.allow_other_weights)
        return lenses

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

    def _read(
        self, activations: Activations, prompts: Sequence[Prompt], lenses: Mapping[str, Lens]
    ) -> dict[str, pd.DataFrame]:
        """Tables `top` and `read` of prompts' positions, one lens after the other."""
        model, layers = activations.model, self._layers(activations.model)
        tops, reads = [], []
        for first, prompt in enumerate(prompts):
            places = range(len(prompt.tokens))[self._read_from :]
            where = positions_table(model, prompts, first, [places])
            rows = {
                layer: activations.get(Address("resid_post", layer), ROWS)[first][places.start :] for layer in layers
            }
            for name, lens in lenses.items():
                readable = torch.cat([lens.readable(rows[layer].float(), layer).float() for layer in layers])
                top, read = read_tables(model, readable, rows[layers[-1]].float(), where, self.top_k, layers)
                tops.append(top.assign(lens=name))
                reads.append(read.assign(lens=name))
        return {"top": pd.concat(tops, ignore_index=True), "read": pd.concat(reads, ignore_index=True)}


def _cards(lenses: Mapping[str, Lens]) -> pd.DataFrame:
    """One row a lens: what it was fitted on."""
    rows = []
    for name, lens in lenses.items():
        card = lens.card
        rows.append(
            {
                "lens": name, "kind": card.kind, "digest": card.tensors, "foreign": card.foreign, "corpus": card.corpus.name,
                "texts": card.corpus.texts, "tokens": card.corpus.tokens, "target": card.target,
                "length": card.options.get("length"), "dtype": card.dtype, "layers": len(card.layers), "reads": card.sentence(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
