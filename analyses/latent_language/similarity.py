"""Group similarity: how alike the hidden states of one meaning are across languages, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.items import Dropped
from analyses.latent_language.read import Reader
from analyses.reading.texts import parallel_sentences
from analyses.similarity.translations import translation_columns
from analyses.word_lists import shipped_words
from probes.capture.needs import Need
from probes.points import Address
from probes.prompts import tokenize
from probes.reducers import Reducer

MIN_SENTENCES = 12
"""Fewest sentences compared, so that finding a translation by chance is rare."""


def measure(reader: Reader, settings: Settings) -> tuple[dict[str, pd.DataFrame], list[Dropped]]:
    """Table `similarity`: layer, language_a, language_b, aligned, unaligned, gap, ci_low, ci_high, retrieval, chance, n."""
    sentences = parallel_sentences(shipped_words())
    languages = [lang for lang in sentences[0] if all(lang in texts for texts in sentences)]
    n = min(len(sentences), max(MIN_SENTENCES, settings.extra_items))
    chosen = np.random.default_rng(settings.seed).permutation(len(sentences))[:n]
    texts = [sentences[i][lang] for lang in languages for i in chosen]
    states = dict(zip(languages, torch.split(_states(reader, texts), n, dim=1), strict=True))
    parts = [
        {"layer": layer, "language_a": a, "language_b": b}
        | translation_columns(states[a][layer], states[b][layer], settings.ci, settings.seed)
        for a, b in combinations(languages, 2)
        for layer in range(reader.model.shape.n_layers)
    ]
    return {"similarity": pd.DataFrame(parts)}, []


def _states(reader: Reader, texts: Sequence[str]) -> Tensor:
    """Mean row of each text at each layer, its first token left out; [layer, text, d_model]."""
    sequences = [tokenize([text], reader.model)[0].tokens for text in texts]
    # The first token's massive norm would make all means alike.
    reducer = Reducer("mean", "after_first")
    captured = reader.capture(sequences, Need("resid_post.*", reducer))
    n_layers = reader.model.shape.n_layers
    return torch.stack([captured.packed(Address("resid_post", layer), reducer) for layer in range(n_layers)])
