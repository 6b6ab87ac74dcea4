"""The logit lens: what each layer's residual stream would predict, at chosen positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.logit_lens.curve import curve
from analyses.logit_lens.figures import FIGURES, PROFILES
from analyses.options import option
from analyses.reading.choice import chosen_lens, reading_note
from analyses.reading.read_outs import positions_table, read_tables
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.lenses.names import LENS_HELP
from probes.lenses.protocol import Lens
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt
from probes.reducers import ROWS, Reducer
from probes.store import ActivationStore

CHUNK = 32
"""Prompts whose rows of all layers are read at once, which bounds memory."""


@dataclass(frozen=True)
class LogitLens(Analysis):
    """Top tokens, entropy and distance to the final prediction at every layer (nostalgebraist 2020, "interpreting GPT")."""

    top_k: int = option(5, "How many of the most probable tokens to list.", low=1, high=100)
    positions: Literal["last", "all"] = option("all", "Which positions of each prompt to read.")
    window: int = option(
        0, "How many of the last positions to read where all are asked for; 0 reads every one.", low=0, form=32
    )
    point: Literal["resid_post", "attn_out", "mlp_out"] = option(
        "resid_post", "What is read: the stream, or one block part's addition to it."
    )
    lens: str = option("logit", f"The lens that the stream is read through: {LENS_HELP}", lenses=())
    allow_other_weights: bool = option(False, "Read through a lens of other weights of the same shape.")
    chat: bool = option(False, "Wrap each text as one user turn of the chat template.")

    name = "logit_lens"
    title = "Logit lens"
    reference = 'nostalgebraist 2020, "interpreting GPT: the logit lens"'
    figures = FIGURES
    profiles = PROFILES

    @property
    def _reducer(self) -> Reducer:
        return ROWS if self.positions == "all" else Reducer(positions="last")

    def needs(self, model: Model) -> list[Need]:
        """Rows of every layer, and of the last stream, which says what the model predicts."""
        return [Need((f"{self.point}.*", f"resid_post.{model.shape.n_layers - 1}"), self._reducer)]

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Tables `top`: prompt, position, layer, rank, token_id, token, probability; `read`: prompt, position, layer,
        entropy_bits, kl_to_final (nats), final_token_id, final_token, final_probability, final_logprob (nats),
        top_token_id, agrees; `curve`: the means of these by layer with intervals over prompts, and agreement by chance.
        """
        model.unembedding()
        through = chosen_lens(self.lens, model, self.point, self.allow_other_weights)
        lines = as_prompts(prompts, model, self.prompt_fields, chat=self.chat)
        sequences = [prompt.tokens for prompt in lines]
        activations = capture(model, sequences, self.needs(model), store, progress=progress)
        tables = self._tables(activations, lines, through)
        notes = self._notes(lines) + ([] if self.lens == "logit" else [reading_note(through.card)])
        if self.allow_other_weights and through.card.weights != model.current().weights:
            notes.append("The lens was fitted on other weights than those whose rows it reads here, as was allowed.")
        return Measured(lines, tables, activations, notes)

    def _notes(self, prompts: list[Prompt]) -> list[str]:
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        if self.positions == "last" or not 0 < self.window < longest:
            return []
        return [
            f"Read at the last {self.window} positions of each prompt, of up to {longest:,}: every mean is over these. Option window says how "
            "many; 0 reads every one."
        ]

    def _places(self, prompt: Prompt) -> range:
        """The positions of a prompt that are read."""
        length = len(prompt.tokens)
        most = 1 if self.positions == "last" else self.window or length
        return range(max(0, length - most), length)

    def _tables(self, activations: Activations, prompts: list[Prompt], through: Lens) -> dict[str, pd.DataFrame]:
        n_layers = activations.model.shape.n_layers
        stream = [activations.get(Address(self.point, layer), self._reducer) for layer in range(n_layers)]
        final = activations.get(Address("resid_post", n_layers - 1), self._reducer)
        parts = []
        for first in range(0, len(prompts), CHUNK):
            chunk = slice(first, first + CHUNK)
            places = [self._places(prompt) for prompt in prompts[chunk]]
            rows = torch.cat([through.readable(_last(at[chunk], places), layer) for layer, at in enumerate(stream)])
            where = positions_table(activations.model, prompts, first, places)
            parts.append(read_tables(activations.model, rows, _last(final[chunk], places), where, self.top_k))
        tables = zip(*parts, strict=True)
        top, read = (pd.concat(frames, ignore_index=True) for frames in tables)
        return {"top": top, "read": read, "curve": curve(read)}


def _last(rows: list[Tensor], places: list[range]) -> Tensor:
    """The rows of the positions read, of some prompts; [pos, d_model]."""
    return torch.cat([one[-len(place) :] for one, place in zip(rows, places, strict=True)])
