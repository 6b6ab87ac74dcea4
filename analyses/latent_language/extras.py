"""The further measurements of the latent-language analysis, and the tuned lens fitted for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from analyses.latent_language import culture, layer_writing, similarity, swap
from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.items import Dropped
from analyses.latent_language.read import Reader
from analyses.latent_language.similarity import parallel_sentences
from analyses.latent_language.word_lists import shipped_words
from probes.capture.needs import Need
from probes.lenses import tuned as tuned_lens
from probes.points import Address
from probes.prompts import tokenize
from probes.reducers import ROWS

Extra = Literal["culture", "similarity", "swap", "layer_writing"]
Made = tuple[dict[str, pd.DataFrame], list[Dropped]]

TRAINING_SENTENCES = 150
"""Sentences the tuned lens is fitted on."""

EXTRAS: Mapping[Extra, Callable[[Reader, Settings], Made]] = {
    "culture": culture.measure,
    "similarity": similarity.measure,
    "swap": swap.measure,
    "layer_writing": layer_writing.measure,
}


@dataclass(frozen=True)
class _Training:
    sequences: list[tuple[int, ...]]
    groups: list[int]


def fitted_lens(reader: Reader, settings: Settings) -> pd.DataFrame:
    """Gives the reader a tuned lens fitted on the shipped sentences of all languages; a table of its held-out losses."""
    model = reader.model
    training = _training(reader, settings.seed)
    captured = reader.capture(training.sequences, Need("resid_post.*", ROWS))

    def layer_rows(layer: int) -> torch.Tensor:
        # The first token's row is set apart by its massive norm; it says nothing of the others.
        return torch.cat([rows[1:].float() for rows in captured.get(Address("resid_post", layer))])

    groups = np.repeat(training.groups, [len(s) - 1 for s in training.sequences])
    fitted = tuned_lens.fit(layer_rows, model.shape.n_layers, list(groups), model.unembedding(), settings.seed)
    reader.translate = fitted.translate
    n_train, n_held = fitted.n_rows
    return pd.DataFrame(
        {
            "layer": np.arange(model.shape.n_layers), "logit_kl": fitted.logit_kl, "tuned_kl": fitted.tuned_kl,
            "ridge": fitted.ridge, "rows_fitted": n_train, "rows_held_out": n_held,
        }
    )  # fmt: skip


def _training(reader: Reader, seed: int) -> _Training:
    """Sentences drawn by seed; those of one meaning form one group, so that none is fitted on its own translation."""
    sentences = [(i, text) for i, texts in enumerate(parallel_sentences(shipped_words())) for text in texts.values()]
    chosen = [int(i) for i in np.random.default_rng(seed).permutation(len(sentences))[:TRAINING_SENTENCES]]
    sequences = [tokenize([sentences[i][1]], reader.model)[0].tokens for i in chosen]
    return _Training(sequences, [sentences[i][0] for i in chosen])
