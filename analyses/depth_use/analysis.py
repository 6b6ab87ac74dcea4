"""Depth use: what each block contributes, what later blocks and the output lose without it, and which proxy predicts that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.depth_use.figures import FIGURES, PROFILES
from analyses.depth_use.forwards import forwards
from analyses.depth_use.kv_subspaces import check_kv
from analyses.depth_use.maps import check_pair, map_table
from analyses.depth_use.measurements import measure_blocks
from analyses.depth_use.settings import Settings
from analyses.depth_use.stream_settings import StreamSettings, compared
from analyses.depth_use.tokens import check_answer_from
from analyses.generation import Decoding, respond
from analyses.interventions import Interventions
from analyses.options import option
from analyses.scoring import check_answer, check_choices
from analyses.tokens import token_text
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import PointError, PromptError
from probes.models import load_model
from probes.models.protocol import Model
from probes.progress import Progress
from probes.prompts import Field, Prompt
from probes.store import ActivationStore


def check_group(value: object) -> str | None:
    """Say what is wrong with a `group` field; None if nothing is."""
    return None if isinstance(value, str | int) and str(value) else "must be a text or a number that names a group"


def check_label(value: object) -> str | None:
    """Say what is wrong with a `label` field; None if nothing is."""
    return None if not isinstance(value, bool) and value in (0, 1) else "must be 0 or 1"


@dataclass(frozen=True)
class DepthUse(StreamSettings, Settings, Analysis):
    """How a model uses its depth (Csordás, Manning, Potts 2025, arXiv 2505.13898), beside the proxies of layer importance."""

    target_model: str = option(
        "", "A model with the same tokenizer, loaded as this one is, whose streams are predicted from it; or self."
    )
    map_stride: int = option(1, "Every how many source layers have maps to the target model.", low=1)
    ridge: float = option(0.001, "Ridge of the maps, as a share of the mean variance of the source.", low=0)
    chat: bool = option(False, "Wrap each text as one user turn of the chat template.")

    name = "depth_use"
    title = "Depth use: contributions, skips and proxies of importance"
    reference = 'Csordás, Manning, Potts 2025, "Do Language Models Use Their Depth Efficiently?", arXiv 2505.13898'
    prompt_fields: ClassVar[Mapping[str, Field]] = {
        "answer_from": Field(
            "Position from 1 of the answer's first token, whose probability is attributed; else the next token is.",
            check_answer_from,
        ),
        "group": Field(
            "Names the lines whose streams are compared with those of other groups: a text or an int.", check_group
        ),
        "answer": Field("The right answer, as text, for the accuracy without each block.", check_answer),
        "choices": Field('Texts among which the answer is looked for: ["Paris", "Rome"].', check_choices),
        "label": Field("Class of the line, 0 or 1, for the probe among the proxies.", check_label),
    }
    figures = FIGURES
    profiles = PROFILES

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "parts",
            "generate_parts",
            "bits",
            "windows",
            "layers",
        ):  # each is measured once, however often it is named
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        self.wide_and_narrow  # noqa: B018 - one width is refused at once

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the restarts of blocks left out, rounded, frozen, run side by side, erased, differentiated and written without."""
        _check_model(model)
        return Interventions(forwards(model, prompts, self), exact=not self.generate_prompts)

    def needs(self, model: Model) -> list[Need]:
        """Ask for rows of the stream entering and leaving every block, and of what attention adds."""
        blocks = Need(("resid_pre.0", "resid_post.*", "attn_out.*"))
        return [blocks, *self.stream_needs(model, self.first_token)]

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `proxies`, `proxy_intervals`, `agreement`, `contributions`, `skip_effect`, `output_effect`, `depth_score`,
        `windows`, `effective_depth`, and where asked for `erasure`, `attribution`, `greedy`, `drop_curve`, `bits_frontier`, `linear_maps`,
        `generation` and `generation_layers`, and those of `analyses.depth_use.stream_settings`: with groups of prompts, and of keys and values.

        Raises:
            PointError: the model is not causal, its blocks do not add to the stream, or its backend keeps them to itself.
            PromptError: no prompt has a next token to predict, or there are too few tokens for subspaces of keys.
            OptionError: a layer that the model does not have, or subspaces of keys that are too large.
        """
        _check_model(model)
        layers = self.swept(model.shape.n_layers)
        collected = as_prompts(prompts, model, self.prompt_fields, chat=self.chat)
        _check_prompts(collected)
        sequences = [prompt.tokens for prompt in collected]
        check_kv(model, sequences, self.kv_rank, layers, self.first_token)
        activations = capture(model, sequences, self.needs(model), store, progress=progress)
        responses: list[tuple[int, ...]] = []
        if self.generate_prompts:
            writing = Decoding(self.generate_tokens)
            responses = respond(model, sequences[: self.generate_prompts], writing, store, progress=progress)[0]
        tables, notes, done = measure_blocks(activations, collected, responses, self, progress)
        groups = [str(prompt.fields.get("group", "")) for prompt in collected]
        tables |= compared(activations, groups, self, layers, self.first_token, self.seed)
        if self.target_model:
            tables["linear_maps"] = self._maps(activations, store, progress)
        for name in ("erasure", "attribution"):
            if name in tables:
                tables[name]["token"] = [token_text(model, int(token)) for token in tables[name]["token_id"]]
        if "attribution" in tables:
            notes.append(_completeness(tables["attribution"]))
        return Measured(collected, tables, activations, notes, interventions=done)

    def _maps(self, source: Activations, store: ActivationStore, progress: Progress) -> pd.DataFrame:
        target = source
        if self.target_model != "self":
            how = source.model.context
            other = load_model(
                self.target_model,
                backend=how.backend,
                device=str(source.model.device),
                dtype=how.dtype,
                attention=how.attention,
            )
            check_pair(source.model, other)
            target = capture(other, source.sequences, [Need("resid_post.*")], store, progress=progress)
        return map_table(source, target, self.map_stride, self.ridge, self.first_token, self.seed)


def _completeness(attribution: pd.DataFrame) -> str:
    errors = attribution.drop_duplicates(["prompt", "part", "layer"]).set_index("layer")["completeness_error"].abs()
    return (
        f"integrated gradients: completeness error in probability {errors.median():.1g} at the median layer, at most "
        f"{errors.max():.2g} (layer {errors.idxmax()}); more gradient_steps lower it"
    )


def _check_model(model: Model) -> None:
    if not model.shape.causal:
        raise PointError(f"{model.ref} reads both ways, so it has no next-token loss; depth_use needs a causal model")
    model.unembedding()
    names = [identity.name for identity in model.faithfulness.identities]
    if any("norm(mlp_in + mlp_out)" in name for name in names):
        raise PointError(
            f"{model.ref} normalises each sum, so what a block adds is not what its stream gains; depth_use needs blocks that add"
        )


def _check_prompts(prompts: list[Prompt]) -> None:
    if all(len(prompt.tokens) < 2 for prompt in prompts):
        raise PromptError("no prompt has a second token, so there is no loss to measure; give longer prompts")
