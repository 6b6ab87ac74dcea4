"""The further measurements of the latent-language analysis, and the tuned lens fitted for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pandas as pd

from analyses.latent_language import culture, layer_writing, similarity, swap
from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.items import Dropped
from analyses.latent_language.read import Reader
from analyses.reading.texts import shipped_texts
from analyses.reading.tuned import fit_tuned_on

Extra = Literal["culture", "similarity", "swap", "layer_writing"]
Made = tuple[dict[str, pd.DataFrame], list[Dropped]]

EXTRAS: Mapping[Extra, Callable[[Reader, Settings], Made]] = {
    "culture": culture.measure,
    "similarity": similarity.measure,
    "swap": swap.measure,
    "layer_writing": layer_writing.measure,
}


def fitted_lens(reader: Reader, settings: Settings) -> pd.DataFrame:
    """Give the reader a tuned lens fitted on the shipped sentences of all languages; a table of its held-out losses."""
    texts = shipped_texts(reader.model, seed=settings.seed)
    fit, captured = fit_tuned_on(reader.model, texts, reader.store, seed=settings.seed, progress=reader.progress)
    reader.captures.append(captured)
    reader.translate = fit.lens.readable
    n_layers = reader.model.shape.n_layers
    return pd.DataFrame(
        {
            "layer": np.arange(n_layers), "logit_kl": fit.kl["logit"].mean(1), "tuned_kl": fit.kl["tuned"].mean(1),
            "choice": [fit.choice.get((layer, 0), "identity") for layer in range(n_layers)],
            "rows_fitted": fit.rows_fitted, "rows_held_out": len(fit.text_of),
        }
    )  # fmt: skip
