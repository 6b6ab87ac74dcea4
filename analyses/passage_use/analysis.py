"""Passage use: where a passage enters the answer, and where the read-out is changed by what the model stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.interventions import Interventions, Tally, swept
from analyses.options import option
from analyses.passage_use.figures import FIGURES, PROFILES
from analyses.passage_use.fusion import Fusing, fusion_note, fusion_table
from analyses.passage_use.items import FIELDS, VARIANT, items_of, made_prompts, with_variants
from analyses.passage_use.measures import LAST, LastRows, knock_out_losses, layer_table
from analyses.passage_use.tables import chosen_table, means_table, notes_of, prompt_table
from probes.blocks.together import together
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import PointError
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt
from probes.store import ActivationStore


@dataclass(frozen=True)
class PassageUse(Analysis):
    """Layer diagnostics of layer-fused decoding (Sun et al. 2025, arXiv 2508.19614), and whether the passage is used where it is attended to."""

    task: Literal["prompts", "facts"] = option(
        "prompts",
        "prompts: passages of the prompt file; facts: made passages that state a fact, true or not, and ask for it.",
    )
    n_prompts: int = option(12, "Made prompts, at most.", low=1)
    window: int = option(1, "How many blocks on either side are blind to the passage together with one.", low=0)
    layers: tuple[int, ...] = option((), "Layers that are made blind to the passage; none: every stride-th.", low=0)
    stride: int = option(1, "Every how many layers one is made blind to the passage, where layers names none.", low=1)
    fuse: bool = option(False, "Also fuse the final prediction with a middle layer's, beside its controls.")
    fuse_strength: float = option(1.0, "With fuse: weight of the middle layer's log-probabilities.", low=0)
    fuse_keep: float = option(
        0.1, "With fuse: tokens below this share of the largest final probability are ruled out.", low=0.0001, high=1
    )
    seed: int = option(0, "Seed of made prompts, drawn layers, halves and intervals.")

    name = "passage_use"
    title = "Passage use: where a passage enters the answer"
    reference = "Sun et al. 2025, layer-fused decoding, arXiv 2508.19614"
    prompt_fields = FIELDS
    figures = FIGURES
    profiles = PROFILES

    @property
    def makes_prompts(self) -> bool:
        """Yes for facts that are stated in a passage and asked for."""
        return self.task != "prompts"

    def collect(self, model: Model, prompts: PromptsLike = ()) -> list[Prompt]:
        """Return each prompt that was given or made, and its variants without the passage."""
        if self.makes_prompts:
            return with_variants(model, made_prompts(model, self.n_prompts, self.seed))
        return with_variants(model, as_prompts(prompts, model, self.prompt_fields))

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the blocks made blind to each passage, the plain run that they resume, and the run that is blind throughout."""
        _check_model(model)
        whole = [prompt for prompt in prompts if prompt.fields[VARIANT] == "passage"]
        passages = sum(prompt.fields["passage"][1] > prompt.fields["passage"][0] for prompt in whole)
        layers = swept(model.shape.n_layers, self.layers, self.stride)
        patterns = model.refusal(Address("pattern", 0)) is None
        return Interventions(
            {
                "prompts to resume": passages,
                "knock-outs around a block": passages * len(layers),
                "knock-outs in all blocks": len(whole) if patterns else 0,
            }
        )

    def needs(self, model: Model) -> list[Need]:
        """Ask for the last rows of the stream before and after each MLP, of what it adds, and of attention where there is any."""
        points = ("mlp_out.*", "resid_mid.*", "resid_post.*")
        return [Need(points + (("pattern.*",) if model.refusal(Address("pattern", 0)) is None else ()), LAST)]

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `layers`, `means`, `chosen`, `prompts`, and with `fuse` also `fusion`.

        Raises:
            PointError: a model that reads both ways, keeps its blocks to itself, or has no stream between attention and MLP.
            PromptError: a prompt without a passage or an answer.
            OptionError: a layer that the model does not have.
        """
        tally = Tally(progress)
        _check_model(model)
        layers = swept(model.shape.n_layers, self.layers, self.stride)
        collected = self.collect(model, prompts)
        items = items_of(model, collected)
        sequences = [prompt.tokens for prompt in collected]
        activations = capture(model, sequences, self.needs(model), store, progress=progress)
        rows = LastRows(activations)
        tally.start(self.interventions(model, collected).total, "knock-out")
        parts = together(
            model, [partial(knock_out_losses, model, item, layers, self.window, tally.tick) for item in items]
        )
        losses = {key: loss for part in parts for key, loss in part.items()}
        tables = {"layers": layer_table(rows, items, losses, tally.tick)}
        tables["means"] = means_table(tables["layers"], self.seed)
        tables["chosen"] = chosen_table(tables["layers"])
        tables["prompts"] = prompt_table(rows, items)
        notes = notes_of(tables["means"], self.window)
        if any(item.neutral is None for item in items):
            notes.append('There is no tokenizer to write neutral text with: give "neutral" as token ids.')
        if self.fuse:
            fusing = Fusing(self.fuse_strength, self.fuse_keep)
            tables["fusion"] = fusion_table(rows, items, tables["chosen"], fusing, self.seed)
            notes.append(fusion_note(tables["fusion"]))
        return Measured(collected, tables, activations, notes, interventions=tally.forwards)


def _check_model(model: Model) -> None:
    if not model.shape.causal:
        raise PointError(
            f"{model.ref} reads both ways, so no position predicts the answer; passage_use needs a causal model"
        )
    model.unembedding()
