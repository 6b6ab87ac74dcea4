"""Culture questions asked in Japanese: whose answer, in which language, at which layer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.ids import Rule
from analyses.latent_language.items import Dropped, Item, culture_items, with_controls
from analyses.latent_language.read import Reader, Reading
from analyses.latent_language.tables import columns
from analyses.results.statistics import row_interval
from analyses.word_lists import CULTURE_LANGUAGES, CULTURES, shipped_questions

ASKED_IN = "ja"


def measure(reader: Reader, settings: Settings) -> tuple[dict[str, pd.DataFrame], list[Dropped]]:
    """Table `culture`: framing, items, layer, culture, language, mean, ci_low, ci_high, control_mean, n.

    `items` is `all`, or `words` for those whose answers are written differently in the two languages.
    """
    rule = Rule(reader.model.tokenizer, "multi_token", settings.spaces, settings.case)
    items: list[Item] = []
    dropped: list[Dropped] = []
    for framing in settings.framings:
        kept, lost = culture_items(
            shipped_questions(), framing, ASKED_IN, rule, reader.model, settings.seed, settings.n_prompts
        )
        items, dropped = items + kept, dropped + lost
    if not items:
        return {}, dropped
    reading = reader.read(with_controls(items, settings.seed, reader.model.shape.d_vocab))
    return {"culture": _table(reading, settings)}, dropped


def _table(reading: Reading, settings: Settings) -> pd.DataFrame:
    parts = []
    for pair in dict.fromkeys(item.pair for item in reading.items):
        members = np.array([i for i, item in enumerate(reading.items) if item.pair == pair])
        words = np.array([i for i in members if _written_differently(reading.items[i])], dtype=np.int64)
        for name, chosen in (("all", members), ("words", words)):
            if not len(chosen):
                continue
            for culture in CULTURES:
                for language in CULTURE_LANGUAGES:
                    own = columns(reading, chosen, f"{culture}/{language}")
                    control = columns(reading, chosen, f"{culture}/{language}", control=True)
                    interval, beside = (row_interval(v, settings.ci, settings.seed) for v in (own, control))
                    part = {
                        "framing": pair.removeprefix("culture, "), "items": name, "layer": np.arange(own.shape[1]),
                        "culture": culture, "language": language, "mean": interval.mean, "ci_low": interval.low,
                        "ci_high": interval.high, "control_mean": beside.mean, "control_ci_low": beside.low,
                        "control_ci_high": beside.high, "n": len(chosen),
                    }  # fmt: skip
                    parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def _written_differently(item: Item) -> bool:
    a, b = CULTURE_LANGUAGES
    return all(set(item.sets[f"{c}/{a}"]) != set(item.sets[f"{c}/{b}"]) for c in CULTURES)
