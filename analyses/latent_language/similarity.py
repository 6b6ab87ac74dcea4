"""Group similarity: how alike the hidden states of one meaning are across languages, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.items import Dropped
from analyses.latent_language.read import Reader
from analyses.reading.texts import parallel_sentences
from analyses.results.statistics import row_interval
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
    parts = []
    for a, b in combinations(languages, 2):
        for layer in range(reader.model.shape.n_layers):
            aligned, unaligned, retrieval = compare(states[a][layer], states[b][layer])
            gap = row_interval((aligned - unaligned)[:, None], settings.ci, settings.seed)
            parts.append(
                {
                    "layer": layer, "language_a": a, "language_b": b, "aligned": aligned.mean(),
                    "unaligned": unaligned.mean(), "gap": gap.mean[0], "ci_low": gap.low[0], "ci_high": gap.high[0],
                    "retrieval": retrieval, "chance": 1 / n, "n": n,
                }
            )  # fmt: skip
    return {"similarity": pd.DataFrame(parts)}, []


def _states(reader: Reader, texts: Sequence[str]) -> Tensor:
    """Mean row of each text at each layer, its first token left out; [layer, text, d_model]."""
    sequences = [tokenize([text], reader.model)[0].tokens for text in texts]
    # The first token's massive norm would make all means alike.
    reducer = Reducer("mean", "after_first")
    captured = reader.capture(sequences, Need("resid_post.*", reducer))
    n_layers = reader.model.shape.n_layers
    return torch.stack([captured.packed(Address("resid_post", layer), reducer) for layer in range(n_layers)])


def compare(a: Float[Tensor, "text d_model"], b: Float[Tensor, "text d_model"]) -> tuple[np.ndarray, np.ndarray, float]:
    """(cosine of each text with its translation, mean cosine with the other texts, share whose nearest is the translation).

    Each language's mean is taken off first, so that what all its texts share does not count; a, b [text, d_model].
    """
    first, second = (torch.nn.functional.normalize((x - x.mean(dim=0)).double(), dim=-1) for x in (a, b))
    cosine = first @ second.T
    n = len(cosine)
    aligned = cosine.diagonal()
    unaligned = (cosine.sum(dim=1) - aligned) / max(1, n - 1)
    nearest = (cosine.argmax(dim=1) == torch.arange(n)).double() + (cosine.argmax(dim=0) == torch.arange(n)).double()
    return aligned.numpy(), unaligned.numpy(), float(nearest.mean() / 2)
